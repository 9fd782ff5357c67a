"""One optimizer step: against SAELens's own trainer, against naive code, across micro-batches, for every architecture."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BUILT_IN_ARCHITECTURES,
    D_HEAD,
    D_MODEL,
    N_HEADS,
    N_LAYERS,
    build_trainer,
    parameters_of,
    runner_config,
    tiny_hooked_transformer,
    token_batch,
    training_sae,
)
from rounding import assert_equal_sums
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from transformer_lens import HookedTransformer

from e2e_sae_plugin import E2ESAETrainer, Objective
from e2e_sae_plugin.architectures import UNTRAINABLE_NORMALISATIONS, WITH_AUXILIARY

NORMALISATIONS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale", "covariance_whitening")
TRAINABLE = [
    (architecture, normalisation)
    for architecture in BUILT_IN_ARCHITECTURES
    for normalisation in NORMALISATIONS
    if normalisation not in UNTRAINABLE_NORMALISATIONS.get(architecture, ())
]
HOOK = "blocks.1.hook_resid_pre"


def clean_activations(model: HookedTransformer, tokens: Tensor, hook_name: str = HOOK) -> Tensor:
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[hook_name])[1][hook_name]


def set_scaler(trainer: SAETrainer[Any, Any], normalisation: str, acts: Tensor) -> None:
    """What `fit` estimates before the first step."""
    if normalisation == "expected_average_only_in":
        trainer.activation_scaler.scaling_factor = 0.7
    elif normalisation == "covariance_whitening":
        trainer.activation_scaler.estimate_whitening(16, iter([acts.flatten(0, 1)] * 2), 2)


def mark_dead(trainer: SAETrainer[Any, Any], features: slice = slice(20, 32)) -> None:
    trainer.n_forward_passes_since_fired[features] = 10_000


def step_gradients(trainer: E2ESAETrainer, tokens: Tensor) -> tuple[dict[str, Tensor], TrainStepOutput]:
    """The gradients that the optimizer is given in a step, and what the step returns."""
    caught: dict[str, Tensor] = {}
    handle = trainer.optimizer.register_step_pre_hook(
        lambda *_: caught.update({n: p.grad.clone() for n, p in trainer.sae.named_parameters() if p.grad is not None})
    )
    output = trainer.step(tokens)
    handle.remove()
    return caught, output


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    """Close relative to the largest element of each gradient."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert float((found[name] - value).abs().max()) <= rtol * scale + 1e-9, name
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-6


def assert_step_equals_naive_code(trainer: E2ESAETrainer, tokens: Tensor, naive: Naive, sae: TrainingSAE[Any]) -> None:
    """Loss and every gradient of one step, against `naive` run on `sae`, a copy of the trainer's."""
    loss = naive.loss(sae)
    expected = naive.gradients(sae, loss)
    found, output = step_gradients(trainer, tokens)
    torch.testing.assert_close(output.loss, loss.detach(), rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, expected)


# The local objective is SAELens's own.


@pytest.mark.parametrize(("architecture", "normalisation"), TRAINABLE)
def test_local_objective_equals_the_hosts_own_steps_to_the_bit(architecture: str, normalisation: str):
    sae = {"normalize_activations": normalisation}
    if architecture in ("standard", "gated"):
        sae["l1_warm_up_steps"] = 2  # pyright: ignore[reportArgumentType]
    config = runner_config(
        architecture, sae, objective=Objective.local(), max_grad_norm=1.0, lr_warm_up_steps=2, training_tokens=3200
    )
    model = tiny_hooked_transformer()
    ours = build_trainer(config, model)
    ours.spliced_model.use_native_kernels(False)  # the host reads its activations from the model's own code
    host_sae = copy.deepcopy(ours.sae)
    host: SAETrainer[Any, Any] = SAETrainer(config.host_trainer_config(), host_sae, data_provider=iter([]))
    acts = clean_activations(model, token_batch(8, seed=9))
    set_scaler(ours, normalisation, acts)
    set_scaler(host, normalisation, acts)
    mark_dead(ours)
    mark_dead(host)
    start = parameters_of(ours.sae)
    for step in range(3):
        tokens = token_batch(4, seed=step)
        our_output = ours.step(tokens)
        host_output = host.step(clean_activations(model, tokens).flatten(0, 1))
        ours.n_training_steps += 1
        host.n_training_steps += 1
        assert torch.equal(our_output.loss, host_output.loss.detach())
        assert our_output.losses.keys() == host_output.losses.keys()
        for name, value in host_output.losses.items():
            assert torch.equal(our_output.losses[name], value.detach()), name  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        for name, value in parameters_of(host.sae).items():
            assert torch.equal(parameters_of(ours.sae)[name], value), (step, name)
        assert torch.equal(ours.n_forward_passes_since_fired, host.n_forward_passes_since_fired)
        assert torch.equal(ours.act_freq_scores, host.act_freq_scores)
        assert ours.n_frac_active_samples == host.n_frac_active_samples
        assert ours.n_training_samples == host.n_training_samples
        assert ours.get_coefficients() == host.get_coefficients()
        assert ours.lr_scheduler.get_last_lr() == host.lr_scheduler.get_last_lr()
    assert any(not torch.equal(value, start[name]) for name, value in parameters_of(ours.sae).items())


