"""The size of the benchmark's problem, and how much arithmetic a training step cannot do without."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A GPT-2 of this size with an SAE on `blocks.<layer>.hook_resid_pre`, and the tokens of one optimizer step."""

    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    vocabulary: int = 50257
    n_ctx: int = 1024
    layer: int = 6
    n_prompts: int = 8
    context_size: int = 256
    k: int = 40
    """Features per token of the TopK SAEs."""
    l0: int = 100
    """Active features per token of the ReLU SAEs whose encoder's bias is lowered."""

    @property
    def hook_name(self) -> str:
        return f"blocks.{self.layer}.hook_resid_pre"

    @property
    def tokens_per_step(self) -> int:
        return self.n_prompts * self.context_size


GPT2_SMALL = Shape()
TINY = Shape(
    n_layers=4, d_model=64, n_heads=4, vocabulary=500, n_ctx=64, layer=2, n_prompts=4, context_size=32, k=8, l0=8
)


def model_flop_per_token(shape: Shape) -> float:
    """Clean forward, spliced forward from the SAE's block, and its backward with respect to activations alone.

    Matrix products with weights only: attention scores, norms and softmax are left out, so the floor is a little low.
    """
    block = 2 * 12 * shape.d_model**2  # attention's four d x d and the MLP's two d x 4d
    unembedding = 2 * shape.d_model * shape.vocabulary
    clean = shape.n_layers * block + unembedding
    spliced = (shape.n_layers - shape.layer) * block + unembedding
    return clean + 2 * spliced


def sae_flop_per_token(shape: Shape, d_sae: int, architecture: str) -> float:
    """Encoder, decoder, and the gradients of both weights and of the feature activations.

    The encoder's input needs no gradient. With few active features only the encoder's forward is dense: everything else
    touches those features of a token.
    """
    dense = 2 * shape.d_model * d_sae
    active = {"topk": shape.k, "relu-sparse": shape.l0}.get(architecture)
    return 5 * dense if active is None else dense + 4 * 2 * shape.d_model * active
