"""The loss of the authors' runs as an `Objective`: equal in value and gradient, or refused by name."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformer_lens.loading_from_pretrained import get_official_model_name

from e2e_sae_plugin.convert.authors import AuthorsConfig, NoCounterpartError, number
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.presets import objective_from_authors

# Blocks of the models in the authors' configs, by TransformerLens's official name: a model's config needs the network.
N_LAYERS = {"gpt2": 12, "EleutherAI/pythia-14m": 6, "roneneldan/TinyStories-1M": 8}

LOSS_TERMS = {
    "sparsity": {"coeff", "p_norm"},
    "in_to_orig": {"total_coeff", "hook_positions"},
    "out_to_orig": {"coeff"},
    "out_to_in": {"coeff"},
    "logits_kl": {"coeff"},
}
# Activations at these are as wide as the residual stream.
_RESIDUAL = {"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_mlp_in"}
# At these each head has an activation of its own: the authors' SAE is then one SAE for all heads.
_WITH_HEADS = re.compile(
    r"attn\.(hook_[qkvz]|hook_rot_[qk]|hook_result|hook_attn_scores|hook_pattern)|hook_[qkv]_input|hook_attn_in|hook_result"
)


@dataclass(frozen=True)
class LossTerms:
    """Their coefficients. None: there is no such term, which is not the same as 0, with which it is still computed."""

    sparsity: float
    p_norm: float
    kl: float | None
    downstream_total: float | None
    hook_positions: tuple[str, ...]
    local: float
    """Of the squared error between the SAE's output and its input."""
    out_to_orig: float
    """Of the squared error between the SAE's output and the clean activation."""

    @property
    def spliced(self) -> bool:
        """Whether they run the model with the SAEs in it; else every SAE sees the clean activation."""
        return self.kl is not None or self.downstream_total is not None


def loss_terms(config: AuthorsConfig) -> LossTerms:
    """Read `loss`.

    Raises:
        NoCounterpartError: it has terms of another version, whose scale is not known, or a coefficient that is no number.
    """
    loss = config.section("loss")
    if not loss:
        raise NoCounterpartError("the config has no section 'loss'")
    terms: dict[str, Mapping[str, Any]] = {}
    for name, term in loss.items():
        if term is None:
            continue
        if not isinstance(term, Mapping) or name not in LOSS_TERMS:
            raise NoCounterpartError(f"loss.{name} is no term of the loss in their library, so its scale is not known")
        if unknown := [key for key, value in term.items() if key not in LOSS_TERMS[name] and value is not None]:
            raise NoCounterpartError(f"loss.{name}.{unknown[0]} is not known in their library")
        terms[name] = term
    if "sparsity" not in terms:
        raise NoCounterpartError("the loss has no sparsity term")
    downstream = terms.get("in_to_orig")
    hooks = [] if downstream is None else downstream.get("hook_positions") or []
    hooks = [hooks] if isinstance(hooks, str) else hooks
    if downstream is not None and (not hooks or not all(isinstance(hook, str) for hook in hooks)):
        raise NoCounterpartError(f"loss.in_to_orig.hook_positions must be a list of hooks, got {hooks!r}")
    return LossTerms(
        sparsity=number(terms["sparsity"], "coeff"),
        p_norm=number(terms["sparsity"], "p_norm", 1.0),
        kl=number(terms["logits_kl"], "coeff") if "logits_kl" in terms else None,
        downstream_total=None if downstream is None else number(downstream, "total_coeff"),
        hook_positions=tuple(hooks),
        local=number(terms["out_to_in"], "coeff") if "out_to_in" in terms else 0.0,
        out_to_orig=number(terms["out_to_orig"], "coeff") if "out_to_orig" in terms else 0.0,
    )


def n_layers_of(config: AuthorsConfig, given: int | None) -> int | None:
    """The number of blocks of the run's model; None where it is not known.

    Raises:
        ValueError: `given` is another number than the model has.
    """
    if given is not None and given < 1:
        raise ValueError(f"n_layers (--layers) must be at least 1, got {given!r}.")
    name = config.model_name
    with contextlib.suppress(ValueError):  # not one of TransformerLens's
        name = get_official_model_name(name) if name else None
    known = N_LAYERS.get(name or "")
    if given is not None and known is not None and given != known:
        raise ValueError(f"n_layers={given} (--layers) does not fit the model: {config.model_name} has {known} blocks.")
    return given if known is None else known


def plain_kind(terms: LossTerms, n_positions: int) -> str:
    """The label of a run's SAEs in comparisons: "local", "e2e", "e2e+ds", or all that its loss has."""
    parts = ["e2e"] * bool(terms.kl) + ["ds"] * bool(terms.downstream_total)
    if not parts:
        return "local"
    joint = "joint " if n_positions > 1 else ""
    return joint + "+".join(parts + ["mse"] * bool(terms.local or terms.out_to_orig))


