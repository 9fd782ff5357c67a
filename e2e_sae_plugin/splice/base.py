"""The two passes over the frozen model: clean, and spliced from the SAE's block on. One subclass per model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from e2e_sae_plugin._typing import shape_checked
from e2e_sae_plugin.kernels.head import LinearHead, Unembed
from e2e_sae_plugin.splice.check import ModelOutput, SpliceError, check_splice, not_called, not_downstream
from e2e_sae_plugin.splice.given_model import check_context
from e2e_sae_plugin.splice.positions import HookPosition, near_matches
from e2e_sae_plugin.splice.quantised import keep_differentiable
from e2e_sae_plugin.splice.recompute import AllCaught, Recompute
from e2e_sae_plugin.torch_state import own_torch_state

CleanPassSource = Callable[["SplicedModel", Tensor], "CleanPass | None"]
"""Clean pass over these tokens for this place, where it has been computed together with others; else None."""

HookFunction = Callable[[Tensor], Tensor | None]
"""Called with the activation `[batch, pos, ...]`; a tensor that it returns takes the activation's place."""


SharedStates = dict[str, dict[Any, Any]]
"""By the argument through which blocks get them: keys and values that some models share between blocks (Gemma 4)."""


@dataclass
class BlockInput:
    """What enters a block besides what the block and later ones compute themselves."""

    hidden: Tensor
    """The residual stream, `[batch, pos, d_model]` in most models."""
    shared: SharedStates = field(default_factory=dict)
    """What earlier blocks have left for later ones."""
    handed_on: tuple[Any, ...] = ()
    """What the block before it has returned besides the residual stream, such as a router's state."""

    def __post_init__(self) -> None:
        self._version = self.hidden._version

    def changed_in_place(self) -> bool:
        """Return whether the model has written to the residual stream since."""
        return self.hidden._version != self._version


@dataclass
class CleanPass:
    """What the clean model computed, without gradients."""

    activation: Tensor
    """`a^(l)` at the SAE's hook, `[batch, pos, ...]` in the hook's own shape."""
    block_input: Tensor
    """Residual stream entering the block that the spliced pass starts at, `[batch, pos, d_model]`."""
    shared: SharedStates = field(default_factory=dict)
    """What the blocks before that one have left for later ones."""
    handed_on: tuple[Any, ...] = ()
    """What the block before that one has returned besides the residual stream."""
    downstream: dict[str, Tensor] = field(default_factory=dict)
    """`a^(k)` by downstream hook name."""
    hidden: Tensor | None = None
    """Final hidden state after the final norm, `[batch, pos, d_model]`; None where the pass stopped before it."""
    context: Any = None
    """What the family needs to start again at a block (tokens, attention mask)."""

    def of_sequences(self, rows: Sequence[int], context: Any) -> CleanPass:
        """Return what starts a spliced pass for some of the sequences, each as often as it is named in `rows`."""
        shared, handed_on = tree_map(
            lambda value: value[rows] if isinstance(value, Tensor) else value, (self.shared, self.handed_on)
        )
        return CleanPass(self.activation[rows], self.block_input[rows], shared, handed_on, context=context)


@dataclass
class SplicedPass:
    """What the model computed with the SAE spliced in, with gradients back to the spliced activation."""

    downstream: dict[str, Tensor]
    hidden: Tensor | None


