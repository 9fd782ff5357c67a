"""The table of model families: a few of its rows, and that its checks and its tool can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from splice_cells import outcome
from sweep_classes import Swept, decoder_layers
from test_notebooks import load_script
from tiny_configs import tiny_config, tiny_model
from tiny_families import BLOCK, FAMILIES, MODEL_CLASSES, PLACES, Family, hook_names, load, save
from torch import nn
from transformers import CONFIG_MAPPING

from e2e_sae_plugin.splice.hugging_face import SplicedHuggingFace

tool = load_script("model_families")
FAMILY = {family.name: family for family in FAMILIES}


def cells(name: str) -> dict[str, dict[str, str]]:
    return {model_class: {p: row[p] for p in PLACES} for model_class, row in tool.try_family(FAMILY[name]).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", "GPT-Neo", "Gemma 2"])
def test_families_that_all_three_classes_load(name: str):
    assert cells(name) == dict.fromkeys(MODEL_CLASSES, dict.fromkeys(PLACES, "works"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Falcon, old architecture", "Gemma 4, E-series"])
def test_families_with_operations_in_place_and_with_keys_shared_between_layers(name: str):
    found = cells(name)
    assert found["AutoModelForCausalLM"] == found["TransformerBridge"] == dict.fromkeys(PLACES, "works")
    assert set(found["HookedTransformer"].values()) == {
        "-: TransformerLens does not load it (NotImplementedError: its class is not currently supported.)"
    }


@pytest.mark.slow
def test_a_decoder_that_lies_one_module_deeper():
    works = dict.fromkeys(MODEL_CLASSES, "works")
    assert {model_class: row["resid"] for model_class, row in cells("OPT").items()} == works


@pytest.mark.slow
def test_an_encoder_decoder_is_refused():
    found = cells("T5")
    assert all(result.startswith("refused: ") for result in found["AutoModelForCausalLM"].values())
    assert all(result.startswith("refused: ") for result in found["TransformerBridge"].values())


# What makes a cell fail.


@pytest.fixture
def gpt2(tmp_path: Path) -> tuple[Any, str]:
    family: Family = FAMILY["GPT-2"]
    model = load(family, save(family, tmp_path), "AutoModelForCausalLM")
    name = hook_names(family, "AutoModelForCausalLM", model)["resid"]
    assert name is not None
    return model, name


def test_a_block_that_runs_again_fails(gpt2: tuple[Any, str]):
    assert outcome(*gpt2, BLOCK) == "works"
    assert outcome(*gpt2, BLOCK + 1).startswith("FAILS: CellError: the spliced pass calls the blocks {2: 1, 3: 1}")


def test_a_lost_gradient_fails(gpt2: tuple[Any, str], monkeypatch: pytest.MonkeyPatch):
    original = SplicedHuggingFace._run

    def detached(self: Any, *args: Any) -> torch.Tensor:
        final = original(self, *args)
        return final.detach().requires_grad_(final.requires_grad)

    monkeypatch.setattr(SplicedHuggingFace, "_run", detached)
    assert outcome(*gpt2, BLOCK).startswith("FAILS: CellError: no gradient reaches the activation")


def test_an_activation_that_is_not_the_models_own_fails(gpt2: tuple[Any, str], monkeypatch: pytest.MonkeyPatch):
    original = SplicedHuggingFace.clean_pass

    def shifted(self: Any, *args: Any, **settings: Any) -> Any:
        clean = original(self, *args, **settings)
        clean.activation = clean.activation + 0.01
        return clean

    monkeypatch.setattr(SplicedHuggingFace, "clean_pass", shifted)
    assert outcome(*gpt2, BLOCK).startswith("FAILS: CellError: clean activation: ")


def test_hooks_that_stay_behind_fail(gpt2: tuple[Any, str], monkeypatch: pytest.MonkeyPatch):
    original = SplicedHuggingFace.spliced_pass

    def leaving_a_hook(self: Any, *args: Any, **settings: Any) -> Any:
        self.model.model.lm_head.register_forward_hook(lambda *_: None)
        return original(self, *args, **settings)

    monkeypatch.setattr(SplicedHuggingFace, "spliced_pass", leaving_a_hook)
    assert outcome(*gpt2, BLOCK).startswith("FAILS: CellError: hooks or swapped layers are left behind")


def test_only_the_packages_own_errors_are_refusals(gpt2: tuple[Any, str]):
    model, hook_name = gpt2
    assert outcome(model, "transformer.h.1.nowhere", BLOCK).startswith("refused: The model has no hook_name")

    def fail(*_: Any) -> None:
        raise ValueError("not of the package")

    model.model.transformer.register_forward_pre_hook(fail)
    result = outcome(model, hook_name, BLOCK)
    assert "not of the package" in result
    assert not result.startswith("refused: not of the package")


# The tool.


def test_a_difference_from_the_page_fails_and_another_version_does_not(capsys: pytest.CaptureFixture[str]):
    page = tool.PAGE.read_text()
    newer = tool.with_block(page, "versions", "transformers 99.0, transformer-lens 99.0, sae-lens 99.0")
    assert newer != page
    assert tool._conclude(page, newer, [], check=True) == 0
    assert tool._conclude(page, page.replace("| works |", "| - |", 1), [], check=True) == 1
    assert "works" in capsys.readouterr().err
    assert tool._conclude(page, page, ["GPT-2: FAILS"], check=True) == 1


def test_the_page_has_every_family_and_the_versions_of_the_constraints():
    page = tool.PAGE.read_text()
    pinned = (tool.ROOT / "constraints.txt").read_text().splitlines()
    assert all(f"\n| {name} | " in page for name in FAMILY)
    assert all(f"{line.replace('==', ' ')}" in page for line in pinned if line.split("==")[0] in tool.PACKAGES)


def test_cells_of_one_result_are_joined_and_messages_are_numbered():
    row = {"resid": "works", "mlp_out": "-: no hook", "attn z": "-: no hook"}
    works = dict.fromkeys(PLACES, "works")
    table = tool.families_table({"Mamba": dict.fromkeys(MODEL_CLASSES, works) | {"TransformerBridge": row}})
    last, _, note = table.splitlines()[-3:]
    assert last.endswith("| works | works | resid works, mlp_out - (1), attn z - (1) |")
    assert note == "1. no hook"


def test_classes_are_listed_by_result_with_what_differs_between_machines_left_out():
    swept = [Swept("B", "refused: B is off by 0.12"), Swept("A", "works"), Swept("C", "refused: C is off by 1.5e-3")]
    assert tool.classes_list(swept) == "**1 work:** `A`\n\n* `B`, `C`: refused: the class is off by …"


@pytest.mark.parametrize(
    ("model_type", "path"),
    [("opt", "model.decoder.layers"), ("git", "git.encoder.layer"), ("fuyu", "model.language_model.layers")],
)
def test_the_decoders_layers_are_found(model_type: str, path: str):
    model = tiny_model(tiny_config(CONFIG_MAPPING[model_type]))
    assert decoder_layers(model) == path
    assert isinstance(model.get_submodule(path), nn.ModuleList)


def test_a_model_that_stays_large_is_not_built():
    with pytest.raises(ValueError, match=r"^It still has [\d,]{10,} parameters\.$"):
        tiny_model(tiny_config(CONFIG_MAPPING["llama"], intermediate_size=100_000))