def authors_objective(
    terms: LossTerms, hook_name: str, d_in: int, *, n_positions: int, n_layers: int | None, model_name: str | None
) -> Objective:
    """The `Objective` with the same value and gradient as their loss, less the sparsity, which the SAE's config has.

    Args:
        terms: of their loss.
        hook_name: where the SAE sits.
        d_in: its width.
        n_positions: number of SAEs in the run.
        n_layers: blocks of the model; needed for downstream terms.
        model_name: for messages.

    Raises:
        NoCounterpartError: one SAE cannot have that loss.
        ValueError: `n_layers` is needed and not given, or the hook lies beyond it.
    """
    if n_positions > 1 and terms.spliced:
        names = [
            name for name, term in (("logits_kl", terms.kl), ("in_to_orig", terms.downstream_total)) if term is not None
        ]
        added = " (loss.out_to_orig even as their own)" if terms.out_to_orig else ""
        raise NoCounterpartError(
            f"the run trained {n_positions} SAEs in one pass of the model (loss.{' and loss.'.join(names)}): each got the "
            f"errors of those before it{added}, which no loss of one SAE has"
        )
    block, inside = _in_block(hook_name)
    if _WITH_HEADS.fullmatch(inside):
        raise NoCounterpartError(
            f"at {hook_name} their SAE is one for all heads; a run here has one for all heads laid side by side, or for one"
        )
    # With the only SAE of the pass, or without a spliced pass, its input is the clean activation.
    local = terms.local + terms.out_to_orig
    downstream = tuple(hook for hook in dict.fromkeys(terms.hook_positions) if not _is_upstream(hook, block, inside))
    if not terms.downstream_total or not downstream:
        return _objective(terms, local, 0.0, d_in, layers_after=0, hooks=())
    for hook in downstream:
        _check_same_width(hook, inside, hook_name)
    if n_layers is None:
        if model_name is None:
            raise NoCounterpartError(
                "the number of blocks of its own model is needed for loss.in_to_orig (n_layers, --layers)"
            )
        raise ValueError(
            f"The number of blocks of {model_name} is needed for loss.in_to_orig, and not known here. Give n_layers "
            "(--layers)."
        )
    start = block + (inside == "hook_resid_post")
    if start > n_layers or (start == n_layers and inside != "hook_resid_post"):
        raise ValueError(f"The hook {hook_name!r} lies beyond the {n_layers} blocks of the model (n_layers, --layers).")
    default = {f"blocks.{k}.hook_resid_pre" for k in range(start + 1, n_layers)}
    hooks = () if set(downstream) == default else downstream
    return _objective(terms, local, terms.downstream_total, d_in, layers_after=n_layers - start, hooks=hooks)


def _objective(
    terms: LossTerms, local: float, total: float, d_in: int, *, layers_after: int, hooks: tuple[str, ...]
) -> Objective:
    try:
        objective = objective_from_authors(
            kl=terms.kl or 0.0,
            downstream_total=total,
            local=local,
            d_in=d_in,
            layers_after=layers_after,
            # Upstream hooks add nothing, but the total is shared with them.
            n_downstream_hooks=max(len(terms.hook_positions), 1),
        )
    except ValueError as error:  # negative coefficients, or all of them 0
        raise NoCounterpartError(str(error)) from None
    return replace(objective, downstream_hooks=hooks or None)


def _in_block(hook_name: str) -> tuple[int, str]:
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if match is None:
        raise NoCounterpartError(f"the hook {hook_name!r} is not inside a block, where an end-to-end run needs it")
    return int(match[1]), match[2]


def _is_upstream(hook: str, block: int, inside: str) -> bool:
    """Whether an activation is that of the clean model whatever the SAE does: its own input, and all before it."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if match is None:
        return hook in ("hook_embed", "hook_pos_embed", "hook_tokens")
    return (match[2] == inside and int(match[1]) == block) or (int(match[1]), _rank(match[2])) < (block, _rank(inside))


def _rank(inside: str) -> int:
    """Order within a block; what has the same rank is told apart by running the model."""
    points = ("hook_resid_pre", "", "hook_attn_out", "hook_resid_mid", "", "hook_mlp_out", "hook_resid_post")
    if inside in points:
        return points.index(inside)
    return 4 if inside.startswith(("mlp.", "ln2.", "hook_mlp_in")) else 1


def _check_same_width(hook: str, inside: str, hook_name: str) -> None:
    """Their mean over a hook's dimensions becomes a sum divided by the SAE's width."""
    other = hook.split(".", 2)[-1]
    if (other != inside and not {other, inside} <= _RESIDUAL) or _WITH_HEADS.fullmatch(other):
        raise NoCounterpartError(
            f"loss.in_to_orig has a term at {hook}, whose width may differ from the SAE's at {hook_name}: one weight for "
            "all downstream terms needs activations of one width"
        )