def test_every_architecture_of_the_registry_is_covered():
    assert set(BUILT_IN_ARCHITECTURES) == set(SAE_TRAINING_CLASS_REGISTRY)


# The whole objective against naive code.


@dataclass
class Naive:
    """The objective written out with one ordinary hooked forward pass per reconstruction, nothing chunked or reused."""

    trainer: E2ESAETrainer
    model: HookedTransformer
    tokens: Tensor
    mask: Tensor
    head: int | None = None

    def sae_in(self) -> Tensor:
        acts = clean_activations(self.model, self.tokens, self.trainer.runner_cfg.hook_name)
        acts = acts if self.head is None else acts[:, :, self.head]
        return acts.flatten(2)[self.mask]

    def forward(self, sae: TrainingSAE[Any]) -> TrainStepOutput:
        sae.train()
        return sae.training_forward_pass(
            TrainStepInput(
                sae_in=self.trainer.activation_scaler(self.sae_in()),
                dead_neuron_mask=self.trainer.dead_neurons,
                coefficients=self.trainer.get_coefficients(),
                n_training_steps=0,
                is_logging_step=False,
            )
        )

    def reconstructions(self, sae: TrainingSAE[Any], output: TrainStepOutput) -> list[Tensor]:
        """The SAE's output, and for Matryoshka that of each prefix of features alone."""
        outs = [output.sae_out]
        for width in getattr(sae.cfg, "matryoshka_widths", [])[:-1]:
            prefix = torch.arange(output.feature_acts.shape[-1]) < width
            outs.append(sae.decode(output.feature_acts.to_dense() * prefix))
        return [self.trainer.activation_scaler.unscale(out) for out in outs]

    def spliced_terms(self, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """(KL, summed downstream errors), means over the tokens of the mask."""
        hook_name = self.trainer.runner_cfg.hook_name
        start = int(hook_name.split(".")[1])
        later = [f"blocks.{k}.hook_resid_pre" for k in range(start + 1, N_LAYERS)]
        caught: dict[str, Tensor] = {}

        def splice(activation: Tensor, hook: Any) -> Tensor:
            spliced = activation.clone()
            target = spliced if self.head is None else spliced[:, :, self.head]
            shape = target[self.mask].shape
            target[self.mask] = reconstruction.reshape(shape)
            return spliced

        def catch(activation: Tensor, hook: Any) -> None:
            caught[hook.name] = activation

        with torch.no_grad():
            cached: Any = self.model.run_with_cache(self.tokens)
            clean_logits, clean = cached
        hooks: list[Any] = [(hook_name, splice), *((name, catch) for name in later)]
        logits = self.model.run_with_hooks(self.tokens, fwd_hooks=hooks)
        log_y, log_y_hat = clean_logits.log_softmax(-1)[self.mask], logits.log_softmax(-1)[self.mask]
        n = int(self.mask.sum())
        kl = F.kl_div(log_y_hat, log_y, log_target=True, reduction="sum") / n
        errors = [(caught[name] - clean[name])[self.mask].pow(2).sum() / n for name in later]
        return kl, torch.stack(errors).sum() if errors else torch.zeros(())

    def loss(self, sae: TrainingSAE[Any]) -> Tensor:
        objective = self.trainer.objective
        output = self.forward(sae)
        layers_after = N_LAYERS - int(self.trainer.runner_cfg.hook_name.split(".")[1])
        total = torch.zeros(())
        terms = [self.spliced_terms(reconstruction) for reconstruction in self.reconstructions(sae, output)]
        alpha: Any = (output.losses["mse_loss"] / terms[0][0]).detach() if objective.balance_kl else 1.0  # pyright: ignore
        for kl, downstream in terms:
            total = total + alpha * objective.kl * kl + objective.beta / layers_after * downstream
        for name, value in output.losses.items():
            if name == "auxiliary_reconstruction_loss":
                weight = 1.0 if objective.balance_kl else objective.auxiliary
                assert weight is not None
                total = total + weight * value
            elif "mse" in name:
                total = total + objective.mse * value
            else:
                total = total + value
        return total

    def gradients(self, sae: TrainingSAE[Any], loss: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(*sae.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return {name: grad for name, grad in zip(names, gradients, strict=True) if grad is not None}


def whole_mask(tokens: Tensor) -> Tensor:
    return torch.ones_like(tokens, dtype=torch.bool)


def mixed(architecture: str) -> Objective:
    """Every term that the architecture has, at weights of its own."""
    return Objective(kl=0.7, beta=0.02, mse=0.003, auxiliary=0.005 if architecture in WITH_AUXILIARY else None)


@pytest.mark.parametrize("architecture", BUILT_IN_ARCHITECTURES)
def test_a_finetuning_step_equals_naive_code_for_every_architecture(architecture: str):
    """In micro-batches, whose KLs differ: alpha is the whole step's."""
    config = runner_config(
        architecture, objective=Objective.finetune(), local_first=0.0, max_grad_norm=None, store_batch_size_prompts=2
    )
    model = tiny_hooked_transformer()
    trainer = build_trainer(config, model)
    mark_dead(trainer)
    tokens = token_batch(4, seed=3)
    naive, sae = Naive(trainer, model, tokens, whole_mask(tokens)), copy.deepcopy(trainer.sae)
    assert_step_equals_naive_code(trainer, tokens, naive, sae)


def test_the_balanced_kl_weighs_as_much_as_the_squared_error():
    trainer = build_trainer(runner_config(objective=Objective.finetune(), local_first=0.0))
    output = trainer.step(token_batch(4, seed=3))
    mse, kl = output.losses["mse_loss"], output.losses["kl_loss"]
    assert trainer.kl_scale is not None
    torch.testing.assert_close(trainer.kl_scale * kl, mse)
    # 0.5 * (alpha * KL + MSE) = MSE, and the L1 stands beside it at its own weight.
    torch.testing.assert_close(output.loss, mse + output.losses["l1_loss"], rtol=1e-5, atol=0)


def test_a_balanced_kl_that_vanishes_is_no_division_by_zero():
    """A perfect reconstruction: the identity through twice as many features as dimensions."""
    config = runner_config(
        objective=Objective.finetune(), local_first=0.0, sae={"l1_coefficient": 0.0}, max_grad_norm=None
    )
    trainer = build_trainer(config)
    eye = torch.eye(16)
    trainer.sae.load_state_dict(
        {
            "W_enc": torch.cat([eye, -eye], 1),
            "W_dec": torch.cat([eye, -eye], 0),
            "b_enc": torch.zeros(32),
            "b_dec": torch.zeros(16),
        }
    )
    before = parameters_of(trainer.sae)
    output = trainer.step(token_batch(4, seed=3))
    assert output.losses["kl_loss"] < 1e-6
    assert trainer.n_skipped_steps == 0
    assert trainer.kl_scale is not None
    assert trainer.kl_scale.isfinite()
    assert trainer.grad_norm is not None
    assert trainer.grad_norm < 1e-3
    assert all(value.isfinite().all() for value in parameters_of(trainer.sae).values())
    assert before.keys() == parameters_of(trainer.sae).keys()


@pytest.mark.parametrize("architecture", BUILT_IN_ARCHITECTURES)
def test_step_equals_naive_code_for_every_architecture(architecture: str):
    config = runner_config(architecture, objective=mixed(architecture), max_grad_norm=None)
    model = tiny_hooked_transformer()
    trainer = build_trainer(config, model)
    mark_dead(trainer)
    tokens = token_batch(4, seed=3)
    naive, sae = Naive(trainer, model, tokens, whole_mask(tokens)), copy.deepcopy(trainer.sae)
    assert_step_equals_naive_code(trainer, tokens, naive, sae)


@pytest.mark.parametrize(("architecture", "normalisation"), [c for c in TRAINABLE if c[1] != "none"])
def test_kl_and_downstream_see_the_output_without_the_normalisation(architecture: str, normalisation: str):
    config = runner_config(
        architecture, {"normalize_activations": normalisation}, objective=mixed(architecture), max_grad_norm=None
    )
    model = tiny_hooked_transformer()
    trainer = build_trainer(config, model)
    set_scaler(trainer, normalisation, clean_activations(model, token_batch(8, seed=9)))
    mark_dead(trainer)
    tokens = token_batch(4, seed=3)
    naive, sae = Naive(trainer, model, tokens, whole_mask(tokens)), copy.deepcopy(trainer.sae)
    loss = naive.loss(sae)
    expected = naive.gradients(sae, loss)
    found, output = step_gradients(trainer, tokens)
    torch.testing.assert_close(output.loss, loss.detach(), rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, expected, rtol=1e-3 if normalisation == "covariance_whitening" else 1e-4)


MASKED = {"seqpos_slice": (1, -1), "train_batch_size_tokens": 24, "training_tokens": 240}
EXCLUDED = torch.tensor([5, 9, 22, 40, 41, 42, 50])


def masked_tokens(seed: int = 3) -> tuple[Tensor, Tensor]:
    """Tokens, some of them excluded, and the mask of those that are trained on."""
    tokens = token_batch(4, seed=seed)
    tokens[0, 2], tokens[2, 3:6], tokens[3, 0] = 5, 9, 22
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 1:-1] = True
    mask &= ~torch.isin(tokens, EXCLUDED)
    assert 0 < mask.sum() < 24
    return tokens, mask


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.1.hook_mlp_out", "blocks.0.hook_attn_out", "blocks.1.attn.hook_z"])
@pytest.mark.parametrize("architecture", ["standard", "batchtopk"])
def test_step_equals_naive_code_with_excluded_tokens_and_positions(hook_name: str, architecture: str):
    config = runner_config(
        architecture,
        hook_name=hook_name,
        objective=mixed(architecture),
        max_grad_norm=None,
        store_batch_size_prompts=2,
        **MASKED,
    )
    model = tiny_hooked_transformer()
    trainer = build_trainer(config, model, excluded_tokens=EXCLUDED)
    tokens, mask = masked_tokens()
    naive, sae = Naive(trainer, model, tokens, mask), copy.deepcopy(trainer.sae)
    assert_step_equals_naive_code(trainer, tokens, naive, sae)


def test_explicit_downstream_hooks_keep_the_divisor_of_the_default():
    objective = Objective(kl=0, beta=0.5, downstream_hooks=("blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"))
    model = tiny_hooked_transformer()
    trainer = build_trainer(runner_config(hook_name="blocks.0.hook_resid_pre", objective=objective), model)
    tokens = token_batch(4)
    sae = copy.deepcopy(trainer.sae)
    output = trainer.step(tokens)
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens)
        sae_out = sae(clean["blocks.0.hook_resid_pre"])
        errors: list[Tensor] = []
        hooks: list[Any] = [("blocks.0.hook_resid_pre", lambda *_, **__: sae_out)]
        hooks += [
            (name, lambda activation, hook: errors.append((activation - clean[hook.name]).pow(2).sum(-1).mean()))
            for name in objective.downstream_hooks or ()
        ]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert len(errors) == 2
    expected = torch.stack(errors).sum() / 3  # L - l = 3 - 0, whatever the number of hooks
    n_terms = N_LAYERS * 8 * D_MODEL + tokens.numel()
    assert_equal_sums(output.losses["downstream_mse_loss"], expected, n_terms)  # pyright: ignore[reportArgumentType]
    assert_equal_sums(output.loss, 0.5 * expected + output.losses["l1_loss"], n_terms)  # pyright: ignore[reportArgumentType]


def test_reported_losses_are_unweighted_and_the_total_is_their_weighted_sum():
    trainer = build_trainer(runner_config("topk", objective=mixed("topk")))
    mark_dead(trainer)
    output = trainer.step(token_batch(4))
    values: dict[str, Any] = output.losses
    assert set(values) == {"kl_loss", "downstream_mse_loss", "mse_loss", "auxiliary_reconstruction_loss"}
    expected = (
        0.7 * values["kl_loss"]
        + 0.02 * values["downstream_mse_loss"]
        + 0.003 * values["mse_loss"]
        + 0.005 * values["auxiliary_reconstruction_loss"]
    )
    torch.testing.assert_close(output.loss, expected)
    assert all(float(value) > 0 and not value.requires_grad for value in values.values())


def test_identity_reconstruction_has_no_kl_and_no_downstream_error():
    config = runner_config(sae={"d_sae": 32, "l1_coefficient": 0.0}, objective=Objective.e2e_downstream(1.0))
    sae: Any = training_sae(config)
    with torch.no_grad():  # relu(x) - relu(-x) = x
        sae.W_enc.copy_(torch.cat([torch.eye(16), -torch.eye(16)], dim=1))
        sae.W_dec.copy_(sae.W_enc.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    output = build_trainer(config, sae=sae).step(token_batch(4))
    assert abs(float(output.losses["kl_loss"])) < 1e-6  # pyright: ignore[reportArgumentType]
    assert float(output.losses["downstream_mse_loss"]) < 1e-8  # pyright: ignore[reportArgumentType]


# Micro-batches.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("architecture", BUILT_IN_ARCHITECTURES)
def test_micro_batches_give_the_gradients_of_one_big_batch(architecture: str, masked: bool):
    results = []
    tokens = masked_tokens()[0] if masked else token_batch(4, seed=3)
    for most in (4, 3, 1):
        config = runner_config(
            architecture,
            objective=Objective(kl=0.7, beta=0.02, mse=0.003),
            max_grad_norm=1.0,
            store_batch_size_prompts=most,
            **(MASKED if masked else {}),
        )
        trainer = build_trainer(config, excluded_tokens=EXCLUDED if masked else None)
        mark_dead(trainer)
        sizes: list[int] = []
        clean_pass = trainer.spliced_model.clean_pass

        def counted(batch: Tensor, *, sizes: list[int] = sizes, clean_pass: Any = clean_pass, **settings: Any) -> Any:
            sizes.append(len(batch))
            return clean_pass(batch, **settings)

        trainer.spliced_model.clean_pass = counted  # pyright: ignore[reportAttributeAccessIssue]
        gradients, output = step_gradients(trainer, tokens)
        assert sizes == {4: [4], 3: [2, 2], 1: [1, 1, 1, 1]}[most]
        results.append((gradients, output, trainer))
    big_gradients, big_output, big = results[0]
    for gradients, output, trainer in results[1:]:
        assert_same_gradients(gradients, big_gradients, rtol=2e-5)
        assert output.losses.keys() == big_output.losses.keys()
        for name, value in big_output.losses.items():
            torch.testing.assert_close(output.losses[name], value, rtol=1e-5, atol=1e-6)
        # The SAE ran once, on the whole step: what couples tokens or advances per step cannot tell the difference (but
        # for the last bits of the clean activations, which the model computes in other shapes).
        acts, big_acts = output.feature_acts.to_dense(), big_output.feature_acts.to_dense()
        assert torch.equal(acts != 0, big_acts != 0)
        torch.testing.assert_close(acts, big_acts, rtol=1e-4, atol=1e-5)
        assert torch.equal(trainer.n_forward_passes_since_fired, big.n_forward_passes_since_fired)
        assert torch.equal(trainer.act_freq_scores, big.act_freq_scores)
        if hasattr(big.sae, "topk_threshold"):
            torch.testing.assert_close(trainer.sae.topk_threshold, big.sae.topk_threshold, rtol=1e-4, atol=0)
            assert big.sae.topk_threshold > 0  # pyright: ignore[reportOperatorIssue]


# What dominates the gradient.


@pytest.mark.parametrize("architecture", BUILT_IN_ARCHITECTURES)
def test_the_kl_dominates_the_gradient_of_live_features(architecture: str):
    """Squared errors hundreds of times the KL must not train live features under `Objective.e2e()`."""
    model = tiny_hooked_transformer()
    with torch.no_grad():  # activations of a realistic size: the norm after each block takes their scale away again
        model.embed.W_E.mul_(20)
        model.pos_embed.W_pos.mul_(20)
    config = runner_config(architecture, objective=Objective.e2e(), max_grad_norm=None)
    trainer = build_trainer(config, model)
    dead = slice(24, 32)
    mark_dead(trainer, dead)
    tokens = token_batch(4, seed=3)
    naive, sae = Naive(trainer, model, tokens, whole_mask(tokens)), copy.deepcopy(trainer.sae)
    output = naive.forward(sae)
    kl = torch.stack([naive.spliced_terms(r)[0] for r in naive.reconstructions(sae, output)]).sum()
    reconstruction_like = {n: v for n, v in output.losses.items() if "mse" in n or "auxiliary" in n}
    sparsity = [v for n, v in output.losses.items() if n not in reconstruction_like]
    mse: Any = output.losses["mse_loss"]
    assert float(mse.detach()) > 100 * float(kl.detach()) > 0
    names, parameters = zip(*sae.named_parameters(), strict=True)

    def gradients(loss: Any) -> dict[str, Tensor]:
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)}

    of_kl, of_sparsity = gradients(kl), gradients(sum(sparsity))
    of_host = gradients(sum(reconstruction_like.values()))
    whole, _ = step_gradients(trainer, tokens)
    live = output.feature_acts.to_dense().bool().any(0)
    live[dead] = False
    assert live.sum() >= 8

    def live_norms(grads: dict[str, Tensor]) -> dict[str, float]:
        rows = {"W_dec": grads["W_dec"][live]}
        if "W_enc" in grads:
            rows["W_enc"] = grads["W_enc"][:, live]
        return {name: float(value.norm()) for name, value in rows.items()}

    rest = live_norms({name: whole[name] - of_kl[name] - of_sparsity[name] for name in whole})
    for name, kl_norm in live_norms(of_kl).items():
        assert kl_norm > 0
        assert live_norms(of_host)[name] > 10 * kl_norm  # what SAELens's own weights would do
        assert rest[name] < 0.5 * kl_norm, (name, rest[name], kl_norm)


