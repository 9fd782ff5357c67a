"""The SAE of a checkpoint as a finished one: weights, and the scale of activations that belongs to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

from e2e_sae_plugin.checkpoint.folder import verify_checkpoint


def finished_sae(checkpoint: Path) -> TrainingSAE[Any]:
    """Return the SAE that the run would have ended with at that step: with its normalisation folded into its weights.

    Args:
        checkpoint: a folder that a run of this package wrote.

    Raises:
        DamagedCheckpointError: If it is not whole.
    """
    verify_checkpoint(checkpoint)
    return sae_of_checkpoint(checkpoint)


def is_checkpoint(folder: Path) -> bool:
    """Return whether the folder holds a run's state, of this package or of SAELens, and not a finished SAE."""
    return (folder / ACTIVATION_SCALER_CFG_FILENAME).is_file()


def sae_of_checkpoint(folder: Path, device: str = "cpu") -> TrainingSAE[Any]:
    """Return the SAE of a checkpoint of this package or of SAELens in training form, with its normalization folded in."""
    architecture = json.loads((folder / SAE_CFG_FILENAME).read_text())["architecture"]
    sae: TrainingSAE[Any] = get_sae_training_class(architecture)[0].load_from_disk(folder, device=device)
    fold_activation_scaling(sae, read_scaler(folder))
    return sae


def read_scaler(folder: Path) -> ActivationScaler:
    """Return the scale of activations that the weights in a folder expect; of a finished SAE's folder, none."""
    scaler = ActivationScaler()
    if is_checkpoint(folder):
        scaler.load(folder / ACTIVATION_SCALER_CFG_FILENAME)
    return scaler


def exported(sae: TrainingSAE[Any]) -> SAE[Any]:
    """Return the inference SAE that SAELens would save of a training SAE, in memory and on its device."""
    state = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    inference: SAE[Any] = SAE.from_dict(sae.cfg.get_inference_sae_cfg_dict()).to(sae.device)
    inference.load_state_dict(state)
    return inference


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


@torch.no_grad()
def unfold_activation_scaling(sae: TrainingSAE[Any], scaler: ActivationScaler) -> None:
    """Undo `fold_activation_scaling`: give weights for activations as they are to an SAE that reads scaled ones."""
    normalization = sae.cfg.normalize_activations
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(1 / scaler.scaling_factor)
    if scaler.whitening is not None:
        whitening = scaler.whitening
        # z = (x - mean) M is undone by x = (z + mean M) M^-1, which is of the same form.
        sae.fold_activation_whitening(
            mean=-(whitening.mean @ whitening.matrix),
            whitening_matrix=whitening.inverse_matrix,
            unwhitening_matrix=whitening.matrix,
        )
    sae.cfg.normalize_activations = normalization  # which folding has set to "none"
