"""TransformerLens's blocks with torch's own kernels for attention, normalisation and GELU.

`HookedTransformer` spells these out, so that each intermediate value can have a hook: some forty passes over memory and a
dozen tensors kept for backward per block, where the kernels take and keep a handful. A block is run here only where nobody
listens to what is inside it; `SplicedModel.check` compares the two, and keeps to the model's own code where they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.components.attention import Attention
from transformer_lens.components.grouped_query_attention import GroupedQueryAttention
from transformer_lens.components.layer_norm import LayerNorm
from transformer_lens.components.layer_norm_pre import LayerNormPre
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.components.mlps.mlp import MLP
from transformer_lens.components.rms_norm import RMSNorm
from transformer_lens.components.rms_norm_pre import RMSNormPre
from transformer_lens.components.transformer_block import TransformerBlock
from transformer_lens.utilities.activation_functions import gelu_fast, gelu_new
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from e2e_sae_plugin.kernels.gelu import gelu_tanh
from e2e_sae_plugin.splice.recompute import Recompute

CALLED = (
    *("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"),
    *("attn.hook_v", "attn.hook_z", "mlp.hook_pre", "mlp.hook_post"),
)
"""Hook points of a block that are called here as in the block itself; a hook anywhere else needs the block's own code.

They are the places that SAEs have, so that a clean pass for several SAEs is each one's own, to the bit."""

# Settings of `HookedTransformerConfig` that change what a block computes in ways that are not written out below, each with
# the value that leaves it as it is here.
PLAIN = {
    "use_attn_in": False,
    "use_split_qkv_input": False,
    "use_attn_result": False,
    "use_hook_mlp_in": False,
    "use_normalization_before_and_after": False,
    "use_qk_norm": False,
    "use_attention_sinks": False,
    "use_logn_attn": False,
    "use_dynamic_ntk_rope": False,
    "load_in_4bit": False,
    "clip_qkv": None,
    "attn_scores_soft_cap": -1.0,
    "attention_dir": "causal",
    "ungroup_grouped_query_attention": False,
    "n_devices": 1,
}


class NativeBlocks:
    """The blocks of a `HookedTransformer` and its final norm."""

    def __init__(self, model: HookedTransformer):
        self.model = model
        plain = all(getattr(model.cfg, name, value) == value for name, value in PLAIN.items())
        self._blocks = [NativeBlock(block) if plain and NativeBlock.fits(block) else None for block in model.blocks]
        self.any_fits = any(block is not None for block in self._blocks)
        self.wanted = True

    def run(self, residual: Tensor, start_block: int, recompute: Recompute | None = None) -> Tensor:
        """Final hidden state `[batch, pos, d_model]` from the residual stream entering `start_block`."""
        for native, block in zip(self._blocks[start_block:], list(self.model.blocks)[start_block:], strict=True):
            runs = block if native is None or native.is_listened_to() else native
            residual = residual.to(next(block.parameters()).device)  # with `n_devices`, the blocks are on several
            residual = runs(residual) if recompute is None else recompute(runs, residual)
        if self.model.cfg.normalization_type is None:
            return residual
        return normalised(self.model.ln_final, residual)


