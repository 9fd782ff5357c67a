"""Activation checkpointing: of a block only its input is kept, and backward computes the rest anew.

Built on `torch.utils.checkpoint`. What is computed anew has to be what was computed at first, operation for operation, but
hooks and swapped modules exist only while a pass runs. They are therefore put back for every recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

Surroundings = Callable[[], AbstractContextManager[Any]]
"""Gives a new context manager at each call."""


class AllCaught(Exception):
    """Raised from a hook to end a pass early: everything that was wanted has been computed."""


class Recompute:
    """Calls blocks so that backward computes anew what autograd would keep of them.

    Args:
        surroundings: what a recomputation runs in, outermost first: as the pass did, with hooks that catch nothing.
    """

    def __init__(self, *surroundings: Surroundings):
        self._surroundings = surroundings

    def within(self, surroundings: Surroundings) -> Recompute:
        """The same, with one more thing around the block."""
        return Recompute(*self._surroundings, surroundings)

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `block(*args, **kwargs)` returns.

        Raises:
            AllCaught: a hook in the block raised it.
        """
        ended: list[bool] = []

        def run(*args: Any) -> Any:
            try:
                return block(*args, **kwargs)
            except AllCaught:  # not through `checkpoint`, so that it finishes; raised again once it has
                ended.append(True)

        # Random states are put back too (the default), for a hook of a user's that adds noise.
        again = _Again(self._surroundings)
        output = checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
        if ended:
            raise AllCaught
        return output


class _Again(AbstractContextManager[None]):
    """All the surroundings; unlike a generator's, it can be entered once per backward through the same graph."""

    def __init__(self, surroundings: tuple[Surroundings, ...]):
        self._surroundings = surroundings
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as entered:
            for surroundings in self._surroundings:
                entered.enter_context(surroundings())
            self._stack = entered.pop_all()

    def __exit__(self, *exception: Any) -> bool | None:
        return self._stack.__exit__(*exception)


class RecomputedBlock(nn.Module):
    """Stands in for a block for the time of a pass; has the block's attributes."""

    def __init__(self, block: nn.Module, recompute: Recompute):
        super().__init__()
        self.__dict__.update(block=block, recompute=recompute)  # not a submodule: the block stays the model's own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["recompute"](self.__dict__["block"], *args, **kwargs)


@contextmanager
def recomputed(blocks: nn.ModuleList, first: int, recompute: Recompute | None) -> Iterator[None]:
    """Swap the blocks from `first` on for stand-ins that recompute them, and back whatever happens; None for no swap."""
    originals = list(blocks)
    try:
        if recompute is not None:
            for i in range(first, len(originals)):
                blocks[i] = RecomputedBlock(originals[i], recompute)
        yield
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block
