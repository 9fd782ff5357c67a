"""Places of several SAEs in one model: the order in which it reaches them, and none of them twice."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from e2e_sae_plugin.splice.base import HookFunction, SplicedModel


@torch.no_grad()
def in_execution_order(models: Mapping[str, SplicedModel]) -> list[str]:
    """The names of SAEs, sorted as the model calls their hooks.

    Args:
        models: splices of one and the same model, by the SAE's name.

    Raises:
        ValueError: two SAEs have the same place, under one name or under two (`blocks.1.hook_resid_post` is
            `blocks.2.hook_resid_pre`), or the model does not call a hook.
    """
    by_hook: dict[str, str] = {}
    for name, model in models.items():
        hook = model.position.hook_name
        if hook in by_hook:
            raise ValueError(_overlap(by_hook[hook], name, hook, hook))
        by_hook[hook] = name
    caught = _caught_in_order(next(iter(models.values())), list(by_hook))
    for hook in by_hook:
        if hook not in caught:
            raise ValueError(
                f"The model does not call {hook!r}, where the SAE {by_hook[hook]!r} sits. Use another hook."
            )
    hooks = list(caught)
    for i, hook in enumerate(hooks):
        for other in hooks[:i]:
            if _same(caught[hook], caught[other]):
                raise ValueError(_overlap(by_hook[other], by_hook[hook], other, hook))
    return [by_hook[hook] for hook in hooks]


def _caught_in_order(model: SplicedModel, hooks: list[str]) -> dict[str, Tensor]:
    """Activations of a few tokens; dicts keep the order of insertion."""
    caught: dict[str, Tensor] = {}
    functions: dict[str, HookFunction] = {hook: _keeper(caught, hook) for hook in hooks}
    tokens = torch.ones((1, 4), dtype=torch.long, device=model.token_device)
    with model._hooked(functions):
        model._run(model._prepare(tokens), None, None)
    return caught


def _keeper(caught: dict[str, Tensor], hook: str) -> HookFunction:
    def keep(activation: Tensor) -> None:
        caught[hook] = activation

    return keep


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _overlap(first: str, second: str, hook: str, other: str) -> str:
    where = f"hook {hook!r}" if hook == other else f"one place, which the model calls {hook!r} and {other!r}"
    return (
        f"The SAEs {first!r} and {second!r} overlap: both sit at {where}. SAEs that are spliced together need a hook of "
        "their own each. Leave one of them out, or train them with mode='independent'."
    )
