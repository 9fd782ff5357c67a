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
from e2e_sae_plugin.splice.base import BlockInput, SharedStates
from e2e_sae_plugin.splice.native_activations import NativeActivations
from e2e_sae_plugin.splice.positions import HookPosition
from e2e_sae_plugin.splice.recompute import Recompute, RecomputedBlock

# Names that models' configs have for them. Some models multiply by the scale and others divide; the check of the head
# tells which.
SOFT_CAPS = ("final_logit_softcapping", "output_logits_soft_cap", "logits_soft_cap")
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


Form = tuple[type, int]
"""Class and length of the sequence that a layer returns."""


class _HeadReached(Exception):
    """Raised where the model calls its head, to end the pass."""


class _HandOn(nn.Module):
    """Stands in for a decoder layer: returns its input in the form in which the layer returned its output.

    Args:
        form: sequence class and length of what the layer returns; None for a bare tensor.
        value: returned instead of the input.
        handed_on: what else the layer has returned, if that is known.
    """

    def __init__(
        self, layer: nn.Module, form: Form | None, value: Tensor | None = None, handed_on: tuple[Any, ...] = ()
    ):
        super().__init__()
        # Not a submodule: only its attributes are wanted (attention_type, ...).
        self.__dict__.update(layer=layer, form=form, value=value, handed_on=handed_on)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.__dict__["value"]
        if hidden is None:
            hidden = args[0] if args else kwargs["hidden_states"]
        form, handed_on = self.__dict__["form"], self.__dict__["handed_on"]
        if form is None:
            return hidden
        sequence, length = form
        return sequence((hidden, *(handed_on or [None] * (length - 1))))


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
        self.form: Form | None = None  # of what a layer returns

    @property
    def token_device(self) -> torch.device:
        return device_of(self.model.get_input_embeddings())  # pyright: ignore[reportCallIssue, reportArgumentType]

    def run(
        self, tokens: Tensor, start: BlockInput | None, position: HookPosition, recompute: Recompute | None = None
    ) -> Tensor:
        """Return the final hidden state `[batch, pos, d_model]`, from the embeddings or with `start` at `position`.

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
                stack.enter_context(self._started_at(position, start, recompute))
            try:
                self.model(input_ids=tokens, use_cache=False)
            except _HeadReached:
                return reached[0]
        raise ValueError(f"{type(self.model).__name__} gives logits without calling its output embedding.")

    @contextmanager
    def _started_at(self, position: HookPosition, start: BlockInput, recompute: Recompute | None) -> Iterator[None]:
        originals, start_block = list(self.layers), position.start_block
        handle = None
        try:
            for i in range(start_block - 1):
                self.layers[i] = _HandOn(originals[i], self.form)
            if start_block > 0:
                # A model may change what a layer returns before the next one gets it (RWKV halves it now and then).
                value = start.hidden if position.leaves_block else None
                self.layers[start_block - 1] = _HandOn(originals[start_block - 1], self.form, value, start.handed_on)
            if recompute is not None:
                recompute = recompute.within(self.activations.swapped_in)
                for i in range(start_block, len(originals)):
                    self.layers[i] = RecomputedBlock(originals[i], recompute)
            if start_block < len(originals):
                # Where a stand-in recomputes the layer, its input has been replaced by then.
                hidden = None if position.leaves_block else start.hidden
                handle = self.layers[start_block].register_forward_pre_hook(
                    lambda _, args, kwargs: _enter(args, kwargs, hidden, start.shared), with_kwargs=True
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

        handed_on: list[Any] = []

        def note_input(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            entering.append(BlockInput(hidden.clone() if copies else hidden, _shared_by(kwargs), tuple(handed_on)))

        def note_form(_: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            self.form = (type(output), len(output)) if isinstance(output, tuple | list) else None

        def note_rest(_: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            handed_on.extend(output[1:] if isinstance(output, tuple | list) else ())

        handles = [self.layers[0].register_forward_hook(note_form)]
        if block > 0:
            handles.append(self.layers[block - 1].register_forward_hook(note_rest))
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
                self.layers[i] = _HandOn(layer, self.form)
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


def _shared_by(kwargs: Mapping[str, Any]) -> SharedStates:
    return {name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)}


def _enter(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor | None, shared: SharedStates
) -> tuple[Any, Any]:
    for name, values in shared.items():
        kwargs[name].update(values)  # the model's own, which later layers get too
    if hidden is None:
        return args, kwargs
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


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
