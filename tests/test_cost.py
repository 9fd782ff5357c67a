"""What a run will cost: FLOPs by part against hand-worked figures and torch's counter, memory by hand, advice."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    FAMILIES,
    module_names,
    proxy,
    runner_config,
    shared_model,
    spliced_model,
    tiny_gpt2_model,
    tiny_hooked_transformer,
    token_batch,
    training_sae,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from e2e_sae_plugin import Objective
from e2e_sae_plugin.cost import advice as advice_module
from e2e_sae_plugin.cost.advice import advice_for, available_memory, for_memory, for_time
from e2e_sae_plugin.cost.flops import BACKWARD, CLEAN, SPLICED, optimizer_bytes, sae_flops, step_flops, total_flops
from e2e_sae_plugin.cost.memory import ENTRY_BYTES, LIBRARIES_BYTES, _saved_bytes, saved_by_spliced_pass, step_memory
from e2e_sae_plugin.cost.workload import (
    ModelSizes,
    SAESizes,
    SavedBytes,
    Workload,
    changed,
    multiplied_weights,
    workload_of,
)

D = 768


def gpt2_small(d_sae: int = 60 * D, **settings: Any) -> Workload:
    """GPT-2 small with a ReLU SAE before block 6: the shape of benchmarks/step.py."""
    sae_bytes = 4 * (2 * D * d_sae + d_sae + D)
    return Workload(
        model=ModelSizes((12 * D**2,) * 12, D, D, 50257, 500_000_000, 4),
        sae=SAESizes("standard", D, d_sae, sae_bytes, sae_bytes, sae_bytes),
        **{
            "start_block": 6,
            "clean_blocks": 12,
            "spliced_end": 12,
            "has_kl": True,
            "context_size": 256,
            "trained_positions": 256,
            "step_prompts": 8,
            "micro_prompts": 4,
            **settings,
        },
    )


def of(parts: dict[str, float], prefix: str, scores: bool = False) -> float:
    """MFLOP of the parts with a prefix, with attention scores or without."""
    return sum(v for part, v in parts.items() if part.startswith(prefix) and (scores or "scores" not in part)) / 1e6


def test_gpt2_small_by_hand():
    parts = step_flops(gpt2_small())
    assert parts["clean pass: blocks"] == 12 * 24 * D**2  # 2 FLOPs x 12 d^2 weights x 12 blocks
    assert parts["clean pass: unembedding"] == 2 * D * 50257
    assert parts["clean pass: attention scores"] == 12 * 4 * 256 * D
    assert of(parts, CLEAN) == pytest.approx(247.06, abs=0.01)
    assert of(parts, SPLICED) == pytest.approx(162.13, abs=0.01)
    assert of(parts, BACKWARD) == pytest.approx(162.13, abs=0.01)
    assert of(parts, "SAE: encoder") == pytest.approx(70.78, abs=0.01)
    assert of(parts, "SAE:") == pytest.approx(5 * 70.78, abs=0.02)
    # Both factors of an attention score are activations, so its backward is twice its forward.
    assert parts["backward of the spliced pass: attention scores"] == 6 * 8 * 256 * D
    assert total_flops(parts) == sum(parts.values())


@pytest.mark.parametrize("multiple", [60, 8])
@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_agreement_with_the_floor_of_the_benchmark(multiple: int, architecture: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    shape = importlib.import_module("shape")
    work = gpt2_small(multiple * D)
    if architecture == "topk":
        work = changed(work, sae={"active": shape.GPT2_SMALL.k})
    parts = {part: flops for part, flops in step_flops(work).items() if "scores" not in part}
    floor = shape.model_flop_per_token(shape.GPT2_SMALL)
    floor += shape.sae_flop_per_token(shape.GPT2_SMALL, multiple * D, architecture)
    assert sum(parts.values()) == pytest.approx(floor, rel=1e-12)


def test_sharing_divides_the_clean_pass_alone():
    parts = step_flops(gpt2_small())
    shared = total_flops(parts, sharing=4)
    assert total_flops(parts) - shared == pytest.approx(0.75 * of(parts, CLEAN, scores=True) * 1e6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_parts_are_what_torch_counts(family: str):
    with_blocks = family in ("hooked_transformer", "bridge")
    hook = "blocks.1.hook_resid_pre" if with_blocks else f"{module_names(family)['layers']}.0"
    cfg = runner_config(hook_name=hook)
    spliced = spliced_model(cfg, shared_model(family))
    parts = step_flops(workload_of(cfg, spliced, training_sae(cfg)))
    tokens = token_batch(4, 8)
    # The counter does not know the CPU's flash kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        clean = spliced.clean_pass(tokens)
    assert counter.get_total_flops() / 32 == of_blocks(parts, CLEAN)
    activation = clean.activation.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = spliced.spliced_pass(clean, activation).hidden
    assert counter.get_total_flops() / 32 == of_blocks(parts, SPLICED)
    assert hidden is not None
    with FlopCounterMode(display=False) as counter:
        hidden.sum().backward()
    assert counter.get_total_flops() / 32 == of_blocks(parts, BACKWARD)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert clean.hidden is not None
        spliced.logits(clean.hidden[0])
    assert counter.get_total_flops() / 8 == parts["clean pass: unembedding"]


def of_blocks(parts: dict[str, float], prefix: str) -> float:
    return sum(v for part, v in parts.items() if part.startswith(prefix) and "unembedding" not in part)


def test_the_dense_sae_is_what_torch_counts():
    cfg = runner_config()
    sae, x = training_sae(cfg), torch.randn(10, 16)
    weights = dict(sae.named_parameters())
    with FlopCounterMode(display=False) as counter:
        (torch.relu(x @ sae.W_enc + weights["b_enc"]) @ sae.W_dec + sae.b_dec - x).pow(2).sum().backward()
    parts = sae_flops(SAESizes("standard", 16, 32, 0, 0, 0))
    assert counter.get_total_flops() / 10 == sum(parts.values()) == 5 * 2 * 16 * 32


def test_sparse_saes_touch_their_active_features():
    dense = 2.0 * 16 * 32
    assert sae_flops(SAESizes("topk", 16, 32, 0, 0, 0, active=4)) == {
        "SAE: encoder": dense,
        "SAE: decoder": dense / 8,
        "SAE: gradients of weights and features": 3 * dense / 8,
    }
    gated = sae_flops(SAESizes("gated", 16, 32, 0, 0, 0, has_gate=True))
    assert list(gated.values()) == [dense, 2 * dense, 5 * dense]
    pursuit = sae_flops(SAESizes("matching_pursuit", 16, 32, 0, 0, 0, active=3, encoder_products=3))
    assert pursuit["SAE: encoder"] == 3 * dense


@pytest.mark.parametrize(
    ("architecture", "active", "n_reconstructions", "separable", "products"),
    [
        ("standard", None, 1, True, 1),
        ("gated", None, 1, False, 1),
        ("jumprelu", None, 1, True, 1),
        ("topk", 4.0, 1, False, 1),
        ("batchtopk", 4.0, 1, False, 1),
        ("matryoshka_batchtopk", 4.0, 3, False, 1),  # widths 8, 16 and 32
        ("matching_pursuit", 4.0, 1, True, 4),
    ],
)
def test_architectures(architecture: str, active: float | None, n_reconstructions: int, separable: bool, products: int):
    cfg = runner_config(architecture)
    work = workload_of(cfg, spliced_model(cfg), training_sae(cfg))
    assert (work.sae.active, work.n_reconstructions) == (active, n_reconstructions)
    assert (work.separable, work.sae.encoder_products) == (separable, products)


def workload(hook: str = "blocks.1.hook_resid_pre", objective: Objective | None = None, **settings: Any) -> Workload:
    cfg = runner_config(hook_name=hook, objective=objective or Objective(), **settings)
    return workload_of(cfg, spliced_model(cfg), training_sae(cfg))


@pytest.mark.parametrize(
    ("hook", "objective", "clean", "spliced"),
    [
        ("blocks.1.hook_resid_pre", Objective.e2e(), 3, 2),
        ("blocks.1.hook_resid_post", Objective.e2e(), 3, 1),
        ("blocks.2.hook_resid_post", Objective.e2e(), 3, 0),  # the unembedding alone
        ("blocks.1.hook_mlp_out", Objective.e2e(), 3, 2),  # from the block's start
        ("blocks.1.hook_resid_pre", Objective.local(), 1, 0),
        ("blocks.1.hook_mlp_out", Objective.local(), 2, 0),
        ("blocks.0.hook_resid_pre", Objective.local(), 0, 0),
        ("blocks.0.hook_resid_pre", Objective.e2e_downstream(1.0), 3, 3),
        ("blocks.0.hook_resid_pre", Objective(kl=0, beta=1), 2, 2),  # the last is blocks.2.hook_resid_pre
        ("blocks.0.hook_resid_pre", Objective(kl=0, beta=1, downstream_hooks=("blocks.1.hook_mlp_out",)), 2, 2),
    ],
)
def test_passes_stop_where_the_objective_lets_them(hook: str, objective: Objective, clean: int, spliced: int):
    work = workload(hook, objective)
    assert (work.clean_blocks, work.spliced_blocks) == (clean, spliced)
    parts = step_flops(work)
    assert ("clean pass: unembedding" in parts) == ("spliced pass: unembedding" in parts) == (objective.kl > 0)
    assert parts.get("clean pass: blocks", 0) == clean * 2 * 2048  # 4 x 16 x 16 and 2 x 16 x 32 weights
    assert parts.get("spliced pass: blocks", 0) == parts.get(f"{BACKWARD}blocks", 0) == spliced * 2 * 2048


def test_positions_that_are_not_trained_on_are_the_trained_ones_burden():
    whole = step_flops(workload())
    half = step_flops(workload(seqpos_slice=(4, None), train_batch_size_tokens=16, store_batch_size_prompts=4))
    assert half["clean pass: blocks"] == 2 * whole["clean pass: blocks"]
    assert half["clean pass: unembedding"] == whole["clean pass: unembedding"]
    assert half["SAE: encoder"] == whole["SAE: encoder"]


def test_every_level_of_matryoshka_has_a_spliced_pass():
    one, all_levels = step_flops(workload()), step_flops(workload(architecture="matryoshka_batchtopk"))
    sampled = step_flops(
        workload(objective=Objective(matryoshka_levels="sampled"), architecture="matryoshka_batchtopk")
    )
    for part in ("spliced pass: blocks", "backward of the spliced pass: unembedding"):
        assert (sampled[part], all_levels[part]) == (2 * one[part], 3 * one[part])
    assert all_levels["clean pass: blocks"] == one["clean pass: blocks"]


def test_frozen_and_adapted_weights_have_no_optimizer_state():
    cfg = runner_config(frozen_parameters=("b_enc",))
    sizes = workload_of(cfg, spliced_model(cfg), training_sae(cfg)).sae
    assert sizes.weight_bytes == 4 * (2 * 16 * 32 + 32 + 16)
    assert sizes.trained_bytes == sizes.optimized_bytes == 4 * (2 * 16 * 32 + 16)
    work = changed(gpt2_small(), sae={"optimized_bytes": 100})
    assert (optimizer_bytes(work), optimizer_bytes(changed(work, clips=False))) == (1000, 700)


def test_weights_are_counted_by_module():
    block = nn.Module()
    block.add_module("norm", nn.LayerNorm(4))
    block.add_module("up", nn.Linear(4, 6))
    block.add_module("positions", nn.Embedding(9, 4))
    block.register_parameter("b_Q", nn.Parameter(torch.zeros(2, 3)))  # TransformerLens's biases have heads
    block.register_parameter("_W_K", nn.Parameter(torch.zeros(2, 4, 3)))
    assert multiplied_weights(block) == 24 + 24
    experts = nn.Module()
    experts.register_parameter("gate_up_proj", nn.Parameter(torch.zeros(8, 4, 6)))
    experts.register_parameter("gate_up_proj_bias", nn.Parameter(torch.zeros(8, 6)))
    block.add_module("experts", experts)
    config = SimpleNamespace(num_local_experts=8, num_experts_per_tok=2)
    assert multiplied_weights(block, config) == 24 + 24 + 2 * 24
    packed = nn.Linear(4, 6)
    packed.weight = nn.Parameter(torch.zeros(12, 1))  # as 4-bit weights are kept
    assert multiplied_weights(packed) == 24


def test_tied_weights_are_in_memory_once():
    cfg = runner_config(hook_name="transformer.h.0")
    model = tiny_gpt2_model()
    sizes = workload_of(cfg, spliced_model(cfg, proxy(model)), training_sae(cfg)).model
    distinct = sum(p.numel() for p in model.parameters())  # which lists a tied weight once
    assert sizes.weight_bytes == 4 * distinct + sum(b.untyped_storage().nbytes() for b in model.buffers())
    assert not any(name == "lm_head.weight" for name, _ in model.named_parameters())


# Memory.

SAVED = SavedBytes(fixed=30_000.0, per_position=48.0)


def test_memory_by_hand():
    memory = step_memory(gpt2_small(step_prompts=4), SAVED)  # one micro-batch of 1,024 tokens
    acts, weights = 1024 * 46080 * 4, 4 * (2 * D * 46080 + 46080 + D)
    block = 1024 * (30_000 + 48 * 256)
    chunk = 128 * 50257 * 4  # 2**23 logits, in whole 64s of tokens
    assert memory.parts == {
        "Python and libraries": LIBRARIES_BYTES,
        "model weights": 500_000_000,
        "SAE weights": weights,
        "SAE gradients": weights,
        "optimizer state": 2 * weights,
        "clean activations": 1024 * 2 * D * 4,
        "spliced activations": 6 * block,
        "working space of a block": block,
        "KL chunk": 2 * chunk,
        "SAE activations": acts + 2**24 * 4,  # and the chunk in which features were counted
    }
    held = LIBRARIES_BYTES + 500_000_000 + 3 * weights + 1024 * 2 * D * 4
    assert memory.phases["forward and backward of the SAE"] == held + weights + acts + 2**24 * 4
    assert memory.peak_bytes == max(memory.phases.values()) == memory.phases[memory.peak_phase]
    on_device = step_memory(gpt2_small(step_prompts=4), SAVED, on_cpu=False)
    assert "Python and libraries" not in on_device.parts
    assert on_device.parts["KL chunk"] == 3 * chunk
    assert on_device.parts["SAE activations"] == 2 * acts


def test_a_relu_sae_runs_at_once_on_what_is_smaller_than_a_second_gradient():
    assert gpt2_small().sae_prompts == 8  # 1,024 tokens beyond a micro-batch, against 2 d_in = 1,536
    assert gpt2_small(step_prompts=12).sae_prompts == 4  # 2,048
    assert changed(gpt2_small(), sae={"architecture": "jumprelu"}).sae_prompts == 4  # SAELens's own code


def test_sparse_kernels_hold_a_chunk_and_the_active_features():
    topk = changed(gpt2_small(), separable=False, sae={"architecture": "topk", "active": 40.0})
    assert topk.sae_prompts == 8  # its auxiliary loss ties the step together
    entries = 2048 * 40 * ENTRY_BYTES
    assert step_memory(topk, SAVED).parts["SAE activations"] == entries + 2**24 * 4
    assert step_memory(topk, SAVED).peak_bytes < step_memory(gpt2_small(), SAVED).peak_bytes
    other = changed(topk, sae={"architecture": "abstopk"})
    assert step_memory(other, SAVED).parts["SAE activations"] == 4 * 2048 * 46080 * 4


def test_local_training_holds_nothing_of_a_spliced_pass():
    local = changed(gpt2_small(), has_kl=False, clean_blocks=6, spliced_end=6)
    memory = step_memory(local, SAVED)
    assert not {"spliced activations", "KL chunk"} & set(memory.parts)
    assert "spliced pass" not in memory.phases
    assert local.sae_prompts == local.step_prompts  # the host's code runs the SAE on the whole step


@pytest.mark.parametrize(
    "larger",
    [
        {"context_size": 512, "trained_positions": 512},
        {"micro_prompts": 8},
        {"step_prompts": 16, "micro_prompts": 8},
        {"start_block": 2},
        {"n_downstream": 5},
        {"sae": {"d_sae": 80 * D, "weight_bytes": 10**9, "trained_bytes": 10**9, "optimized_bytes": 10**9}},
        {"model": dataclasses.replace(gpt2_small().model, weight_bytes=600_000_000)},
        {"model": dataclasses.replace(gpt2_small().model, has_linear_head=False)},
    ],
    ids=str,
)
def test_more_of_anything_takes_more_memory(larger: dict[str, Any]):
    saved = SavedBytes(100_000.0, 48.0)  # enough that the spliced pass is the largest moment
    work = gpt2_small(8 * D)
    assert step_memory(changed(work, **larger), saved).peak_bytes > step_memory(work, saved).peak_bytes


@pytest.mark.parametrize(
    "larger",
    [
        {"context_size": 512, "trained_positions": 512},
        {"start_block": 2},
        {"n_reconstructions": 2},
        {"sae": {"d_sae": 80 * D}},
        {"trained_positions": 128},
        {"model": dataclasses.replace(gpt2_small().model, vocabulary=60000)},
    ],
    ids=str,
)
def test_more_of_anything_takes_more_arithmetic(larger: dict[str, Any]):
    assert total_flops(step_flops(changed(gpt2_small(), **larger))) > total_flops(step_flops(gpt2_small()))


@pytest.mark.parametrize("family", ["hooked_transformer", "gpt2", "llama"])
def test_what_autograd_keeps_is_predicted_from_short_sequences(family: str):
    """Counted with at most 12 positions, right for 16; what no position adds to is left out."""
    hook = "blocks.1.hook_resid_pre" if family == "hooked_transformer" else f"{module_names(family)['layers']}.0"
    spliced = spliced_model(runner_config(hook_name=hook), shared_model(family))
    saved = saved_by_spliced_pass(spliced, context_size=12)
    predicted = [2 * n * saved.at(n) for n in (8, 16)]
    counted = [_saved_bytes(spliced, n) for n in (8, 16)]
    assert predicted[1] - predicted[0] == pytest.approx(counted[1] - counted[0], rel=0.02)
    assert predicted[1] > 2 * 16 * 16 * 4 * 4  # more than a few residual streams


def test_a_place_after_the_last_block_keeps_nothing():
    spliced = spliced_model(runner_config(hook_name="blocks.2.hook_resid_post"))
    assert saved_by_spliced_pass(spliced, 8) == SavedBytes(0.0, 0.0)


def test_counting_leaves_the_model_as_it_is():
    model = tiny_hooked_transformer()
    spliced = spliced_model(runner_config(), model)
    saved_by_spliced_pass(spliced, 8)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


# Advice.


def advice_of(work: Workload, **settings: Any) -> list[advice_module.Advice]:
    cfg = runner_config(store_batch_size_prompts=4, **settings)
    return advice_for(cfg, work, SAVED)


def test_advice_says_what_each_change_saves():
    work = gpt2_small()
    found = {one.change.split(" ")[0]: one for one in advice_of(work)}
    smaller = found["sae.d_sae:"]
    half = {
        "d_sae": 30 * D,
        **{f"{what}_bytes": work.sae.weight_bytes // 2 for what in ("weight", "trained", "optimized")},
    }
    other = changed(work, sae=half)
    assert smaller.change == "sae.d_sae: 23040 (now 46080)"
    assert smaller.memory_saving == step_memory(work, SAVED).peak_bytes - step_memory(other, SAVED).peak_bytes > 0
    assert smaller.flops_saving == pytest.approx(1 - total_flops(step_flops(other)) / total_flops(step_flops(work)))
    assert found["hook_name:"].change == "hook_name: a place before block 9 (now block 6)"
    topk = changed(work, sae={"active": 40.0})
    saving = 1 - total_flops(step_flops(topk)) / total_flops(step_flops(work))
    assert found["sae.architecture:"].flops_saving == pytest.approx(saving)
    free = [one for one in advice_of(gpt2_small(8 * D)) if one.change.startswith("store_batch_size_prompts: 2 ")]
    assert [one.price for one in free] == [""]
    assert "local_first:" not in found  # an L1 that suits a squared error does not suit a KL


def test_advice_is_ordered_free_ones_first_then_by_what_they_save():
    for order, saving in ((for_memory, "memory_saving"), (for_time, "flops_saving")):
        ordered = order(advice_of(gpt2_small()))
        assert len(ordered) > 2
        keys = [(bool(one.price), -getattr(one, saving)) for one in ordered]
        assert keys == sorted(keys)
        assert all(getattr(one, saving) > 0 for one in ordered)


def test_a_local_start_is_advised_where_it_is_allowed():
    work = changed(gpt2_small(), separable=False, sae={"architecture": "topk", "active": 40.0})
    found = {one.change: one for one in advice_of(work, architecture="topk")}
    local = changed(work, has_kl=False, clean_blocks=6, spliced_end=6)
    saving = 0.5 * (1 - total_flops(step_flops(local)) / total_flops(step_flops(work)))
    assert found["local_first: 0.5 (now 0)"].flops_saving == pytest.approx(saving)
    assert found["local_first: 0.5 (now 0)"].memory_saving == 0  # the other half needs what it needs
    assert not any("local_first" in one.change for one in advice_of(work, architecture="topk", local_first=0.5))


def test_a_smaller_step_is_advised_where_the_sae_runs_on_all_of_it():
    whole = changed(gpt2_small(), separable=False, sae={"architecture": "gated"})
    assert any("train_batch_size_tokens: 1024 " in one.change for one in advice_of(whole))
    assert not any("train_batch_size_tokens" in one.change for one in advice_of(gpt2_small(step_prompts=32)))


def test_free_memory_is_the_machines_within_the_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       2000 kB\nMemAvailable:   1000 kB\n")
    assert advice_module._free_of_machine(meminfo) == 1_024_000
    assert (advice_module._free_of_machine(tmp_path / "none") or 1) > 0
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert advice_module._free_of_container(tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert advice_module._free_of_container(tmp_path) is None
    assert advice_module._free_of_container(tmp_path / "none") is None
    monkeypatch.setattr(advice_module, "_free_of_machine", lambda: 5)
    monkeypatch.setattr(advice_module, "_free_of_container", lambda: 3)
    assert available_memory("cpu") == 3
    assert available_memory("mps") is None


def test_under_autocast_the_hosts_own_code_is_counted():
    plain = changed(gpt2_small(), separable=False, sae={"architecture": "topk", "active": 40.0})
    autocast = changed(plain, autocasts_sae=True)
    assert step_memory(autocast, SAVED).parts["SAE activations"] == 8 * 2048 * 46080 * 4
    assert step_memory(autocast, SAVED).peak_bytes > step_memory(plain, SAVED).peak_bytes
    assert changed(gpt2_small(), autocasts_sae=True).sae_prompts == 4
