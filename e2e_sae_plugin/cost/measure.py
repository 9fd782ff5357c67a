"""A few real optimizer steps on this machine: the parts of a run, built from its config, on random tokens."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE

from e2e_sae_plugin.build import build_sae, check_model_and_sae, load_language_model
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.metrics_log import MetricsLog
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.splice import SplicedModel, splice_into
from e2e_sae_plugin.trainer import E2ESAETrainer

logger = logging.getLogger(__name__)

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
MATMUL_REPEATS = 6


@dataclass(frozen=True)
class RunParts:
    """What a run's cost is read from."""

    cfg: E2ESAERunnerConfig
    spliced: SplicedModel
    sae: TrainingSAE[Any]


@dataclass(frozen=True)
class StepTimes:
    """Measured optimizer steps of one objective."""

    objective: str
    """Its kind: "local", "e2e", ..."""
    seconds: tuple[float, ...]
    """Of each step after the first, which sets things up."""
    tokens_per_step: int

    @property
    def tokens_per_second(self) -> float:
        """Of the median step."""
        return self.tokens_per_step / statistics.median(self.seconds)


@dataclass(frozen=True)
class Measurement:
    """What this machine does with the run."""

    main: StepTimes
    """With the config's objective."""
    local: StepTimes | None
    """With the local objective, where the run starts with it (`local_first`)."""
    matmul_flops_per_second: float
    """Of a large matrix product in the model's dtype."""
    peak_bytes: int | None
    """Of the process, or of the accelerator where it trains on one; None where the system does not say."""

    def training_seconds(self, cfg: E2ESAERunnerConfig) -> float:
        """All steps of the run; loading, data, evaluations and checkpoints come on top."""
        steps = math.ceil(cfg.training_tokens / self.main.tokens_per_step)
        local_steps = math.ceil(cfg.local_first * steps) if self.local is not None else 0
        seconds = (steps - local_steps) * statistics.median(self.main.seconds)
        if self.local is not None:
            seconds += local_steps * statistics.median(self.local.seconds)
        return seconds


def build_parts(cfg: E2ESAERunnerConfig, on_device: bool = True) -> RunParts:
    """Model and SAE of a config, checked as a run checks them. No data, no folders, no Weights & Biases.

    Args:
        on_device: where the run would be; otherwise on the CPU, for their sizes alone.

    Raises:
        ValueError: model and SAE do not fit each other, as in a run.
    """
    cfg = copy.copy(cfg)  # `dataclasses.replace` would give the checkpoints another folder
    cfg.output_path = cfg.checkpoint_path = cfg.resume_from_checkpoint = None
    cfg.logger = dataclasses.replace(cfg.logger, log_to_wandb=False)
    cfg.verbose = False
    if not on_device:
        cfg.device = cfg.llm_device = "cpu"
        cfg.sae = copy.copy(cfg.sae)
        # Sizes without memory: a dictionary may be counted that this machine has no room for.
        cfg.sae.device = "cpu" if cfg.from_pretrained_path else "meta"
    device = cfg.llm_device or str(cfg.device)
    model = load_language_model(cfg.model_class_name, cfg.model_name, device, cfg.model_from_pretrained_kwargs or {})
    sae = build_sae(cfg)
    needs_downstream = cfg.objective.beta > 0
    hooks = cfg.objective.downstream_hooks if needs_downstream else None
    spliced = splice_into(model, cfg.hook_name, downstream_hooks=hooks, needs_downstream=needs_downstream)
    check_model_and_sae(spliced, sae, cfg)
    return RunParts(cfg, spliced, sae)


def measure_steps(parts: RunParts, n_steps: int) -> Measurement:
    """Train on random tokens for a few steps; the SAE is changed by them.

    Steps are those of a new SAE, which is dense; `torch.compile` (`compile_sae`) is left out.

    Args:
        n_steps: timed steps of each objective that the run has, after one that is not timed.

    Raises:
        ValueError: `n_steps` is not positive.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}.")
    cfg, device = parts.cfg, str(parts.cfg.device)
    trainer = E2ESAETrainer(cfg, parts.sae, parts.spliced, iter([]), MetricsLog(None, to_wandb=False))
    parts.sae.to(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    local = None
    if cfg.local_first:
        local = StepTimes(Objective.local().kind, _timed_steps(trainer, n_steps), cfg.train_batch_size_tokens)
        # What decides which objective a step has.
        trainer.n_training_samples = math.ceil(cfg.local_first * cfg.training_tokens)
    main = StepTimes(cfg.objective.kind, _timed_steps(trainer, n_steps), cfg.train_batch_size_tokens)
    peak = peak_memory(device)
    dtype = next(parts.spliced.model.parameters()).dtype
    if cfg.autocast_lm:
        dtype = torch.bfloat16
    return Measurement(main, local, matmul_speed(str(parts.spliced.token_device), dtype), peak)


def _timed_steps(trainer: E2ESAETrainer, n_steps: int) -> tuple[float, ...]:
    cfg, device = trainer.runner_cfg, trainer.spliced_model.token_device
    generator = torch.Generator().manual_seed(0)
    shape = (cfg.step_size_prompts, cfg.context_size)
    seconds: list[float] = []
    for _ in range(n_steps + 1):
        tokens = torch.randint(trainer.spliced_model.vocabulary, shape, generator=generator).to(device)
        _synchronise(trainer)
        start = time.perf_counter()
        trainer.step(tokens)
        _synchronise(trainer)
        seconds.append(time.perf_counter() - start)
        trainer.n_training_steps += 1
    return tuple(seconds[1:])


def _synchronise(trainer: E2ESAETrainer) -> None:
    for device in {str(trainer.cfg.device), str(trainer.spliced_model.token_device)}:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


def matmul_speed(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large square matrix product, the best of a few."""
    size = MATMUL_SIZE.get(device.split(":")[0], MATMUL_SIZE["cpu"])
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(left)
    best = math.inf
    for _ in range(MATMUL_REPEATS):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: str = "cpu") -> int | None:
    """The most bytes that were in use: of a CUDA device in tensors, else of this process since it started."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Windows has none
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
