"""The SAE of a checkpoint, as a finished one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

from e2e_sae_plugin.checkpoint.folder import verify_checkpoint


def finished_sae(checkpoint: Path) -> TrainingSAE[Any]:
    """The SAE that the run would have ended with at that step: with its normalisation folded into its weights.

    Args:
        checkpoint: a folder that a run of this package wrote.

    Raises:
        DamagedCheckpointError: it is not whole.
    """
    verify_checkpoint(checkpoint)
    architecture = json.loads((checkpoint / SAE_CFG_FILENAME).read_text())["architecture"]
    sae: TrainingSAE[Any] = get_sae_training_class(architecture)[0].load_from_disk(checkpoint, device="cpu")
    scaler = ActivationScaler()
    scaler.load(checkpoint / ACTIVATION_SCALER_CFG_FILENAME)
    fold_activation_scaling(sae, scaler)
    return sae


@torch.no_grad()
def fold_activation_scaling(sae: TrainingSAE[Any], scaler: ActivationScaler) -> None:
    """Fold an estimated activation normalisation into the SAE's weights, as SAELens does at the end of `fit`."""
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        scaler.scaling_factor = None
    if scaler.whitening is not None:
        whitening = scaler.whitening
        sae.fold_activation_whitening(
            mean=whitening.mean,
            whitening_matrix=whitening.matrix,
            unwhitening_matrix=whitening.inverse_matrix,
        )
        scaler.whitening = None
