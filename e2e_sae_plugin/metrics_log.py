"""Where metrics go: every scalar to `metrics.jsonl`, and everything to Weights & Biases where that is on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

METRICS_FILENAME = "metrics.jsonl"


class MetricsLog:
    """Appends one JSON object per call to `metrics.jsonl` and passes the same metrics to Weights & Biases.

    Args:
        folder: where `metrics.jsonl` is written; None for no file.
        to_wandb: also call `wandb.log` (the runner has called `wandb.init`).
        resume: keep the lines of an earlier run; otherwise the file starts empty.
    """

    def __init__(self, folder: Path | None, to_wandb: bool, resume: bool = False):
        self.to_wandb = to_wandb
        self.path: Path | None = None
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
            with self.path.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.to_wandb:
            import wandb

            wandb.log(metrics, step=step)


def _json_number(value: float) -> float | str:
    """JSON has no NaN or infinity; they are written as strings rather than dropped."""
    return value if math.isfinite(value) else str(value)