class NativeBlock:
    """One `TransformerBlock`."""

    def __init__(self, block: TransformerBlock):
        self.block, self.cfg = block, block.cfg
        self._inside = [module for name, module in block.named_modules() if name not in CALLED]

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether the block is made of the parts that are known here."""
        if type(block) is not TransformerBlock or block.cfg.original_architecture in POST_NORM_ARCHITECTURES:
            return False
        attn = block.attn
        return (
            type(attn) in (Attention, GroupedQueryAttention)
            and attn.attn_type == "global"
            and attn._attention_dir_override in (None, "causal")
            and block.cfg.positional_embedding_type in ("standard", "rotary")
            and _is_known_norm(block.ln1)
            and (block.cfg.attn_only or (_is_known_norm(block.ln2) and _is_known_mlp(block.mlp)))
        )

    def is_listened_to(self) -> bool:
        """Whether somebody's hook is on or inside the block, so that its own code has to run."""
        return any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
            for module in self._inside
        )

    def __call__(self, residual: Tensor) -> Tensor:
        block = self.block
        residual = block.hook_resid_pre(residual)
        attn_out = block.hook_attn_out(self._attend(normalised(block.ln1, residual)))
        if self.cfg.attn_only:
            return block.hook_resid_post(residual + attn_out)
        if self.cfg.parallel_attn_mlp:
            mlp_out = block.hook_mlp_out(self._mlp(normalised(block.ln2, residual)))
            return block.hook_resid_post(residual + attn_out + mlp_out)
        middle = block.hook_resid_mid(residual + attn_out)
        return block.hook_resid_post(middle + block.hook_mlp_out(self._mlp(normalised(block.ln2, middle))))

    def _attend(self, x: Tensor) -> Tensor:
        attn = self.block.attn
        grouped = isinstance(attn, GroupedQueryAttention)
        W_K, W_V = (attn._W_K, attn._W_V) if grouped else (attn.W_K, attn.W_V)
        b_K, b_V = (attn._b_K, attn._b_V) if grouped else (attn.b_K, attn.b_V)
        n_heads, n_kv_heads = len(attn.W_Q), len(W_K)
        # One product in the place of three. The weights are laid out anew at each call, as in TransformerLens: to keep
        # them would take a quarter of the blocks' memory once more, and the copy is 1 % of a step.
        W = torch.cat([attn.W_Q, W_K, W_V]).transpose(1, 2).flatten(0, 1)
        b = torch.cat([attn.b_Q, b_K, b_V]).flatten()
        heads = F.linear(x, W, b).unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
        q_k, v = heads.split([n_heads + n_kv_heads, n_kv_heads], dim=2)
        if self.cfg.positional_embedding_type == "rotary":
            q_k = self._rotated(q_k)
        q, k = q_k.split([n_heads, n_kv_heads], dim=2)
        v = attn.hook_v(v)
        z = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=1 / attn.attn_scale,
            enable_gqa=n_kv_heads != n_heads,
        )
        z = z.transpose(1, 2)
        # The kernel keeps its result for backward, so a hook that writes in place gets a copy.
        z = attn.hook_z(z.clone() if _has_hooks(attn.hook_z) else z)
        return F.linear(z.flatten(2), attn.W_O.flatten(0, 1).T, attn.b_O)

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotary position embedding of `[batch, pos, heads, d_head]`."""
        attn, n_pos, width = self.block.attn, x.shape[1], self.cfg.rotary_dim
        if self.cfg.rotary_adjacent_pairs or n_pos > len(attn.rotary_cos) or attn.rotary_cos.device != x.device:
            return attn.apply_rotary(x)  # which also extends its tables
        assert width is not None
        half = width // 2
        cos, sin = (table[:n_pos, None, :half] for table in (attn.rotary_cos, attn.rotary_sin))
        left, right = x[..., :half], x[..., half:width]
        turned = [left * cos - right * sin, right * cos + left * sin]
        return torch.cat([*turned, x[..., width:]], dim=-1)

    def _mlp(self, x: Tensor) -> Tensor:
        mlp: Any = self.block.mlp
        if isinstance(mlp, GatedMLP):
            gate = mlp.hook_pre(F.linear(x, mlp.W_gate.T))
            post = activated(mlp.act_fn, gate, mlp.hook_pre) * F.linear(x, mlp.W_in.T) + mlp.b_in
        else:
            post = activated(mlp.act_fn, mlp.hook_pre(F.linear(x, mlp.W_in.T, mlp.b_in)), mlp.hook_pre)
        return F.linear(mlp.hook_post(post), mlp.W_out.T, mlp.b_out)


def _is_known_norm(norm: nn.Module) -> bool:
    return type(norm) in (LayerNorm, LayerNormPre, RMSNorm, RMSNormPre, nn.Identity)


def _is_known_mlp(mlp: Any) -> bool:
    return type(mlp) in (MLP, GatedMLP) and not mlp.cfg.is_layer_norm_activation()


def normalised(norm: Any, x: Tensor) -> Tensor:
    """`norm(x)` by torch's kernel; by the module itself where it is none of TransformerLens's, or has hooks."""
    if not _is_known_norm(norm) or isinstance(norm, nn.Identity) or _has_hooks(norm):
        return norm(x)
    shape, eps = (x.shape[-1],), norm.eps
    if type(norm) in (LayerNorm, LayerNormPre):
        return F.layer_norm(x, shape, getattr(norm, "w", None), getattr(norm, "b", None), eps)
    return F.rms_norm(x, shape, getattr(norm, "w", None), eps)


def _has_hooks(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in module.modules())


def activated(act_fn: Callable[[Tensor], Tensor], x: Tensor, hook_point: nn.Module) -> Tensor:
    """`act_fn(x)`, with one kernel for the formulas of GPT-2's GELU; in `x`'s memory if it may be lost.

    Args:
        hook_point: where `x` has been handed out to hooks, if any listen.
    """
    if act_fn not in (gelu_new, gelu_fast):
        return act_fn(x)
    return gelu_tanh(x, may_overwrite=not _has_hooks(hook_point))
