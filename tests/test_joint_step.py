"""The step of SAEs that are spliced together, beside plain code: hooks on the whole model, whole logits, autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FAMILIES, module_names, runner_config, shared_model, token_batch, training_sae
from torch import Tensor

from e2e_sae_plugin import E2ESAETrainer, NonFiniteError, Objective, splice_into
from e2e_sae_plugin.joint.splice import JointPlace, JointSplice
from e2e_sae_plugin.joint.spliced_sae import FrozenSAE
from e2e_sae_plugin.joint.step import JointStep
from e2e_sae_plugin.metrics_log import MetricsLog

TOKENS = token_batch(n_prompts=4)


def hooks_of(family: str) -> tuple[str, str]:
    """An MLP's output in block 0 and the residual stream entering block 2."""
    if family in ("hooked_transformer", "bridge"):
        return "blocks.0.hook_mlp_out", "blocks.2.hook_resid_pre"
    names = module_names(family)
    return f"{names['layers']}.0.{names['mlp']}", f"{names['layers']}.1"


def build(
    model: Any,
    hooks: tuple[str, ...],
    objective: Objective,
    *,
    architectures: tuple[str, ...] = ("standard", "standard"),
    frozen: int | None = None,
    agreement: float = 0.0,
    micro: int = 4,
    excluded: Tensor | None = None,
    **settings: Any,
) -> JointStep:
    """SAEs at these hooks, the one of number `frozen` not trained."""
    trainers: dict[str, E2ESAETrainer] = {}
    fixed: dict[str, Any] = {}
    places: dict[str, JointPlace] = {}
    for number, (hook, architecture) in enumerate(zip(hooks, architectures, strict=True)):
        config = runner_config(
            architecture, hook_name=hook, objective=objective, store_batch_size_prompts=micro, seed=number, **settings
        )
        spliced = splice_into(model, hook, needs_downstream=objective.beta > 0 and number == 0)
        spliced.check()
        places[hook] = JointPlace(spliced)
        sae = training_sae(config)
        with torch.no_grad():
            sae.W_enc.mul_(1 + number)  # or all would be the same SAE
        if number == frozen:
            fixed[hook] = FrozenSAE(sae.requires_grad_(False), (sae.cfg.d_in,))
        else:
            trainers[hook] = E2ESAETrainer(
                config, sae, spliced, iter([]), MetricsLog(None, to_wandb=False), excluded_tokens=excluded
            )
    return JointStep(JointSplice(places), trainers, fixed, objective, agreement)


def gradients_of(step: JointStep) -> dict[str, Tensor]:
    return {
        f"{hook}.{name}": p.grad.clone()
        for hook, trainer in step.trainers.items()
        for name, p in trainer.sae.named_parameters()
        if p.grad is not None
    }


