"""Training few numbers in the place of whole weights: low-rank changes, or one scale per feature.

The SAE keeps its ordinary parameters. After each backward pass an adapter turns the gradients of the weights that it
stands for into its own (the chain rule), and after each update it writes those weights anew; so the SAE is always a stock
one, and the optimizer holds the adapter's numbers alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor, nn

AdapterKind = Literal["none", "low_rank", "scale"]
DEFAULT_RANK = 8


class Adapter(ABC):
    """Stands for weights of an SAE.

    Args:
        sae: its weights now are what is adapted.
        weights: names of the parameters that the adapter stands for.
    """

    def __init__(self, sae: TrainingSAE[Any], weights: tuple[str, ...]):
        self.sae, self.weights = sae, weights
        self.base = {name: sae.get_parameter(name).detach().clone() for name in weights}
        self.parameters: dict[str, nn.Parameter] = {}
        """What the optimizer trains, by name."""

    @abstractmethod
    def pull_gradients(self) -> None:
        """From the weights' gradients, which are dropped, to the adapter's own."""

    @abstractmethod
    def write(self, decoder_norms: Tensor | None) -> None:
        """Put the adapted weights into the SAE.

        Args:
            decoder_norms: `[d_sae, 1]`, what the norms of `W_dec`'s rows are held at; None for free ones.
        """

    def take_gradient(self, name: str) -> Tensor | None:
        """The gradient of a weight, which is dropped."""
        weight = self.sae.get_parameter(name)
        gradient, weight.grad = weight.grad, None
        return gradient

    def state(self) -> dict[str, Tensor]:
        """Copies of what `load` needs."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Put the adapter back to where `state` was taken; the SAE's weights are the checkpoint's own."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])


class LowRankAdapter(Adapter):
    """`W = W_0 + A B` with `A [rows, rank]` and `B [rank, columns]`, B zero at the start (LoRA, Hu et al. 2021, arXiv
    2106.09685, with alpha = rank), for `W_enc` and `W_dec`.

    Where the decoder's norms are held, its rows are scaled to them, and the gradient goes through that.
    """

    def __init__(self, sae: TrainingSAE[Any], weights: tuple[str, ...], rank: int, seed: int):
        super().__init__(sae, weights)
        generator = torch.Generator().manual_seed(seed)
        for name, base in self.base.items():
            rows, columns = base.shape
            a = torch.randn(rows, rank, generator=generator) / math.sqrt(rank)
            self.parameters[f"{name}.A"] = nn.Parameter(a.to(base))
            self.parameters[f"{name}.B"] = nn.Parameter(base.new_zeros(rank, columns))
        self._row_scale: Tensor | None = None  # `[d_sae, 1]`, of the last `write`

    @torch.no_grad()
    def pull_gradients(self) -> None:
        for name in self.weights:
            gradient = self.take_gradient(name)
            if gradient is None:
                continue
            if name == "W_dec" and self._row_scale is not None:  # the part along the rows is left out already
                gradient = gradient * self._row_scale
            a, b = self.parameters[f"{name}.A"], self.parameters[f"{name}.B"]
            a.grad, b.grad = gradient @ b.T, a.T @ gradient

    @torch.no_grad()
    def write(self, decoder_norms: Tensor | None) -> None:
        for name, base in self.base.items():
            weight = torch.addmm(base, self.parameters[f"{name}.A"], self.parameters[f"{name}.B"])
            if name == "W_dec" and decoder_norms is not None:
                norms = weight.norm(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
                self._row_scale = decoder_norms / norms
                weight *= self._row_scale
            self.sae.get_parameter(name).copy_(weight)

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({} if self._row_scale is None else {"row_scale": self._row_scale.clone()})

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        if "row_scale" in state:
            self._row_scale = state["row_scale"].to(self.base["W_dec"].device)


class ScaleAdapter(Adapter):
    """Row i of `W_dec` is `s_i` times what it was: every feature keeps its direction (Wright and Sharkey 2024 correct the
    shrinkage of L1-trained SAEs so)."""

    def __init__(self, sae: TrainingSAE[Any]):
        super().__init__(sae, ("W_dec",))
        base = self.base["W_dec"]
        self.parameters["W_dec.scale"] = nn.Parameter(base.new_ones(len(base), 1))

    @torch.no_grad()
    def pull_gradients(self) -> None:
        gradient = self.take_gradient("W_dec")
        if gradient is not None:
            self.parameters["W_dec.scale"].grad = (gradient * self.base["W_dec"]).sum(1, keepdim=True)

    @torch.no_grad()
    def write(self, decoder_norms: Tensor | None) -> None:
        assert decoder_norms is None  # refused by the config
        self.sae.W_dec.copy_(self.parameters["W_dec.scale"] * self.base["W_dec"])


def build_adapter(
    sae: TrainingSAE[Any], kind: AdapterKind, rank: int | None, frozen: tuple[str, ...], seed: int
) -> Adapter | None:
    """The adapter that a run's config asks for; None for none.

    Args:
        rank: of a low-rank change; None for `DEFAULT_RANK`.
        frozen: names of parameters that are not adapted.
        seed: of a low-rank change's first factor.

    Raises:
        ValueError: no weight is left for it to adapt.
    """
    if kind == "none":
        return None
    names = ("W_dec",) if kind == "scale" else ("W_enc", "W_dec")
    weights = tuple(name for name, _ in sae.named_parameters() if name in names and name not in frozen)
    if not weights:
        raise ValueError(
            f"adapter={kind!r} has nothing to adapt: {' and '.join(names)} are among frozen_parameters. Leave one "
            "of them out."
        )
    if kind == "scale":
        return ScaleAdapter(sae)
    return LowRankAdapter(sae, weights, rank or DEFAULT_RANK, seed)
