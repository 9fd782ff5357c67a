"""What is compared: SAEs with the labels that group them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor

from e2e_sae_plugin.checkpoint.identity import fingerprint
from e2e_sae_plugin.evaluation.place import same_model_name
from e2e_sae_plugin.finetune.start import load_quietly, same_weights
from e2e_sae_plugin.hub.foreign import FORMATS, sae_folders
from e2e_sae_plugin.hub.sae_folder import nearest_sae
from e2e_sae_plugin.objective import kind_of_weights

LOCAL = "local"
KIND_ORDER = (LOCAL, "e2e", "e2e+ds")
SPARSITY_NAMES = ("l1_coefficient", "l0_coefficient", "k", "max_iterations")


@dataclass(frozen=True)
class Subject:
    """One SAE of a comparison."""

    name: str
    sae: SAE[Any]
    kind: str
    """Its objective: "local", "e2e", "e2e+ds", or what its metadata say."""
    setting: str
    """What it was trained at besides kind and seed (its sparsity): SAEs of one kind and setting differ by their seed."""
    seed: int | None

    @property
    def decoder(self) -> Tensor:
        """`W_dec [d_sae, d_in]` in fp32 on the CPU."""
        return self.sae.W_dec.detach().float().cpu()


def kind_of(sae: SAE[Any]) -> str:
    """From the metadata: `kind` as a sweep writes it, else from the objective; "local" for an SAE without one, which
    SAELens trained."""
    metadata = sae.cfg.metadata
    if metadata.kind:
        return str(metadata.kind)
    objective = metadata.objective
    if not isinstance(objective, Mapping):
        return LOCAL
    kl, beta, mse = (float(objective.get(name) or 0) for name in ("kl", "beta", "mse"))
    return kind_of_weights(kl, beta, mse)


def subject(name: str, sae: SAE[Any], kind: str | None = None) -> Subject:
    """An SAE with the labels of its metadata; `kind` overrides theirs."""
    metadata = sae.cfg.metadata
    sparsity = metadata.sparsity
    if sparsity is None:
        sparsity = next((getattr(sae.cfg, n) for n in SPARSITY_NAMES if getattr(sae.cfg, n, None) is not None), None)
    seed = metadata.seed
    setting = f"{sparsity:g}" if isinstance(sparsity, int | float) else name
    return Subject(name, sae, kind or kind_of(sae), setting, seed if isinstance(seed, int) else None)


def load_subjects(sources: Sequence[str], device: str = "cpu") -> list[Subject]:
    """SAEs from folders (of one SAE, or of several, such as a sweep's), releases or repositories.

    Args:
        sources: `PATH`, `RELEASE:SAE_ID`, `OWNER/REPOSITORY:SAE_ID` or `OWNER/REPOSITORY@REVISION:SAE_ID`; with a label
            before it where wanted, `LABEL=...`, which then is the SAE's kind and name (of a folder of several: the kind, and
            the start of their names).
        device: where to put them.

    Raises:
        ValueError: there is no SAE.
    """
    found: dict[str, Subject] = {}
    for source in sources:
        label, place = _label(source)
        loaded = _load(place, device)
        for name, sae in loaded:
            chosen = name if label is None else label if len(loaded) == 1 else f"{label}/{name}"
            while chosen in found:
                chosen += "'"
            found[chosen] = subject(chosen, sae, label)
    if not found:
        raise ValueError("There is no SAE to compare.")
    return list(found.values())


def _label(source: str) -> tuple[str | None, str]:
    """The label, or None, and what it stands before. A folder may be called lr=0.1."""
    label, sign, place = source.partition("=")
    return (label, place) if label and sign and "/" not in label and not Path(source).is_dir() else (None, source)


def _load(place: str, device: str) -> list[tuple[str, SAE[Any]]]:
    path = Path(place)
    if path.is_dir():
        folders = sae_folders(path)
        if not folders:
            raise ValueError(
                f"The folder {place!r} holds no SAE, nor does a folder in it.{nearest_sae(path)} "
                f"Supported formats: {FORMATS}."
            )
        return [(folder.resolve().name, load_quietly(folder, device=device)) for folder in folders]
    release, sign, sae_id = place.partition(":")
    if not sign and "@" not in place:
        raise ValueError(
            f"There is no folder {place!r}. Expected a folder, or RELEASE:SAE_ID for one of SAELens's releases or a Hub "
            "repository."
        )
    return [(place, load_quietly(release, sae_id or None, device))]


def check_same_model(subjects: Sequence[Subject]) -> None:
    """Refuse SAEs of different models, or tokenizers.

    Raises:
        ValueError: names two of them and what differs.
    """
    # Against the first that says something: an SAE whose metadata are silent must not hide that two others differ.
    named = [(each.name, name) for each in subjects if (name := each.sae.cfg.metadata.model_name)]
    for name, model_name in named[1:]:
        if not same_model_name(named[0][1], model_name):
            raise ValueError(
                f"{named[0][0]} is an SAE of {named[0][1]!r} and {name} of {model_name!r}: SAEs of different models cannot "
                "be compared as if equal. Compare those of each model by themselves."
            )
    prints = [(each.name, sha256) for each in subjects if (sha256 := each.sae.cfg.metadata.tokenizer_sha256)]
    for name, sha256 in prints[1:]:
        if sha256 != prints[0][1]:
            raise ValueError(
                f"{prints[0][0]} and {name} were trained with different tokenizers, so they see other text. Compare those "
                "of each tokenizer by themselves."
            )


def check_different(subjects: Sequence[Subject]) -> None:
    """Refuse one SAE twice in a kind: across its seeds there would be nothing to compare.

    Raises:
        ValueError: names the two.
    """
    seen: dict[tuple[str, str], Subject] = {}
    for each in subjects:
        other = seen.setdefault((each.kind, fingerprint(each.sae)), each)
        if other is not each and same_weights(other.sae, each.sae):
            raise ValueError(
                f"{other.name} and {each.name} are one SAE, weight for weight: this would be a cross-seed comparison of one "
                "seed. Leave one out, or give SAEs of two seeds."
            )


def ordered_kinds(subjects: Sequence[Subject]) -> list[str]:
    """The kinds, the paper's first."""
    kinds = list(dict.fromkeys(each.kind for each in subjects))
    return sorted(kinds, key=lambda kind: (KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER), kind))


@torch.no_grad()
def check_finite(subjects: Sequence[Subject]) -> None:
    """Refuse an SAE with weights that are not finite.

    Raises:
        ValueError: names it.
    """
    for each in subjects:
        for name, value in each.sae.state_dict().items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{each.name}: {name} is not finite, so there is nothing to measure. Train it again.")