def plain(step: JointStep, model: Any, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one ordinary forward pass of the model with hooks that put the SAEs in."""
    objective, first = step.objective, step.splice.first
    parts: dict[str, Any] = {**step.saes, **step.trainers}
    saes: dict[str, Any] = {name: parts[name].sae for name in step.splice.places}
    keep = torch.ones(TOKENS.shape, dtype=torch.bool) if mask is None else mask
    clean: dict[str, Tensor] = {}
    watched = {*first.downstream_hooks, *saes}
    with torch.no_grad(), first._hooked({name: watcher(clean, name) for name in watched}):
        clean_logits = first.full_logits(TOKENS)
    seen: dict[str, Tensor] = {}
    own: list[Tensor] = []

    def put_in(name: str) -> Callable[[Tensor], Tensor]:
        def hook(activation: Tensor) -> Tensor:
            seen[name] = activation
            x = activation.flatten(2)
            if name in step.trainers:
                acts = torch.relu((x - saes[name].b_dec) @ saes[name].W_enc + saes[name].b_enc)
                sae_out = acts @ saes[name].W_dec + saes[name].b_dec
                l1 = (acts * saes[name].W_dec.norm(dim=1)).sum(-1)[keep].mean() * saes[name].cfg.l1_coefficient
                own.append(l1 + objective.mse * (sae_out - x).pow(2).sum(-1)[keep].mean())
            else:
                sae_out = saes[name](x)
            return torch.where(keep[..., None], sae_out, x).reshape(activation.shape)

        return hook

    later = [hook for hook in first.downstream_hooks if hook not in saes]
    functions: dict[str, Any] = {name: watcher(seen, name) for name in later}
    functions |= {name: put_in(name) for name in saes}
    with first._hooked(functions):
        logits = first.full_logits(TOKENS)
    kl = (
        F.kl_div(logits.log_softmax(-1), clean_logits.log_softmax(-1), log_target=True, reduction="none")
        .sum(-1)[keep]
        .mean()
    )
    total = objective.kl * kl + torch.stack(own).sum()
    for hook in first.downstream_hooks if objective.beta else ():
        error = (seen[hook] - clean[hook]).pow(2).sum(-1)[keep].mean()
        total = total + objective.beta / first.position.layers_after * error
    for name in step.readers:
        with torch.no_grad():
            x = clean[name].flatten(2)
            clean_acts = torch.relu((x - saes[name].b_dec) @ saes[name].W_enc + saes[name].b_enc)
        fixed = {key: value.detach() for key, value in saes[name].named_parameters()}
        x = seen[name].flatten(2)
        acts = torch.relu((x - fixed["b_dec"]) @ fixed["W_enc"] + fixed["b_enc"])
        change = (acts - clean_acts).pow(2).sum(-1)[keep].mean()
        total = total + step.agreement / len(step.readers) * change
    parameters = {
        f"{name}.{key}": p for name, trainer in step.trainers.items() for key, p in trainer.sae.named_parameters()
    }
    found = torch.autograd.grad(total, list(parameters.values()))
    return total.detach(), dict(zip(parameters, found, strict=True))


def watcher(into: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def watch(activation: Tensor) -> None:
        into[name] = activation

    return watch


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert float(value.abs().max()) > 1e-8, f"nothing is compared at {name}"
        torch.testing.assert_close(ours[name], value, rtol=2e-4, atol=2e-6 * float(value.abs().max() + 1), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_plain_codes(family: str):
    objective = Objective(kl=1.0, beta=0.01, mse=0.1) if family != "gpt_neox" else Objective(kl=1.0, mse=0.1)
    model = shared_model(family)
    step = build(model, hooks_of(family), objective, agreement=0.05)
    step._gradient(TOKENS, TOKENS.numel())
    loss, gradients = plain(step, model)
    assert step.loss is not None
    torch.testing.assert_close(step.loss, loss, rtol=1e-4, atol=1e-6)
    assert_close(gradients_of(step), gradients)


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_trainable_among_frozen(frozen: int):
    model = shared_model("hooked_transformer")
    hooks = hooks_of("hooked_transformer")
    step = build(model, hooks, Objective(kl=1.0, beta=0.01), frozen=frozen, agreement=0.05)
    assert step.readers == ([hooks[1]] if frozen == 1 else [])  # the last has none behind it
    step._gradient(TOKENS, TOKENS.numel())
    loss, gradients = plain(step, model)
    assert step.loss is not None
    torch.testing.assert_close(step.loss, loss, rtol=1e-4, atol=1e-6)
    assert_close(gradients_of(step), gradients)
    assert set(step.trainers) == {hooks[1 - frozen]}


def test_excluded_tokens_stay_as_they_arrive():
    model = shared_model("hooked_transformer")
    excluded = TOKENS[0, :2].clone()
    mask = ~torch.isin(TOKENS, excluded)
    mask[:, -1] = False
    step = build(
        model,
        hooks_of("hooked_transformer"),
        Objective(kl=1.0, beta=0.01),
        agreement=0.05,
        excluded=excluded,
        seqpos_slice=(0, 7),
        train_batch_size_tokens=28,
    )
    step._gradient(TOKENS, int(mask.sum()))
    loss, gradients = plain(step, model, mask)
    assert step.loss is not None
    torch.testing.assert_close(step.loss, loss, rtol=1e-4, atol=1e-6)
    assert_close(gradients_of(step), gradients)


@pytest.mark.parametrize("architectures", [("standard", "jumprelu"), ("topk", "standard")])
def test_micro_batches_add_up_to_the_whole_step(architectures: tuple[str, str]):
    model = shared_model("hooked_transformer")
    objective = Objective(kl=1.0, beta=0.01, mse=0.1)
    found: list[dict[str, Tensor]] = []
    for micro in (4, 1):
        step = build(
            model, hooks_of("hooked_transformer"), objective, architectures=architectures, agreement=0.05, micro=micro
        )
        step._gradient(TOKENS, TOKENS.numel())
        found.append(gradients_of(step))
    assert_close(found[1], found[0])


def test_a_pass_with_one_sae_is_that_of_the_sae_alone():
    """The degenerate case: the step of `E2ESAETrainer`."""
    model, hook = shared_model("hooked_transformer"), "blocks.1.hook_resid_pre"
    objective = Objective(kl=1.0, beta=0.01)
    joint = build(model, (hook,), objective, architectures=("standard",))
    alone = build(model, (hook,), objective, architectures=("standard",)).trainers[hook]
    for batch in (TOKENS, token_batch(seed=5)):
        output = alone.step(batch)
        torch.testing.assert_close(joint(batch)[hook].loss, output.loss)
    for name, value in alone.sae.state_dict().items():
        torch.testing.assert_close(joint.trainers[hook].sae.state_dict()[name], value, msg=name)
    assert alone.n_training_samples == joint.trainers[hook].n_training_samples == 64


def test_the_features_agreement_moves_the_saes_before_alone():
    model = shared_model("hooked_transformer")
    hooks = hooks_of("hooked_transformer")
    steps = [build(model, hooks, Objective(kl=1e-12), agreement=weight) for weight in (0.0, 1.0)]
    for step in steps:
        for trainer in step.trainers.values():
            trainer.cfg.total_training_samples = 10
            for scheduler in trainer.coefficient_schedulers.values():
                scheduler.final_value = 0.0
            trainer.sae.cfg.l1_coefficient = 0.0
        step._gradient(TOKENS, TOKENS.numel())
    without, with_it = (gradients_of(step) for step in steps)
    assert float((with_it[f"{hooks[0]}.W_dec"] - without[f"{hooks[0]}.W_dec"]).abs().max()) > 1e-3
    torch.testing.assert_close(with_it[f"{hooks[1]}.W_enc"], without[f"{hooks[1]}.W_enc"])


def test_a_step_that_is_not_finite_reaches_none_of_the_saes():
    model = shared_model("hooked_transformer")
    step = build(model, hooks_of("hooked_transformer"), Objective(kl=1.0), max_skipped_steps=2)
    step(TOKENS)
    broken: Any = list(step.trainers.values())[1]
    trainers: dict[str, Any] = dict(step.trainers)
    kept = {name: trainer.sae.W_dec.detach().clone() for name, trainer in trainers.items()}
    before = broken.sae.b_enc.detach().clone()
    with torch.no_grad():
        broken.sae.b_enc[0] = float("nan")
    step(token_batch(seed=1))
    for name, trainer in trainers.items():
        torch.testing.assert_close(trainer.sae.W_dec, kept[name], rtol=0, atol=0)
        assert trainer.n_skipped_steps == 1
    with pytest.raises(NonFiniteError, match=r"2 steps in a row .* Loss or gradient of "):
        step(token_batch(seed=2))
    with torch.no_grad():
        broken.sae.b_enc.copy_(before)
    step.n_skipped_in_a_row = 1
    step(token_batch(seed=3))
    assert step.n_skipped_in_a_row == 0


def test_a_step_of_excluded_tokens_alone_is_refused():
    model = shared_model("hooked_transformer")
    step = build(model, hooks_of("hooked_transformer"), Objective(), excluded=torch.arange(64))
    with pytest.raises(ValueError, match="Every token of the batch at step 0 is excluded"):
        step(TOKENS)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (
            ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"),
            "overlap: both sit at one place, which the model calls",
        ),
        (("blocks.1.attn.hook_pattern", "blocks.0.hook_resid_pre"), None),
    ],
)
def test_places_are_put_into_the_models_order_and_may_not_overlap(hooks: tuple[str, str], message: str | None):
    model = shared_model("hooked_transformer")
    places = {str(i): JointPlace(splice_into(model, hook, needs_downstream=False)) for i, hook in enumerate(hooks)}
    if message is None:
        assert list(JointSplice(places).places) == ["1", "0"]
        return
    with pytest.raises(ValueError, match=message):
        JointSplice(places)
