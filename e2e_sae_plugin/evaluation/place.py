"""Where an SAE sits: its hook, head, positions and excluded tokens, from its metadata, and whether that fits a model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.util import get_special_token_ids
from torch import Tensor, nn
from transformer_lens.loading_from_pretrained import get_official_model_name

from e2e_sae_plugin.splice import SplicedModel, splice_into

UNNAMED = "custom"  # what TransformerLens calls a model without a name
CENTRED_TOLERANCE = 1e-3
"""Activations whose mean over features is a larger part of their root mean square than this are not centred."""


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


SpecialTokens = bool | Sequence[int] | None
"""Which special tokens are left out: all (True), none (False), these ids, or as the SAE's record says (None)."""


def place_of(
    sae: SAE[Any],
    model: Any,
    hook_name: str | None = None,
    *,
    exclude_special_tokens: SpecialTokens = None,
    seqpos_slice: Sequence[int | None] | None = None,
) -> Place:
    """From the SAE's metadata, as SAELens and this package write them.

    Args:
        sae: in inference or training form.
        model: the language model, whose tokenizer knows which tokens are special.
        hook_name: where to splice an SAE whose metadata name no hook, or another hook than they name.
        exclude_special_tokens: instead of what the metadata say. If neither says anything, special tokens are left out
            where the model has a tokenizer that knows them, as in SAELens's evaluations.
        seqpos_slice: positions, instead of what the metadata say.

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
    tokenizer = getattr(model, "tokenizer", None)
    special = metadata.exclude_special_tokens if exclude_special_tokens is None else exclude_special_tokens
    if special is None:
        special = tokenizer is not None
    if special is True:
        if tokenizer is None:
            raise ValueError(
                "The SAE leaves out special tokens, but the model has no tokenizer that says which these are. Give the list "
                "of their ids (exclude_special_tokens, or the SAE's metadata)."
            )
        special = get_special_token_ids(tokenizer)
    return Place(
        hook_name=hook,
        head_index=metadata.hook_head_index,
        seqpos_slice=tuple(seqpos_slice or metadata.seqpos_slice or (None,)),
        excluded=tuple(sorted({int(token) for token in special or ()})),
    )


def common_place(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    hook_name: str | None = None,
    *,
    exclude_special_tokens: SpecialTokens = None,
    seqpos_slice: Sequence[int | None] | None = None,
) -> Place:
    """The one place of all the SAEs. Of special tokens, an SAE without a record has what the others' records say.

    Args:
        saes: By name.
        model: As in `place_of`; so are the others.
        hook_name: Where to splice all of them.
        exclude_special_tokens: For all of them.
        seqpos_slice: For all of them.

    Raises:
        ValueError: If there are none, or they sit at different places.
    """
    if not saes:
        raise ValueError("There is no SAE to evaluate.")
    places = places_of(saes, model, hook_name, exclude_special_tokens=exclude_special_tokens, seqpos_slice=seqpos_slice)
    first_name, first = next(iter(places.items()))
    for name, place in places.items():
        differing = [field for field in vars(first) if getattr(first, field) != getattr(place, field)]
        if differing:
            what = "; ".join(f"{f}: {getattr(first, f)!r} and {getattr(place, f)!r}" for f in differing)
            raise ValueError(
                f"{first_name} and {name} are not at the same place of the model ({what}), so their numbers cannot be "
                f"compared as if equal. {_how_to_make_equal(differing)}"
            )
    return first


def places_of(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    hook_name: str | None = None,
    *,
    exclude_special_tokens: SpecialTokens = None,
    seqpos_slice: Sequence[int | None] | None = None,
) -> dict[str, Place]:
    """The place of each of the SAEs, see `common_place`."""
    recorded = {name: sae.cfg.metadata.exclude_special_tokens for name, sae in saes.items()}
    of_others = next((each for each in recorded.values() if each is not None), None)
    places: dict[str, Place] = {}
    for name, sae in saes.items():
        special = exclude_special_tokens
        if special is None and recorded[name] is None:
            special = of_others
        places[name] = place_of(sae, model, hook_name, exclude_special_tokens=special, seqpos_slice=seqpos_slice)
    return places


def _how_to_make_equal(differing: Sequence[str]) -> str:
    settings = {"excluded": "exclude_special_tokens", "seqpos_slice": "seqpos_slice"}
    if any(field not in settings for field in differing):
        return "Evaluate each place by itself, or all in one pass (--joint)."
    names = [settings[field] for field in differing]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
    return f"Give {' and '.join(names)} ({flags}) to measure all of them on the same tokens."


def splice_at(model: Any, place: Place, saes: Sequence[SAE[Any]], names: Sequence[str]) -> SplicedModel:
    """The model with the SAEs' place in it, checked.

    Raises:
        ValueError: the model cannot be spliced there, it has no such head, an SAE's `d_in` does not fit the hook, or the SAE
            needs a model with centred weights and this one is not.
    """
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
    activations = spliced.check()
    shape = tuple(activations.shape[2:])
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
    check_centred(sae, spliced, activations, name)


def check_centred(sae: SAE[Any], spliced: SplicedModel, activations: Tensor, name: str = "The SAE") -> None:
    """Refuse a model as Hugging Face has it for an SAE that was trained with `center_writing_weights=True`.

    Such an SAE has only seen residual streams without a mean over features. On others it is silently wrong: LayerNorm takes
    the mean away, so the model computes the same.

    Args:
        activations: at the SAE's hook, `[batch, pos, d_model]`.

    Raises:
        ValueError: says how to load the model.
    """
    settings = sae.cfg.metadata.model_from_pretrained_kwargs or {}
    hooks = (spliced.position.hook_name, str(sae.cfg.metadata.hook_name))
    on_residual_stream = any("hook_resid_" in hook for hook in hooks)
    if not settings.get("center_writing_weights") or not on_residual_stream or not _can_be_centred(spliced.model):
        return
    values = activations.detach().float()
    mean, rms = values.mean(-1).abs(), values.square().mean(-1).sqrt()
    share = float((mean / rms.clamp_min(torch.finfo(rms.dtype).tiny)).mean())
    if share > CENTRED_TOLERANCE:
        model_name = sae.cfg.metadata.model_name or "..."
        raise ValueError(
            f"{name} needs a model whose weights are centred (center_writing_weights=True in its metadata), but the mean "
            f"over features of its activations at {spliced.position.hook_name!r} is {share:.2g} of their size. Load it with "
            f"HookedTransformer.from_pretrained_no_processing({model_name!r}, center_writing_weights=True). A model that is "
            "loaded already is centred by its process_weights_(fold_ln=False, center_writing_weights=True, "
            "center_unembed=False), a TransformerBridge by enable_compatibility_mode()."
        )


def _can_be_centred(model: Any) -> bool:
    """Where the mean of the residual stream counts (RMSNorm follows it, for one), TransformerLens leaves it there even if
    asked to centre."""
    config = getattr(model, "cfg", None)
    kind = getattr(config, "normalization_type", None)
    if kind is not None:
        return (
            kind in ("LN", "LNPre")
            and not getattr(config, "final_rms", False)
            and getattr(config, "positional_embedding_type", None) != "shortformer"
        )
    return any(isinstance(module, nn.LayerNorm) for module in model.modules())


def reads_all_heads(sae: SAE[Any]) -> bool:
    """Return True for an SAE of a `hook_z` that is not of one head; SAELens reshapes for no other hook with heads."""
    metadata = sae.cfg.metadata
    return str(metadata.hook_name).endswith("_z") and metadata.hook_head_index is None


def flatten_heads(sae: SAE[Any]) -> None:
    """Set `reshape_activations="hook_z"` for an SAE that was trained on flattened heads.

    A `HookedSAETransformer` passes `[..., n_heads, d_head]`, which the SAE flattens with this setting alone. In training
    form it has no effect, as in SAELens, until the SAE is saved.
    """
    if not reads_all_heads(sae):
        return
    sae.cfg.reshape_activations = "hook_z"
    if not isinstance(sae, TrainingSAE):
        sae.turn_on_forward_pass_hook_z_reshaping()


def model_name_of(model: Any) -> str | None:
    """The name that a language model has; None for one that TransformerLens calls "custom"."""
    wrapped = getattr(model, "model", model)
    name = getattr(getattr(model, "cfg", None), "model_name", None)
    name = name or getattr(getattr(wrapped, "config", None), "name_or_path", None)
    return str(name) if name and name != UNNAMED else None


def check_recorded_model(sae: SAE[Any], model: Any) -> str | None:
    """A warning if the SAE's record names another model than this one."""
    recorded, name = sae.cfg.metadata.model_name, model_name_of(model)
    if not recorded or name is None or same_model_name(recorded, name):
        return None
    return f"It was trained on {recorded!r} (its record says), and is measured on {name!r}."


def same_model_name(first: str, second: str) -> bool:
    """Whether two names mean one model: TransformerLens's aliases, with or without the organisation."""
    return _plain_name(first) == _plain_name(second)


def _plain_name(name: str) -> str:
    with contextlib.suppress(ValueError):  # not one of TransformerLens's
        name = get_official_model_name(name)
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def spliced_at_its_place(
    sae: SAE[Any],
    model: Any,
    seqpos_slice: Sequence[int | None],
    excluded: Tensor | None,
    head_index: int | None,
) -> tuple[SplicedModel, Sequence[int | None], Tensor | None, int | None]:
    """A `SplicedModel` as it is, its width checked; any other model with the SAE's place in it, and what the metadata say of
    positions, tokens and head where the arguments say nothing."""
    if isinstance(model, SplicedModel):
        check_width(model, sae, "The SAE", head_index)
        return model, seqpos_slice, excluded, head_index
    place = place_of(sae, model)
    return (
        splice_at(model, place, [sae], ["The SAE"]),
        place.seqpos_slice if tuple(seqpos_slice) == (None,) else seqpos_slice,
        place.excluded_tensor() if excluded is None else excluded,
        place.head_index if head_index is None else head_index,
    )