def test_auxiliary_loss_is_rescaled_to_its_share_of_the_kl_and_reaches_dead_features():
    trainer = build_trainer(runner_config("topk", objective=Objective.e2e(), max_grad_norm=None))
    with torch.no_grad():
        trainer.sae.b_enc[24:] = -5.0  # pyright: ignore[reportIndexIssue]
    mark_dead(trainer, slice(24, 32))
    gradients, output = step_gradients(trainer, token_batch(4))
    kl, total = output.losses["kl_loss"], output.loss
    torch.testing.assert_close(total, kl * (1 + 1 / 32))  # pyright: ignore[reportArgumentType, reportOperatorIssue]
    assert gradients["W_dec"][24:].abs().max() > 0


def test_auxiliary_loss_costs_nothing_while_no_feature_is_dead():
    trainer = build_trainer(runner_config("topk", objective=Objective.e2e()))
    output = trainer.step(token_batch(4))
    assert torch.equal(output.loss, output.losses["kl_loss"])  # pyright: ignore[reportArgumentType]
    assert torch.isfinite(output.loss)


def test_auxiliary_weight_zero_leaves_dead_features_alone():
    trainer = build_trainer(runner_config("topk", objective=Objective.e2e(auxiliary=0), max_grad_norm=None))
    with torch.no_grad():
        trainer.sae.b_enc[24:] = -5.0  # pyright: ignore[reportIndexIssue]
    mark_dead(trainer, slice(24, 32))
    gradients, output = step_gradients(trainer, token_batch(4))
    assert float(output.losses["auxiliary_reconstruction_loss"]) > 0  # pyright: ignore[reportArgumentType]
    assert gradients["W_dec"][24:].abs().max() == 0
    assert gradients["W_dec"][:24].abs().max() > 0


