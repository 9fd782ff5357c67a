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

from e2e_sae_plugin._typing import shape_checked
from e2e_sae_plugin.kernels.kl import LinearHead, Unembed
from e2e_sae_plugin.splice.check import check_splice, not_downstream
from e2e_sae_plugin.splice.positions import HookPosition, near_matches
from e2e_sae_plugin.splice.quantised import keep_differentiable
from e2e_sae_plugin.splice.recompute import AllCaught, Recompute

CleanPassSource = Callable[["SplicedModel", Tensor], "CleanPass | None"]
"""Clean pass over these tokens for this place, where it has been computed together with others; else None."""

HookFunction = Callable[[Tensor], Tensor | None]
"""Called with the activation `[batch, pos, ...]`; a tensor that it returns takes the activation's place."""


@dataclass
class CleanPass:
    """What the clean model computed, without gradients."""

    activation: Tensor
    """`a^(l)` at the SAE's hook, `[batch, pos, ...]` in the hook's own shape."""
    block_input: Tensor
    """Residual stream entering the block that the spliced pass starts at, `[batch, pos, d_model]`."""
    downstream: dict[str, Tensor] = field(default_factory=dict)
    """`a^(k)` by downstream hook name."""
    hidden: Tensor | None = None
    """Final hidden state after the final norm, `[batch, pos, d_model]`; None where the pass stopped before it."""
    context: Any = None
    """What the family needs to start again at a block (tokens, attention mask)."""


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
        self, model: nn.Module, hook_name: str, downstream_hooks: Sequence[str] | None, needs_downstream: bool
    ):
        self.model = model
        self._freeze()
        self.position = self._find_position(hook_name)
        self.downstream_hooks = self._choose_downstream(downstream_hooks, needs_downstream)
        self.vocabulary = 0  # known after `check`
        self.unembed: Unembed = self.logits  # `check` puts a faster one here where it can
        self.shared: CleanPassSource | None = None  # passes that other SAEs need too
        self.recomputes_blocks = False  # set by `recompute_blocks`

    def _freeze(self) -> None:
        self.model.eval()
        keep_differentiable(self.model)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def _choose_downstream(self, hooks: Sequence[str] | None, needed: bool) -> tuple[str, ...]:
        if not needed:
            return ()
        if hooks is None:
            hooks = self.position.default_downstream
            if not hooks:
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
                raise ValueError(not_downstream(hook, self.position.hook_name))
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
    def _run(self, context: Any, start: Tensor | None, recompute: Recompute | None) -> Tensor:
        """Final hidden state of a run from the embeddings, or from `start` entering `position.start_block`.

        Args:
            recompute: calls the blocks of a run from `start`; None where autograd keeps what it wants of them.
        """

    @abstractmethod
    def _capture_block_input(self) -> AbstractContextManager[list[Tensor]]:
        """Context manager yielding a list that receives the residual stream entering `position.start_block`."""

    @abstractmethod
    def logits(self, hidden: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens vocabulary"]:
        """The model's own map from final hidden states `[tokens, d_model]` to logits `[tokens, vocabulary]`."""

    @abstractmethod
    def linear_head(self) -> LinearHead | None:
        """The unembedding's weights where it looks linear; `check` finds out whether it is."""

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
        caught: dict[str, Tensor] = {}
        wanted = None if hidden or later else self.downstream_hooks
        functions = {name: _catcher(caught, name, wanted) for name in self.downstream_hooks}
        # The same hooks, so that the same code runs; but a recomputed value belongs to no graph, and is not to be caught.
        functions_again: dict[str, HookFunction] = dict.fromkeys(self.downstream_hooks, _ignore)
        if self.position.enters_block:
            start = activation
        else:
            start = clean.block_input
            functions[self.position.hook_name] = functions_again[self.position.hook_name] = lambda _: activation
        for name, function in (later or {}).items():
            functions[name] = _both(functions[name], function) if name in functions else function
        recompute = None
        if self.recomputes_blocks and torch.is_grad_enabled():
            recompute = Recompute(lambda: self._hooked(functions_again))
        with self._hooked(functions):
            final = self._run_until_caught(clean.context, start, recompute)
        return SplicedPass(caught, final)

    def _run_until_caught(
        self, context: Any, start: Tensor | None, recompute: Recompute | None = None
    ) -> Tensor | None:
        try:
            return self._run(context, start, recompute)
        except AllCaught:
            return None

    def check(self, context_size: int = 8) -> Tensor:
        """Run the model on a few tokens and refuse what cannot be trained; returns the activation at the hook.

        Raises:
            ValueError: the model has no logits, is not causal, its logits are not a function of its final hidden state
                alone, or a downstream hook does not depend on the SAE's output (or is the SAE's own place).
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
    caught: dict[str, Tensor] = {}
    later = {hook for model in models if downstream for hook in model.downstream_hooks}
    wanted = later | {model.position.hook_name for model in models}
    functions = {name: _catcher(caught, name, None if hidden else sorted(wanted)) for name in wanted}
    context = models[0]._prepare(tokens)
    with ExitStack() as stack:
        # Capturing comes last, as it is undone first.
        stack.enter_context(models[0]._hooked(functions))
        entering = [stack.enter_context(model._capture_block_input()) for model in models]
        final = models[0]._run_until_caught(context, None)
    caught_later = {
        hook: caught[hook] for hook in later if hook in caught
    }  # `check` refuses what a pass does not reach
    passes: list[CleanPass] = []
    for model, block_input in zip(models, entering, strict=True):
        activation = caught[model.position.hook_name]
        start = activation if model.position.enters_block else block_input[0]
        passes.append(CleanPass(activation, start, caught_later, final, context))
    return passes


def _ignore(activation: Tensor) -> None:
    """Hook function that leaves the activation as it is."""


def _both(first: HookFunction, second: HookFunction) -> HookFunction:
    """The first only looks."""

    def both(activation: Tensor) -> Tensor | None:
        first(activation)
        return second(activation)

    return both


def _catcher(caught: dict[str, Tensor], name: str, stop_once_caught: Sequence[str] | None) -> HookFunction:
    def catch(activation: Tensor) -> None:
        caught[name] = activation
        if stop_once_caught is not None and caught.keys() >= set(stop_once_caught):
            raise AllCaught

    return catch
