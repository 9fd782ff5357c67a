"""One SAE of a joint splice: trained, or frozen."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from sae_lens.saes.sae import SAE, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor, nn
from torch.func import functional_call

from e2e_sae_plugin.evaluation.metrics import encode_with
from e2e_sae_plugin.trainer import E2ESAETrainer


class SplicedSAE(Protocol):
    """What a joint pass asks of an SAE. Activations are the model's own, `[tokens, d_in]`; features `[tokens, d_sae]`."""

    def reconstruct(self, sae_in: Tensor) -> Tensor:
        """`SAE(sae_in)`, in the model's own space; gradients flow to `sae_in`."""
        ...

    def features(self, sae_in: Tensor) -> Tensor:
        """`Enc(sae_in)`; gradients flow to `sae_in`, none to the SAE."""
        ...


class FrozenSAE:
    """An SAE that takes part in the pass as it is.

    Args:
        sae: in inference or training form.
        activation_shape: trailing shape of the model's activation; see `encode_with`.
        scaler: of an SAE in training, whose activation scaling is not folded into its weights yet.
    """

    def __init__(self, sae: SAE[Any], activation_shape: tuple[int, ...], scaler: ActivationScaler | None = None):
        self.sae, self._scaler = sae, scaler or ActivationScaler()
        self._encode = encode_with(sae, activation_shape)
        self.n_active: Tensor | None = None
        """Active features of each token, `[tokens]`, in the last pass."""

    def reconstruct(self, sae_in: Tensor) -> Tensor:
        """As `SplicedSAE`."""
        with torch.autocast(self.sae.W_dec.device.type, enabled=False):
            feature_acts = self._encode(self._scaler(sae_in.to(self.sae.W_dec.device, self.sae.W_dec.dtype)))
            self.n_active = feature_acts.bool().sum(1)
            return self._scaler.unscale(self.sae.decode(feature_acts).flatten(1))

    def features(self, sae_in: Tensor) -> Tensor:
        """As `SplicedSAE`."""
        with torch.autocast(self.sae.W_dec.device.type, enabled=False):
            return self._encode(self._scaler(sae_in.to(self.sae.W_dec.device, self.sae.W_dec.dtype)))


class TrainedSAE:
    """An SAE that is trained: SAELens's training forward pass, whose output is kept for its losses."""

    def __init__(self, trainer: E2ESAETrainer):
        self.trainer = trainer
        self._encoder = _Encoder(trainer.sae)
        self.output: TrainStepOutput | None = None
        """Of the last pass."""

    def reconstruct(self, sae_in: Tensor) -> Tensor:
        """As `SplicedSAE`."""
        with torch.autocast(self.trainer.sae.device.type, enabled=False):  # the model's is not the SAE's
            self.output = self.trainer.sae_forward(self._scaled(sae_in))
            return self.trainer.activation_scaler.unscale(self.output.sae_out)

    def features(self, sae_in: Tensor) -> Tensor:
        """As `SplicedSAE`; normalised as the SAE trains on them."""
        fixed = {name: value.detach() for name, value in self._encoder.state_dict(keep_vars=True).items()}
        with torch.autocast(self.trainer.sae.device.type, enabled=False):
            return functional_call(self._encoder, fixed, (self._scaled(sae_in),))

    def _scaled(self, sae_in: Tensor) -> Tensor:
        trainer = self.trainer
        return trainer.activation_scaler(sae_in.to(trainer.sae.device, torch.float32))


class _Encoder(nn.Module):
    """So that `functional_call` runs `encode`."""

    def __init__(self, sae: Any):
        super().__init__()
        self.sae = sae

    def forward(self, sae_in: Tensor) -> Tensor:
        return self.sae.encode(sae_in)
