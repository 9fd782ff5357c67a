"""Weights and the scale of activations that they were trained at are one thing, wherever an SAE is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import runner_config, tiny_hooked_transformer, token_dataset, training_sae
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.training.activation_scaler import ActivationScaler

from e2e_sae_plugin import E2ESAETrainingRunner, Objective, evaluate, load_sae
from e2e_sae_plugin.checkpoint.finished import fold_activation_scaling, unfold_activation_scaling

SCALED, WHITENED, PLAIN = "expected_average_only_in", "covariance_whitening", "none"
ARCHITECTURES = ["standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_hooked_transformer()


def runner(model: Any, architecture: str, normalization: str, **settings: Any) -> E2ESAETrainingRunner:
    config = runner_config(
        architecture, {"normalize_activations": normalization}, n_eval_batches=2, objective=Objective(kl=1.0, mse=1.0),
        **{"training_tokens": 32 * 12, "lr": 1e-2, **settings},
    )  # fmt: skip
    return E2ESAETrainingRunner(config, override_model=model, override_dataset=token_dataset())


def trained(model: Any, architecture: str, normalization: str, folder: Path) -> tuple[Path, Path]:
    """The folder of a finished SAE and the one of its run's last checkpoint."""
    runner(
        model, architecture, normalization, output_path=str(folder / "out"), checkpoint_path=str(folder / "checkpoints"),
        save_final_checkpoint=True,
    ).run()  # fmt: skip
    (manifest,) = (folder / "checkpoints").rglob("manifest.json")
    return folder / "out", manifest.parent


def first_kl(model: Any, architecture: str, normalization: str, start: Path) -> float:
    """The held-out KL of a continued run before its first step, at a rate that changes nothing."""
    continued = runner(
        model,
        architecture,
        normalization,
        from_pretrained_path=str(start),
        training_tokens=32,
        lr=1e-7,
        output_path=None,
    )
    return continued_kl(continued)


def continued_kl(continued: E2ESAETrainingRunner) -> float:
    continued.run()
    return continued.last_evaluation["metrics/held_out_kl"]


@pytest.mark.parametrize("continued_with", [SCALED, PLAIN, WHITENED])
@pytest.mark.parametrize("trained_with", [SCALED, PLAIN, WHITENED])
@pytest.mark.parametrize("kind", ["finished", "checkpoint"])
def test_a_continued_run_starts_where_the_other_ended(
    kind: str, trained_with: str, continued_with: str, model: Any, tmp_path: Path
):
    finished, checkpoint = trained(model, "standard", trained_with, tmp_path)
    start = finished if kind == "finished" else checkpoint
    expected = evaluate(load_sae(finished), model, held_out(model), n_resamples=5).value("kl")
    untrained = evaluate(training_sae(runner_config("standard")), model, held_out(model), n_resamples=5, hook_name=HOOK)
    assert untrained.value("kl") > 1.2 * expected  # or the start would say little
    assert first_kl(model, "standard", continued_with, start) == pytest.approx(expected, rel=1e-3)


HOOK = "blocks.1.hook_resid_pre"


def held_out(model: Any) -> torch.Tensor:
    """The rows that the runs of this file hold out."""
    tokens = runner(model, "standard", PLAIN).evaluation_tokens
    assert tokens is not None
    return tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_keeps_its_scale_from_a_checkpoint(architecture: str, model: Any, tmp_path: Path):
    finished, checkpoint = trained(model, architecture, SCALED, tmp_path)
    tokens = held_out(model)
    expected = evaluate(load_sae(finished), model, tokens, n_resamples=5)
    found = evaluate(load_sae(checkpoint), model, tokens, n_resamples=5)
    assert found.value("kl") == pytest.approx(expected.value("kl"), rel=1e-4)
    assert found.value("l0") == pytest.approx(expected.value("l0"), rel=1e-4)
    assert load_sae(checkpoint).cfg.normalize_activations == PLAIN


def test_a_checkpoint_of_saelens_keeps_its_scale(model: Any, tmp_path: Path):
    """Its files: weights and config of a training SAE, and the scaler beside them."""
    sae = training_sae(runner_config("standard", {"normalize_activations": SCALED}))
    sae.cfg.metadata.hook_name = HOOK
    sae.save_model(tmp_path)
    ActivationScaler(scaling_factor=0.25).save(str(tmp_path / ACTIVATION_SCALER_CFG_FILENAME))
    x = torch.randn(5, 16)
    expected = sae(x * 0.25) / 0.25
    torch.testing.assert_close(load_sae(tmp_path)(x), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalization", [SCALED, WHITENED])
def test_unfolding_undoes_folding(architecture: str, normalization: str):
    sae = training_sae(runner_config(architecture, {"normalize_activations": normalization}))
    x = torch.randn(7, 16) * 2
    data = iter([torch.randn(64, 16) * torch.linspace(0.5, 3, 16) + 1 for _ in range(4)])
    scaler = ActivationScaler()
    estimate = scaler.estimate_scaling_factor if normalization == SCALED else scaler.estimate_whitening
    estimate(d_in=16, data_provider=data, n_batches_for_norm_estimate=4)
    again = ActivationScaler(scaler.scaling_factor, scaler.whitening)
    expected = scaler.unscale(sae(scaler.scale(x)))
    fold_activation_scaling(sae, scaler)
    torch.testing.assert_close(sae(x), expected, rtol=1e-3, atol=1e-3)
    sae.cfg.normalize_activations = normalization
    unfold_activation_scaling(sae, again)
    assert sae.cfg.normalize_activations == normalization
    torch.testing.assert_close(again.unscale(sae(again.scale(x))), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("saved", "config", "message"),
    [
        (
            ("batchtopk", PLAIN),
            ("batchtopk", PLAIN),
            "architecture 'jumprelu', and the config has 'batchtopk'",
        ),
        (("standard", PLAIN), ("topk", PLAIN), "architecture 'standard', and the config has 'topk'"),
        (
            ("standard", "layer_norm"),
            ("standard", PLAIN),
            "normalize_activations='layer_norm'.* set sae.norm",
        ),
    ],
)
def test_weights_of_another_kind_are_refused(
    saved: tuple[str, str], config: tuple[str, str], message: str, model: Any, tmp_path: Path
):
    finished, _ = trained(model, *saved, tmp_path)
    assert json.loads((finished / "cfg.json").read_text())["architecture"]
    with pytest.raises(ValueError, match=message):
        runner(model, *config, from_pretrained_path=str(finished))
