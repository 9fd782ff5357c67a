"""From a hook name to its place in the model: which block the spliced pass starts at, `l`, and the default downstream."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HookPosition:
    """Where an SAE sits in a model of `n_layers` blocks."""

    hook_name: str
    start_block: int
    """The first block that the spliced pass runs; `n_layers` when only the final norm and the unembedding follow."""
    enters_block: bool
    """Whether the hooked activation is the residual stream entering `start_block` (else it lies inside that block)."""
    leaves_block: bool
    """Whether it is what the block before `start_block` returns; some models change it before the next one gets it."""
    n_layers: int
    default_downstream: tuple[str, ...]
    """Residual stream entering each later block, `k = l + 1 ... L - 1`; empty for an SAE in or before the last block."""

    @property
    def layers_after(self) -> int:
        """`L - l`, the divisor of the downstream term, whatever the list of downstream points.

        `l` is the block that the spliced pass starts at: `b` inside block `b` and for `blocks.b.hook_resid_pre`,
        `b + 1` for `blocks.b.hook_resid_post` and the output of Hugging Face layer `b`.
        """
        return self.n_layers - self.start_block


def near_matches(name: str, known: Iterable[str]) -> str:
    """`" Near matches: ..."` for an error message, or the empty string."""
    close = difflib.get_close_matches(name, list(known), n=4, cutoff=0.6)
    return f" Near matches: {', '.join(close)}." if close else ""


def no_such_hook(hook_name: str, known: Sequence[str], layers_path: str | None = None, n_layers: int = 0) -> str:
    """What is wrong with a hook name that the model does not have; of the other family's names, what it is here.

    Args:
        known: the model's names.
        layers_path: of a plain Hugging Face model, the path of its decoder layers; None of TransformerLens's models.
        n_layers: of a plain Hugging Face model, how many there are.
    """
    said = f"The model has no hook_name {hook_name!r}."
    if layers_path is not None and (match := re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)):
        return f"{said} {_as_module(int(match[1]), match[2], layers_path, n_layers)}"
    if layers_path is None and (match := re.fullmatch(r"(?:[A-Za-z_]\w*\.)+(\d+)(\..+)?", hook_name)):
        is_layer, block = match[2] is None, int(match[1])
        if ".hook_" not in hook_name and (is_layer or not hook_name.startswith("blocks.")):
            return f"{said} {_as_hook_point(block, is_layer, known)}"
    return said + near_matches(hook_name, known)


def _as_module(block: int, inside: str, layers_path: str, n_layers: int) -> str:
    """Where TransformerLens's `blocks.<block>.<inside>` is in a plain Hugging Face model."""
    text = (
        "That is a name of TransformerLens's. With model_class_name AutoModelForCausalLM, hooks are module paths, which "
        "stand for the module's output: "
    )
    if block >= n_layers:
        return f"{text}{layers_path}.0 to {layers_path}.{n_layers - 1} are its layers, and it has no layer {block}."
    if inside == "hook_resid_post":
        return f"{text}use {layers_path}.{block}, whose output is the residual stream that leaves that layer."
    if inside == "hook_resid_pre" and block > 0:
        return (
            f"{text}use {layers_path}.{block - 1}, whose output is the residual stream that enters the next layer, "
            f"{layers_path}.{block}."
        )
    if inside == "hook_resid_pre":
        return f"{text}what enters the first layer is no layer's output. The first that can be used is {layers_path}.0."
    return f"{text}{layers_path}.{block} for the whole layer, or a module inside it, {layers_path}.{block}.<module>."


def _as_hook_point(block: int, is_layer: bool, known: Sequence[str]) -> str:
    """Where the output of a layer, or something inside it, is in a model of TransformerLens's."""
    text = (
        "That is a module path, as with model_class_name AutoModelForCausalLM. TransformerLens's models have hooks, named "
        "blocks.<block>.<...>: "
    )
    ends = [name for end in ("hook_resid_post", "hook_out") if (name := f"blocks.{block}.{end}") in known]
    if not ends:
        return f"{text}blocks.0.hook_resid_pre, for instance. There is no block {block}."
    if is_layer:
        return f"{text}use {ends[0]}, the residual stream that leaves block {block}."
    inside = [name for name in known if name.startswith(f"blocks.{block}.")]
    return f"{text}{', '.join(inside[:3])} and {len(inside) - 3} more are in block {block}."


def transformer_lens_position(hook_name: str, n_layers: int, known: Sequence[str]) -> HookPosition:
    """Position of a TransformerLens hook name such as `blocks.6.hook_resid_pre`.

    Raises:
        ValueError: the model has no such hook, or it is not inside a block.
    """
    if hook_name not in known:
        raise ValueError(no_such_hook(hook_name, known))
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if match is None:
        raise ValueError(
            f"hook_name {hook_name!r} is not inside a block. An end-to-end SAE needs a hook named blocks.<block>.<...>, "
            "for instance blocks.0.hook_resid_pre for the embeddings." + near_matches(hook_name, known)
        )
    block, inside = int(match[1]), match[2]
    after = inside in ("hook_resid_post", "hook_out")
    start = block + 1 if after else block
    residual = "hook_resid_pre" if "blocks.0.hook_resid_pre" in known else "hook_in"
    return HookPosition(
        hook_name=hook_name,
        start_block=start,
        enters_block=after or inside in ("hook_resid_pre", "hook_in"),
        leaves_block=after,
        n_layers=n_layers,
        default_downstream=tuple(f"blocks.{k}.{residual}" for k in range(start + 1, n_layers)),
    )


def hugging_face_position(hook_name: str, layers_path: str, n_layers: int, known: Sequence[str]) -> HookPosition:
    """Position of a module path such as `model.layers.9` (that layer's output) or `model.layers.9.mlp`.

    Args:
        layers_path: path of the model's list of decoder layers, for instance `model.layers`.

    Raises:
        ValueError: the model has no such module, or it is not a decoder layer or inside one.
    """
    if hook_name not in known:
        raise ValueError(no_such_hook(hook_name, known, layers_path, n_layers))
    match = re.fullmatch(re.escape(layers_path) + r"\.(\d+)(\..+)?", hook_name)
    if match is None:
        raise ValueError(
            f"hook_name {hook_name!r} is not a decoder layer or inside one. Expected {layers_path}.<layer> (the layer's "
            f"output) or {layers_path}.<layer>.<module>, for instance {layers_path}.0."
        )
    block, is_layer = int(match[1]), match[2] is None
    start = block + 1 if is_layer else block
    return HookPosition(
        hook_name=hook_name,
        start_block=start,
        enters_block=is_layer,
        leaves_block=is_layer,
        n_layers=n_layers,
        # The output of layer k - 1 is the residual stream entering block k.
        default_downstream=tuple(f"{layers_path}.{k - 1}" for k in range(start + 1, n_layers)),
    )
