"""An evaluation belongs to the weights that it was made of: nothing else goes up with an SAE."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import runner_config, tiny_hooked_transformer, token_batch, token_dataset
from hub_saes import an_sae
from sae_lens import SAE
from safetensors.torch import load_file, save_file

from e2e_sae_plugin import E2ESAETrainingRunner
from e2e_sae_plugin.architectures import TOKEN_SEPARABLE
from e2e_sae_plugin.checkpoint.finished import finished_sae
from e2e_sae_plugin.evaluation import Evaluation, evaluate
from e2e_sae_plugin.evaluation.result import weights_sha256
from e2e_sae_plugin.hub.gather import SharedSAE, gather
from e2e_sae_plugin.output_folder import mark_output

ARCHITECTURES = sorted({*TOKEN_SEPARABLE, "batchtopk", "matryoshka_batchtopk", "gated"})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_hooked_transformer()


def measured(sae: SAE[Any], model: Any, **settings: Any) -> Evaluation:
    return evaluate(sae, model, token_batch(2), n_resamples=2, ablations=False, **settings)


def exported(folder: Path, architecture: str = "topk", seed: int = 0) -> Path:
    an_sae(architecture, seed).save_inference_model(folder)
    return folder


def gathered(source: Any, tmp_path: Path, evaluation: Evaluation | None = None) -> SharedSAE:
    workspace = tmp_path / f"workspace{len(list(tmp_path.glob('workspace*')))}"
    workspace.mkdir()
    return gather(source, workspace, evaluations=evaluation)[0]


# The digest.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_sae_has_the_digest_of_its_export(tmp_path: Path, architecture: str):
    sae = an_sae(architecture)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    digest = weights_sha256(sae)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    sae.save_inference_model(tmp_path)
    assert weights_sha256(SAE.load_from_disk(tmp_path)) == digest
    # What a run returns has been exported once.
    assert weights_sha256(sae) == digest


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_digest_is_that_of_the_values_in_fp32(tmp_path: Path, dtype: str):
    sae = SAE.load_from_disk(exported(tmp_path / "a"))
    half = copy.deepcopy(sae).to(dtype=getattr(torch, dtype))
    half.cfg.dtype = dtype
    half.save_model(tmp_path / "half")
    assert load_file(tmp_path / "half/sae_weights.safetensors")["W_dec"].dtype == getattr(torch, dtype)
    loaded = SAE.load_from_disk(tmp_path / "half", dtype="float32")
    assert weights_sha256(loaded) == weights_sha256(half)
    assert weights_sha256(half) != weights_sha256(sae)  # it was rounded


def test_the_digest_sees_every_weight_and_its_place():
    sae = an_sae("standard")
    digests = {weights_sha256(sae)}
    for i in range(sae.cfg.d_sae):
        changed = copy.deepcopy(sae)
        changed.W_dec.data[i, -1] += 1e-6
        digests.add(weights_sha256(changed))
    swapped = copy.deepcopy(sae)
    swapped.W_dec.data = swapped.W_dec.data.flip(0)
    assert len(digests | {weights_sha256(swapped)}) == sae.cfg.d_sae + 2


# What goes up with an SAE.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_its_own_evaluation_goes_up(tmp_path: Path, model: Any, architecture: str):
    sae = an_sae(architecture)
    found = measured(sae, model)
    assert gathered(sae, tmp_path, found).entry.evaluation is not None  # in memory, in training form
    sae.save_inference_model(tmp_path / "run")
    assert gathered(sae, tmp_path, measured(sae, model)).entry.evaluation is not None  # as a run returns it
    for each in (found, measured(SAE.load_from_disk(tmp_path / "run"), model)):
        each.save(tmp_path / "run/evaluation.json")
        said = gathered(tmp_path / "run", tmp_path).entry.evaluation
        assert said is not None
        assert said.metrics == each.metrics


def test_that_of_an_earlier_sae_is_refused_and_named(tmp_path: Path, model: Any):
    folder = exported(tmp_path / "run")
    measured(SAE.load_from_disk(folder), model).save(folder / "evaluation.json")
    exported(folder, seed=1)  # trained again
    message = (
        r"(?s)^Nothing was sent.*blocks\.1\.hook_resid_pre: its evaluation is of other weights \(SHA-256 .* not .*"
    )
    message += r"e2e-sae evaluate FOLDER --output FOLDER/evaluation\.json\), or remove evaluation\.json"
    with pytest.raises(ValueError, match=message):
        gathered(folder, tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        gathered(folder, tmp_path, measured(an_sae(seed=2), model))
    # One that is given wins over what lies beside.
    assert gathered(folder, tmp_path, measured(SAE.load_from_disk(folder), model)).entry.evaluation is not None
    (folder / "evaluation.json").unlink()
    assert gathered(folder, tmp_path).entry.evaluation is None


def test_one_feature_that_was_changed_is_enough(tmp_path: Path, model: Any):
    folder = exported(tmp_path / "run")
    measured(SAE.load_from_disk(folder), model).save(folder / "evaluation.json")
    weights = load_file(folder / "sae_weights.safetensors")
    weights["W_dec"][3] = 0
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="other weights"):
        gathered(folder, tmp_path)


def test_an_sae_in_bfloat16_that_was_measured_in_float32(tmp_path: Path, model: Any):
    sae = SAE.load_from_disk(exported(tmp_path / "a")).to(dtype=torch.bfloat16)
    sae.cfg.dtype = "bfloat16"
    sae.save_model(tmp_path / "half")
    found = measured(SAE.load_from_disk(tmp_path / "half", dtype="float32"), model)
    found.save(tmp_path / "half/evaluation.json")
    assert gathered(tmp_path / "half", tmp_path).entry.evaluation is not None
    assert gathered(sae, tmp_path, found).entry.evaluation is not None


def test_an_sae_in_memory_that_is_rounded_when_it_is_loaded(tmp_path: Path, model: Any):
    sae = SAE.load_from_disk(exported(tmp_path / "a"))
    sae.cfg.dtype = "bfloat16"
    assert gathered(sae, tmp_path, measured(sae, model)).entry.evaluation is not None
    with pytest.raises(ValueError, match="other weights"):
        gathered(sae, tmp_path, measured(an_sae(seed=1), model))


def test_one_of_before_digests_were_noted_is_taken_at_its_word(tmp_path: Path, model: Any):
    folder = exported(tmp_path / "run")
    entries = measured(an_sae(seed=1), model).to_dict()
    del entries["weights_sha256"], entries["text"]
    (folder / "evaluation.json").write_text(json.dumps(entries))
    said = gathered(folder, tmp_path).entry.evaluation
    assert said is not None
    assert (said.weights_sha256, said.text) == (None, None)


def test_what_was_measured_on_goes_up_too(tmp_path: Path, model: Any):
    sae = an_sae()
    found = measured(sae, model, text="owner/words")
    assert "16 tokens in 2 sequences of owner/words" in str(found)
    said = gathered(sae, tmp_path, found).entry.evaluation
    assert said is not None
    assert (said.text, said.weights_sha256) == ("owner/words", weights_sha256(sae))
    assert " sequences of " not in str(measured(sae, model))


def test_that_of_a_run_and_of_its_checkpoint(tmp_path: Path, model: Any):
    config = runner_config(
        "batchtopk", {"normalize_activations": "expected_average_only_in"}, output_path=str(tmp_path / "out"),
        checkpoint_path=str(tmp_path / "checkpoints"), n_checkpoints=1,
    )  # fmt: skip
    sae = E2ESAETrainingRunner(config, override_dataset=token_dataset(), override_model=model).run()
    found = measured(sae, model)
    found.save(tmp_path / "out/evaluation.json")
    assert gathered(tmp_path / "out", tmp_path).entry.evaluation is not None
    checkpoint = min(path.parent for path in (tmp_path / "checkpoints").rglob("manifest.json"))
    of_checkpoint = measured(finished_sae(checkpoint), model)
    assert of_checkpoint.weights_sha256 != found.weights_sha256
    assert gathered(checkpoint, tmp_path, of_checkpoint).entry.evaluation is not None
    with pytest.raises(ValueError, match="other weights"):
        gathered(checkpoint, tmp_path, found)


# A run that takes another's folder.

LEFT = ("evaluation.json", "held_out.json", "checksums.sha256")


def test_overwriting_an_output_removes_what_was_said_of_the_sae_before(tmp_path: Path):
    for name in (*LEFT, "notes.txt"):
        (tmp_path / name).write_text("{}")
    config = runner_config(output_path=str(tmp_path), overwrite_output=True)
    mark_output(config, tmp_path, starts_anew=False)  # a resumed run goes on with its own
    assert {path.name for path in tmp_path.iterdir()} == {*LEFT, "notes.txt", "e2e_runner_cfg.json"}
    mark_output(config, tmp_path, starts_anew=True)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "e2e_runner_cfg.json"}


def test_a_run_in_a_new_folder_removes_nothing(tmp_path: Path):
    (tmp_path / "evaluation.json").write_text("{}")
    mark_output(runner_config(output_path=str(tmp_path)), tmp_path, starts_anew=True)
    assert (tmp_path / "evaluation.json").exists()
    mark_output(runner_config(output_path=str(tmp_path / "new")), tmp_path / "new", starts_anew=True)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["e2e_runner_cfg.json"]
