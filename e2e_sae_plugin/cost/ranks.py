"""What a step costs each of several processes that share its tokens, and what they say to each other.

Data-parallel training: model and SAE are on every rank, the step's sequences are split evenly, and gradients are summed once
per optimizer step. Predicted here, whoever does it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.cost.memory import FP32_BYTES
from e2e_sae_plugin.cost.workload import Workload


@dataclass(frozen=True)
class Ranks:
    """One step on `n` processes."""

    n: int
    tokens_per_rank: int
    """Trained tokens of a step."""
    reduced_bytes: int
    """The gradients that are summed at each step, in fp32."""
    sent_bytes: int
    """By each rank at each step, in a ring: `2 (n - 1) / n` of them."""


def ring_bytes(reduced_bytes: int, n: int) -> int:
    """What each of `n` ranks sends (and receives) for a ring all-reduce."""
    return round(2 * (n - 1) / n * reduced_bytes)


def ranks_of(work: Workload, n: int, weight_element_bytes: int = FP32_BYTES) -> Ranks:
    """The communication of the step `work`, which is one rank's.

    Args:
        weight_element_bytes: of a number of the SAE's weights.
    """
    reduced = work.sae.trained_bytes // weight_element_bytes * FP32_BYTES
    return Ranks(n, work.tokens_per_step, reduced, ring_bytes(reduced, n))


def config_of_rank(cfg: E2ESAERunnerConfig, n: int) -> E2ESAERunnerConfig:
    """The config as one of `n` ranks sees it: its share of each step's sequences.

    Raises:
        ValueError: the sequences of a step cannot be split evenly.
    """
    if n < 1:
        raise ValueError(f"--ranks must be at least 1, got {n}.")
    if cfg.step_size_prompts % n:
        raise ValueError(
            f"--ranks {n} cannot share the {cfg.step_size_prompts} sequences of a step evenly (train_batch_size_tokens="
            f"{cfg.train_batch_size_tokens} in sequences of {cfg.training_context_size}). Use a divisor of "
            f"{cfg.step_size_prompts}, or another train_batch_size_tokens."
        )
    share = copy.copy(cfg)  # `dataclasses.replace` would give the checkpoints another folder
    share.train_batch_size_tokens = cfg.train_batch_size_tokens // n
    share.training_tokens = cfg.training_tokens // n
    return share
