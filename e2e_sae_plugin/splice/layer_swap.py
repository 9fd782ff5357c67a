"""Starting a Hugging Face decoder at a block, with the model's own forward pass.

For the time of a pass, the layers before the block are replaced by modules that hand their input on, and the block's
input is replaced by a pre-hook. Masks, position embeddings and everything else stay the model's own code, so the logits
are bit-identical to a full pass. The head is run in the same way: the body is replaced by a module that returns the
hidden states at hand, so soft caps, scales and biases need no knowledge here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from e2e_sae_plugin.kernels.kl import LinearHead
from e2e_sae_plugin.splice.native_activations import NativeActivations
from e2e_sae_plugin.splice.recompute import Recompute, RecomputedBlock


class _HandOn(nn.Module):
    """Stands in for a decoder layer: returns its input (or `value`) in the form in which the layer returned its output."""

    def __init__(self, layer: nn.Module, returns_tuple: bool, value: Tensor | None):
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: only its attributes are wanted (attention_type, ...)
        self.returns_tuple, self.value = returns_tuple, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.__dict__.get("value")
        if hidden is None:
            hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self.__dict__["returns_tuple"] else hidden


class _Body(nn.Module):
    """Stands in for the model's body: returns given hidden states in the body's own output class."""

    def __init__(self, hidden: Tensor, output_class: type):
        super().__init__()
        self.__dict__.update(hidden=hidden, output_class=output_class)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        return self.__dict__["output_class"](last_hidden_state=self.__dict__["hidden"])


class LayerSwap:
    """Runs a Hugging Face causal language model from one of its decoder layers on.

    Args:
        model: the model with its head (`...ForCausalLM`).
        layers: its list of decoder layers.

    Raises:
        ValueError: the model has no separate body (`base_model`), so it has no language-model head.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList):
        self.model, self.layers = model, layers
        self.body_name = getattr(model, "base_model_prefix", "")
        body = getattr(model, self.body_name, None) if self.body_name else None
        if not isinstance(body, nn.Module) or getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise ValueError(
                f"{type(model).__name__} has no language-model head, so it gives no logits. "
                "Load it with AutoModelForCausalLM."
            )
        self.body: nn.Module = body
        self.activations = NativeActivations(body)
        self.output_class: type | None = None
        self.returns_tuple = False

    @property
    def token_device(self) -> torch.device:
        return device_of(self.model.get_input_embeddings())  # pyright: ignore[reportCallIssue, reportArgumentType]

    def run(self, tokens: Tensor, start: Tensor | None, start_block: int, recompute: Recompute | None = None) -> Tensor:
        """Final hidden state `[batch, pos, d_model]`, from the embeddings or with `start` entering `start_block`.

        Args:
            recompute: calls the layers of a run from `start`.
        """
        with self.activations.swapped_in():
            if start is None:
                output = self.body(input_ids=tokens, use_cache=False)
            else:
                with self._started_at(start_block, start, recompute):
                    output = self.body(input_ids=tokens, use_cache=False)
        self.output_class = type(output)
        return output.last_hidden_state

    @contextmanager
    def _started_at(self, start_block: int, start: Tensor, recompute: Recompute | None) -> Iterator[None]:
        originals = list(self.layers)
        handle = None
        try:
            for i in range(start_block):
                # Past the last layer there is no input to replace, so the last stand-in returns the value.
                value = start if i == start_block - 1 == len(originals) - 1 else None
                self.layers[i] = _HandOn(originals[i], self.returns_tuple, value)
            if recompute is not None:
                recompute = recompute.within(self.activations.swapped_in)
                for i in range(start_block, len(originals)):
                    self.layers[i] = RecomputedBlock(originals[i], recompute)
            if start_block < len(originals):
                # Where a stand-in recomputes the layer, its input has been replaced by then.
                handle = self.layers[start_block].register_forward_pre_hook(
                    lambda _, args, kwargs: _replace_hidden(args, kwargs, start), with_kwargs=True
                )
            yield
        finally:
            if handle is not None:
                handle.remove()
            for i, layer in enumerate(originals):
                self.layers[i] = layer

    @contextmanager
    def capture_input(self, block: int, *, wanted: bool) -> Iterator[list[Tensor]]:
        """Collect the residual stream entering `block`, and note in what form the layers return their output."""
        entering: list[Tensor] = []
        handles = []
        if wanted:
            handles.append(
                self.layers[block].register_forward_pre_hook(
                    lambda _, args, kwargs: entering.append(args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
            )

        def note_form(_: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            self.returns_tuple = isinstance(output, tuple)

        handles.append(self.layers[0].register_forward_hook(note_form))
        try:
            yield entering
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[tokens, vocabulary]` of final hidden states, by the model's own head."""
        assert self.output_class is not None, "run() first: it tells the class of the body's output"
        tokens = torch.zeros((1, hidden.shape[0]), dtype=torch.long, device=self.token_device)
        setattr(self.model, self.body_name, _Body(hidden[None], self.output_class))
        try:
            return self.model(input_ids=tokens, use_cache=False).logits[0]
        finally:
            setattr(self.model, self.body_name, self.body)

    def linear_head(self) -> LinearHead | None:
        """The weights of the head if it is a plain linear map: the model may still scale or cap what comes out."""
        head = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        # A bridge wraps the head's module; anything but a plain one (quantised, an adapter) is left to the model, and so is
        # one whose weight is elsewhere while it does not run (offloaded), or only in part on this process (`tp_plan`).
        head = getattr(head, "original_component", head)
        is_whole = type(head) is nn.Linear and not head.weight.is_meta and not hasattr(head.weight, "device_mesh")
        return LinearHead(head.weight, head.bias) if is_whole else None


def _replace_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> tuple[Any, Any]:
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
