"""The frozen model, run twice: the clean pass, and the pass that starts at the SAE's block."""

from collections.abc import Sequence
from typing import Any

from sae_lens.load_model import HookedProxyLM
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from e2e_sae_plugin.splice.base import CleanPass as CleanPass
from e2e_sae_plugin.splice.base import SplicedModel as SplicedModel
from e2e_sae_plugin.splice.base import SplicedPass as SplicedPass
from e2e_sae_plugin.splice.given_model import uncompiled, warn_of_leftovers
from e2e_sae_plugin.splice.hugging_face import SplicedHuggingFace
from e2e_sae_plugin.splice.transformer_lens import SplicedBridge, SplicedHookedTransformer
from e2e_sae_plugin.torch_state import own_torch_state


@own_torch_state()
def splice_into(
    model: Any,
    hook_name: str,
    *,
    downstream_hooks: Sequence[str] | None = None,
    needs_downstream: bool | None = None,
) -> SplicedModel:
    """Freeze `model` and prepare it for an SAE at `hook_name`.

    Args:
        model: a `HookedTransformer`, a `TransformerBridge` or a `HookedProxyLM`.
        hook_name: where the SAE sits.
        downstream_hooks: where later activations are compared; None for the residual stream entering every later block.
        needs_downstream: False when no later activation is compared; True to raise an error where there is none to compare;
            None for what there is.

    Raises:
        ValueError: another class of model, or a hook that the model does not have or that cannot be spliced.
    """
    model = uncompiled(model)
    families: tuple[tuple[type, Any], ...] = (
        (HookedTransformer, SplicedHookedTransformer),
        (TransformerBridge, SplicedBridge),
        (HookedProxyLM, SplicedHuggingFace),
    )
    for model_class, spliced_class in families:
        if isinstance(model, model_class):
            warn_of_leftovers(model)
            return spliced_class(model, hook_name, downstream_hooks, needs_downstream)  # pyright: ignore
    raise ValueError(
        f"Cannot splice an SAE into a {type(model).__name__}. Expected a HookedTransformer or TransformerBridge "
        "(TransformerLens), or a Hugging Face causal language model wrapped in sae_lens.load_model.HookedProxyLM."
    )
