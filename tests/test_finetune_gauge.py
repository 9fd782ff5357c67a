"""SAEs whose encoder and decoder are of very different size are fine-tuned at another scale, without a rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BUILT_IN_ARCHITECTURES,
    parameters_of,
    runner_config,
    tiny_hooked_transformer,
    token_dataset,
    training_sae,
)
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput

from e2e_sae_plugin import FinetuneRunner, finetune_config
from e2e_sae_plugin.finetune.gauge import balancing_factor, unfold_scale
from e2e_sae_plugin.finetune.start import training_counterpart

FOLDED = 2.0**-6


def folded(folder: Path, architecture: str, **sae: Any) -> SAE[Any]:
    """As SAELens exports an SAE that was trained on activations of 1/64 of the model's size."""
    trained = training_sae(runner_config(architecture, sae=sae))
    trained.fold_activation_norm_scaling_factor(FOLDED)
    trained.save_inference_model(str(folder))
    loaded = SAE.load_from_disk(str(folder))
    for name, value in {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_pre", "context_size": 8}.items():
        loaded.cfg.metadata[name] = value
    return loaded


def test_the_factor_is_a_power_of_two_and_1_for_what_is_balanced(tmp_path: Path):
    sae = folded(tmp_path, "jumprelu")
    factor = balancing_factor(sae)
    assert 2**-7 <= factor <= 2**-5
    assert factor == 2.0 ** round(torch.tensor(factor).log2().item())
    with torch.no_grad():
        sae.W_enc.div_(factor)  # pyright: ignore[reportCallIssue]
        sae.W_dec.mul_(factor)
    assert balancing_factor(sae) == 1
    sae.cfg.normalize_activations = "layer_norm"
    with torch.no_grad():
        sae.W_dec.mul_(1000)
    assert balancing_factor(sae) == 1
    with torch.no_grad():
        sae.W_dec.zero_()
    assert balancing_factor(sae) == 1


@pytest.mark.parametrize("architecture", sorted(set(BUILT_IN_ARCHITECTURES) - {"matching_pursuit"}))
def test_unfolding_and_folding_leave_every_bit(architecture: str, tmp_path: Path):
    start = training_counterpart(folded(tmp_path, architecture))
    before, x = parameters_of(start), torch.randn(30, 16) / FOLDED
    out = start(x)
    unfold_scale(start, 2.0**-6)
    torch.testing.assert_close(start(x * 2.0**-6) / 2.0**-6, out)
    start.fold_activation_norm_scaling_factor(2.0**-6)
    assert all(torch.equal(before[name], value) for name, value in start.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("standard", {"l1_coefficient": 0.3}),
        ("jumprelu", {"l0_coefficient": 0.3}),
        ("jumprelu", {"l0_coefficient": 0.3, "jumprelu_sparsity_loss_mode": "tanh", "pre_act_loss_coefficient": 0.1}),
    ],
)
def test_sparsity_weighs_as_much_beside_the_squared_error(architecture: str, settings: dict[str, Any]):
    def terms(factor: float) -> dict[str, float]:
        sae = training_sae(runner_config(architecture, sae={**settings}))
        unfold_scale(sae, factor)
        name = "l1" if architecture == "standard" else "l0"
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=factor * torch.randn(50, 16, generator=torch.Generator().manual_seed(0)),
                coefficients={name: getattr(sae.cfg, f"{name}_coefficient")},
                dead_neuron_mask=torch.ones(32, dtype=torch.bool),
                n_training_steps=0,
                is_logging_step=False,
            )
        )
        return {key: float(value.detach()) / factor**2 for key, value in output.losses.items()}

    assert terms(8.0) == pytest.approx(terms(1.0), rel=1e-4)


def test_a_folded_sae_is_trained_at_its_scale_and_comes_back_at_its_own(tmp_path: Path):
    original = folded(tmp_path / "original", "jumprelu")
    cfg = finetune_config(
        original, training_tokens=32 * 8, train_batch_size_tokens=32, store_batch_size_prompts=4, evaluation_tokens=256,
        lr=1e-2, dataset_path="tiny", checkpoint_path=str(tmp_path / "c"), checkpoint_every_minutes=1e-9,
        keep_checkpoints=100, output_path=str(tmp_path / "whole"), patience_evaluations=None, verbose=False,
    )  # fmt: skip
    given: dict[str, Any] = {"override_dataset": token_dataset(), "override_model": tiny_hooked_transformer()}
    runner = FinetuneRunner(cfg, original, **given)
    tuned = runner.run()
    moved = {
        name: float((tuned.state_dict()[name] - value).norm() / value.norm())
        for name, value in original.state_dict().items()
        if name in ("W_enc", "W_dec")
    }
    assert 0.2 < moved["W_enc"] / moved["W_dec"] < 5  # 4,096 at the folded scale
    assert runner.identity["override_sae"] is not None
    folders = [path for path in (tmp_path / "c").rglob("[0-9]*") if (path / "cfg.json").exists()]
    cfg.resume_from_checkpoint = str(sorted(folders, key=lambda path: int(path.name))[3])
    cfg.overwrite_output = True
    FinetuneRunner(cfg, original, **given).run()
    again = SAE.load_from_disk(str(tmp_path / "whole"))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in tuned.state_dict().items())
