"""TransformerLens models: `HookedTransformer`, which starts at a block by itself, and `TransformerBridge`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.activation_functions import apply_softcap

from e2e_sae_plugin.kernels.head import LinearHead
from e2e_sae_plugin.splice.base import BlockInput, HookFunction, SplicedModel
from e2e_sae_plugin.splice.check import SpliceError
from e2e_sae_plugin.splice.layer_swap import LayerSwap
from e2e_sae_plugin.splice.native_blocks import NativeBlocks
from e2e_sae_plugin.splice.positions import HookPosition, transformer_lens_position
from e2e_sae_plugin.splice.recompute import Recompute, recomputed

# Hooks of a pass carry a level of their own, so that removing them leaves a user's hooks where they are.
HOOK_LEVEL = 10_007


@contextmanager
def hook_points(points: Mapping[str, HookPoint], functions: Mapping[str, HookFunction]) -> Iterator[None]:
    """Attach functions to TransformerLens hook points (which reshape heads for us) and always detach them."""
    attached: list[HookPoint] = []
    try:
        for name, function in functions.items():
            point = points[name]
            attached.append(point)
            point.add_hook(_as_hook(function), level=HOOK_LEVEL)
        yield
    finally:
        for point in attached:
            point.remove_hooks(dir="fwd", level=HOOK_LEVEL)


def _as_hook(function: HookFunction) -> Callable[..., Tensor | None]:
    def hook(tensor: Tensor, *, hook: HookPoint) -> Tensor | None:  # noqa: ARG001 (TransformerLens passes it by keyword)
        return function(tensor)

    return hook


@dataclass
class _Embedded:
    tokens: Tensor
    residual: Tensor
    shortformer_pos_embed: Tensor | None
    attention_mask: Tensor | None


class SplicedHookedTransformer(SplicedModel):
    """A `HookedTransformer`, run from a block by its own `start_at_layer`."""

    model: HookedTransformer

    def _freeze(self) -> None:
        super()._freeze()
        self._native = NativeBlocks(self.model)

    def use_native_kernels(self, wanted: bool) -> bool:
        self._native.wanted = wanted
        return self._native.any_fits

    def hook_names(self) -> Sequence[str]:
        return list(self.model.hook_dict)

    def _find_position(self, hook_name: str) -> HookPosition:
        return transformer_lens_position(hook_name, self.model.cfg.n_layers, self.hook_names())

    def _hooked(self, functions: Mapping[str, HookFunction]) -> Any:
        return hook_points(self.model.hook_dict, functions)

    @contextmanager
    def _capture_block_input(self) -> Iterator[list[BlockInput]]:
        entering: list[BlockInput] = []
        if self.position.enters_block:
            yield entering
            return

        def capture(residual: Tensor) -> None:
            entering.append(BlockInput(residual.clone() if self.copies_activations else residual))

        name = f"blocks.{self.position.start_block}.hook_resid_pre"
        with hook_points(self.model.hook_dict, {name: capture}):
            yield entering

    def _prepare(self, tokens: Tensor) -> _Embedded:
        # The mask (None but for left-padding tokenizers) is only computed here; a run from a block has to be given it.
        residual, _, shortformer_pos_embed, attention_mask = self.model.input_to_embed(tokens, prepend_bos=False)
        return _Embedded(tokens, residual, shortformer_pos_embed, attention_mask)

    def _run(self, context: _Embedded, start: BlockInput | None, recompute: Recompute | None) -> Tensor:
        residual, block = (context.residual, 0) if start is None else (start.hidden, self.position.start_block)
        if self._native.wanted and context.attention_mask is None and context.shortformer_pos_embed is None:
            return self._native.run(residual, block, recompute)
        with recomputed(self.model.blocks, self.position.start_block, recompute):
            residual = self.model(
                residual,
                start_at_layer=block,
                stop_at_layer=self.model.cfg.n_layers,
                shortformer_pos_embed=context.shortformer_pos_embed,
                attention_mask=context.attention_mask,
            )
        return residual if self.model.cfg.normalization_type is None else self.model.ln_final(residual)

    def logits(self, hidden: Tensor) -> Tensor:
        return apply_softcap(self.model.unembed(hidden[None])[0], self.model.cfg.output_logits_soft_cap)

    def linear_heads(self) -> Sequence[LinearHead]:
        bias, soft_cap = self.model.unembed.b_U, self.model.cfg.output_logits_soft_cap
        has_cap = soft_cap is not None and soft_cap > 0
        return [
            LinearHead(self.model.unembed.W_U.T, bias if bias.any() else None, soft_cap=soft_cap if has_cap else None)
        ]

    def full_logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, return_type="logits", prepend_bos=False)

    @property
    def token_device(self) -> torch.device:
        return self.model.embed.W_E.device


class SplicedBridge(SplicedModel):
    """A `TransformerBridge`: TransformerLens's hook points on a Hugging Face model, which `LayerSwap` starts at a block."""

    model: TransformerBridge  # pyright: ignore[reportIncompatibleVariableOverride]

    def _freeze(self) -> None:
        super()._freeze()
        self.model.original_model.eval()
        for parameter in self.model.original_model.parameters():
            parameter.requires_grad_(False)
        # Resolves aliases at every access: keep it. SAELens's own bridge has a hook_dict without them.
        self._points: dict[str, HookPoint] = TransformerBridge.hook_dict.__get__(self.model)
        blocks = getattr(self.model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise SpliceError(
                f"This TransformerBridge of a {type(self.model.original_model).__name__} has no single list of blocks. SAEs "
                "are trained in models with one decoder."
            )
        if not hasattr(self.model.original_model, "get_output_embeddings"):
            raise SpliceError(
                "This TransformerBridge is of boot_native(), whose model cannot be started at a block. Use "
                "TransformerBridge.boot_transformers() with a Hugging Face model, or a HookedTransformer."
            )
        self._swap = LayerSwap(self.model.original_model, blocks)

    def hook_names(self) -> Sequence[str]:
        return list(self._points)

    def _find_position(self, hook_name: str) -> HookPosition:
        return transformer_lens_position(hook_name, len(self._swap.layers), self.hook_names())

    def _hooked(self, functions: Mapping[str, HookFunction]) -> Any:
        return hook_points(self._points, functions)

    def _capture_block_input(self) -> Any:
        return self._swap.capture_input(self.position.start_block, copies=self.copies_activations)

    def _prepare(self, tokens: Tensor) -> Tensor:
        if hasattr(self.model, "pos_embed"):
            self.model.pos_embed._current_batch_size = tokens.shape[0]  # as the bridge's own forward does
        return tokens

    def _run(self, context: Tensor, start: BlockInput | None, recompute: Recompute | None) -> Tensor:
        self._prepare(context)
        return self._swap.run(context, start, self.position, recompute)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._swap.logits(hidden)

    def linear_heads(self) -> Sequence[LinearHead]:
        return self._swap.linear_heads()

    def use_native_kernels(self, wanted: bool) -> bool:
        return self._swap.activations.use(wanted)

    def full_logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, return_type="logits", prepend_bos=False)

    @property
    def token_device(self) -> torch.device:
        return self._swap.token_device