# Matryoshka.


def matryoshka_step(levels: Any, seed: int = 0) -> tuple[dict[str, Tensor], TrainStepOutput]:
    config = runner_config(
        "matryoshka_batchtopk", objective=Objective.e2e(matryoshka_levels=levels), max_grad_norm=None, seed=seed
    )
    return step_gradients(build_trainer(config), token_batch(4, seed=3))


def test_all_matryoshka_levels_get_the_kl_of_their_prefix():
    _, output = matryoshka_step("all")
    kl = {name: value for name, value in output.losses.items() if name.startswith("kl")}
    assert set(kl) == {"kl_loss", "kl_loss_8", "kl_loss_16"}
    values: list[Any] = list(kl.values())
    torch.testing.assert_close(output.loss, torch.stack(values).sum())
    assert len({round(float(value), 6) for value in values}) == 3


def test_sampled_matryoshka_level_is_an_unbiased_estimate_of_all_levels():
    everything, _ = matryoshka_step("all")
    sampled: dict[str, dict[str, Tensor]] = {}
    for seed in range(20):
        gradients, output = matryoshka_step("sampled", seed)
        (name,) = [n for n in output.losses if n.startswith("kl_loss_")]
        sampled[name] = gradients
        if len(sampled) == 2:
            break
    assert set(sampled) == {"kl_loss_8", "kl_loss_16"}
    mean = {name: (sampled["kl_loss_8"][name] + sampled["kl_loss_16"][name]) / 2 for name in everything}
    assert_same_gradients(mean, everything)
    assert not torch.allclose(sampled["kl_loss_8"]["W_dec"], sampled["kl_loss_16"]["W_dec"])


