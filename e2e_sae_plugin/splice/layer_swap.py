"""Starting a Hugging Face decoder at a block, with the model's own forward pass.

For the time of a pass, the layers before the block are replaced by modules that hand their input on, and the block's
input is replaced by a pre-hook. Masks, position embeddings and everything else stay the model's own code, so the logits
are bit-identical to a full pass. A pass ends where the model calls its head, whose input is the final hidden state. The
head is run in the same way, on given hidden states and with all layers replaced, so scales and soft caps need no
knowledge here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from e2e_sae_plugin.kernels.head import LinearHead
from e2e_sae_plugin.splice.base import BlockInput
from e2e_sae_plugin.splice.native_activations import NativeActivations
from e2e_sae_plugin.splice.recompute import Recompute, RecomputedBlock

# Names that models' configs have for them. Some models multiply by the scale and others divide; the check of the head
# tells which.
SOFT_CAPS = ("final_logit_softcapping", "output_logits_soft_cap", "logits_soft_cap")
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


class _HeadReached(Exception):
    """Raised where the model calls its head, to end the pass."""


class _HandOn(nn.Module):
    """Stands in for a decoder layer: returns its input (or `value`) in the form in which the layer returned its output."""

    def __init__(self, layer: nn.Module, tuple_length: int | None, value: Tensor | None):
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: only its attributes are wanted (attention_type, ...)
        self.__dict__.update(tuple_length=tuple_length, value=value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.__dict__["value"]
        if hidden is None:
            hidden = args[0] if args else kwargs["hidden_states"]
        length = self.__dict__["tuple_length"]
        return hidden if length is None else (hidden, *[None] * (length - 1))


class LayerSwap:
    """Runs a Hugging Face causal language model from one of its decoder layers on.

    Args:
        model: the model with its head (`...ForCausalLM`).
        layers: its list of decoder layers.

    Raises:
        ValueError: If the model has no language-model head.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList):
        self.model, self.layers = model, layers
        self.head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(self.head, nn.Module):
            raise ValueError(
                f"{type(model).__name__} has no language-model head, so it gives no logits. "
                "Load it with AutoModelForCausalLM."
            )
        self.activations = NativeActivations(model)
        self.tuple_length: int | None = None  # of what a layer returns; None for a bare tensor

    @property
    def token_device(self) -> torch.device:
        return device_of(self.model.get_input_embeddings())  # pyright: ignore[reportCallIssue, reportArgumentType]

    def run(
        self, tokens: Tensor, start: BlockInput | None, start_block: int, recompute: Recompute | None = None
    ) -> Tensor:
        """Return the final hidden state `[batch, pos, d_model]`, from the embeddings or with `start` entering `start_block`.

        Args:
            recompute: calls the layers of a run from `start`.

        Raises:
            ValueError: If the model gives logits without calling its head.
        """
        reached: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(self.activations.swapped_in())
            stack.enter_context(_before(self.head, lambda hidden: _end_pass(reached, hidden)))
            if start is not None:
                stack.enter_context(self._started_at(start_block, start, recompute))
            try:
                self.model(input_ids=tokens, use_cache=False)
            except _HeadReached:
                return reached[0]
        raise ValueError(f"{type(self.model).__name__} gives logits without calling its output embedding.")

    @contextmanager
    def _started_at(self, start_block: int, start: BlockInput, recompute: Recompute | None) -> Iterator[None]:
        originals = list(self.layers)
        handle = None
        try:
            for i in range(start_block):
                # Past the last layer there is no input to replace, so the last stand-in returns the value.
                value = start.hidden if i == start_block - 1 == len(originals) - 1 else None
                self.layers[i] = _HandOn(originals[i], self.tuple_length, value)
            if recompute is not None:
                recompute = recompute.within(self.activations.swapped_in)
                for i in range(start_block, len(originals)):
                    self.layers[i] = RecomputedBlock(originals[i], recompute)
            if start_block < len(originals):
                # Where a stand-in recomputes the layer, its input has been replaced by then.
                handle = self.layers[start_block].register_forward_pre_hook(
                    lambda _, args, kwargs: _enter(args, kwargs, start), with_kwargs=True
                )
            yield
        finally:
            if handle is not None:
                handle.remove()
            for i, layer in enumerate(originals):
                self.layers[i] = layer

    @contextmanager
    def capture_input(self, block: int, *, copies: bool) -> Iterator[list[BlockInput]]:
        """Collect what enters `block`, if it is one of the model's, and note in what form the layers return their output.

        Args:
            copies: copy it, for a model that writes to it.
        """
        entering: list[BlockInput] = []

        def note_input(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            entering.append(BlockInput(hidden.clone() if copies else hidden, _shared_by(kwargs)))

        def note_form(_: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            self.tuple_length = len(output) if isinstance(output, tuple) else None

        handles = [self.layers[0].register_forward_hook(note_form)]
        if block < len(self.layers):
            handles.append(self.layers[block].register_forward_pre_hook(note_input, with_kwargs=True))
        try:
            yield entering
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits `[tokens, vocabulary]` of final hidden states `[tokens, d_model]`, by the model's own head."""
        # One token a sequence, as there may be more of them than the model has positions.
        tokens = torch.zeros((len(hidden), 1), dtype=torch.long, device=self.token_device)
        originals = list(self.layers)
        try:
            for i, layer in enumerate(originals):
                self.layers[i] = _HandOn(layer, self.tuple_length, None)
            with _before(self.head, lambda _: hidden[:, None]):
                return self.model(input_ids=tokens, use_cache=False).logits[:, 0]
        finally:
            for i, layer in enumerate(originals):
                self.layers[i] = layer

    def linear_heads(self) -> list[LinearHead]:
        """Return what the head may be, by its weights and the model's config; empty if it is no plain linear map.

        A bridge wraps the head's module. Anything but a plain one (quantized, an adapter) is left to the model, and so is
        one whose weight is elsewhere while it does not run (offloaded), or only in part on this process (`tp_plan`).
        """
        head = getattr(self.head, "original_component", self.head)
        is_whole = type(head) is nn.Linear and not head.weight.is_meta and not hasattr(head.weight, "device_mesh")
        if not is_whole:
            return []
        config = _text_config(self.model)
        soft_caps = [*_positive_numbers(config, SOFT_CAPS), None]
        scales = [1.0]
        for value in _positive_numbers(config, SCALES):
            scales += [value, 1 / value]
        return [LinearHead(head.weight, head.bias, *each) for each in itertools.product(scales, soft_caps)]


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _positive_numbers(config: Any, names: tuple[str, ...]) -> list[float]:
    found = [getattr(config, name, None) for name in names]
    return [float(value) for value in found if isinstance(value, int | float) and value > 0]


@contextmanager
def _before(module: nn.Module, function: Any) -> Iterator[None]:
    """While it lasts, give the module what `function` makes of its input."""

    def replace(_: nn.Module, args: Any) -> Any:
        return (function(args[0]), *args[1:])

    handle = module.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _end_pass(reached: list[Tensor], hidden: Tensor) -> None:
    reached.append(hidden)
    raise _HeadReached


def _shared_by(kwargs: Mapping[str, Any]) -> dict[str, dict[Any, Any]]:
    return {name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)}


def _enter(args: tuple[Any, ...], kwargs: dict[str, Any], start: BlockInput) -> tuple[Any, Any]:
    for name, values in start.shared.items():
        kwargs[name].update(values)  # the model's own, which later layers get too
    if args:
        return (start.hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": start.hidden}


def device_of(module: nn.Module) -> torch.device:
    """Device that a module's input has to be on; where accelerate keeps its weights elsewhere between runs, the device that
    it runs on.

    Raises:
        ValueError: its weights are on no device.
    """
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hook: Any = getattr(module, "_hf_hook", None)  # accelerate's, or several of its in one
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "execution_device", None) is not None:
            return torch.device(one.execution_device)
    raise ValueError(
        f"The weights of {type(module).__name__} are on torch's 'meta' device, which holds no numbers. Load the model with "
        "its weights, or with accelerate's device_map."
    )
