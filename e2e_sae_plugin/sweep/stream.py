"""One stream of batches for several readers, each at its own place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from e2e_sae_plugin.token_stream import TokenStream


class SharedBatches:
    """Keeps the batches that some reader has still to see; all of them see the same ones.

    Args:
        source: where batches come from.
        device: where the model wants them.
    """

    def __init__(self, source: TokenStream, device: torch.device):
        self.source, self.device = source, device
        self.readers: list[Reader] = []
        self._kept: dict[int, Tensor] = {}
        self._drawn = 0

    def reader(self, place: int = 0) -> Reader:
        """Another reader, at the batch of number `place`."""
        reader = Reader(self, place)
        self.readers.append(reader)
        return reader

    def leave(self, reader: Reader) -> None:
        """This reader will ask for nothing more, so that batches need not be kept for it."""
        self.readers.remove(reader)

    def batch(self, index: int) -> Tensor:
        """The batch of that number, drawn where nobody has asked for it yet.

        Raises:
            ValueError: the data cannot give it; see `TokenStream`.
        """
        while self._drawn <= index:
            self._kept[self._drawn] = next(self.source).to(self.device)
            self._drawn += 1
        return self._kept[index]

    def forget_what_all_have_read(self) -> None:
        """Free batches that no reader will ask for."""
        first = min((reader.place for reader in self.readers), default=self._drawn)
        for index in [index for index in self._kept if index < first]:
            del self._kept[index]

    # Resuming.

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `resume` needs, as JSON and as tensors."""
        self.forget_what_all_have_read()
        stream, tensors = self.source.state()
        kept = {f"kept.{index}": batch.cpu() for index, batch in self._kept.items()}
        return {"drawn": self._drawn, "stream": stream}, {**tensors, **kept}

    def resume(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: the data is not what the state was taken with.
        """
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith("kept.")}
        self.source.resume(state["stream"], {name: value for name, value in tensors.items() if name not in kept})
        self._drawn = state["drawn"]
        self._kept = {int(name.removeprefix("kept.")): batch.to(self.device) for name, batch in kept.items()}


class Reader:
    """One reader's place in the stream; an endless iterator."""

    def __init__(self, batches: SharedBatches, place: int):
        self.batches, self.place = batches, place

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        batch = self.batches.batch(self.place)
        self.place += 1
        return batch