class SplicedModel(ABC):
    """A frozen model with an SAE's place in it.

    The model is put into evaluation mode and its parameters stop requiring gradients when this is built. Hooks and
    swapped layers exist only while a pass runs.
    """

    def __init__(
        self, model: nn.Module, hook_name: str, downstream_hooks: Sequence[str] | None, needs_downstream: bool | None
    ):
        self.model = model
        self._freeze()
        self.position = self._find_position(hook_name)
        self.downstream_hooks = self._choose_downstream(downstream_hooks, needs_downstream)
        self.chooses_downstream = downstream_hooks is None
        self.output: ModelOutput | None = None  # set by `check`
        self.shared: CleanPassSource | None = None  # passes that other SAEs need too
        self.recomputes_blocks = False  # set by `recompute_blocks`
        self.copies_activations = False  # set by the first pass that finds that the model changes what hooks have seen

    @property
    def vocabulary(self) -> int:
        """Number of logits per token; runs `check` if nobody has."""
        return self._checked_output().vocabulary

    @property
    def unembed(self) -> Unembed:
        """Map from final hidden states `[tokens, d_model]` to logits in at least fp32; runs `check` if nobody has."""
        return self._checked_output().unembed

    def _checked_output(self) -> ModelOutput:
        if self.output is None:
            self.check()
        assert self.output is not None
        return self.output

    def _freeze(self) -> None:
        self.model.eval()
        keep_differentiable(self.model)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def _choose_downstream(self, hooks: Sequence[str] | None, needed: bool | None) -> tuple[str, ...]:
        if needed is False:
            return ()
        if hooks is None:
            hooks = self.position.default_downstream
            if not hooks and needed:
                raise ValueError(
                    f"objective.beta is positive but no downstream hook is left after {self.position.hook_name!r}: no "
                    f"block of the {self.position.n_layers} lies beyond the one that it feeds. Use an earlier hook_name, "
                    "set objective.beta to 0, or name objective.downstream_hooks in the same block."
                )
        for hook in hooks:
            if hook not in self.hook_names():
                raise ValueError(
                    f"objective.downstream_hooks: the model has no hook {hook!r}.{near_matches(hook, self.hook_names())}"
                )
            if hook == self.position.hook_name:
                raise SpliceError(not_downstream(hook, self.position.hook_name))
        return tuple(hooks)

    def autocast(self, enabled: bool) -> AbstractContextManager[Any]:
        """bfloat16 autocast on the model's device, or nothing."""
        return torch.autocast(self.token_device.type, dtype=torch.bfloat16) if enabled else nullcontext()

    # What a family defines.

    @abstractmethod
    def hook_names(self) -> Sequence[str]:
        """Names that `hook_name` and `downstream_hooks` may take."""

    @abstractmethod
    def _find_position(self, hook_name: str) -> HookPosition: ...

    @abstractmethod
    def _hooked(self, functions: Mapping[str, HookFunction]) -> AbstractContextManager[None]:
        """Context manager that attaches the functions and detaches them whatever happens."""

    @abstractmethod
    def _prepare(self, tokens: Tensor) -> Any:
        """What both passes over these tokens need, computed once (tokens, attention mask)."""

    @abstractmethod
    def _run(self, context: Any, start: BlockInput | None, recompute: Recompute | None) -> Tensor:
        """Final hidden state of a run from the embeddings, or from `start` entering `position.start_block`.

        Args:
            recompute: calls the blocks of a run from `start`; None where autograd keeps what it wants of them.
        """

    @abstractmethod
    def _capture_block_input(self) -> AbstractContextManager[list[BlockInput]]:
        """Context manager yielding a list that receives what enters `position.start_block`, if there is such a block."""

    @abstractmethod
    def logits(self, hidden: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens vocabulary"]:
        """The model's own map from final hidden states `[tokens, d_model]` to logits `[tokens, vocabulary]`."""

    @abstractmethod
    def linear_heads(self) -> Sequence[LinearHead]:
        """Candidates for the unembedding where it looks linear but for a soft cap; `check` finds out which one it is."""

    @abstractmethod
    def full_logits(self, tokens: Tensor) -> Tensor:
        """Logits `[batch, pos, vocabulary]` of an ordinary forward pass, to check the splice against."""

    @abstractmethod
    def use_native_kernels(self, wanted: bool) -> bool:
        """Run the model with torch's kernels in the place of its own code for the same, where there are any, or never.

        They are wanted from the beginning; `check` compares the two. Returns whether it makes a difference for this model.
        """

    # What all families share.

    def recompute_blocks(self, wanted: bool) -> None:
        """Activation checkpointing: in spliced passes, autograd keeps only the input of each block, and backward computes
        the rest anew, one block at a time. It costs one more forward pass over these blocks and changes no number.

        Raises:
            ValueError: wanted where no block runs after the SAE.
        """
        if wanted and self.position.layers_after == 0:
            raise ValueError(
                f"checkpoint_blocks=True has no effect: no block of the {self.position.n_layers} runs after "
                f"{self.position.hook_name!r}. Leave it at False, or use an earlier hook_name."
            )
        self.recomputes_blocks = wanted

    @torch.no_grad()
    @shape_checked
    def clean_pass(
        self, tokens: Int[Tensor, "batch pos"], *, hidden: bool = True, downstream: bool = True
    ) -> CleanPass:
        """Run the clean model on `tokens [batch, pos]`.

        Args:
            hidden: run to the final hidden state. False stops after the last activation that is wanted.
            downstream: keep the activations at the downstream hooks.
        """
        if self.shared is not None and (clean := self.shared(self, tokens)) is not None:
            return clean
        return clean_passes([self], tokens, hidden=hidden, downstream=downstream)[0]

    @shape_checked
    def spliced_pass(
        self,
        clean: CleanPass,
        activation: Float[Tensor, "batch pos *d"],
        *,
        hidden: bool = True,
        later: Mapping[str, HookFunction] | None = None,
    ) -> SplicedPass:
        """Run the model from the SAE's block on, with `activation` in the place of `clean.activation`.

        Args:
            activation: same shape, dtype and device as `clean.activation`; gradients flow back to it.
            hidden: run to the final hidden state. False stops after the last downstream hook.
            later: by hook, what the activation there is replaced with: further SAEs. A downstream activation at the same
                hook is the one that they get. The pass then goes to the final hidden state.
        """
        caught = _Caught(self.copies_activations)
        wanted = None if hidden or later else self.downstream_hooks
        functions: dict[str, HookFunction] = {name: caught.catcher(name, wanted) for name in self.downstream_hooks}
        # The same hooks, so that the same code runs; but a recomputed value belongs to no graph, and is not to be caught.
        functions_again: dict[str, HookFunction] = dict.fromkeys(self.downstream_hooks, _ignore)
        entering = clean.block_input
        if self.copies_activations:
            activation, entering = activation.clone(), entering.clone()
        if self.position.enters_block:
            entering = activation
        else:
            functions[self.position.hook_name] = functions_again[self.position.hook_name] = lambda _: activation
        for name, function in (later or {}).items():
            if self.copies_activations:
                function = _copied(function)
            functions[name] = _both(functions[name], function) if name in functions else function
        recompute = None
        if self.recomputes_blocks and torch.is_grad_enabled():
            recompute = Recompute(lambda: self._hooked(functions_again))
        with self._hooked(functions):
            final = self._run_until_caught(
                clean.context, BlockInput(entering, clean.shared, clean.handed_on), recompute
            )
        if caught.changed_in_place():
            self.copies_activations = True
            return self.spliced_pass(clean, activation, hidden=hidden, later=later)
        return SplicedPass(caught.activations, final)

    def _run_until_caught(
        self, context: Any, start: BlockInput | None, recompute: Recompute | None = None
    ) -> Tensor | None:
        try:
            return self._run(context, start, recompute)
        except AllCaught:
            return None

    @own_torch_state()
    def check(self, context_size: int = 8) -> Tensor:
        """Run both passes on a few tokens and refuse what cannot be trained; returns the activation at the hook.

        Raises:
            ValueError: If the model cannot be run from the SAE's block, has no logits, is not causal, or its logits are not
                a function of its final hidden state alone; if the hook is not called or has no activation per token; if a
                downstream hook does not depend on the SAE's output (or is the SAE's own hook).
        """
        return check_splice(self, context_size)

    @property
    @abstractmethod
    def token_device(self) -> torch.device:
        """Device that tokens have to be on."""


@torch.no_grad()
def clean_passes(
    models: Sequence[SplicedModel], tokens: Tensor, *, hidden: bool = True, downstream: bool = True
) -> list[CleanPass]:
    """One run of the clean model, for several places of SAEs in it; arguments as in `SplicedModel.clean_pass`.

    Args:
        models: splices of one and the same model.
    """
    check_context(models[0].model, tokens.shape[1])
    caught = _Caught(any(model.copies_activations for model in models))
    # Dictionaries keep their order from process to process; sets do not.
    later = dict.fromkeys(hook for model in models if downstream for hook in model.downstream_hooks)
    wanted = list(later | dict.fromkeys(model.position.hook_name for model in models))
    functions = {name: caught.catcher(name, None if hidden else wanted) for name in wanted}
    context = models[0]._prepare(tokens)
    with ExitStack() as stack:
        # Capturing comes last, as it is undone first.
        stack.enter_context(models[0]._hooked(functions))
        entering = [stack.enter_context(model._capture_block_input()) for model in models]
        final = models[0]._run_until_caught(context, None)
    if caught.changed_in_place() or any(one.changed_in_place() for inputs in entering for one in inputs):
        for model in models:
            model.copies_activations = True
        return clean_passes(models, tokens, hidden=hidden, downstream=downstream)
    caught_later = {hook: caught.activations[hook] for hook in later if hook in caught.activations}
    return [
        _clean_pass_of(model, caught, caught_later, inputs, final, context)
        for model, inputs in zip(models, entering, strict=True)
    ]


def _clean_pass_of(
    model: SplicedModel,
    caught: _Caught,
    caught_later: dict[str, Tensor],
    inputs: list[BlockInput],
    final: Tensor | None,
    context: Any,
) -> CleanPass:
    hook_name = model.position.hook_name
    if hook_name not in caught.activations:
        raise SpliceError(not_called(hook_name))
    activation = caught.activations[hook_name]
    start = activation if model.position.enters_block else inputs[0].hidden
    shared, handed_on = (inputs[0].shared, inputs[0].handed_on) if inputs else ({}, ())
    return CleanPass(activation, start, shared, handed_on, caught_later, final, context)


class _Caught:
    """Activations that hooks have seen in a pass, as they were then.

    Some models change a tensor in place after its hook: Falcon adds the attention's output to the MLP's. That shows in
    the tensor's version, and the pass is then run again with copies.
    """

    def __init__(self, copies: bool):
        self.activations: dict[str, Tensor] = {}
        self._copies = copies
        self._versions: dict[str, int] = {}

    def catcher(self, name: str, stop_once_caught: Sequence[str] | None) -> HookFunction:
        def catch(activation: Tensor) -> None:
            self.activations[name] = activation.clone() if self._copies else activation
            self._versions[name] = self.activations[name]._version
            if stop_once_caught is not None and self.activations.keys() >= set(stop_once_caught):
                raise AllCaught

        return catch

    def changed_in_place(self) -> bool:
        return any(value._version != self._versions[name] for name, value in self.activations.items())


def _ignore(activation: Tensor) -> None:
    """Hook function that leaves the activation as it is."""


def _copied(function: HookFunction) -> HookFunction:
    def copied(activation: Tensor) -> Tensor | None:
        value = function(activation)
        return None if value is None else value.clone()

    return copied


def _both(first: HookFunction, second: HookFunction) -> HookFunction:
    """The first only looks."""

    def both(activation: Tensor) -> Tensor | None:
        first(activation)
        return second(activation)

    return both
