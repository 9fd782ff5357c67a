"""One clean pass per batch for all the SAEs that train on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from e2e_sae_plugin.splice.base import CleanPass, SplicedModel, clean_passes


class SharedCleanPasses:
    """Answers the clean passes of several SAEs' places in one model, computing each once.

    Memory: the activations that the SAEs need of one whole batch, held while the batch is current.

    Args:
        models: the places; each one's `clean_pass` asks here first from now on.
        hidden: whether any of the SAEs needs the final hidden state.
    """

    def __init__(self, models: Sequence[SplicedModel], hidden: bool):
        self.models, self.hidden = list(models), hidden
        for model in models:
            model.shared = self
        self._batch: Tensor | None = None
        self._passes: dict[tuple[int, int], dict[str, CleanPass]] = {}
        self.n_passes = 0
        """How many the model has run."""

    @contextmanager
    def over(self, batch: Tensor) -> Iterator[None]:
        """While it lasts, passes over parts of `batch [n_prompts, pos]` (views of it) are shared."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None
            self._passes.clear()

    def __call__(self, model: SplicedModel, tokens: Tensor) -> CleanPass | None:
        """The pass for one SAE; None for tokens that are not of the current batch."""
        if self._batch is None or tokens.untyped_storage().data_ptr() != self._batch.untyped_storage().data_ptr():
            return None
        part = (int(tokens.storage_offset()), len(tokens))
        if part not in self._passes:
            passes = clean_passes(self.models, tokens, hidden=self.hidden)
            self._passes[part] = {one.position.hook_name: clean for one, clean in zip(self.models, passes, strict=True)}
            self.n_passes += 1
        return self._passes[part][model.position.hook_name]