# One head.


@pytest.mark.parametrize("head", range(N_HEADS))
def test_training_on_one_head_splices_that_head_alone(head: int):
    config = runner_config(
        sae={"d_in": D_HEAD}, hook_name="blocks.1.attn.hook_z", hook_head_index=head, objective=mixed("standard"),
        max_grad_norm=None, store_batch_size_prompts=2,
    )  # fmt: skip
    model = tiny_hooked_transformer()
    trainer = build_trainer(config, model)
    tokens = token_batch(4, seed=3)
    naive, sae = Naive(trainer, model, tokens, whole_mask(tokens), head=head), copy.deepcopy(trainer.sae)
    assert_step_equals_naive_code(trainer, tokens, naive, sae)


# What is counted.


def test_sparsity_statistics_divide_by_the_tokens_really_trained_on():
    trainer = build_trainer(runner_config(store_batch_size_prompts=1, **MASKED), excluded_tokens=EXCLUDED)
    tokens, mask = masked_tokens()
    n_trained = int(mask.sum())
    output = trainer.step(tokens)
    assert output.feature_acts.shape == (n_trained, 32)
    assert trainer.n_frac_active_samples == n_trained
    torch.testing.assert_close(trainer.feature_sparsity, output.feature_acts.bool().float().mean(0))
    assert 0 < trainer.feature_sparsity.mean() < 1
    assert trainer.n_training_samples == 4 * 6  # excluded tokens count, positions outside the slice do not


