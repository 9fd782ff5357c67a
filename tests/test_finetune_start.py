"""Any finished SAE as a start: the same weights and activations, and again the same SAE when nothing was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BUILT_IN_ARCHITECTURES, runner_config, training_sae
from sae_lens import SAE
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

from e2e_sae_plugin.finetune.start import (
    SPARSITY_COEFFICIENT,
    finished_form,
    load_sae,
    same_weights,
    training_config,
    training_counterpart,
)


def finished(architecture: str, folder: Path, **sae: Any) -> SAE[Any]:
    """A trained SAE's export, as `SAE.load_from_disk` gives it."""
    training_sae(runner_config(architecture, sae=sae)).save_inference_model(str(folder))
    return SAE.load_from_disk(str(folder))


@pytest.mark.parametrize("architecture", BUILT_IN_ARCHITECTURES)
def test_nothing_trained_is_the_same_sae_to_the_bit(architecture: str, tmp_path: Path):
    original = finished(architecture, tmp_path / "original")
    start = training_counterpart(original)
    assert start.cfg.architecture() == original.cfg.architecture()
    assert same_weights(start, original)
    finished_form(start, original).save_model(tmp_path / "again")
    again = SAE.load_from_disk(str(tmp_path / "again"))
    assert type(again) is type(original)
    assert same_weights(again, original)
    first, second = (tmp_path / name / "sae_weights.safetensors" for name in ("original", "again"))
    assert first.read_bytes() == second.read_bytes()
    x = 3 * torch.randn(40, original.cfg.d_in)
    with torch.no_grad():
        assert torch.equal(again.encode(x), original.encode(x))
        assert torch.equal(again(x), original(x))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_the_sparsity_coefficient_comes_from_the_metadata_or_the_user(architecture: str, tmp_path: Path):
    name = SPARSITY_COEFFICIENT[architecture]
    original = finished(architecture, tmp_path, **{name: 0.123})
    assert getattr(training_config(original), name) == 0.123
    assert getattr(training_config(original, {name: 0.5}), name) == 0.5
    original.cfg.metadata.training_architecture_details = None
    if architecture == "jumprelu":
        assert getattr(training_config(original), name) == 0
        with pytest.raises(ValueError, match="do not say its l0_coefficient"):
            training_config(original, thresholds_are_frozen=False)
    else:
        with pytest.raises(ValueError, match="do not say its l1_coefficient, without which its L0 would drift"):
            training_counterpart(original)
    assert getattr(training_config(original, {name: 0.5}), name) == 0.5


def test_what_the_metadata_say_of_another_architecture_is_not_taken(tmp_path: Path):
    exported = finished("batchtopk", tmp_path)
    assert exported.cfg.architecture() == "jumprelu"
    assert exported.cfg.metadata.training_architecture == "batchtopk"
    assert training_config(exported).to_dict()["l0_coefficient"] == 0


def test_warm_ups_are_over(tmp_path: Path):
    original = finished("standard", tmp_path, l1_warm_up_steps=5)
    assert training_config(original).to_dict()["l1_warm_up_steps"] == 0


def test_low_precision_becomes_fp32(tmp_path: Path):
    original = finished("topk", tmp_path, dtype="bfloat16")
    start = training_counterpart(original)
    assert (start.W_dec.dtype, start.cfg.dtype) == (torch.float32, "float32")
    assert torch.equal(start.W_dec.bfloat16(), original.W_dec)


def test_the_original_is_left_alone(tmp_path: Path):
    original = finished("standard", tmp_path)
    start = training_counterpart(original)
    with torch.no_grad():
        start.W_dec.add_(1)
    start.cfg.metadata.objective = "changed"
    assert not torch.equal(start.W_dec, original.W_dec)
    assert original.cfg.metadata.objective is None


def test_architectures_without_a_training_form_are_refused_by_name():
    transcoder = Transcoder(TranscoderConfig(d_in=4, d_out=4, d_sae=8, apply_b_dec_to_input=False))
    with pytest.raises(ValueError, match=r"'transcoder' cannot be fine-tuned.*writes elsewhere than it reads"):
        training_counterpart(transcoder)


def test_unknown_settings_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="'topk' has no training setting 'l1_coefficient'"):
        training_config(finished("topk", tmp_path), {"l1_coefficient": 1.0})


def test_saes_are_found_in_folders_and_refused_by_name_elsewhere(tmp_path: Path):
    original = finished("standard", tmp_path / "sae")
    assert same_weights(load_sae(tmp_path / "sae"), original)
    assert load_sae(original) is original
    with pytest.raises(ValueError, match=r"holds no SAE. Name one of the folders in it: sae"):
        load_sae(tmp_path)
    with pytest.raises(ValueError, match="sae_id='x' has no meaning"):
        load_sae(tmp_path / "sae", "x")
    with pytest.raises(ValueError, match="taken for a release of SAELens or a Hub repository, and needs a sae_id"):
        load_sae("gemma-scope-2")
