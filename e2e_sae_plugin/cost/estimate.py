"""All that can be said of a run's cost before it runs, put together from its config."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.cost.advice import HEADROOM, Advice, advice_for, available_memory
from e2e_sae_plugin.cost.flops import step_flops, total_flops
from e2e_sae_plugin.cost.measure import Measurement, RunParts, build_parts, measure_steps, peak_memory
from e2e_sae_plugin.cost.memory import StepMemory, saved_by_spliced_pass, step_memory
from e2e_sae_plugin.cost.placement import Placement, is_cpu, placements
from e2e_sae_plugin.cost.ranks import Ranks, config_of_rank, ranks_of
from e2e_sae_plugin.cost.workload import Workload, workload_of
from e2e_sae_plugin.demo.bundled import BUNDLED
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.preflight import check_device, check_device_spelling, check_model_shape

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
    placements: tuple[Placement, ...]
    """What each device holds; one, where model and SAE are on the same."""
    ranks: Ranks | None = None
    """Where several processes share a step; all else is then one rank's."""

    @property
    def run_flops(self) -> float:
        """Of the whole run."""
        local = self.cfg.local_first if self.local_flops is not None else 0.0
        per_token = (1 - local) * total_flops(self.flops) + local * total_flops(self.local_flops or {})
        return per_token * self.cfg.training_tokens * (1 if self.ranks is None else self.ranks.n)

    @property
    def peak_bytes(self) -> int:
        """The estimate, or what was measured where that is more."""
        measured = self.measurement.peak_bytes if self.measurement is not None else None
        return max(self.memory.peak_bytes, measured or 0)

    @property
    def fits(self) -> bool | None:
        """Whether it leaves some of the free memory free, on every device; None where that is not known."""
        if len(self.placements) > 1:
            known = [p for p in self.placements if p.available_bytes is not None]
            if any(p.memory.peak_bytes > HEADROOM * (p.available_bytes or 0) for p in known):
                return False
            return True if len(known) == len(self.placements) else None
        return None if self.available_bytes is None else self.peak_bytes <= HEADROOM * self.available_bytes

    @property
    def is_tight(self) -> bool:
        """Whether it takes half of the free memory, or that is not known."""
        return self.available_bytes is None or self.peak_bytes > self.available_bytes / 2


def estimate_run(cfg: E2ESAERunnerConfig, n_steps: int = DEFAULT_STEPS, n_ranks: int | None = None) -> Estimate:
    """What the run of `cfg` will cost.

    Args:
        n_steps: timed steps; 0 for none. None are run either where the estimate is beyond the memory that there is.
        n_ranks: processes that share each step; what is counted and measured is then one rank's share.

    Raises:
        ValueError: model, SAE, device or context do not fit each other, as in a run.
    """
    if cfg.shard_dictionary:
        raise ValueError(
            "shard_dictionary=True is not in the model of cost. Leave it at False for the cost with replicas of the SAE; "
            "docs/guides/many_devices.md says how much of an SAE a rank then holds, and what ranks send each other."
        )
    device = str(cfg.device)
    if n_ranks is not None:
        cfg = config_of_rank(cfg, n_ranks)
    llm_device = str(cfg.llm_device or device)
    on_cpu = is_cpu(device)
    (check_device if n_steps else check_device_spelling)(cfg)
    free = {name: _available(name) for name in (device, llm_device)}
    available = free[device] if llm_device == device else None
    if cfg.model_name != BUNDLED:
        check_model_shape(cfg)
    parts = build_parts(cfg, on_device=n_steps > 0)
    work = workload_of(parts.cfg, parts.spliced, parts.sae)
    saved = saved_by_spliced_pass(parts.spliced, cfg.context_size)
    memory = step_memory(work, saved, on_cpu)
    by_device = placements(work, saved, device, llm_device, free)
    measurement, why_not = _measured(parts, n_steps, by_device)
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
        placements=by_device,
        ranks=None if n_ranks is None else ranks_of(work, n_ranks, parts.sae.W_dec.element_size()),
    )


def _available(device: str) -> int | None:
    available = available_memory(device)
    if available is not None and is_cpu(device):
        available += peak_memory() or 0  # what this process holds now, a run of its own would hold
    return available


def _measured(parts: RunParts, n_steps: int, by_device: tuple[Placement, ...]) -> tuple[Measurement | None, str]:
    """The measurement, or None and why there is none."""
    if not n_steps:
        return None, "--no-measure"
    if any(p.available_bytes is not None and p.memory.peak_bytes > p.available_bytes for p in by_device):
        return None, "no step was tried: by the estimate it does not fit"
    try:
        return measure_steps(parts, n_steps), ""
    except torch.OutOfMemoryError:
        return None, RAN_OUT
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what the CPU's allocator raises
            raise
        return None, RAN_OUT
