"""A model object as its user hands it over: compiled, with hooks or SAEs left on it, and its longest context."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from sae_lens.load_model import HookedProxyLM
from torch import nn
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

logger = logging.getLogger(__name__)

# Packages whose hooks are part of how a model runs, and change no activation.
KNOWN_HOOKS = ("sae_lens.", "transformer_lens.", "transformers.", "accelerate.", "torch.")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


_WARNED_OF: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def uncompiled(model: Any) -> Any:
    """Return the model inside what `torch.compile` has returned: passes start at a block, which compiled code cannot do."""
    inner = getattr(model, "_orig_mod", None)
    if inner is None:
        return model
    logger.warning("The model was compiled as a whole; it is run uncompiled here, since passes start inside it.")
    return inner


def max_positions(model: Any) -> int | None:
    """Return the longest context that a model has positions for, in tokens; None where it says none."""
    if isinstance(model, HookedTransformer | TransformerBridge):
        return _whole_number(getattr(model.cfg, "n_ctx", None))
    config: Any = getattr(getattr(model, "model", model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = [_whole_number(getattr(config, name, None)) for name in POSITIONS]
    return next((value for value in found if value is not None), None)


def _whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def check_context(model: Any, context_size: int) -> None:
    """Refuse sequences that are longer than the model has positions for.

    Raises:
        ValueError: If they are.
    """
    longest = max_positions(model)
    if longest is not None and context_size > longest:
        raise ValueError(
            f"context_size={context_size} is longer than the model's context of {longest} tokens. Use sequences of at most "
            f"{longest}."
        )


def warn_of_leftovers(model: Any) -> None:
    """Warn of SAEs and hooks that are left on a model, by which its clean output is not its own."""
    if model in _WARNED_OF:
        return
    left: list[str] = []
    if saes := list(getattr(model, "_acts_to_saes", None) or getattr(model, "acts_to_saes", None) or ()):
        left.append(f"SAEs at {', '.join(map(str, saes[:3]))} (remove them with model.reset_saes())")
    points = getattr(model, "hook_dict", {})
    if hooked := [name for name, point in points.items() if point.fwd_hooks or point.bwd_hooks]:
        left.append(f"hooks at {', '.join(hooked[:3])} (remove them with model.reset_hooks())")
    inner = model.model if isinstance(model, HookedProxyLM) else model
    if modules := [name for name, module in inner.named_modules() if _has_foreign_hooks(module)]:
        left.append(f"forward hooks on {', '.join(modules[:3])} (call remove() on their handles)")
    if left:
        _WARNED_OF.add(model)
        logger.warning(
            "The model is not clean: it has %s. They stay on in every pass, so the clean output is not "
            "that of the model itself.",
            "; ".join(left),
        )


def _has_foreign_hooks(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    origins = [str(getattr(hook, "__module__", "") or type(hook).__module__) + "." for hook in hooks]
    return any(not origin.startswith(KNOWN_HOOKS) for origin in origins)
