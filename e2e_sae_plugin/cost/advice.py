"""Which settings to change when a run does not fit, or is slow: each with what it saves and what it changes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from e2e_sae_plugin.architectures import FIXED_L0
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.cost.flops import step_flops, total_flops
from e2e_sae_plugin.cost.memory import step_memory
from e2e_sae_plugin.cost.workload import SavedBytes, Workload, changed

SMALLEST_SAVING = 0.02
"""Share of memory or arithmetic below which a change is not worth a line."""
HEADROOM = 0.9
"""Share of the free memory that a run is planned with: allocators round up, and the estimate is one."""
TYPICAL_K = 40
BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Advice:
    """One change of a setting."""

    change: str
    """What to write into the config."""
    price: str
    """What else it changes; "" where the result stays the same."""
    memory_saving: int
    """Estimated bytes off the peak."""
    flops_saving: float
    """Estimated share of the run's arithmetic."""


@dataclass(frozen=True)
class _Change:
    change: str
    price: str
    work: Workload
    """The step after it."""
    share: float = 1.0
    """Of the run's steps, how many are such; the others stay as they are."""


def advice_for(cfg: E2ESAERunnerConfig, work: Workload, saved: SavedBytes, on_cpu: bool = True) -> list[Advice]:
    """The changes that lower the peak or the arithmetic by the estimate.

    Args:
        work: the step with the config's objective.
        saved: what autograd keeps of the model.
        on_cpu: as in `step_memory`.
    """
    memory, flops = step_memory(work, saved, on_cpu).peak_bytes, total_flops(step_flops(work))
    found: list[Advice] = []
    for change in _changes(cfg, work):
        other = change.work
        ratio = other.model.element_bytes / work.model.element_bytes
        kept = SavedBytes(saved.fixed * ratio, saved.per_position * ratio)
        saved_bytes = memory - step_memory(other, kept, on_cpu).peak_bytes if change.share == 1 else 0
        saved_flops = change.share * (1 - total_flops(step_flops(other)) / flops)
        if max(saved_bytes / memory, saved_flops) >= SMALLEST_SAVING:
            found.append(Advice(change.change, change.price, saved_bytes, saved_flops))
    return found


def for_memory(advice: Iterable[Advice]) -> list[Advice]:
    """Those that lower the peak: first those without a price, then by what they save."""
    return sorted((a for a in advice if a.memory_saving > 0), key=lambda a: (bool(a.price), -a.memory_saving))


def for_time(advice: Iterable[Advice]) -> list[Advice]:
    """Those that save arithmetic, in the same order."""
    useful = (a for a in advice if a.flops_saving >= SMALLEST_SAVING)
    return sorted(useful, key=lambda a: (bool(a.price), -a.flops_saving))


def _changes(cfg: E2ESAERunnerConfig, work: Workload) -> Iterator[_Change]:
    yield from _batch_changes(cfg, work)
    yield from _model_changes(cfg, work)
    yield from _sae_changes(cfg, work)
    yield from _objective_changes(cfg, work)


def _batch_changes(cfg: E2ESAERunnerConfig, work: Workload) -> Iterator[_Change]:
    smaller = [n for n in range(1, work.micro_prompts) if work.step_prompts % n == 0]
    if work.has_spliced_pass and smaller:
        for n in sorted({smaller[-1], 1}, reverse=True):
            text = f"store_batch_size_prompts: {n} (now {cfg.store_batch_size_prompts})"
            yield _Change(text, "", changed(work, micro_prompts=n))
    if work.spliced_blocks > 1 and not work.recomputes_blocks:
        text = "checkpoint_blocks: true (now false), for one more forward pass over the blocks after the SAE"
        yield _Change(text, "", changed(work, recomputes_blocks=True))
    if work.sae_prompts == work.step_prompts > 1:
        half = work.step_prompts // 2
        micro = _largest_divisor(half, work.micro_prompts)
        yield _Change(
            f"train_batch_size_tokens: {half * work.trained_positions} (now {cfg.train_batch_size_tokens})",
            "noisier steps",
            changed(work, step_prompts=half, micro_prompts=micro),
        )


