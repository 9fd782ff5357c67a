"""Frozen models in 8 and 4 bits: the gradient that reaches the SAE, whole runs from a config, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import hook_of, randomise, runner_config, tiny_tokenizer, token_dataset
from sae_lens import SAE
from test_large_models import MODELS, spliced, terms_and_gradient
from torch import nn
from transformers import BitsAndBytesConfig

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner
from e2e_sae_plugin.build import load_language_model
from e2e_sae_plugin.kernels.head import LinearHead
from e2e_sae_plugin.model_settings import check_model_settings, loading_settings

bnb = pytest.importorskip("bitsandbytes")

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
EIGHT_BIT = {"load_in_8bit": True}
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")


# The smallest that the 4-bit product of a CPU takes: blocks of 32 rows.
WIDER: dict[str, dict[str, int]] = {"gpt2": {"n_embd": 64}, "llama": {"hidden_size": 64, "intermediate_size": 128}}


def plain(family: str) -> Any:
    return randomise(MODELS[family](**WIDER[family]), scale=0.12)


def saved(family: str, folder: Path) -> str:
    plain(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def load(folder: str, **settings: Any) -> Any:
    return load_language_model("AutoModelForCausalLM", folder, "cpu", settings).model


def dequantised(model: nn.Module, family: str) -> nn.Module:
    """The same model in fp32, from what its quantised weights stand for; of a model that has not run, which repacks them."""
    wide = plain(family)
    module: Any
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight.data.float() * module.weight.SCB[:, None].float() / 127
        else:
            continue
        target = wide.get_submodule(name).weight
        assert not torch.equal(weight, target), "nothing is quantised"
        # GPT-2's projections are transposed.
        target.data.copy_(weight.T if family == "gpt2" else weight)
    return wide


@pytest.mark.parametrize("family", sorted(MODELS))
def test_gradients_through_4_bits_are_those_of_the_dequantised_weights(family: str, tmp_path: Path):
    model = load(saved(family, tmp_path), quantization_config=FOUR_BIT)
    expected_terms, expected = terms_and_gradient(spliced(family, dequantised(model, family)))
    terms, gradient = terms_and_gradient(spliced(family, model))
    assert terms == pytest.approx(expected_terms, rel=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    _, original = terms_and_gradient(spliced(family, plain(family)))
    assert float((original - expected).norm() / expected.norm()) > 0.02, "the comparison could not fail"


@pytest.mark.parametrize("family", sorted(MODELS))
def test_gradients_through_8_bits_are_those_of_the_dequantised_weights(family: str, tmp_path: Path):
    """Up to the rounding of activations, which the 8-bit product rounds to 8 bits too."""
    model = load(saved(family, tmp_path), quantization_config=EIGHT_BIT)
    expected_terms, expected = terms_and_gradient(spliced(family, dequantised(model, family)), noise=1.0)
    terms, gradient = terms_and_gradient(spliced(family, model), noise=1.0)
    assert terms == pytest.approx(expected_terms, rel=0.05)
    assert float((gradient - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("quantisation", [EIGHT_BIT, FOUR_BIT])
def test_a_quantised_head_is_run_by_the_model(quantisation: dict[str, Any], tmp_path: Path):
    config = {**quantisation, "llm_int8_skip_modules": ["embed_tokens"]}  # by default the head stays as it is
    model = spliced("llama", load(saved("llama", tmp_path), quantization_config=config))
    assert type(model.model.get_submodule("model.lm_head")) is not nn.Linear
    assert not isinstance(model.unembed, LinearHead)
    _, gradient = terms_and_gradient(model)
    assert float(gradient.norm()) > 0
    spared = spliced("llama", load(str(tmp_path), quantization_config=quantisation))
    assert isinstance(spared.unembed, LinearHead)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"quantization_config": EIGHT_BIT},
        {"quantization_config": FOUR_BIT},
        {"device_map": {"": "cpu"}},
    ],
    ids=["bf16", "8 bits", "4 bits", "device_map"],
)
def test_a_run_from_yaml(settings: dict[str, Any], tmp_path: Path):
    folder = saved("llama", tmp_path / "model")
    config = runner_config(
        "topk", model_name=folder, model_class_name="AutoModelForCausalLM", hook_name=hook_of("llama"), lr=1e-2,
        sae={"d_in": 64},
        model_from_pretrained_kwargs=settings, output_path=str(tmp_path / "out"), training_tokens=32 * 20,
    )  # fmt: skip
    written = yaml.safe_dump({k: v for k, v in config.to_dict().items() if not k.startswith("sae_lens")})
    read = E2ESAERunnerConfig.from_dict(yaml.safe_load(written))
    E2ESAETrainingRunner(read, override_dataset=token_dataset()).run()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    kl = [line["losses/kl_loss"] for line in lines if "losses/kl_loss" in line]
    assert sum(kl[-5:]) < sum(kl[:5])
    saved_sae = SAE.load_from_disk(str(tmp_path / "out"))
    assert saved_sae.cfg.metadata.model_from_pretrained_kwargs == settings
    assert saved_sae.W_dec.dtype == torch.float32


def test_weights_that_a_pass_has_repacked_are_refused(tmp_path: Path):
    model = load(saved("llama", tmp_path), quantization_config=FOUR_BIT)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # what a processor with bf16 products makes of it
    with pytest.raises(ValueError, match=r"up_proj' have been repacked.*Load the model anew"):
        spliced("llama", model)


def test_what_cannot_work_is_refused_when_the_config_is_made(monkeypatch: pytest.MonkeyPatch):
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("HookedTransformer", {"quantization_config": EIGHT_BIT}, "needs weights that are not quantised"),
        ("TransformerBridge", {"quantization_config": EIGHT_BIT}, "needs weights that are not quantised"),
        ("AutoModelForCausalLM", {"quantization_config": {}}, "must set one of load_in_4bit and load_in_8bit"),
        ("AutoModelForCausalLM", {"quantization_config": {**EIGHT_BIT, **FOUR_BIT}}, "must set one of"),
        (
            "AutoModelForCausalLM",
            {"quantization_config": {"load_in_4bit": True, "x": object()}},
            "no file can keep",
        ),
        ("AutoModelForCausalLM", {"tp_plan": "auto"}, "tp_plan='auto' cannot be used"),
        ("HookedTransformer", {"device_map": "auto"}, "n_devices"),
    ]
    for model_class, settings, message in refused:
        with pytest.raises(ValueError, match=message):
            runner_config("topk", model_class_name=model_class, model_from_pretrained_kwargs=settings)
    object_form = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match=r"plain mapping.*'load_in_8bit': True"):
        check_model_settings("AutoModelForCausalLM", {"quantization_config": object_form})
    with pytest.raises(ValueError, match="llm_device='cuda:1' has no effect"):
        check_model_settings("AutoModelForCausalLM", {"device_map": "auto"}, "cuda:0", "cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2"):
        check_model_settings("AutoModelForCausalLM", {"device_map": "auto"})
    monkeypatch.setattr("e2e_sae_plugin.model_settings.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"e2e-sae-plugin\[quantized\]"):
        check_model_settings("AutoModelForCausalLM", {"quantization_config": EIGHT_BIT})


def test_quantised_weights_go_to_the_models_device_at_once():
    given = {"quantization_config": EIGHT_BIT}
    before = copy.deepcopy(given)
    assert loading_settings("AutoModelForCausalLM", given, "cuda:1")["device_map"] == {"": "cuda:1"}
    assert given == before
    assert loading_settings("AutoModelForCausalLM", {**given, "device_map": "auto"}, "cpu")["device_map"] == "auto"
