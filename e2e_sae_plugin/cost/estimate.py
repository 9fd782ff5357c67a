"""All that can be said of a run's cost before it runs, put together from its config."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.cost.advice import HEADROOM, Advice, advice_for, available_memory
from e2e_sae_plugin.cost.flops import step_flops, total_flops
from e2e_sae_plugin.cost.measure import Measurement, RunParts, build_parts, measure_steps, peak_memory
from e2e_sae_plugin.cost.memory import StepMemory, saved_by_spliced_pass, step_memory
from e2e_sae_plugin.cost.workload import Workload, workload_of
from e2e_sae_plugin.demo.bundled import BUNDLED
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.preflight import check_device, check_model_shape

DEFAULT_STEPS = 3
RAN_OUT = "a step ran out of memory"


@dataclass(frozen=True)
class Estimate:
    """What a run will cost."""

    cfg: E2ESAERunnerConfig
    work: Workload
    flops: dict[str, float]
    """Part -> FLOPs per trained token, with the config's objective."""
    local_flops: dict[str, float] | None
    """The same of the run's local part (`local_first`)."""
    memory: StepMemory
    available_bytes: int | None
    measurement: Measurement | None
    why_not_measured: str
    advice: list[Advice]

    @property
    def run_flops(self) -> float:
        """Of the whole run."""
        local = self.cfg.local_first if self.local_flops is not None else 0.0
        per_token = (1 - local) * total_flops(self.flops) + local * total_flops(self.local_flops or {})
        return per_token * self.cfg.training_tokens

    @property
    def peak_bytes(self) -> int:
        """The estimate, or what was measured where that is more."""
        measured = self.measurement.peak_bytes if self.measurement is not None else None
        return max(self.memory.peak_bytes, measured or 0)

    @property
    def fits(self) -> bool | None:
        """Whether it leaves some of the free memory free; None where that is not known."""
        return None if self.available_bytes is None else self.peak_bytes <= HEADROOM * self.available_bytes

    @property
    def is_tight(self) -> bool:
        """Whether it takes half of the free memory, or that is not known."""
        return self.available_bytes is None or self.peak_bytes > self.available_bytes / 2


def estimate_run(cfg: E2ESAERunnerConfig, n_steps: int = DEFAULT_STEPS) -> Estimate:
    """What the run of `cfg` will cost.

    Args:
        n_steps: timed steps; 0 for none. None are run either where the estimate is beyond the memory that there is.

    Raises:
        ValueError: model, SAE, device or context do not fit each other, as in a run.
    """
    device = str(cfg.device)
    on_cpu = not device.startswith("cuda")
    if n_steps:
        check_device(cfg)
    available = available_memory(device) if (cfg.llm_device or device) == device else None
    if available is not None and on_cpu:
        available += peak_memory() or 0  # what this process holds now, a run of its own would hold
    if cfg.model_name != BUNDLED:
        check_model_shape(cfg)
    parts = build_parts(cfg, on_device=n_steps > 0)
    work = workload_of(parts.cfg, parts.spliced, parts.sae)
    saved = saved_by_spliced_pass(parts.spliced, cfg.context_size)
    memory = step_memory(work, saved, on_cpu)
    measurement, why_not = _measured(parts, n_steps, memory, available)
    local = workload_of(parts.cfg, parts.spliced, parts.sae, Objective.local()) if cfg.local_first else None
    return Estimate(
        cfg=cfg,
        work=work,
        flops=step_flops(work),
        local_flops=None if local is None else step_flops(local),
        memory=memory,
        available_bytes=available,
        measurement=measurement,
        why_not_measured=why_not,
        advice=advice_for(cfg, work, saved, on_cpu),
    )


def _measured(
    parts: RunParts, n_steps: int, memory: StepMemory, available: int | None
) -> tuple[Measurement | None, str]:
    """The measurement, or None and why there is none."""
    if not n_steps:
        return None, "--no-measure"
    if available is not None and memory.peak_bytes > available:
        return None, "no step was tried: by the estimate it does not fit"
    try:
        return measure_steps(parts, n_steps), ""
    except torch.OutOfMemoryError:
        return None, RAN_OUT
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what the CPU's allocator raises
            raise
        return None, RAN_OUT
