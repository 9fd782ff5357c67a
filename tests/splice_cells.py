"""One cell of the families' table: an SAE at one hook of one model, against the model's own forward pass."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from helpers import VOCABULARY
from naive_passes import counted_blocks, naive_run, snapshot, spliced_logits
from torch import Tensor

import e2e_sae_plugin
from e2e_sae_plugin import splice_into
from e2e_sae_plugin.splice import CleanPass, SplicedModel

WORKS = "works"
PACKAGE = Path(e2e_sae_plugin.__file__).parent
# float32 rounding through a few blocks, and through backward, as a fraction of the largest value.
ROUNDING, GRADIENT_ROUNDING = 1e-5, 1e-4


class CellError(AssertionError):
    """A spliced pass that differs from the model's own."""


def outcome(model: Any, hook_name: str, start_block: int) -> str:
    """`works`, `refused: <message>` or `FAILS: <what>`.

    Args:
        start_block: the first block that may run in the spliced pass.
    """
    try:
        spliced_model = splice_into(model, hook_name)
        spliced_model.check()
    except Exception as error:
        is_refusal = isinstance(error, ValueError) and _raised_by_package(error)
        return f"refused: {error}" if is_refusal else failure(error)
    try:
        before = snapshot(model)
        compare_with_naive_passes(model, spliced_model, start_block)
        _expect(snapshot(model) == before, "hooks or swapped layers are left behind")
    except Exception as error:
        return failure(error)
    return WORKS


def failure(error: Exception) -> str:
    """`FAILS: <type>: <first line of the message> (<file>, <function>)`."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"FAILS: {type(error).__name__}: {first_line(error)} ({Path(frame.filename).name}, {frame.name})"


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _raised_by_package(error: Exception) -> bool:
    """Tell the package's own refusals from errors of transformers that happen to be ValueErrors."""
    return PACKAGE in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents


def compare_with_naive_passes(model: Any, spliced_model: SplicedModel, start_block: int) -> None:
    """Run both passes and compare all that they give.

    Raises:
        CellError: If anything differs.
    """
    hook_name = spliced_model.position.hook_name
    tokens = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), counted_blocks(model, hook_name) as own:
        logits, caught = naive_run(model, tokens, {}, [hook_name])
    with counted_blocks(model, hook_name) as counts:
        clean = spliced_model.clean_pass(tokens)
    _expect(counts == own, f"the clean pass calls the blocks {dict(counts)} times, the model itself {dict(own)}")
    shape = clean.activation.shape
    _expect(shape[:2] == tokens.shape, f"activation {tuple(shape)} is not [batch, pos, ...] of {tuple(tokens.shape)}")
    _same("clean activation", clean.activation, caught[hook_name], ROUNDING)
    with torch.no_grad():
        _same("clean logits", spliced_logits(spliced_model, clean.hidden), logits, ROUNDING)
    spliced_model.clean_pass(tokens[:1].flip(1))  # what this one leaves in the model is not to reach the other
    later = Counter({block: n for block, n in own.items() if block >= start_block})
    with counted_blocks(model, hook_name) as counts, torch.no_grad():
        spliced = spliced_model.spliced_pass(clean, clean.activation.clone())
    _expect(counts == later, f"the spliced pass calls the blocks {dict(counts)} times instead of {dict(later)}")
    with torch.no_grad():
        _same("logits with a perfect SAE", spliced_logits(spliced_model, spliced.hidden), logits, ROUNDING)
    _expect(bool(clean.downstream), "no downstream activation")
    for name, value in clean.downstream.items():
        _same(f"{name} with a perfect SAE", spliced.downstream[name], value, ROUNDING)
    _compare_changed(model, spliced_model, tokens, clean, logits)


def _compare_changed(model: Any, spliced_model: SplicedModel, tokens: Tensor, clean: CleanPass, logits: Tensor) -> None:
    """Another activation in the place of the clean one: logits, and the gradient that reaches it."""
    hook_name = spliced_model.position.hook_name
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(clean.activation.shape, generator=generator) * clean.activation.std()
    probe = torch.randn(logits.shape, generator=generator)
    ours, naive = [(clean.activation + 0.5 * noise).requires_grad_() for _ in range(2)]
    given = ours.clone()  # as an SAE's output, which is no leaf
    spliced = spliced_model.spliced_pass(clean, given)
    our_logits = spliced_logits(spliced_model, spliced.hidden)
    naive_logits, _ = naive_run(model, tokens, {hook_name: naive}, [])
    moved = float((naive_logits - logits).detach().abs().max())
    _expect(moved > 1e-3 * float(logits.abs().max()), "a changed activation does not change the logits")
    _same("logits with a changed activation", our_logits.detach(), naive_logits.detach(), ROUNDING)
    _expect(torch.equal(given.detach(), ours.detach()), "the model overwrites the activation that it is given")
    (our_logits * probe).sum().backward()
    (naive_logits * probe).sum().backward()
    if ours.grad is None or naive.grad is None:
        raise CellError("no gradient reaches the activation")
    _expect(bool(naive.grad.abs().max() > 0), "the gradient of the model itself is zero")
    _same("gradient", ours.grad, naive.grad, GRADIENT_ROUNDING)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise CellError(otherwise)


def _same(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    _expect(got.shape == expected.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
    difference = float((got - expected).abs().max() / expected.abs().max())
    _expect(difference <= tolerance, f"{what}: {difference:.1g} of the largest value off")
