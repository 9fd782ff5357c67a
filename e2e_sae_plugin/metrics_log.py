"""Where metrics go: every scalar to `metrics.jsonl`, and everything to Weights & Biases where that is on."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from e2e_sae_plugin.checkpoint.folder import whole_files, write_whole

logger = logging.getLogger(__name__)

METRICS_FILENAME = "metrics.jsonl"
UNKNOWN_LENGTH = 2**62


class MetricsLog:
    """Appends one JSON object per call to `metrics.jsonl` and passes the same metrics to Weights & Biases.

    A line that cannot be written (a full disk) is kept and written with the next one: a log is no reason to lose a run.

    Args:
        folder: where `metrics.jsonl` is written; None for no file.
        to_wandb: also call `wandb.log` (the runner has called `wandb.init`).
        resume: keep the lines of an earlier run, up to those that `resume` says; otherwise the file starts empty.
        kept_by_another: another process writes the run's log, and this one, with no folder, nothing. Of a checkpoint that
            it writes in that one's place, the log is cut by its steps and not by its length.
    """

    def __init__(self, folder: Path | None, to_wandb: bool, resume: bool = False, kept_by_another: bool = False):
        self.to_wandb = to_wandb
        self.path: Path | None = None
        self._pending = ""
        self._n_bytes = UNKNOWN_LENGTH if kept_by_another else 0
        self._last_line = ""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / METRICS_FILENAME
            if not resume:
                self.path.unlink(missing_ok=True)

    def log(self, metrics: dict[str, Any], step: int, n_training_samples: int) -> None:
        """Record metrics of a step; what is not a number (histograms) goes to Weights & Biases alone."""
        if not metrics:
            return
        if self.path is not None:
            scalars = {key: _json_number(value) for key, value in metrics.items() if isinstance(value, int | float)}
            line = {"step": step, "n_training_samples": n_training_samples, **scalars}
            self._write(json.dumps(line, allow_nan=False) + "\n")
        if self.to_wandb:
            import wandb

            wandb.log(metrics, step=step)

    def _write(self, text: str) -> None:
        assert self.path is not None
        was_pending, self._pending = bool(self._pending), self._pending + text
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened each time, so that a moved or removed file does not swallow what follows.
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.truncate(min(self._n_bytes, file.seek(0, os.SEEK_END)))  # drop what an earlier failure left
                self._n_bytes = file.seek(0, os.SEEK_END)
                file.write(self._pending.encode())
                file.flush()
            self._n_bytes += len(self._pending.encode())
            self._last_line, self._pending = text, ""
        except OSError as error:
            if not was_pending:
                logger.error("Cannot write %s (%s); its lines are kept in memory until it can be.", self.path, error)

    # Resuming.

    def state(self) -> dict[str, Any]:
        """How much has been written, and what could not be; all of it is on the disk when this returns."""
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return {"n_bytes": self._n_bytes, "pending": self._pending, "last_line": self._last_line}

    def resume(self, state: dict[str, Any], n_training_samples: int, earlier: Path | None = None) -> None:
        """Cut off what was logged after `state` was taken: the steps since then are trained, and logged, again.

        Args:
            n_training_samples: of the checkpoint.
            earlier: folder of the run so far, whose log is copied where this one has none.
        """
        if self.path is None:
            return
        if not self.path.exists() and earlier is not None and (earlier / METRICS_FILENAME).is_file():
            shutil.copy(earlier / METRICS_FILENAME, self.path)
        content = self.path.read_bytes() if self.path.exists() else b""
        kept = content[: state["n_bytes"]]
        if len(kept) < state["n_bytes"] or not kept.endswith(state["last_line"].encode()):
            kept = b"".join(_lines_where(content, lambda line: line["n_training_samples"] <= n_training_samples))
            logger.warning(
                "%s is not what it was at the checkpoint; it goes on after %d whole lines of steps until then.",
                self.path, kept.count(b"\n"),
            )  # fmt: skip
        if kept != content:
            with whole_files(self.path.parent, last=METRICS_FILENAME) as folder:
                (folder / METRICS_FILENAME).write_bytes(kept)
        self._n_bytes, self._pending = len(kept), state["pending"]
        self._last_line = kept[kept.rfind(b"\n", 0, -1) + 1 :].decode()

    def keep_lines(self, holds: Callable[[dict[str, Any]], bool]) -> None:
        """Keep the lines of which that holds, of a log that no checkpoint says more about."""
        if self.path is None or not self.path.exists():
            return
        content = self.path.read_bytes()
        kept = b"".join(_lines_where(content, holds))
        if kept != content:
            write_whole(self.path, kept.decode())
        self._n_bytes = len(kept)


def _lines_where(content: bytes, holds: Callable[[dict[str, Any]], bool]) -> Iterator[bytes]:
    """The whole lines that can be read, and of which that holds."""
    for line in content.splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and holds(json.loads(line)):
                yield line
        except (ValueError, KeyError, TypeError):
            continue


def _json_number(value: float) -> float | str:
    """JSON has no NaN or infinity; they are written as strings rather than dropped."""
    return value if math.isfinite(value) else str(value)
