"""`DataSettings`: which rows of which dataset are read, and from which column."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ROW_SETTINGS = ("split", "text_column", "shuffle_seed", "skip_examples", "max_examples")
"""Settings of a dataset that is named; a dataset object is taken as it is."""


@dataclass(frozen=True)
class DataSettings:
    """A dataset and the rows of it that are read. Fields of `E2ESAERunnerConfig` and flags have the same names.

    Args:
        dataset_path: A dataset of the Hub, a file, a folder, or "e2e-sae-demo".
        split: The split. Default: "train", or the only one.
        text_column: The column of texts or of token ids. Default: found by name and type.
        shuffle_seed: Shuffle the rows with this seed, before any are left out. Default: they stay in order.
        skip_examples: Rows left out at the beginning.
        max_examples: The most rows read. Default: all.
        streaming: Stream the dataset instead of fetching all of it first.
        use_chat_formatting: Rows are conversations, which the tokenizer's chat template joins.

    Raises:
        ValueError: If a number is out of range.
    """

    dataset_path: str
    split: str | None = None
    text_column: str | None = None
    shuffle_seed: int | None = None
    skip_examples: int = 0
    max_examples: int | None = None
    streaming: bool = False
    use_chat_formatting: bool = False

    def __post_init__(self) -> None:
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, or None for all rows; got {self.max_examples!r}.")
        if self.skip_examples < 0:
            raise ValueError(f"skip_examples must be 0 or more, got {self.skip_examples!r}.")
        if self.shuffle_seed is not None and self.shuffle_seed < 0:
            raise ValueError(f"shuffle_seed must be 0 or more, or None for no shuffle; got {self.shuffle_seed!r}.")
        for name in ("split", "text_column"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must be a name, or None for the default; got an empty string.")

    @classmethod
    def of(cls, cfg: Any) -> DataSettings:
        """The settings of a run's config."""
        return cls(**{field.name: getattr(cfg, field.name) for field in fields(cls)})

    def check_unused(self) -> None:
        """Reject settings that have no effect next to a dataset object.

        Raises:
            ValueError: If one of them is set.
        """
        defaults = {field.name: field.default for field in fields(self)}
        for name in ROW_SETTINGS:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with override_dataset, which is taken as it is. Leave it "
                    "out, and change the dataset itself."
                )


def text_name(dataset: str | None) -> str | None:
    """What a dataset is called where results are read: of a place on this machine, the last component."""
    if not dataset:
        return None
    path = Path(dataset)
    return path.absolute().name or None if path.is_absolute() or path.exists() else dataset
