"""Options that save memory: the same numbers, less kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from helpers import (
    D_MODEL,
    build_trainer,
    module_names,
    parameters_of,
    runner_config,
    shared_model,
    tiny_hooked_transformer,
    token_batch,
)
from sae_lens.load_model import HookedProxyLM
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from e2e_sae_plugin import E2ESAERunnerConfig, Objective, splice_into
from e2e_sae_plugin.build import check_model_and_sae
from e2e_sae_plugin.checkpoint.resume import config_differences
from e2e_sae_plugin.cost.memory import saved_by_spliced_pass, step_memory
from e2e_sae_plugin.cost.workload import workload_of
from e2e_sae_plugin.splice import SplicedModel, recompute

PLACES = [
    ("hooked_transformer", "blocks.1.hook_resid_pre", None),
    ("hooked_transformer", "blocks.0.attn.hook_z", None),
    ("hooked_transformer", "blocks.0.hook_resid_pre", ["blocks.1.mlp.hook_post", "blocks.2.attn.hook_pattern"]),
    ("bridge", "blocks.1.hook_resid_pre", None),
    ("bridge", "blocks.0.hook_mlp_out", ["blocks.1.attn.hook_z", "blocks.2.hook_mlp_out"]),
    ("gpt2", "transformer.h.0", None),
    ("gpt2", "transformer.h.0.mlp", ["transformer.h.1.mlp.act", "transformer.h.2.attn"]),
    ("llama", "model.layers.0.self_attn", None),
    ("gemma2", "model.layers.0", ["model.layers.1.mlp.down_proj"]),
    ("gpt_neox", "gpt_neox.layers.0.attention", None),
]
places = pytest.mark.parametrize(("family", "hook_name", "downstream"), PLACES)


def spliced(family: str, hook_name: str, downstream: list[str] | None = None) -> SplicedModel:
    model = splice_into(shared_model(family), hook_name, downstream_hooks=downstream)
    model.check()
    return model


def passed(model: SplicedModel, *, hidden: bool = True, wanted: bool) -> tuple[Tensor, Tensor, Any]:
    """A loss of everything that a spliced pass gives, the spliced activation, and the pass."""
    clean = model.clean_pass(token_batch(3))
    model.recompute_blocks(wanted)
    noise = torch.randn(clean.activation.shape, generator=torch.Generator().manual_seed(0))
    activation = (clean.activation + 0.5 * noise).requires_grad_()
    result = model.spliced_pass(clean, activation, hidden=hidden)
    assert (result.hidden is not None) == hidden
    loss = torch.stack(
        [(value - clean.downstream[hook]).pow(2).sum() for hook, value in result.downstream.items()]
    ).sum()
    return loss if result.hidden is None else loss + result.hidden.pow(3).sum(), activation, result


def gradient(model: SplicedModel, *, hidden: bool = True, wanted: bool) -> Tensor:
    loss, activation, _ = passed(model, hidden=hidden, wanted=wanted)
    return torch.autograd.grad(loss, activation)[0]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("hidden", [True, False])
@places
def test_gradients_are_those_without_to_the_bit(
    family: str, hook_name: str, downstream: list[str] | None, hidden: bool, native: bool
):
    model = spliced(family, hook_name, downstream)
    model.use_native_kernels(native)
    expected = gradient(model, hidden=hidden, wanted=False)
    assert expected.abs().max() > 0.1
    assert torch.equal(gradient(model, hidden=hidden, wanted=True), expected)


@places
def test_a_graph_can_be_gone_through_twice(family: str, hook_name: str, downstream: list[str] | None):
    model = spliced(family, hook_name, downstream)
    loss, activation, _ = passed(model, wanted=True)
    first = torch.autograd.grad(loss, activation, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, activation)[0], first)


def kept_bytes(model: SplicedModel, wanted: bool) -> int:
    """Memory that a spliced pass keeps for backward, besides weights and masks."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def unchanged(packed: Any) -> Any:
        return packed

    clean = model.clean_pass(token_batch(3))
    model.recompute_blocks(wanted)
    activation = clean.activation.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, unchanged):
        result = model.spliced_pass(clean, activation)
    del result
    return sum(kept.values())


