"""`MeasuredTokens`: the tokens that a result is about, recorded with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from e2e_sae_plugin.evaluation.place import Place

FLAGS = {
    "dataset": "--dataset", "split": "--split", "text_column": "--text-column", "shuffle_seed": "--shuffle-seed",
    "rows": "--skip-examples, --max-examples", "n_sequences": "--tokens", "context_size": "--context-size",
    "prepend_bos": "--prepend-bos", "seqpos_slice": "--seqpos-slice", "excluded": "--exclude-special-tokens",
}  # fmt: skip
"""What sets each of them on the command line."""


@dataclass(frozen=True)
class MeasuredTokens:
    """Which tokens something was measured on. Numbers of two results are comparable where all of it is equal."""

    n_sequences: int
    context_size: int
    seqpos_slice: tuple[int | None, ...] = (None,)
    """Positions that the SAE is applied to and measured at."""
    excluded: tuple[int, ...] = ()
    """Ids of special tokens that stay clean and are left out of every mean."""
    sha256: str | None = None
    """Digest of the token ids."""
    dataset: str | None = None
    """As readers will know it; None and below: the tokens were given, and no one said where they come from."""
    split: str | None = None
    text_column: str | None = None
    shuffle_seed: int | None = None
    rows: tuple[tuple[int, int], ...] = ()
    """First and last row that were read, of the shuffled dataset; several ranges if one was not enough."""
    prepend_bos: bool | None = None
    """Whether each sequence begins with a BOS token that was put there."""

    def of(self, tokens: Tensor, place: Place) -> MeasuredTokens:
        """The same text with what is known once it is measured.

        Args:
            tokens: Ids `[n_prompts, pos]`.
            place: Of the SAE.
        """
        digest = hashlib.sha256(tokens.cpu().long().contiguous().numpy().tobytes()).hexdigest()
        n_sequences, context_size = tokens.shape
        return replace(
            self,
            n_sequences=n_sequences,
            context_size=context_size,
            seqpos_slice=place.seqpos_slice,
            excluded=place.excluded,
            sha256=digest,
        )

    def differences(self, other: MeasuredTokens) -> list[str]:
        """Settings in which two results differ, each with both values and the flag that sets it; [] if comparable."""
        found = [
            f"{name}: {_shown(getattr(self, name))} and {_shown(getattr(other, name))} ({flag})"
            for name, flag in FLAGS.items()
            if getattr(self, name) != getattr(other, name)
        ]
        if not found and None not in (self.sha256, other.sha256) and self.sha256 != other.sha256:
            found.append("the token ids themselves (sha256)")
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> MeasuredTokens:
        """What `to_dict` gave."""
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in entries.items() if name in known}
        for name in ("seqpos_slice", "excluded"):
            given[name] = tuple(given.get(name, ()))
        given["rows"] = tuple((first, last) for first, last in given.get("rows", ()))
        return cls(**given)

    def __str__(self) -> str:
        """In half a sentence: `rows 480 to 912 of my_text, special tokens left out`."""
        rows = " and ".join(f"{first:,} to {last:,}" for first, last in self.rows)
        of = "" if self.dataset is None else f"{self.dataset}{f' ({self.split})' if self.split else ''}"
        parts = [f"rows {rows} of {of}" if rows else of, "special tokens left out" if self.excluded else ""]
        if tuple(self.seqpos_slice) not in ((None,), (None, None), (0, None)):
            parts.append(f"positions {_shown(self.seqpos_slice)}")
        return ", ".join(part for part in parts if part)


def _shown(value: Any) -> str:
    return "none" if value in (None, (), (None,)) else str(value)