def _model_changes(cfg: E2ESAERunnerConfig, work: Workload) -> Iterator[_Change]:
    model, n_layers = work.model, len(work.model.block_weights)
    is_plain = not model.dequantised_bytes
    if is_plain and model.element_bytes > BFLOAT16_BYTES and cfg.model_name != "e2e-sae-demo":  # which is fp32 alone
        weights = model.weight_bytes * BFLOAT16_BYTES // model.element_bytes
        narrow = dataclasses.replace(model, weight_bytes=weights, element_bytes=BFLOAT16_BYTES)
        text = "model_from_pretrained_kwargs: {dtype: bfloat16}"
        yield _Change(text, "a less exact model; slow on CPUs", changed(work, model=narrow))
    later = (work.start_block + n_layers) // 2
    if work.has_spliced_pass and later > work.start_block:
        downstream = min(work.n_downstream, max(n_layers - later - 1, 0))
        end = max(work.spliced_end, later)
        text = f"hook_name: a place before block {later} (now block {work.start_block})"
        if work.has_kl or downstream:
            moved = changed(work, start_block=later, spliced_end=end, clean_blocks=end, n_downstream=downstream)
            yield _Change(text, "an SAE of another layer", moved)
    if work.trained_positions == work.context_size >= 64 and work.context_size % 2 == 0:
        half = work.context_size // 2
        prompts = 2 * work.step_prompts
        micro = _largest_divisor(prompts, cfg.store_batch_size_prompts)
        shorter = changed(work, context_size=half, trained_positions=half, step_prompts=prompts, micro_prompts=micro)
        yield _Change(f"context_size: {half} (now {work.context_size})", "the SAE sees shorter texts", shorter)


def _sae_changes(cfg: E2ESAERunnerConfig, work: Workload) -> Iterator[_Change]:  # noqa: ARG001
    sae = work.sae
    half = sae.d_sae // 2
    if half >= max(sae.d_in, 1):
        sizes = {
            "d_sae": half,
            "weight_bytes": sae.weight_bytes // 2,
            "trained_bytes": sae.trained_bytes // 2,
            "optimized_bytes": sae.optimized_bytes // 2,
        }
        yield _Change(f"sae.d_sae: {half} (now {sae.d_sae})", "a smaller dictionary", changed(work, sae=sizes))
    if sae.active is None:
        # TopK's auxiliary loss ties a step's tokens together, so the SAE runs on all of them at once.
        fixed_l0 = {"architecture": "topk", "active": float(TYPICAL_K), "has_gate": False}
        text = f"sae.architecture: topk, with sae.k: {TYPICAL_K} (now {sae.architecture})"
        yield _Change(text, "L0 is set instead of its penalty", changed(work, separable=False, sae=fixed_l0))


def _objective_changes(cfg: E2ESAERunnerConfig, work: Workload) -> Iterator[_Change]:
    can_start_locally = cfg.sae.architecture() in FIXED_L0 or cfg.objective.mse > 0
    if work.has_spliced_pass and not cfg.local_first and can_start_locally:
        start = work.start_block
        local = changed(work, has_kl=False, n_downstream=0, clean_blocks=start, spliced_end=start, n_reconstructions=1)
        text = "local_first: 0.5 (now 0)"
        yield _Change(text, "half of the run trains locally: compare the SAEs at its end", local, share=0.5)
    if work.n_reconstructions > 2:
        text = "objective.matryoshka_levels: sampled (now all)"
        yield _Change(text, "a noisier gradient of the inner levels", changed(work, n_reconstructions=2))


def _largest_divisor(number: int, limit: int) -> int:
    return max(n for n in range(1, min(number, limit) + 1) if number % n == 0)


def available_memory(device: str) -> int | None:
    """Bytes that a new process could use on a device: what is free there, on the CPU within the container's limit; None
    where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    if not device.startswith("cpu"):
        return None
    free = [size for size in (_free_of_machine(), _free_of_container()) if size is not None]
    return min(free, default=None)


def _free_of_machine(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # all that there is
    except (AttributeError, OSError, ValueError):
        return None


def _free_of_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None
