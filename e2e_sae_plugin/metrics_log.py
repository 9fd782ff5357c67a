"""Where metrics go: every scalar to `metrics.jsonl`, and everything to Weights & Biases where that is on."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

METRICS_FILENAME = "metrics.jsonl"


class MetricsLog:
    """Appends one JSON object per call to `metrics.jsonl` and passes the same metrics to Weights & Biases.

    A line that cannot be written (a full disk) is kept and written with the next one: a log is no reason to lose a run.

    Args:
        folder: where `metrics.jsonl` is written; None for no file.
        to_wandb: also call `wandb.log` (the runner has called `wandb.init`).
        resume: keep the lines of an earlier run, up to those that `resume` says; otherwise the file starts empty.
    """

    def __init__(self, folder: Path | None, to_wandb: bool, resume: bool = False):
        self.to_wandb = to_wandb
        self.path: Path | None = None
        self._pending = ""
        self._n_bytes = 0
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
            self._pending = ""
        except OSError as error:
            if not was_pending:
                logger.error("Cannot write %s (%s); its lines are kept in memory until it can be.", self.path, error)

    # Resuming.

    def state(self) -> dict[str, Any]:
        """How much has been written, and what could not be; all of it is on the disk when this returns."""
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return {"n_bytes": self._n_bytes, "pending": self._pending}

    def resume(self, state: dict[str, Any]) -> None:
        """Cut off what was logged after `state` was taken: the steps since then are trained, and logged, again."""
        if self.path is None:
            return
        there = self.path.stat().st_size if self.path.exists() else 0
        if there < state["n_bytes"]:
            logger.warning(
                "%s holds %d bytes of the %d that the run had logged at the checkpoint; it goes on from what is there.",
                self.path, there, state["n_bytes"],
            )  # fmt: skip
        else:
            os.truncate(self.path, state["n_bytes"]) if there else None
        self._n_bytes = min(there, state["n_bytes"])
        self._pending = state["pending"]


def _json_number(value: float) -> float | str:
    """JSON has no NaN or infinity; they are written as strings rather than dropped."""
    return value if math.isfinite(value) else str(value)
