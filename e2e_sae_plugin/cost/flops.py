"""Floating-point operations of one end-to-end training step, per trained token and by part.

Counted is what no implementation can leave out: matrix products, at two FLOPs for each multiplied weight. Norms, softmax,
activation functions and the optimizer move bytes instead (`optimizer_bytes`). Attention scores are counted in full, as
most kernels compute them; those that skip what the causal mask hides need half.
"""

from __future__ import annotations

from e2e_sae_plugin.cost.workload import SAESizes, Workload

CLEAN = "clean pass: "
SPLICED = "spliced pass: "
BACKWARD = "backward of the spliced pass: "


def step_flops(work: Workload) -> dict[str, float]:
    """Part -> FLOPs per trained token, in the order in which they are computed; parts that a step leaves out are not there.

    The model is frozen, so its backward is with respect to activations alone, which costs as much as its forward (twice
    as much for attention scores, both of whose factors are activations). For a hook within a block, the whole block is
    counted.
    """
    # The model sees every position; the KL and the SAE the trained ones.
    positions = work.context_size / work.trained_positions
    scores = 4 * work.context_size * work.model.score_width  # queries with keys, and the result with values
    head = 2 * work.model.d_model * work.model.vocabulary
    weights = work.model.block_weights
    clean = 2 * sum(weights[: work.clean_blocks])
    spliced = 2 * sum(weights[work.start_block : work.spliced_end])
    passes = work.n_reconstructions if work.has_spliced_pass else 0
    parts = {
        f"{CLEAN}blocks": positions * clean,
        f"{CLEAN}attention scores": positions * scores * work.clean_blocks,
        f"{CLEAN}unembedding": head if work.has_kl else 0,
        f"{SPLICED}blocks": passes * positions * spliced,
        f"{SPLICED}attention scores": passes * positions * scores * work.spliced_blocks,
        f"{SPLICED}unembedding": passes * head if work.has_kl else 0,
        f"{BACKWARD}blocks": passes * positions * spliced,
        f"{BACKWARD}attention scores": 2 * passes * positions * scores * work.spliced_blocks,
        f"{BACKWARD}unembedding": passes * head if work.has_kl else 0,
        **sae_flops(work.sae),
    }
    return {part: float(flops) for part, flops in parts.items() if flops}


def sae_flops(sae: SAESizes) -> dict[str, float]:
    """Part -> FLOPs per token of the SAE, forward and backward.

    The encoder's input needs no gradient. With `sae.active` features per token only the encoder's forward is dense: the
    decoder, the features' gradient and both weight gradients touch those alone.
    """
    dense = 2 * sae.d_in * sae.d_sae
    touched = dense if sae.active is None else 2 * sae.d_in * min(sae.active, sae.d_sae)
    decoders = 2 if sae.has_gate else 1
    return {
        "SAE: encoder": float(sae.encoder_products * dense),
        "SAE: decoder": float(decoders * touched),
        "SAE: gradients of weights and features": float((1 + 2 * decoders) * touched),
    }


def total_flops(parts: dict[str, float], sharing: int = 1) -> float:
    """FLOPs per trained token.

    Args:
        sharing: SAEs of a sweep that share the clean pass; the result is what one of them costs.
    """
    return sum(flops / (sharing if part.startswith(CLEAN) else 1) for part, flops in parts.items())


def optimizer_bytes(work: Workload) -> int:
    """Bytes that one update reads and writes: Adam reads the weight, its gradient and two moments, and writes all but the
    gradient; clipping reads the gradient twice and writes it once."""
    return work.sae.optimized_bytes * (10 if work.clips else 7)
