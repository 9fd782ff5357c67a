"""The L0 of BatchTopK and Matryoshka SAEs in the form that they are saved in, JumpReLU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_trainer, runner_config, tiny_hooked_transformer, token_batch, token_dataset, training_sae
from sae_lens import SAE
from torch import Tensor

from e2e_sae_plugin import (
    E2ESAETrainer,
    E2ESAETrainingRunner,
    MultiE2ESAERunnerConfig,
    MultiE2ESAETrainingRunner,
    load_sae,
)
from e2e_sae_plugin.checkpoint.finished import finished_sae
from e2e_sae_plugin.evaluation import measure, reconstruct_with
from e2e_sae_plugin.kernels.saved_threshold import as_saved, settle_threshold

ARCHITECTURES = ("batchtopk", "matryoshka_batchtopk")
K = 4


def saved_form(sae: Any) -> SAE[Any]:
    """By SAELens's own export, which changes weights in place."""
    exported_from = copy.deepcopy(sae)
    state = {name: value.clone() for name, value in exported_from.state_dict().items()}
    exported_from.process_state_dict_for_saving_inference(state)
    exported: SAE[Any] = SAE.from_dict(exported_from.cfg.get_inference_sae_cfg_dict())
    exported.load_state_dict(state)
    return exported


def n_active(sae: SAE[Any], sae_in: Tensor) -> int:
    with torch.no_grad():
        return int((sae.encode(sae_in) > 0).sum())


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_saved_form_has_k_active_features_per_token(architecture: str, rescale: bool):
    sae = training_sae(runner_config(architecture, sae={"rescale_acts_by_decoder_norm": rescale}))
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    settle_threshold(sae, x, len(x))
    assert n_active(saved_form(sae), x) == K * 50


