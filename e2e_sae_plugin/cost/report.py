"""An estimate as text and as figures."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from e2e_sae_plugin.cost.advice import HEADROOM, Advice, for_memory, for_time
from e2e_sae_plugin.cost.estimate import RAN_OUT, Estimate
from e2e_sae_plugin.cost.flops import optimizer_bytes, total_flops
from e2e_sae_plugin.cost.placement import Placement


def report(estimate: Estimate) -> str:
    """What the command prints."""
    cfg, work = estimate.cfg, estimate.work
    n_tokens = cfg.training_tokens * (estimate.ranks.n if estimate.ranks else 1)
    lines = [
        f"{n_tokens:,} tokens of {cfg.model_name}, SAE of {work.sae.d_in} x {work.sae.d_sae:,} "
        f"({work.sae.architecture}) at {cfg.hook_name}, objective {cfg.objective.kind}",
        f"steps of {work.tokens_per_step:,} tokens, {work.micro_prompts * work.context_size:,} through the model at once",
        *(f"{said}: not counted below, but in the measured time" for said in cfg.objective.approximations),
        "",
        *_flops_lines(estimate),
        "",
        *_memory_lines(estimate),
        *_rank_lines(estimate),
        "",
        *_time_lines(estimate),
    ]
    too_large = estimate.fits is False or estimate.why_not_measured == RAN_OUT
    memory, time = for_memory(estimate.advice), for_time(estimate.advice)
    if too_large:
        lines += ["", "To make it fit (estimated, each by itself):", *_advice_lines(memory, by_memory=True)]
    elif memory and estimate.is_tight:
        lines += ["", "To use less memory (estimated, each by itself):", *_advice_lines(memory[:3], by_memory=True)]
    if time:
        lines += ["", "To make it faster (share of the arithmetic, each by itself):", *_advice_lines(time, False)]
    if str(cfg.device) == "cpu" and torch.cuda.is_available():
        lines += ["", "A GPU is here: set device: cuda."]
    return "\n".join(lines)


def _flops_lines(estimate: Estimate) -> list[str]:
    total = total_flops(estimate.flops)
    lines = [f"Arithmetic per token: {total / 1e6:,.1f} MFLOP"]
    lines += [f"  {flops / 1e6:10,.1f}  {flops / total:4.0%}  {part}" for part, flops in estimate.flops.items()]
    if estimate.local_flops is not None:
        local = total_flops(estimate.local_flops)
        lines.append(
            f"  in the local part, the first {estimate.cfg.local_first:.0%} of the run: {local / 1e6:,.1f} MFLOP"
        )
    lines.append(f"of the run: {estimate.run_flops:.3g} FLOP")
    lines.append(f"and the optimizer moves {memory_size(optimizer_bytes(estimate.work))} at each step")
    return lines


def _memory_lines(estimate: Estimate) -> list[str]:
    memory = estimate.memory
    lines = [
        f"Memory: {memory_size(memory.peak_bytes)} at once by the estimate, in the {memory.peak_phase}. By part, each at "
        "its largest:"
    ]
    lines += [f"  {memory_size(size):>13}  {part}" for part, size in memory.parts.items() if size >= 5e5]
    measured = estimate.measurement.peak_bytes if estimate.measurement is not None else None
    if measured is not None:
        lines.append(f"measured: {memory_size(measured)}")
    if len(estimate.placements) > 1:
        return lines + _placement_lines(estimate.placements)
    device = estimate.cfg.device
    if estimate.available_bytes is None:
        lines.append(f"how much memory {device} has free is not known here, so whether it fits is not checked")
    else:
        verdict = "it fits" if estimate.fits else "IT DOES NOT FIT"
        lines.append(f"free on {device}: {memory_size(estimate.available_bytes)}; {verdict}")
    return lines


def _placement_lines(placements: tuple[Placement, ...]) -> list[str]:
    lines: list[str] = ["of that, on each device:"]
    for one in placements:
        peak = one.memory.peak_bytes
        line = f"  {memory_size(peak):>13}  {one.device}, which holds the {one.holds}"
        if one.available_bytes is not None:
            fits = peak <= HEADROOM * one.available_bytes
            line += f"; free: {memory_size(one.available_bytes)}; {'it fits' if fits else 'IT DOES NOT FIT'}"
        lines.append(line)
    return lines


def _rank_lines(estimate: Estimate) -> list[str]:
    ranks = estimate.ranks
    if ranks is None:
        return []
    return [
        "",
        f"{ranks.n} ranks: {ranks.tokens_per_rank:,} of a step's {ranks.n * ranks.tokens_per_rank:,} tokens on each; memory "
        "above and times below are one rank's",
        f"  {memory_size(ranks.reduced_bytes)} of gradients are summed at each step; in a ring each rank sends "
        f"{memory_size(ranks.sent_bytes)}",
    ]


def _time_lines(estimate: Estimate) -> list[str]:
    measured = estimate.measurement
    if measured is None:
        return [f"Time: not measured ({estimate.why_not_measured})."]
    of_rank = " of a rank, without what the ranks send each other" if estimate.ranks else ""
    seconds = duration(measured.training_seconds(estimate.cfg))
    lines = [f"Time: {seconds} for all steps{of_rank}, as measured on this machine"]
    for times, flops in ((measured.local, estimate.local_flops), (measured.main, estimate.flops)):
        if times is not None and flops is not None:
            share = times.tokens_per_second * total_flops(flops) / measured.matmul_flops_per_second
            speed = f"{times.tokens_per_second:,.0f} tokens/s with the objective {times.objective}"
            of_what = f"a matrix product's {measured.matmul_flops_per_second / 1e9:,.0f} GFLOP/s"
            lines.append(f"  {speed}: {share:.0%} of {of_what}")
    lines.append("  of a new SAE, on random tokens; loading, data, evaluations and checkpoints come on top")
    return lines


def _advice_lines(advice: list[Advice], by_memory: bool) -> list[str]:
    if not advice:
        return ["  no setting of this run makes a difference; use a smaller model or a larger machine"]
    lines: list[str] = []
    for one in advice:
        saving = f"{memory_size(one.memory_saving):>11}" if by_memory else f"{one.flops_saving:8.0%}"
        lines.append(f"  {saving}  {one.change}" + (f"; {one.price}" if one.price else "; the result stays the same"))
    return lines


def memory_size(n_bytes: float) -> str:
    """Such as `1.25 GB`, or `42.0 MB` below 0.1 GB."""
    return f"{n_bytes / 1e9:,.2f} GB" if abs(n_bytes) >= 1e8 else f"{n_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Such as `42 s`, `3 min 5 s`, `2 h 10 min` or `4 days 3 h`."""
    total = max(1, round(seconds))
    for unit, size, smaller, smaller_size in (("days", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if total >= size:
            count, rest = divmod(total, size)
            name = "day" if unit == "days" and count == 1 else unit
            return f"{count} {name} {rest // smaller_size} {smaller}" if rest // smaller_size else f"{count} {name}"
    return f"{total} s"


def to_dict(estimate: Estimate) -> dict[str, Any]:
    """Every figure, for `--json`."""
    measured = estimate.measurement
    timing = None
    if measured is not None:
        timing = {
            **dataclasses.asdict(measured),
            "tokens_per_second": measured.main.tokens_per_second,
            "share_of_matmul": measured.main.tokens_per_second
            * total_flops(estimate.flops)
            / measured.matmul_flops_per_second,
            "training_seconds": measured.training_seconds(estimate.cfg),
        }
    return {
        "flops_per_token": estimate.flops,
        "flops_per_token_local": estimate.local_flops,
        "run_flops": estimate.run_flops,
        "optimizer_bytes_per_step": optimizer_bytes(estimate.work),
        "memory_bytes": estimate.memory.parts,
        "memory_phases_bytes": estimate.memory.phases,
        "peak_bytes": estimate.memory.peak_bytes,
        "available_bytes": estimate.available_bytes,
        "fits": estimate.fits,
        "devices": [
            {
                "device": one.device,
                "holds": one.holds,
                "peak_bytes": one.memory.peak_bytes,
                "memory_bytes": one.memory.parts,
                "available_bytes": one.available_bytes,
            }
            for one in estimate.placements
        ],
        "ranks": None if estimate.ranks is None else dataclasses.asdict(estimate.ranks),
        "measured": timing,
        "why_not_measured": estimate.why_not_measured or None,
        "advice": [dataclasses.asdict(one) for one in estimate.advice],
        "workload": dataclasses.asdict(estimate.work),
    }