@pytest.mark.parametrize(("n_prompts", "sae_batches"), [(4, [4]), (6, [6]), (8, [2, 2, 2, 2])])
def test_a_dense_sae_runs_in_micro_batches_where_their_gradients_take_less_memory_than_its_activations(
    n_prompts: int, sae_batches: list[int]
):
    """Of 8 tokens each: beyond the first 2 sequences, 16, 32 and 48 tokens, against 2 d_in = 32."""
    results: list[tuple[dict[str, Tensor], TrainStepOutput]] = []
    for most in (n_prompts, 2):
        config = runner_config(
            store_batch_size_prompts=most, train_batch_size_tokens=8 * n_prompts, objective=Objective.e2e(mse=0.1)
        )
        trainer = build_trainer(config)
        sizes: list[int] = []
        sae_forward = trainer.sae_forward

        def counted(sae_in: Tensor, *, sizes: list[int] = sizes, sae_forward: Any = sae_forward) -> TrainStepOutput:
            sizes.append(len(sae_in) // 8)
            return sae_forward(sae_in)

        trainer.sae_forward = counted
        results.append(step_gradients(trainer, token_batch(n_prompts)))
        assert sizes == ([n_prompts] if most == n_prompts else sae_batches)
    (big, big_output), (gradients, output) = results
    assert_same_gradients(gradients, big, rtol=2e-5)
    torch.testing.assert_close(output.loss, big_output.loss, rtol=1e-5, atol=1e-6)


def test_under_autocast_the_hosts_code_runs_in_micro_batches():
    trainer = build_trainer(runner_config(store_batch_size_prompts=2, autocast=True))
    assert [len(part) for part in trainer._sae_batches(token_batch(4))] == [2, 2]
    trainer = build_trainer(runner_config(store_batch_size_prompts=2))
    assert [len(part) for part in trainer._sae_batches(token_batch(4))] == [4]


def test_counters_and_schedules_advance_once_per_step_whatever_the_micro_batch():
    config = runner_config(
        "standard", {"l1_warm_up_steps": 10, "l1_coefficient": 0.5}, lr=1.0, lr_warm_up_steps=10,
        store_batch_size_prompts=1, training_tokens=3200,
    )  # fmt: skip
    trainer = build_trainer(config)
    with torch.no_grad():
        trainer.sae.b_enc[5] = -100.0  # pyright: ignore[reportIndexIssue]
    assert trainer.get_coefficients() == {"l1": 0.0}
    assert trainer.lr_scheduler.get_last_lr() == [pytest.approx(0.1)]
    trainer.step(token_batch(4))
    assert trainer.get_coefficients() == {"l1": pytest.approx(0.05)}
    assert trainer.lr_scheduler.get_last_lr() == [pytest.approx(0.2)]
    assert trainer.n_forward_passes_since_fired[5] == 1
    assert trainer.n_forward_passes_since_fired.sum() < 16  # most features fired
    assert trainer.n_training_samples == 32
    assert trainer.n_training_steps == 0  # `fit` counts steps, as in the host


def test_batchtopk_threshold_advances_once_per_step():
    trainer = build_trainer(runner_config("batchtopk", store_batch_size_prompts=1))
    output = trainer.step(token_batch(4))
    feature_acts = output.feature_acts.to_dense()
    smallest = feature_acts[feature_acts > 0].min().double()
    torch.testing.assert_close(trainer.sae.topk_threshold, 0.01 * smallest.detach())
    assert int((feature_acts > 0).sum()) == 4 * 32  # k on average over the whole step


def test_features_that_have_not_fired_for_the_window_are_dead():
    trainer = build_trainer(runner_config(dead_feature_window=2, training_tokens=3200))
    with torch.no_grad():
        trainer.sae.b_enc[7] = -100.0  # pyright: ignore[reportIndexIssue]
    dead = []
    for step in range(3):
        trainer.step(token_batch(4, seed=step))
        dead.append(bool(trainer.dead_neurons[7]))
    assert dead == [False, False, True]


def test_a_batch_without_a_token_to_train_on_is_refused():
    trainer = build_trainer(runner_config(exclude_special_tokens=[5]), excluded_tokens=torch.tensor([5]))
    with pytest.raises(
        ValueError, match=r"Every token of the batch at step 0 is excluded by exclude_special_tokens=\[5"
    ):
        trainer.step(torch.full((4, 8), 5))


def test_a_micro_batch_without_a_token_to_train_on_is_no_problem():
    trainer = build_trainer(runner_config(store_batch_size_prompts=1), excluded_tokens=torch.tensor([5]))
    tokens = token_batch(4)
    tokens[1] = 5
    output = trainer.step(tokens)
    assert math.isfinite(float(output.loss))
    assert len(output.feature_acts) == int((tokens != 5).sum())


# Clipping.


@pytest.mark.parametrize("limit", [None, 1e-3, 1e6])
def test_gradients_are_clipped_to_max_grad_norm(limit: float | None):
    free, _ = step_gradients(build_trainer(runner_config(max_grad_norm=None)), token_batch(4))
    trainer = build_trainer(runner_config(max_grad_norm=limit))
    clipped, _ = step_gradients(trainer, token_batch(4))
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in free.values()))
    assert 1e-3 < norm < 1e6
    factor = 1.0 if limit is None else min(1.0, limit / norm)
    assert_same_gradients(clipped, {name: factor * g for name, g in free.items()})
    if limit is not None:
        assert trainer.grad_norm is not None
        assert float(trainer.grad_norm) == pytest.approx(norm, rel=1e-4)  # the norm before clipping is what is logged