def test_the_threshold_lies_between_what_is_chosen_and_the_next_value():
    sae: Any = training_sae(runner_config("batchtopk", sae={"k": 1.5, "rescale_acts_by_decoder_norm": False}))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_enc[:4, :4] = torch.eye(4)
    x = torch.zeros(2, 16)
    x[:, :4] = torch.tensor([[5.0, 4.0, 3.0, -1.0], [2.0, 1.0, 0.5, 0.0]])
    settle_threshold(sae, x, 2)  # three of 5, 4, 3, 2, 1, 0.5 are chosen
    assert float(sae.topk_threshold) == 2.5
    sae.cfg.k = 3.5  # seven would be, of six that are positive
    settle_threshold(sae, x, 2)
    assert float(sae.topk_threshold) == 0.0
    settle_threshold(sae, x * torch.nan, 2)
    assert float(sae.topk_threshold) == 0.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_measured_as_saved_it_is_what_is_saved(architecture: str):
    sae: Any = training_sae(runner_config(architecture))
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    settle_threshold(sae, x[:20], 20)
    in_training = sae.encode(x)
    with as_saved(sae) as is_another_form, torch.no_grad():
        found = sae.decode(sae.encode(x))
    assert is_another_form
    torch.testing.assert_close(found, saved_form(sae)(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.encode(x), in_training, rtol=0, atol=0)  # and back
    with as_saved(training_sae(runner_config("topk"))) as is_another_form:
        assert not is_another_form


def train(config: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[SAE[Any], Tensor, E2ESAETrainingRunner]:
    """The saved SAE, and the activations of the last step as the model has them."""
    seen: list[Tensor] = []
    settle = E2ESAETrainer.settle_threshold

    def keep(trainer: E2ESAETrainer, sae_in: Tensor) -> None:
        seen.append(trainer.activation_scaler.unscale(sae_in.clone()))
        settle(trainer, sae_in)

    monkeypatch.setattr(E2ESAETrainer, "settle_threshold", keep)
    runner = E2ESAETrainingRunner(config, token_dataset(), tiny_hooked_transformer())
    runner.run()
    return SAE.load_from_disk(config.output_path), seen[-1], runner


@pytest.mark.parametrize("normalisation", ["none", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_short_run_saves_the_l0_that_it_trained(
    architecture: str, normalisation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = runner_config(
        architecture, sae={"normalize_activations": normalisation}, output_path=str(tmp_path / "out"), n_eval_batches=2
    )
    saved, sae_in, runner = train(config, monkeypatch)
    # Folding rounds, and a value next to the threshold may fall on its other side.
    assert n_active(saved, sae_in) == pytest.approx(K * len(sae_in), abs=1)
    assert runner.evaluation_tokens is not None
    measured = measure(reconstruct_with(saved), runner.evaluation_model, runner.evaluation_tokens)
    assert runner.last_evaluation["metrics/held_out_l0"] == pytest.approx(measured.l0, abs=0.1)
    assert runner.last_evaluation["metrics/held_out_kl"] == pytest.approx(measured.kl, rel=1e-2)


def test_so_do_the_best_weights_of_a_run_that_stops(monkeypatch: pytest.MonkeyPatch):
    config = runner_config("batchtopk", n_eval_batches=1, patience_evaluations=2, training_tokens=32 * 40)
    settled: list[tuple[float, Tensor]] = []
    settle = E2ESAETrainer.settle_threshold

    def keep(trainer: E2ESAETrainer, sae_in: Tensor) -> None:
        settle(trainer, sae_in)
        settled.append((float(trainer.sae.topk_threshold), sae_in.clone()))  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(E2ESAETrainer, "settle_threshold", keep)
    kls = iter([9.0, 5.0, 1.0, 2.0, 3.0, 0.0])  # at the start, and after every five steps; the end's are not compared

    def evaluate(self: Any, trainer: Any) -> dict[str, float]:
        del self, trainer
        return {"metrics/held_out_kl": next(kls)}

    monkeypatch.setattr(E2ESAETrainingRunner, "_evaluate", evaluate)
    sae: Any = E2ESAETrainingRunner(config, token_dataset(), tiny_hooked_transformer()).run()
    assert len(settled) == 4
    threshold, sae_in = settled[1]
    assert float(sae.topk_threshold) == threshold
    assert n_active(saved_form(sae), sae_in) == pytest.approx(K * 32, abs=1)


def test_milestones_do_and_they_change_nothing_that_is_trained(tmp_path: Path):
    def run(name: str, n_checkpoints: int) -> dict[str, Tensor]:
        config = runner_config(
            "batchtopk",
            n_checkpoints=n_checkpoints,
            checkpoint_path=str(tmp_path / "c"),
            output_path=str(tmp_path / name),
        )
        return E2ESAETrainingRunner(config, token_dataset(), tiny_hooked_transformer()).run().state_dict()

    with_checkpoints, without = run("with", 1), run("without", 0)
    for name, value in without.items():
        torch.testing.assert_close(with_checkpoints[name], value, rtol=0, atol=0)
    checkpoint = next((tmp_path / "c").rglob("sae_weights.safetensors")).parent
    of_checkpoint: Any = finished_sae(checkpoint)
    # SAELens's running mean after n steps is 1 - 0.99^n of what it comes to rest at.
    assert float(of_checkpoint.topk_threshold) > 0.5 * float(without["topk_threshold"])


def test_it_does_not_move_while_the_run_goes_on():
    trainer = build_trainer(runner_config("batchtopk"), data=iter(token_batch(seed=step) for step in range(10)))
    thresholds: list[float] = []
    while not trainer.is_done:
        trainer.advance()
        thresholds.append(float(trainer.sae.topk_threshold))  # pyright: ignore[reportArgumentType]
    assert all(later < 0.2 * thresholds[-1] for later in thresholds[:-1])


def test_saes_of_a_joint_run_have_it_in_the_pass_that_they_were_trained_in(tmp_path: Path):
    sae = {"architecture": "batchtopk", "d_in": 16, "d_sae": 32, "k": K}
    cfg = MultiE2ESAERunnerConfig(
        saes={"one": sae, "two": sae},
        hook_names={"one": "blocks.1.hook_resid_pre", "two": "blocks.2.hook_resid_pre"},
        model_name="tiny", dataset_path="tiny", context_size=8, train_batch_size_tokens=256, store_batch_size_prompts=32,
        training_tokens=2560, lr=1e-3, n_eval_batches=1, verbose=False, output_path=tmp_path / "out",
        objective="e2e", logger={"log_to_wandb": False},
    )  # fmt: skip
    saes = MultiE2ESAETrainingRunner(cfg, tiny_hooked_transformer(), token_dataset()).run()
    rows = saes.evaluate(tiny_hooked_transformer(), token_batch(64, seed=11)).rows
    assert [row.l0.value for row in rows] == pytest.approx([K, K], rel=0.15)
    told = (tmp_path / "out/joint.csv").read_text().splitlines()
    assert len(told) == 3
    assert load_sae(tmp_path / "out/one").cfg.architecture() == "jumprelu"
