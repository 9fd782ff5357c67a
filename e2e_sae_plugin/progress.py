"""The progress bar of a run."""

from __future__ import annotations

import time
from typing import Any

from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from tqdm.auto import tqdm

MIN_SECONDS = 0.5


class Progress:
    """Tokens seen and tokens per second, with the latest step's named losses and L0.

    Args:
        total: tokens of the whole run.
        done: tokens that an earlier part of the run has seen.
        shown: False for no bar.
    """

    def __init__(self, total: int, done: int, *, shown: bool = True):
        hidden: dict[str, Any] = {} if shown else {"disable": True}  # or TQDM_DISABLE would not be heard
        self._bar: tqdm[Any] = tqdm(
            total=total,
            initial=done,
            desc="Training SAE",
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            **hidden,
        )
        self._shown = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, step: int, n_tokens: int, output: TrainStepOutput, l0: Tensor, *, now: bool = False) -> None:
        """Bring the bar up to date, at most every `MIN_SECONDS` unless `now`: reading losses waits for the device."""
        if self._bar.disable:
            return
        if not now and time.monotonic() - self._shown < MIN_SECONDS:
            return
        values = {name.removesuffix("_loss"): float(value) for name, value in output.losses.items()}
        # TopK's auxiliary term is exactly 0 while no feature is dead.
        terms = {name: f"{value:.4g}" for name, value in values.items() if value != 0}
        self._bar.set_postfix({"step": step, **terms, "L0": f"{float(l0):.1f}"}, refresh=False)
        self._bar.update(n_tokens - self._bar.n)
        self._shown = time.monotonic()
