"""Whole runs with the model on one device and the SAE on another: what comes before, beside and after the steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    runner_config,
    tiny_hooked_transformer,
    tiny_tokenizer,
    token_batch,
    token_dataset,
    training_sae,
)
from sae_lens import SAE
from safetensors.torch import load_file
from second_device import SIDES, other_device, places
from test_finetune_run import finished
from test_sweep import settings as sweep_settings

from e2e_sae_plugin import (
    E2ESAETrainingRunner,
    FinetuneRunner,
    Objective,
    SweepConfig,
    SweepRunner,
    finetune_config,
    splice_into,
)
from e2e_sae_plugin.evaluation import evaluate, feature_cards, feature_importance

other = other_device


def run(side: str, other: str, folder: Path, **settings: Any) -> E2ESAETrainingRunner:
    sae_device, model_device = places(side, other)
    sae = {"device": sae_device, **settings.pop("sae", {})}
    config = runner_config(
        settings.pop("architecture", "topk"),
        sae=sae,
        device=sae_device,
        llm_device=model_device,
        output_path=str(folder),
        n_eval_batches=1,
        **{"training_tokens": 32 * 6, "store_batch_size_prompts": 2, **settings},
    )
    runner = E2ESAETrainingRunner(
        config,
        override_model=tiny_hooked_transformer().to(model_device),
        override_dataset=token_dataset(),
        override_sae=_start(config).to(sae_device),  # a GPU draws other numbers
    )
    runner.run()
    return runner


def _start(config: Any) -> Any:
    config = copy.deepcopy(config)
    config.sae.device = "cpu"
    return training_sae(config)


def assert_same_files(first: Path, second: Path) -> None:
    ours, theirs = (load_file(folder / "sae_weights.safetensors") for folder in (first, second))
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "settings",
    [
        {"b_dec_init_method": "mean", "sae": {"normalize_activations": "expected_average_only_in"}},
        {"architecture": "standard", "sae": {"normalize_activations": "layer_norm"}},
        {
            "architecture": "jumprelu",
            "patience_evaluations": 1,
            "training_tokens": 32 * 11,
            "exclude_special_tokens": [1, 2, 3],
        },
        {"local_first": 0.5, "objective": Objective(kl=1.0, beta=0.01)},
        {"objective": Objective.local(), "architecture": "standard"},
    ],
    ids=str,
)
def test_a_run_ends_with_the_sae_of_one_device(other: str, side: str, settings: dict[str, Any], tmp_path: Path):
    run(side, other, tmp_path / "apart", **settings)
    run(side, "cpu", tmp_path / "together", **settings)
    assert_same_files(tmp_path / "apart", tmp_path / "together")


@pytest.mark.parametrize("side", SIDES)
def test_a_run_resumes_on_other_devices_than_it_began_on(other: str, side: str, tmp_path: Path):
    settings: dict[str, Any] = {"checkpoint_path": str(tmp_path / "checkpoints"), "n_checkpoints": 1}
    run("model", "cpu", tmp_path / "whole", **settings)
    checkpoint = next(path.parent for path in (tmp_path / "checkpoints").rglob("manifest.json"))
    resumed = run(side, other, tmp_path / "resumed", resume_from_checkpoint=str(checkpoint), **settings)
    assert resumed.resumed_from == checkpoint
    assert_same_files(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_evaluation(other: str, side: str, architecture: str):
    sae_device, model_device = places(side, other)
    sae = training_sae(runner_config(architecture))
    model, tokens = tiny_hooked_transformer(), token_batch(6)
    here = evaluate(sae, model, tokens, hook_name="blocks.1.hook_resid_pre", n_resamples=10)
    apart = evaluate(
        sae.to(sae_device), model.to(model_device), tokens, hook_name="blocks.1.hook_resid_pre", n_resamples=10
    )
    for name, value in here.to_dict().items():
        if isinstance(value, float):
            assert apart.to_dict()[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("side", SIDES)
def test_importance_and_cards(other: str, side: str):
    if other.startswith("second"):
        pytest.skip("random vectors come from a device's own generator, which the stand-in has not")
    found: list[tuple[Any, Any]] = []
    for sae_device, model_device in (("cpu", "cpu"), places(side, other)):
        sae = training_sae(runner_config("topk")).to(sae_device)
        model = splice_into(tiny_hooked_transformer().to(model_device), "blocks.1.hook_resid_pre")
        model.check()
        tokens = token_batch(4)
        importance = feature_importance(sae, model, tokens, exact=[0, 1, 2], n_samples=2)
        cards = feature_cards(sae, model, tokens, [0, 1], importance, tokenizer=tiny_tokenizer())
        found.append((importance, cards))
    (here, its_cards), (apart, cards) = found
    torch.testing.assert_close(apart.attribution.cpu(), here.attribution, rtol=1e-3, atol=1e-6)
    assert apart.exact == pytest.approx(here.exact, rel=1e-3, abs=1e-6)
    assert [card.contexts for card in cards] == [card.contexts for card in its_cards]


@pytest.mark.parametrize("side", SIDES)
def test_a_fine_tune(other: str, side: str, tmp_path: Path):
    sae = finished(tmp_path / "sae")
    saes: list[SAE[Any]] = []
    for sae_device, model_device in (places(side, other), ("cpu", "cpu")):
        config = finetune_config(
            sae, training_tokens=32 * 4, train_batch_size_tokens=32, store_batch_size_prompts=4, evaluation_tokens=256,
            lr=1e-2, checkpoint_path=None, output_path=None, exclude_special_tokens=[1, 2, 3], verbose=False,
            device=sae_device, llm_device=model_device,
        )  # fmt: skip
        runner = FinetuneRunner(
            config, sae, source="a test", override_dataset=token_dataset(),
            override_model=tiny_hooked_transformer().to(model_device),
        )  # fmt: skip
        saes.append(runner.run())
        sae = finished(tmp_path / "sae")
    assert saes[0].device == torch.device(places(side, other)[0])
    for (name, ours), theirs in zip(saes[0].named_parameters(), saes[1].parameters(), strict=True):
        torch.testing.assert_close(
            ours.detach().cpu(), theirs.detach(), rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("side", SIDES)
def test_a_sweep(other: str, side: str, tmp_path: Path):
    for name, device in (("apart", other), ("together", "cpu")):
        config = SweepConfig.from_dict(
            sweep_settings(tmp_path / name, device=device, llm_device="cpu", sae={"device": device})
        )
        SweepRunner(config, override_model=tiny_hooked_transformer(), override_dataset=token_dataset()).run()
    weights = sorted((tmp_path / "together").rglob("sae_weights.safetensors"))
    assert len(weights) == 3
    for path in weights if other.startswith("second") else []:  # a GPU draws other first weights
        assert_same_files(tmp_path / "apart" / path.parent.relative_to(tmp_path / "together"), path.parent)
