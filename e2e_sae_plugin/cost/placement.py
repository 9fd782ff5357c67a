"""What a step holds on each device, where the model is on one (`llm_device`) and the SAE on another (`device`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from e2e_sae_plugin.cost.memory import FP32_BYTES, StepMemory, step_memory
from e2e_sae_plugin.cost.workload import SavedBytes, Workload, changed

COPIES = 3
"""`[tokens, d_in]` tensors that cross: the SAE's input, its output, the gradient of that."""


@dataclass(frozen=True)
class Placement:
    """One device's share of a step."""

    device: str
    holds: str
    """"model", "SAE" or "model and SAE"."""
    memory: StepMemory
    available_bytes: int | None


def is_cpu(device: str) -> bool:
    """Whether memory is that of the process, libraries included."""
    return not device.startswith("cuda")


def placements(
    work: Workload, saved: SavedBytes, device: str, llm_device: str, available: dict[str, int | None]
) -> tuple[Placement, ...]:
    """The memory of one optimizer step by device.

    Args:
        device: the SAE's.
        llm_device: the model's.
        available: free bytes by device; one that is left out is not known.
    """
    if device == llm_device:
        memory = step_memory(work, saved, is_cpu(device))
        return (Placement(device, "model and SAE", memory, available.get(device)),)
    return (
        Placement(llm_device, "model", _of_model(work, saved, is_cpu(llm_device)), available.get(llm_device)),
        Placement(device, "SAE", _of_sae(work, is_cpu(device)), available.get(device)),
    )


def _of_model(work: Workload, saved: SavedBytes, on_cpu: bool) -> StepMemory:
    nothing = {"weight_bytes": 0, "trained_bytes": 0, "optimized_bytes": 0, "d_sae": 0, "active": 0.0}
    return step_memory(changed(work, sae=nothing), saved, on_cpu)


def _of_sae(work: Workload, on_cpu: bool) -> StepMemory:
    model = dataclasses.replace(work.model, weight_bytes=0, element_bytes=0, dequantised_bytes=0)
    alone = changed(work, model=model, has_kl=False, n_downstream=1 if work.has_spliced_pass else 0)
    memory = step_memory(alone, SavedBytes(0.0, 0.0), on_cpu)
    copies = COPIES * work.sae_prompts * work.trained_positions * work.sae.d_in * FP32_BYTES
    phases = {phase: size + copies for phase, size in memory.phases.items()}
    return StepMemory({**memory.parts, "copies from and for the model": copies}, phases)
