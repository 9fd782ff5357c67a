"""Frozen Hugging Face models too large for one device or for 32 bits: bf16, quantised, spread over devices, offloaded."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers import hook_of, proxy, randomise, tiny_gpt2_model, tiny_llama_model, token_batch
from time_limits import hang_seconds
from torch import Tensor, nn

from e2e_sae_plugin import Objective, splice_into
from e2e_sae_plugin.kernels.head import LinearHead
from e2e_sae_plugin.kernels.kl import fused_kl_sum
from e2e_sae_plugin.losses import kl_per_token
from e2e_sae_plugin.splice import SplicedModel
from e2e_sae_plugin.spliced_losses import clean_micro_batch, spliced_terms

MODELS: dict[str, Callable[..., Any]] = {"gpt2": tiny_gpt2_model, "llama": tiny_llama_model}


def terms_and_gradient(spliced: SplicedModel, noise: float = 0.3) -> tuple[dict[str, float], Tensor]:
    """KL and downstream error of a disturbed activation, and their gradient for it, `[tokens, d_in]` in fp32."""
    micro = clean_micro_batch(spliced, token_batch(2), hidden=True)
    sae_in = micro.sae_in(None).float().cpu()
    sae_out = sae_in + noise * torch.randn(sae_in.shape, generator=torch.Generator().manual_seed(1))
    result = spliced_terms(spliced, Objective(kl=1.0, beta=0.1), [micro], [("", 1.0, sae_out)], None, None)
    return {name: float(value) for name, value in result.named.items()}, result.gradients[0].float().cpu()


def spliced(family: str, model: Any) -> SplicedModel:
    made = splice_into(proxy(model), hook_of(family))
    made.check()
    return made


def offloaded_to_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def dispatched_in_part(model: nn.Module, folder: Path) -> nn.Module:
    """The second block on disk, the rest where it computes."""
    layers = "transformer.h" if hasattr(model, "transformer") else "model.layers"
    device_map: dict[str, Any] = {}
    for name, module in model.named_modules():
        parent, _, index = name.rpartition(".")
        if parent == layers:
            device_map[name] = "disk" if index == "1" else "cpu"
        elif next(module.parameters(recurse=False), None) is not None and layers not in name:
            device_map[name] = "cpu"
    return dispatch_model(model, device_map, main_device=torch.device("cpu"), offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("offload", [offloaded_to_cpu, offloaded_to_disk, dispatched_in_part])
@pytest.mark.parametrize("family", sorted(MODELS))
def test_offloaded_weights_give_the_same_gradient(family: str, offload: Any, recomputes: bool, tmp_path: Path):
    expected_terms, expected = terms_and_gradient(spliced(family, MODELS[family]()))
    model = spliced(family, offload(MODELS[family](), tmp_path))
    model.recompute_blocks(recomputes)
    assert any(p.is_meta for p in model.model.parameters()), "nothing is offloaded"
    terms, gradient = terms_and_gradient(model)
    assert terms == pytest.approx(expected_terms, rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert float(gradient.norm()) > 0
    assert any(p.is_meta for p in model.model.parameters()), "what was loaded stays loaded"


def test_weights_without_numbers_are_refused():
    with torch.device("meta"):
        model = tiny_llama_model()
    with pytest.raises(ValueError, match=r"'meta' device.*device_map"):
        spliced("llama", model)


def test_a_bf16_model_trains_the_sae_as_its_weights_in_fp32_do():
    """Same weights, rounded to bf16 once: what is left is the rounding of activations, 1 in 512 in each of some 50 steps."""
    for family, make in MODELS.items():
        narrow = make().to(torch.bfloat16)
        wide = copy.deepcopy(narrow).float()
        terms, gradient = terms_and_gradient(spliced(family, narrow), noise=1.0)
        expected_terms, expected = terms_and_gradient(spliced(family, wide), noise=1.0)
        assert terms == pytest.approx(expected_terms, rel=0.05), family
        assert float((gradient - expected).norm() / expected.norm()) < 0.1, family


def test_the_kl_of_a_bf16_head_is_summed_in_fp32():
    """In bf16 a sum of 4,096 probabilities near 1 / 4,096 stops growing at a sixteenth of them."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.05 * torch.randn(4096, 32, generator=generator)).bfloat16()
    clean, changed = torch.randn(2, 256, 32, generator=generator).bfloat16()
    changed.requires_grad_()
    got = fused_kl_sum(clean, changed, LinearHead(weight), 4096)
    assert got.dtype == torch.float32
    (gradient,) = torch.autograd.grad(got, changed)
    exact_changed = changed.detach().double().requires_grad_()
    expected = kl_per_token(clean.double() @ weight.double().T, exact_changed @ weight.double().T).sum()
    (expected_gradient,) = torch.autograd.grad(expected, exact_changed)
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=5e-3)
    assert float((gradient.double() - expected_gradient).norm() / expected_gradient.norm()) < 0.02


@pytest.mark.slow
def test_a_model_split_by_tensor_parallelism_gives_the_same_gradient(tmp_path: Path):
    """In two processes on the CPU; the runner refuses it, but a script of one's own may splice such a model."""
    config = tiny_llama_model().config
    config.num_key_value_heads = 2  # one for each process
    randomise(type(tiny_llama_model())(config)).save_pretrained(tmp_path)
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(here.parent), str(here)])
    result = subprocess.run(
        [*command, str(here / "tensor_parallel.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=hang_seconds(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("the gradients agree") == 2
