"""The ranks of a run: processes that `torchrun` has started, each with the model and with a replica or a shard of the SAE.

All that knows of `torch.distributed` is here. A process that was started alone never gets a `Ranks`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

logger = logging.getLogger(__name__)

BUCKET_BYTES = 2**25
"""Tensors smaller than this are copied together and reduced at once; larger ones are reduced where they are."""
PIECE_ELEMENTS = 2**26
"""Of a tensor that one rank sends to another at once."""
TIMEOUT = timedelta(minutes=60)
"""How long a rank waits for another one, which may be evaluating or writing a checkpoint."""
TAKE_OVER_SECONDS = 5.0
"""How long the ranks that are left wait for a sign of life of a lower one before they take its place."""

T = TypeVar("T")


class LostRankError(RuntimeError):
    """Another rank of the run has ended or cannot be reached."""


def launched_size() -> int:
    """Number of processes that this one was started with (`torchrun` says so in `WORLD_SIZE`); 1 when started alone."""
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if launched else 1


class Ranks:
    """This process among those of a run.

    Every method that talks to the others must be called by all of them in the same order.

    Args:
        store: of the process group; what is left of the ranks talks through it when one is lost.

    Raises:
        LostRankError: of every such method, when another rank has ended.
    """

    def __init__(self, store: Store):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self._store = store
        self._device_group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes, prints and logs."""
        return self.rank == 0

    def use_device(self, device: str) -> None:
        """Have this rank's `cuda` be the GPU of its number, and reduce what lies there by NCCL."""
        if torch.device(device).type == "cuda" and self._device_group is None:
            torch.cuda.set_device(self.local_rank)
            self._device_group = dist.new_group(backend="nccl", timeout=TIMEOUT)  # pyright: ignore[reportAttributeAccessIssue]

    def part_of(self, batch: Tensor) -> Tensor:
        """This rank's rows of a batch that all have; it divides by their number."""
        return batch.tensor_split(self.size)[self.rank]

    # Few numbers and objects, by way of the CPU.

    def exchange(self, values: Sequence[float]) -> Tensor:
        """Every rank's `values`, `[size, len(values)]`, float64."""
        mine = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        _reaching(lambda: dist.all_gather(gathered, mine))
        return torch.stack(gathered)

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, which can be pickled."""
        gathered: list[Any] = [None] * self.size
        _reaching(lambda: dist.all_gather_object(gathered, value))
        return gathered

    def from_leader(self, value: T) -> T:
        """What rank 0 has passed; the others wait for it."""
        box = [value]
        _reaching(lambda: dist.broadcast_object_list(box, src=0))
        return box[0]

    def by_leader(self, find: Callable[[], T]) -> T:
        """What rank 0 finds, on all ranks; what it raises, too.

        Raises:
            ValueError, RuntimeError: it has failed.
        """
        found: Any = None
        with self.all_or_none():
            found = find() if self.leads else None
        return self.from_leader(found)

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """What is done inside has worked on every rank, or fails on every rank. Nothing inside may talk to the others.

        Raises:
            ValueError, RuntimeError: what went wrong, and on which ranks.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        texts = self.gather(None if error is None else (isinstance(error, ValueError | OSError), str(error)))
        if error is not None and len(set(texts)) == 1:
            raise error
        failed = {rank: text for rank, text in enumerate(texts) if text is not None}
        if failed:
            kind = ValueError if all(refused for refused, _ in failed.values()) else RuntimeError
            said = "\n  ".join(f"rank {rank}: {text}" for rank, (_, text) in failed.items())
            raise kind(f"{len(failed)} of {self.size} ranks cannot go on:\n  {said}") from error

    # Tensors.

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over the ranks, in few large messages. The sum is the same on all, to the bit."""
        small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            if tensor.nbytes >= BUCKET_BYTES and tensor.is_contiguous():
                self._reduce(tensor, dist.ReduceOp.SUM)
            else:
                small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for same_kind in small.values():
            for bucket in _buckets(same_kind):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                self._reduce(flat, dist.ReduceOp.SUM)
                for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def summed(self, tensor: Tensor) -> Tensor:
        """A new tensor: the sum over the ranks."""
        total = tensor.detach().clone()
        self._reduce(total, dist.ReduceOp.SUM)
        return total

    def smallest(self, tensor: Tensor) -> Tensor:
        """A new tensor: elementwise the smallest of all ranks."""
        least = tensor.detach().clone()
        self._reduce(least, dist.ReduceOp.MIN)
        return least

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks `[n, ...]`, in their order; each may have another number of them."""
        counts = [int(n) for n in self.exchange([len(tensor)])[:, 0]]
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor.detach()
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        _reaching(lambda: dist.all_gather(gathered, padded, group=self._group_of(tensor)))
        return torch.cat([part[:n] for part, n in zip(gathered, counts, strict=True)])

    def all_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks `[sum(counts), ...]`, in their order, where each has `counts[rank]` of them."""
        gathered = [own.new_empty(max(counts), *own.shape[1:]) for _ in counts]
        padded = _padded(own.detach(), max(counts))
        _reaching(lambda: dist.all_gather(gathered, padded, group=self._group_of(own)))
        return torch.cat([part[:n] for part, n in zip(gathered, counts, strict=True)])

    def own_rows_of_sum(self, everyone: Tensor, counts: Sequence[int]) -> Tensor:
        """Of the sum over the ranks of `[sum(counts), ...]` the rows that are this rank's: `[counts[rank], ...]`."""
        parts = [_padded(part, max(counts)) for part in everyone.detach().split(list(counts))]
        own = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        _reaching(lambda: dist.reduce_scatter(own, parts, group=self._group_of(everyone)))
        return own[: counts[self.rank]]

    def joined_by_leader(self, part: Tensor, dim: int) -> Tensor | None:
        """On rank 0, in its main memory: all ranks' parts, of one shape, one after the other along `dim`. None elsewhere.

        A part at a time, so that beside the whole there is no more than one.
        """
        mine = part.detach().cpu().contiguous()
        if not self.leads:
            for piece in mine.view(-1).split(PIECE_ELEMENTS):
                _reaching(partial(dist.send, piece, 0))
            return None
        shape = list(mine.shape)
        shape[dim] *= self.size
        whole = torch.empty(shape, dtype=mine.dtype)
        whole.narrow(dim, 0, mine.shape[dim]).copy_(mine)
        theirs = torch.empty_like(mine)
        for rank in range(1, self.size):
            for piece in theirs.view(-1).split(PIECE_ELEMENTS):
                _reaching(partial(dist.recv, piece, rank))
            whole.narrow(dim, rank * mine.shape[dim], mine.shape[dim]).copy_(theirs)
        return whole

    def _reduce(self, tensor: Tensor, op: Any) -> None:
        _reaching(lambda: dist.all_reduce(tensor, op, group=self._group_of(tensor)))

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._device_group if tensor.device.type == "cuda" else None

    # When a run cannot go on.

    def is_successor(self) -> bool:
        """Whether this rank saves and speaks for a run that has failed: the lowest of those that are left.

        The others return when it is done (`succeeded`), so that none ends, upon which `torchrun` would end all.
        """
        reached = False
        try:
            self._store.set(f"left/{self.rank}", "1")
            reached = self._store.check([f"left/{self.rank}"])  # a write alone does not fail
            until = time.monotonic() + TAKE_OVER_SECONDS
            while time.monotonic() < until:
                if self._any_lower("left"):
                    while not self._any_lower("done"):
                        time.sleep(0.05)
                    return False
                if self.leads:
                    break
                time.sleep(0.05)
        except RuntimeError:  # without torchrun the store ends with rank 0
            return not reached  # which was there a moment ago, so it has ended by itself
        return True

    def succeeded(self) -> None:
        """Tell the others that all is saved and said."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"done/{self.rank}", "1")

    def _any_lower(self, word: str) -> bool:
        return any(self._store.check([f"{word}/{rank}"]) for rank in range(self.rank))

    def speaks(self, text: str) -> bool:
        """Whether this rank prints `text`: rank 0 does, and another one where rank 0 has not said the same."""
        with contextlib.suppress(RuntimeError):
            if self.leads:
                self._store.set("said", text)
                return True
            until = time.monotonic() + TAKE_OVER_SECONDS
            while time.monotonic() < until:
                if self._store.check(["said"]):
                    return self._store.get("said").decode() != text
                time.sleep(0.05)
        return True


def _reaching(operation: Callable[[], Any]) -> None:
    try:
        operation()
    except RuntimeError as error:  # gloo and NCCL have no error of their own for it
        raise LostRankError(
            "Another rank of this run has ended or cannot be reached, so none can go on. Start all of them again; their "
            "number may be another."
        ) from error


def _padded(rows: Tensor, n: int) -> Tensor:
    """`n` rows, contiguous: those that there are, and zeros."""
    if len(rows) == n:
        return rows.contiguous()
    padded = rows.new_zeros(n, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """The process group of a launch, by the environment that `torchrun` sets; it is left at the end.

    What other ranks than 0 would only repeat (log lines below an error) is not logged meanwhile.
    """
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group("gloo", store=PrefixStore("group", store), rank=rank, world_size=size, timeout=TIMEOUT)
    packages = [logging.getLogger(name) for name in ("e2e_sae_plugin", "sae_lens")]
    levels = [package.level for package in packages]
    try:
        ranks = Ranks(PrefixStore("e2e_sae_plugin", store))
        if not ranks.leads:
            for package in packages:
                package.setLevel(logging.ERROR)
        yield ranks
    finally:
        for package, level in zip(packages, levels, strict=True):
            package.setLevel(level)
        dist.destroy_process_group()


_joined: list[Ranks] = []


def join() -> Ranks | None:
    """The ranks of this launch, joined until the process ends; None for a process that was started alone.

    Raises:
        ValueError: the process has a process group of its own making.
    """
    if _joined:
        return _joined[0]
    if launched_size() == 1:
        return None
    if dist.is_initialized():
        raise ValueError(
            "This script has called torch.distributed.init_process_group itself. Leave that to the runner, which joins the "
            "processes of torchrun."
        )
    until_the_end = contextlib.ExitStack()
    _joined.append(until_the_end.enter_context(process_group()))
    atexit.register(until_the_end.close)
    return _joined[0]


def joined() -> Ranks | None:
    """The ranks, where `join` has been called."""
    return _joined[0] if _joined else None
