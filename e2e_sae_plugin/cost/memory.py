"""Memory of one end-to-end training step, in bytes and by part, and how much of it is held at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from e2e_sae_plugin.cost.workload import SavedBytes, Workload
from e2e_sae_plugin.kernels.kl import chunk_tokens
from e2e_sae_plugin.kernels.sparse_sae import CHUNK_ELEMENTS
from e2e_sae_plugin.splice import SplicedModel

LIBRARIES_BYTES = 600_000_000
"""Resident memory of a process that has imported everything and made a step of no size (measured on Linux)."""
FP32_BYTES = 4
OPAQUE_CHUNK_TENSORS = 6
"""Tensors of a KL chunk's logits where the head is not known to be linear."""
DENSE_TENSORS = {"standard": 2, "abstopk": 4, "matryoshka_batchtopk": 6}
"""`[tokens, d_sae]` tensors at the largest moment of an SAE's step, while many features are active. On a CPU the second of a
standard SAE is a chunk (`kernels.relu_sae`)."""
OTHER_DENSE_TENSORS = 8
"""The same of SAELens's own code, which trains the other architectures, and all of them locally."""
BY_SPARSE_KERNEL = frozenset({"topk", "batchtopk"})
"""Architectures that hold a chunk of pre-activations and their active features (`kernels.sparse_sae`)."""
ENTRY_BYTES = 48
"""Of an active feature: value, feature and token, in the order of tokens and in that of features."""
PROBE_POSITIONS = 32


@dataclass(frozen=True)
class StepMemory:
    """What a step holds."""

    parts: dict[str, int]
    """Part -> bytes at its largest."""
    phases: dict[str, int]
    """Phase of the step -> bytes of all that is held in it."""

    @property
    def peak_phase(self) -> str:
        """The phase that holds most."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def peak_bytes(self) -> int:
        """What the phase that holds most holds."""
        return self.phases[self.peak_phase]


def step_memory(work: Workload, saved: SavedBytes, on_cpu: bool = True) -> StepMemory:
    """The memory of one optimizer step after the first.

    Args:
        saved: what autograd keeps of the model, from `saved_by_spliced_pass`.
        on_cpu: memory of the process, libraries included; otherwise of an accelerator.
    """
    model, sae = work.model, work.sae
    acts = _sae_activations(work, on_cpu)
    block = round(work.micro_prompts * work.context_size * saved.at(work.context_size))
    block_input = work.micro_prompts * work.context_size * model.d_model * model.element_bytes
    residuals = (
        1 + work.has_kl + work.n_downstream
    )  # what is kept of the clean pass: block input, final state, downstream
    chunk = min(chunk_tokens(model.vocabulary), work.micro_prompts * work.trained_positions)
    # Those of a linear head: see `kernels.kl._Buffers`; the tile of a CPU's is small.
    chunk_tensors = (2 if on_cpu else 3) if model.has_linear_head else OPAQUE_CHUNK_TENSORS
    parts = {
        "Python and libraries": LIBRARIES_BYTES if on_cpu else 0,
        "model weights": model.weight_bytes,
        "a weight dequantised": model.dequantised_bytes,
        "SAE weights": sae.weight_bytes,
        "SAE gradients": sae.trained_bytes,
        "optimizer state": 2 * sae.optimized_bytes,
        "clean activations": work.sae_prompts * work.context_size * residuals * model.d_model * model.element_bytes,
        "spliced activations": work.spliced_blocks * (block_input if work.recomputes_blocks else block),
        "working space of a block": block,
        "KL chunk": work.has_kl * chunk * model.vocabulary * FP32_BYTES * chunk_tensors,
        "SAE activations": acts.of_earlier_batches + acts.largest,
    }
    always = ("Python and libraries", "model weights", "SAE weights", "optimizer state", "clean activations")
    held = sum(parts[name] for name in always) + acts.of_earlier_batches
    gradients = parts["SAE gradients"]
    earlier_gradients = gradients if work.step_prompts > work.sae_prompts else 0
    phases = {
        "clean pass": held + earlier_gradients + block + model.dequantised_bytes,
        "spliced pass": held
        + earlier_gradients
        + acts.kept
        + parts["spliced activations"]
        + max(block + model.dequantised_bytes, parts["KL chunk"]),
        # A batch's gradients are whole before they are added to those of the batches before it.
        "forward and backward of the SAE": held + earlier_gradients + gradients + acts.largest,
        # What the step hands back is put together from its batches; local training's Adam, which is
        # not the fused one, makes two tensors of a weight's size.
        "update": held
        + gradients
        + (0 if work.has_spliced_pass else sae.optimized_bytes)
        + acts.kept
        + (acts.of_earlier_batches + acts.kept if earlier_gradients else 0),
    }
    if not work.has_spliced_pass:
        del phases["spliced pass"]
    return StepMemory({part: size for part, size in parts.items() if size}, phases)


@dataclass(frozen=True)
class _SAEActivations:
    """Bytes of the SAE's activations on the tokens that it runs on at once."""

    kept: int
    """From its forward to its backward."""
    largest: int
    """At the largest moment of either."""
    of_earlier_batches: int
    """Kept until the step's output is put together."""