# Architectures of a user.


class BareTensorSAEConfig(StandardTrainingSAEConfig):
    @classmethod
    def architecture(cls) -> str:
        return "bare_tensor"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return StandardSAEConfig


class BareTensorSAE(StandardTrainingSAE):
    """Returns its auxiliary losses as one tensor, which SAELens allows."""

    def calculate_aux_loss(self, *_: Any, **kwargs: Any) -> Any:
        return 0.25 * kwargs["feature_acts"].pow(2).sum(-1).mean()


@pytest.fixture
def bare_tensor_architecture() -> Iterator[str]:
    register_sae_training_class("bare_tensor", BareTensorSAE, BareTensorSAEConfig)
    yield "bare_tensor"
    SAE_TRAINING_CLASS_REGISTRY.pop("bare_tensor")
    assert "bare_tensor" not in SAE_CLASS_REGISTRY


def test_an_architecture_that_a_user_registers_trains_with_its_unnamed_losses(bare_tensor_architecture: str):
    config = runner_config(bare_tensor_architecture, objective=Objective.e2e(), max_grad_norm=None)
    model = tiny_hooked_transformer()
    trainer = build_trainer(config, model)
    tokens = token_batch(4, seed=3)
    naive, sae = Naive(trainer, model, tokens, whole_mask(tokens)), copy.deepcopy(trainer.sae)
    forward = naive.forward(sae)
    unnamed = 0.25 * forward.feature_acts.pow(2).sum(-1).mean()
    loss = naive.spliced_terms(forward.sae_out)[0] + unnamed
    expected = naive.gradients(sae, loss)
    found, output = step_gradients(trainer, tokens)
    torch.testing.assert_close(output.losses["unnamed_loss"], unnamed.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.loss, loss.detach(), rtol=1e-4, atol=1e-4)
    assert_same_gradients(found, expected, rtol=1e-3)