@pytest.mark.parametrize(
    ("family", "hook_name"),
    [("hooked_transformer", "blocks.0.hook_resid_pre"), ("bridge", "blocks.0.hook_resid_pre"),
     ("llama", "model.layers.0"), ("gpt2", "transformer.h.0")],
)  # fmt: skip
@pytest.mark.parametrize("native", [True, False])
def test_only_the_inputs_of_blocks_are_kept(family: str, hook_name: str, native: bool):
    model = spliced(family, hook_name, [])
    model.use_native_kernels(native)
    residual = 3 * 8 * D_MODEL * 4
    # Of each block its input; and what the final norm keeps: its input, and two of that size where it is spelled out.
    assert (
        model.position.layers_after * residual
        <= kept_bytes(model, True)
        <= (model.position.layers_after + 4) * residual
    )
    assert kept_bytes(model, False) > 2 * kept_bytes(model, True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Blocks that are run so that they can be recomputed."""
    blocks: list[Any] = []
    checkpoint = recompute.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        blocks.append(args)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(recompute, "checkpoint", counted)
    return blocks


@places
def test_only_passes_with_gradients_are_recomputed(
    family: str, hook_name: str, downstream: list[str] | None, calls: list[Any]
):
    model = spliced(family, hook_name, downstream)
    model.recompute_blocks(True)
    clean = model.clean_pass(token_batch(3))
    with torch.no_grad():
        model.spliced_pass(clean, clean.activation)
    assert not calls
    model.spliced_pass(clean, clean.activation.requires_grad_())
    assert len(calls) == model.position.layers_after


@places
def test_a_pass_is_freed_with_its_last_reference(family: str, hook_name: str, downstream: list[str] | None):
    """Without the garbage collector: graphs that hold themselves would pile up between its visits."""
    model = spliced(family, hook_name, downstream)
    graphs: list[list[weakref.ref[Tensor]]] = []
    gc.collect()
    gc.disable()
    try:
        for hidden in (True, False, True):
            loss, activation, result = passed(model, hidden=hidden, wanted=True)
            graphs.append([weakref.ref(tensor) for tensor in (activation, *result.downstream.values())])
            torch.autograd.grad(loss, activation)
            del loss, activation, result
        alive = [[reference() is not None for reference in graph] for graph in graphs[:-1]]
    finally:
        gc.enable()
    # A bridge's blocks themselves hold on to the last activation that they have seen.
    assert not any(map(any, alive))


def modules_and_hooks(model: Any) -> list[tuple[int, int]]:
    inner = model.model if isinstance(model, HookedProxyLM) else model
    return [(id(module), len(module._forward_hooks) + len(module._forward_pre_hooks)) for module in inner.modules()]


@places
def test_the_model_is_left_as_it_was_whatever_happens(family: str, hook_name: str, downstream: list[str] | None):
    model = spliced(family, hook_name, downstream)
    before = modules_and_hooks(model.model)
    loss, activation, _ = passed(model, wanted=True)
    assert modules_and_hooks(model.model) == before
    torch.autograd.grad(loss, activation)
    assert modules_and_hooks(model.model) == before

    class Failure(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Failure

    layers = shared_model(family).blocks if family in ("hooked_transformer", "bridge") else None
    if layers is None:
        layers = shared_model(family).model.get_submodule(module_names(family)["layers"])
    for first_fails in (True, False):  # in the pass; when it is recomputed
        loss, activation, _ = (None, None, None) if first_fails else passed(model, wanted=True)
        handle = layers[2].register_forward_pre_hook(fail)
        try:
            if loss is None or activation is None:
                with pytest.raises(Failure):
                    passed(model, wanted=True)
            elif family != "hooked_transformer":  # whose native block is not called as a module
                with pytest.raises(Failure):
                    torch.autograd.grad(loss, activation)
        finally:
            handle.remove()
        assert modules_and_hooks(model.model) == before


def test_a_users_hook_that_adds_noise_adds_the_same_noise_again():
    model = splice_into(tiny_hooked_transformer(), "blocks.0.hook_resid_pre")
    model.check()
    seen: list[int] = []

    def perturb(value: Tensor, hook: Any) -> Tensor:
        seen.append(1)
        return value * torch.rand_like(value)

    model.model.hook_dict["blocks.1.mlp.hook_post"].add_hook(perturb)  # pyright: ignore
    gradients = []
    for wanted, n_calls in ((False, 1), (True, 2)):
        torch.manual_seed(0)
        loss, activation, _ = passed(model, wanted=wanted)
        del seen[:-1]  # the clean pass
        gradients.append(torch.autograd.grad(loss, activation)[0])
        assert len(seen) == n_calls
        seen.clear()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("autocast_lm", [False, True])
@pytest.mark.parametrize("objective", [Objective.e2e(), Objective.e2e_downstream(0.1), Objective(kl=0.0, beta=1.0)])
def test_training_with_it_is_training_without_it(objective: Objective, autocast_lm: bool):
    weights = []
    for wanted in (False, True):
        settings: dict[str, Any] = {"objective": objective, "autocast_lm": autocast_lm, "store_batch_size_prompts": 2}
        trainer = build_trainer(runner_config("matryoshka_batchtopk", checkpoint_blocks=wanted, **settings))
        for seed in range(3):
            trainer.step(token_batch(seed=seed))
        weights.append(parameters_of(trainer.sae))
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value)


def test_the_option_reaches_the_model(calls: list[Any]):
    build_trainer(runner_config(checkpoint_blocks=True)).step(token_batch())
    assert len(calls) == 2  # blocks 1 and 2
    build_trainer(runner_config()).step(token_batch())
    assert len(calls) == 2


def test_it_is_refused_where_it_would_have_no_effect():
    with pytest.raises(ValueError, match="checkpoint_blocks=True has no effect: the objective is local"):
        runner_config(checkpoint_blocks=True, objective=Objective.local())
    with pytest.raises(ValueError, match="checkpoint_blocks must be True or False"):
        runner_config(checkpoint_blocks="yes")
    config = runner_config("topk", checkpoint_blocks=True, hook_name="blocks.2.hook_resid_post", local_first=0.5)
    model = splice_into(tiny_hooked_transformer(), config.hook_name, needs_downstream=False)
    with pytest.raises(ValueError, match=r"no block of the 3 runs after 'blocks\.2\.hook_resid_post'"):
        check_model_and_sae(model, build_trainer(runner_config("topk")).sae, config)
    with pytest.raises(ValueError, match="no block of the 3 runs after"):
        build_trainer(config)


def test_a_run_may_be_resumed_with_it():
    without = runner_config()
    assert config_differences(runner_config(checkpoint_blocks=True).to_dict(), without) == []
    assert E2ESAERunnerConfig.from_dict(runner_config(checkpoint_blocks=True).to_dict()).checkpoint_blocks is True


def test_the_estimate_counts_the_inputs_of_all_blocks_and_one_block():
    config = runner_config(hook_name="blocks.0.hook_resid_pre", checkpoint_blocks=True)
    trainer = build_trainer(config)
    saved = saved_by_spliced_pass(trainer.spliced_model, 8)
    assert trainer.spliced_model.recomputes_blocks
    other = build_trainer(runner_config(hook_name="blocks.0.hook_resid_pre"))
    assert saved == saved_by_spliced_pass(other.spliced_model, 8)
    parts = step_memory(workload_of(config, trainer.spliced_model, trainer.sae), saved).parts
    kept = step_memory(workload_of(other.runner_cfg, other.spliced_model, other.sae), saved).parts
    assert parts["spliced activations"] == 3 * 4 * 8 * D_MODEL * 4  # blocks x sequences x tokens x numbers x bytes
    assert kept["spliced activations"] == 3 * parts["working space of a block"] > 2 * parts["spliced activations"]
    assert parts["working space of a block"] == kept["working space of a block"]


class Products(TorchDispatchMode):
    """Dtypes of the operands of matrix products with a side of `size`."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.dtypes: set[torch.dtype] = set()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            operands = [arg for arg in args if isinstance(arg, Tensor)]
            if any(self.size in operand.shape for operand in operands):
                self.n += 1
                self.dtypes |= {operand.dtype for operand in operands}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk"])
def test_under_autocast_weights_gradients_and_moments_stay_fp32_and_products_are_bf16(architecture: str):
    """`autocast` with an fp32 SAE is mixed precision with fp32 master weights."""
    lr = 1e-6
    trainer = build_trainer(runner_config(architecture, sae={"d_sae": 40}, autocast=True, lr=lr))
    before = parameters_of(trainer.sae)
    gradients: dict[str, torch.dtype] = {}
    for name, parameter in trainer.sae.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: gradients.update({name: p.grad.dtype})  # pyright: ignore
        )
    with Products(40) as products:
        trainer.step(token_batch())
    assert products.n >= 2
    assert products.dtypes == {torch.bfloat16}
    assert gradients == dict.fromkeys(dict(trainer.sae.named_parameters()), torch.float32)
    for parameter in trainer.sae.parameters():
        assert parameter.dtype == torch.float32
        moments = trainer.optimizer.state[parameter]
        assert {moments["exp_avg"].dtype, moments["exp_avg_sq"].dtype} == {torch.float32}
    moved = (trainer.sae.W_dec.detach() - before["W_dec"]).abs()
    assert float(moved.max()) == pytest.approx(lr, rel=0.1)  # Adam's first step, by all of it
    lost = before["W_dec"].bfloat16() - lr == before["W_dec"].bfloat16()
    assert lost.float().mean() > 0.9  # as would have happened to bf16 weights


def test_without_autocast_products_are_fp32():
    trainer = build_trainer(runner_config("standard", sae={"d_sae": 40}))
    with Products(40) as products:
        trainer.step(token_batch())
    assert products.n >= 2
    assert products.dtypes == {torch.float32}
