"""A checkpoint of the authors' library: its tensors, checked, in SAELens's names and orientation."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# One SAE's tensors as the authors name them; the published files have the encoder without its place in the Sequential.
ENCODER, ENCODER_BIAS, DECODER, DECODER_BIAS = "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"
TENSORS = (ENCODER, ENCODER_BIAS, DECODER, DECODER_BIAS)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_KEY = re.compile(r"(?:(?P<place>[^.]+)\.)?(?P<name>encoder(?:\.0)?\.(?:weight|bias)|decoder\.(?:weight|bias))")

# A module dictionary cannot have dots in its keys, so hooks are written with hyphens; no hook of TransformerLens has one.
_DOT = "-"


@dataclass(frozen=True)
class Weights:
    """One SAE, fp32: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae, d_in]` with unit rows, `b_dec [d_in]`."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def state_dict(self) -> dict[str, Tensor]:
        """As SAELens's `StandardSAE` names them."""
        return {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def read_checkpoint(path: Path) -> dict[str | None, Weights]:
    """The SAEs of a `.pt` file by hook name; the key is None where the file does not say (the published ones hold one SAE).

    Accepted are the state of the authors' `saes` (`<hook>.encoder.0.weight`, ...), of their whole model (the same below
    `saes.`; the language model's tensors are left out), and that of a single SAE.

    Raises:
        ValueError: the file is no such checkpoint, is damaged, needs code to be run, or has keys that are missing or
            unknown, tensors of wrong shapes, or values that are not finite. Each is named.
        OSError: it cannot be read.
    """
    state = _load(path)
    # The state of their SAETransformer holds the language model beside the SAEs.
    whole_model = any(key.startswith("saes.") for key in state)
    grouped: dict[str | None, dict[str, Any]] = {}
    unknown: list[str] = []
    for key, value in state.items():
        if whole_model and key.startswith("tlens_model."):
            continue
        match = _KEY.fullmatch(key.removeprefix("saes."))
        if match is None:
            unknown.append(key)
            continue
        place = None if match["place"] is None else match["place"].replace(_DOT, ".")
        name = match["name"].replace("encoder.0.", "encoder.")
        if name in grouped.setdefault(place, {}):
            raise ValueError(f"{path.name} has {name} of {place or 'its SAE'} twice (the second time as {key!r}).")
        grouped[place][name] = value
    _check_keys(path, grouped, unknown)
    return {place: _weights(tensors, f"{path.name}, {place or 'its SAE'}") for place, tensors in grouped.items()}


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no checkpoint {str(path)!r}.")
    damaged = f"{path.name} cannot be read as a checkpoint: it is damaged, truncated, or something else."
    if path.stat().st_size == 0:
        raise ValueError(f"{damaged} It is empty.")
    try:
        # Never code from the file; only zip files can be mapped instead of read.
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if (needed := re.search(r"GLOBAL (\S+)", str(error))) is not None:
            raise ValueError(
                f"{path.name} is refused: to read it, {needed[1]} would have to be called, and a checkpoint can name any "
                "code there. Only tensors are read. Save the state_dict() of the SAEs instead of objects."
            ) from None
        raise ValueError(f"{damaged} {_last_line(error)}") from None
    except OSError:
        raise
    except Exception as error:  # whatever torch's reader stumbles over: it has no class of its own for that
        raise ValueError(f"{damaged} {_last_line(error)}") from None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path.name} holds {type(state).__name__}, not the state_dict of SAEs (names and tensors).")
    if not state:
        raise ValueError(f"{path.name} is empty: it holds no tensors.")
    return dict(state)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and "documentation" not in line]
    return f"({lines[-1].strip() if lines else type(error).__name__})"


def _check_keys(path: Path, grouped: Mapping[str | None, Mapping[str, Any]], unknown: list[str]) -> None:
    if codebooks := [key for key in unknown if key.rpartition(".")[2] == "codebook"]:
        raise ValueError(
            f"{path.name} holds a codebook ({', '.join(codebooks)}), not an SAE: it has no encoder, and SAELens has no such "
            "architecture."
        )
    if unknown:
        raise ValueError(
            f"{path.name} has keys that no SAE of the authors has: {_few(unknown)}. Expected <hook with - for .>."
            "encoder.0.weight, .encoder.0.bias, .decoder.weight and .decoder.bias for every hook."
        )
    if not grouped:
        raise ValueError(f"{path.name} holds no SAE, only the language model.")
    if None in grouped and len(grouped) > 1:
        raise ValueError(
            f"{path.name} names the hook of some of its tensors and not of others: {sorted(filter(None, grouped))}."
        )
    missing = [
        f"{'' if place is None else place + ': '}{name}"
        for place, tensors in grouped.items()
        for name in TENSORS
        if name not in tensors
    ]
    if missing:
        raise ValueError(f"{path.name} lacks {_few(missing)}.")


def _weights(tensors: Mapping[str, Any], where: str) -> Weights:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in DTYPES:
            what = f"{tensor.layout} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{where}: {name} must be a dense tensor of floating-point numbers, got {what}.")
    encoder = tensors[ENCODER]
    if encoder.ndim != 2 or 0 in encoder.shape:
        raise ValueError(f"{where}: {ENCODER} must have the shape [d_sae, d_in], got {list(encoder.shape)}.")
    d_sae, d_in = encoder.shape
    for name, shape in ((ENCODER_BIAS, (d_sae,)), (DECODER, (d_in, d_sae)), (DECODER_BIAS, (d_in,))):
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{where}: {name} has the shape {list(tensors[name].shape)}, but {ENCODER} has {[d_sae, d_in]}, so "
                f"{list(shape)} was expected."
            )
    # In memory of their own, so that the file can go.
    own = {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in tensors.items()}
    for name, tensor in own.items():
        # A sum is not finite if one of its terms is not, and in double precision it cannot overflow.
        if not tensor.sum(dtype=torch.float64).isfinite():
            raise ValueError(f"{where}: {name} has values that are not finite in float32 (nan or infinity).")
    # Dictionary elements are the normalised columns: the authors normalise in every forward pass, and store what they train.
    elements = F.normalize(own[DECODER], dim=0)
    return Weights(
        W_enc=own[ENCODER].T.contiguous(),
        b_enc=own[ENCODER_BIAS],
        W_dec=elements.T.contiguous(),
        b_dec=own[DECODER_BIAS],
    )


def _few(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