def _sae_activations(work: Workload, on_cpu: bool) -> _SAEActivations:
    sae = work.sae
    n_tokens = work.sae_prompts * work.trained_positions
    dense = n_tokens * sae.d_sae * FP32_BYTES
    if work.has_kernels and sae.architecture in BY_SPARSE_KERNEL and sae.active is not None:
        kept = round(n_tokens * sae.active * ENTRY_BYTES)
        largest = kept + min(dense, CHUNK_ELEMENTS * FP32_BYTES)
    elif work.has_kernels and sae.architecture == "standard" and on_cpu:
        kept, largest = dense, dense + min(dense, CHUNK_ELEMENTS * FP32_BYTES)
    else:
        n_dense = DENSE_TENSORS.get(sae.architecture, OTHER_DENSE_TENSORS)
        kept, largest = dense, dense * (n_dense if work.has_kernels else OTHER_DENSE_TENSORS)
    n_earlier = work.step_prompts // work.sae_prompts - 1
    return _SAEActivations(kept, largest, n_earlier * kept)


def saved_by_spliced_pass(spliced: SplicedModel, context_size: int) -> SavedBytes:
    """What autograd keeps of each block of the spliced pass, counted on three short sequences.

    Args:
        spliced: the model with the SAE's place in it; a place after the last block keeps nothing.
        context_size: the longest sequence that may be tried.
    """
    n_blocks = spliced.position.layers_after
    if n_blocks == 0:
        return SavedBytes(0.0, 0.0)
    n = max(1, min(PROBE_POSITIONS, context_size) // 3)
    recomputes = spliced.recomputes_blocks
    spliced.recompute_blocks(False)  # what a block keeps is held then too, of one block at a time
    try:
        first, second, third = (_saved_bytes(spliced, length) / n_blocks for length in (n, 2 * n, 3 * n))
    finally:
        spliced.recompute_blocks(recomputes)
    # T(n) = constant + fixed * n + per_position * n**2, of which the constant belongs to no token.
    square = (third - 2 * second + first) / (2 * n**2)
    linear = (second - first) / n - 3 * n * square
    return SavedBytes(max(0.0, linear), max(0.0, square))


def _saved_bytes(spliced: SplicedModel, n_positions: int) -> int:
    """Distinct memory that one spliced pass over a sequence keeps for its backward, besides the weights."""
    weights = {p.untyped_storage().data_ptr() for p in [*spliced.model.parameters(), *spliced.model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unchanged(packed: Any) -> Any:
        return packed

    tokens = torch.zeros((1, n_positions), dtype=torch.long, device=spliced.token_device)
    clean = spliced.clean_pass(tokens, downstream=False)
    activation = clean.activation.clone().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, unchanged):
        result = spliced.spliced_pass(clean, activation)  # held: memory of one that is freed could be counted twice
    del result
    return sum(kept.values())
