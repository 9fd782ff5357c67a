"""Where an SAE sits: its hook, head, positions and excluded tokens, from its metadata, and whether that fits a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.util import get_special_token_ids
from torch import Tensor

from e2e_sae_plugin.splice import SplicedModel, splice_into


@dataclass(frozen=True)
class Place:
    """Where an SAE reads and writes."""

    hook_name: str
    head_index: int | None = None
    seqpos_slice: tuple[int | None, ...] = (None,)
    excluded: tuple[int, ...] = ()
    """Ids of tokens whose activations stay as they are."""

    def excluded_tensor(self) -> Tensor | None:
        return torch.tensor(self.excluded) if self.excluded else None


def place_of(sae: SAE[Any], model: Any, hook_name: str | None = None) -> Place:
    """From the SAE's metadata, as SAELens and this package write them.

    Args:
        sae: in inference or training form.
        model: the language model, whose tokenizer knows which tokens are special.
        hook_name: where to splice an SAE whose metadata name no hook, or another hook than they name.

    Raises:
        ValueError: no hook is known, the SAE writes elsewhere than it reads (a transcoder) or reads whole sequences (a
            temporal one), or it leaves out special tokens and the model has no tokenizer that knows them.
    """
    metadata = sae.cfg.metadata
    hook = hook_name or metadata.hook_name
    if not hook:
        raise ValueError("The SAE's metadata name no hook. Give hook_name.")
    written = metadata.hook_name_out
    if hasattr(sae.cfg, "d_out") or (written is not None and written != metadata.hook_name):
        raise ValueError(
            f"The SAE reads {metadata.hook_name!r} and writes {written!r}: transcoders cannot be spliced. Expected an SAE "
            "that reconstructs what it reads."
        )
    if isinstance(sae, TemporalSAE):
        raise ValueError("A temporal SAE reads whole sequences. Expected an SAE that reads each token by itself.")
    special = metadata.exclude_special_tokens
    if special is True:
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "The SAE leaves out special tokens, but the model has no tokenizer that says which these are. Set its "
                "metadata.exclude_special_tokens to the list of their ids."
            )
        special = get_special_token_ids(tokenizer)
    return Place(
        hook_name=hook,
        head_index=metadata.hook_head_index,
        seqpos_slice=tuple(metadata.seqpos_slice or (None,)),
        excluded=tuple(sorted({int(token) for token in special or ()})),
    )


def splice_at(model: Any, place: Place, saes: Sequence[SAE[Any]], names: Sequence[str]) -> SplicedModel:
    """The model with the SAEs' place in it, checked.

    Raises:
        ValueError: the model cannot be spliced there, it has no such head, or an SAE's `d_in` does not fit the hook.
    """
    spliced = splice_into(model, place.hook_name, needs_downstream=False)
    if spliced.position.default_downstream:  # none in the last block
        spliced = splice_into(model, place.hook_name)
    for sae, name in zip(saes, names, strict=True):
        check_width(spliced, sae, name, place.head_index)
    return spliced


def check_width(spliced: SplicedModel, sae: SAE[Any], name: str, head_index: int | None) -> None:
    """Check the model, and that the SAE fits the place.

    Raises:
        ValueError: as `splice_at`.
    """
    place = Place(spliced.position.hook_name, head_index)
    shape = tuple(spliced.check().shape[2:])
    if place.head_index is not None and (len(shape) < 2 or not 0 <= place.head_index < shape[0]):
        raise ValueError(
            f"The SAEs are of head {place.head_index}, but the activations at {place.hook_name!r} have "
            f"{f'heads 0 to {shape[0] - 1}' if len(shape) > 1 else 'no heads'}. Is it of another model, or of another hook?"
        )
    width = math.prod(shape) if place.head_index is None else shape[-1]
    if sae.cfg.d_in != width:
        raise ValueError(
            f"{name} has d_in={sae.cfg.d_in}, but the activations at {place.hook_name!r} have "
            f"{' x '.join(map(str, shape))} dimensions. Is it of another model, or of another hook?"
        )