# Precision.


def test_autocast_of_the_sae_changes_the_numbers_by_bf16_rounding_only():
    exact, exact_output = step_gradients(build_trainer(runner_config(max_grad_norm=None)), token_batch(4))
    rounded, output = step_gradients(build_trainer(runner_config(max_grad_norm=None, autocast=True)), token_batch(4))
    assert not torch.equal(output.sae_out.float(), exact_output.sae_out)
    torch.testing.assert_close(output.sae_out.float(), exact_output.sae_out, rtol=0.05, atol=0.05)
    assert all(g.dtype == torch.float32 for g in rounded.values())
    cosine = F.cosine_similarity(rounded["W_dec"].flatten(), exact["W_dec"].flatten(), dim=0)
    assert 0.98 < float(cosine) < 1 - 1e-7


def test_autocast_of_the_model_changes_the_numbers_by_bf16_rounding_only():
    exact, exact_output = step_gradients(build_trainer(runner_config(max_grad_norm=None)), token_batch(4))
    trainer = build_trainer(runner_config(max_grad_norm=None, autocast_lm=True))
    rounded, output = step_gradients(trainer, token_batch(4))
    assert float(output.losses["kl_loss"]) != float(exact_output.losses["kl_loss"])  # pyright: ignore[reportArgumentType]
    assert float(output.losses["kl_loss"]) == pytest.approx(float(exact_output.losses["kl_loss"]), rel=0.1)  # pyright: ignore[reportArgumentType]
    assert output.sae_in.dtype == torch.float32
    cosine = F.cosine_similarity(rounded["W_dec"].flatten(), exact["W_dec"].flatten(), dim=0)
    assert float(cosine) > 0.98


def test_a_gated_sae_in_bfloat16_is_refused_because_the_host_cannot_train_it():
    with pytest.raises(ValueError, match=r"sae\.dtype='bfloat16' cannot be trained with architecture 'gated'"):
        runner_config("gated", {"dtype": "bfloat16"})


@pytest.mark.parametrize("architecture", [name for name in BUILT_IN_ARCHITECTURES if name != "gated"])
def test_an_sae_in_bfloat16_trains(architecture: str):
    config = runner_config(architecture, {"dtype": "bfloat16"}, objective=Objective(beta=0.01))
    trainer = build_trainer(config)
    before = parameters_of(trainer.sae)
    output = trainer.step(token_batch(4))
    assert math.isfinite(float(output.loss))
    assert float(output.losses["kl_loss"]) > 0  # pyright: ignore[reportArgumentType]
    after = parameters_of(trainer.sae)
    assert after["W_dec"].dtype == torch.bfloat16
    assert not torch.equal(after["W_dec"], before["W_dec"])


def test_a_model_in_bfloat16_trains_an_sae_in_fp32():
    model = tiny_hooked_transformer().to(torch.bfloat16)
    trainer = build_trainer(runner_config(objective=Objective(beta=0.01), max_grad_norm=None), model)
    exact, _ = step_gradients(
        build_trainer(runner_config(objective=Objective(beta=0.01), max_grad_norm=None)), token_batch(4)
    )
    rounded, output = step_gradients(trainer, token_batch(4))
    assert output.sae_in.dtype == torch.float32
    assert rounded["W_dec"].dtype == torch.float32
    cosine = F.cosine_similarity(rounded["W_dec"].flatten(), exact["W_dec"].flatten(), dim=0)
    assert float(cosine) > 0.98


# The log.


def test_logged_metrics_of_a_step_have_the_hosts_names_and_the_steps_values():
    trainer = build_trainer(runner_config(objective=Objective.e2e_downstream(0.02)))
    output = trainer.step(token_batch(4))
    metrics = trainer._step_metrics(output)
    assert metrics["losses/kl_loss"] == float(output.losses["kl_loss"])  # pyright: ignore[reportArgumentType]
    assert metrics["losses/downstream_mse_loss"] == float(output.losses["downstream_mse_loss"])  # pyright: ignore[reportArgumentType]
    assert metrics["losses/overall_loss"] == float(output.loss)
    assert metrics["metrics/l0"] == float(output.feature_acts.bool().float().sum(-1).mean())
    assert metrics["details/n_training_samples"] == 32
    assert metrics["details/grad_norm"] > 0
