"""Losses and gradients that are not finite never reach the weights, and the message says where they come from."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import parameters_of, runner_config, tiny_hooked_transformer, token_batch, token_dataset
from safetensors.torch import load_file
from torch import Tensor

from e2e_sae_plugin import E2ESAETrainingRunner, NonFiniteError, Objective
from e2e_sae_plugin.checkpoint import verify_checkpoint
from e2e_sae_plugin.splice import SplicedModel

POISON = 63  # a token whose embedding the tests spoil


def build(tmp_path: Path, model: Any, rows: list[list[int]], **settings: Any) -> E2ESAETrainingRunner:
    config = runner_config(
        **{
            "checkpoint_path": str(tmp_path / "checkpoints"), "output_path": str(tmp_path / "out"), "lr": 1e-2,
            "objective": Objective.e2e_downstream(0.01), **settings,
        }
    )  # fmt: skip
    return E2ESAETrainingRunner(config, override_dataset=Dataset.from_dict({"tokens": rows}), override_model=model)


def rows_with_poison(*sequences: int) -> list[list[int]]:
    """40 sequences without the token, but in those named."""
    rows = (token_batch(40, 8) % POISON).tolist()
    for sequence in sequences:
        rows[sequence][3] = POISON
    return rows


def poisoned_model(value: float = math.inf) -> Any:
    model = tiny_hooked_transformer()
    with torch.no_grad():
        model.W_E[POISON] = value
    return model


class Exploding(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return gradients[0] * math.inf


@pytest.mark.parametrize("architecture", ["standard", "batchtopk", "gated"])
def test_a_bad_batch_is_skipped_counted_and_leaves_no_trace(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        runner = build(
            tmp_path, poisoned_model(), rows_with_poison(9), architecture=architecture, checkpoint_every_minutes=1e-9,
            keep_checkpoints=100,
        )  # fmt: skip
        runner.run()
    assert runner.run_folder is not None
    states = {path.name: path for path, _ in runner.run_folder.checkpoints()}
    before, after = states["64"], states["96"]  # step 2 has sequences 8 to 11
    for name in ("sae_weights.safetensors", "optimizer.safetensors", "sparsity.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes()
    assert load_file(after / "sae_weights.safetensors")["W_dec"].isfinite().all()
    counts = [json.loads((path / "trainer_state.json").read_text()) for path in (before, after)]
    assert [state["n_skipped_steps"] for state in counts] == [0, 1]
    assert [state["n_training_steps"] for state in counts] == [2, 3]
    assert [state["lr_scheduler"]["last_epoch"] for state in counts] == [2, 3]
    assert all(value.isfinite().all() for value in parameters_of(runner.sae).values())
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line.get("details/n_skipped_steps") for line in lines if "losses/kl_loss" in line] == [None] * 2 + [1] * 8
    assert "Step 2 is skipped: its loss or gradient is not finite." in caplog.text
    assert "The batch: sequences 8 to 11 of epoch 1 (from dataset row 8 on)." in caplog.text


def test_skipped_steps_are_in_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    build(tmp_path, poisoned_model(), rows_with_poison(9), verbose=True).run()
    assert "skipped    1 steps, whose loss or gradient was not finite" in capsys.readouterr().out


def test_too_many_in_a_row_stop_the_run_with_the_last_good_state(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = rows_with_poison(9, 16, 20, 24)  # steps 2, 4, 5, 6
    good = build(
        tmp_path / "good",
        poisoned_model(),
        rows,
        checkpoint_every_minutes=1e-9,
        keep_checkpoints=9,
        max_skipped_steps=3,
    )
    with pytest.raises(NonFiniteError):
        good.run()
    runner = build(tmp_path, poisoned_model(), rows, max_skipped_steps=3)
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"), pytest.raises(NonFiniteError) as stopped:
        runner.run()
    message = str(stopped.value)
    assert "3 steps in a row (max_skipped_steps), up to step 6," in message
    assert "The activation at blocks.1.hook_resid_pre of the clean pass is not finite." in message
    assert "overflows by itself, without the SAE" in message
    assert "sequences 24 to 27 of epoch 1" in message
    assert runner.run_folder is not None
    ((checkpoint, manifest),) = runner.run_folder.checkpoints()
    assert (manifest["n_training_steps"], checkpoint.name) == (4, "128")
    assert verify_checkpoint(checkpoint)
    assert good.run_folder is not None
    reference = good.run_folder.path / "128"
    for name in ("sae_weights.safetensors", "optimizer.safetensors", "trainer_state.safetensors"):
        assert (checkpoint / name).read_bytes() == (reference / name).read_bytes()
    # The same batches come again.
    with pytest.raises(NonFiniteError, match="up to step 6"):
        build(tmp_path, poisoned_model(), rows, max_skipped_steps=3, resume_from_checkpoint=str(checkpoint)).run()


def test_a_run_resumed_in_a_row_of_skipped_steps_stops_where_the_whole_one_does(tmp_path: Path):
    rows = rows_with_poison(16, 20, 24)
    runner = build(
        tmp_path, poisoned_model(), rows, max_skipped_steps=3, checkpoint_every_minutes=1e-9, keep_checkpoints=9
    )
    with pytest.raises(NonFiniteError, match="up to step 6"):
        runner.run()
    assert runner.run_folder is not None
    checkpoint = runner.run_folder.path / "192"  # two of the three are skipped
    with pytest.raises(NonFiniteError, match="up to step 6"):
        build(tmp_path, poisoned_model(), rows, max_skipped_steps=3, resume_from_checkpoint=str(checkpoint)).run()


# Where it comes from.


def fault_of(tmp_path: Path, model: Any, sae_change: Any = None, model_change: Any = None, **settings: Any) -> str:
    runner = build(tmp_path, model, token_dataset()["tokens"], max_skipped_steps=1, **settings)
    if sae_change is not None:
        with torch.no_grad():
            sae_change(runner.sae)
    if model_change is not None:  # after the checks that a runner makes
        with torch.no_grad():
            model_change(model)
    with pytest.raises(NonFiniteError) as stopped:
        runner.run()
    return str(stopped.value)


def spoil_hook(model: Any, hook: str, *, when_spliced: bool, backward: bool = False) -> Any:
    """Make a hook's activation, or its gradient, infinite; in the spliced pass only, or in both."""

    def spoil(value: Tensor, hook: Any) -> Tensor:
        if when_spliced and not value.requires_grad:
            return value
        return Exploding.apply(value) if backward else value * math.inf  # pyright: ignore[reportReturnType]

    model.add_perma_hook(hook, spoil)
    return model


def test_the_models_own_overflow_is_told_apart(tmp_path: Path):
    hook = "blocks.2.hook_resid_pre"
    spoilt = fault_of(
        tmp_path, tiny_hooked_transformer(), model_change=lambda model: spoil_hook(model, hook, when_spliced=False)
    )
    assert f"The activation at {hook} of the clean pass is not finite. The language model overflows by itself" in spoilt
    assert "without the SAE, under its dtype" in spoilt


def test_the_models_own_overflow_under_autocast_is_told_apart(tmp_path: Path):
    def enlarge(model: Any) -> None:
        model.blocks[0].mlp.W_in.fill_(3e38)  # products beyond the largest number of bf16

    message = fault_of(tmp_path, tiny_hooked_transformer(), model_change=enlarge, autocast_lm=True)
    assert "The language model overflows by itself, without the SAE, under autocast_lm=True" in message


def test_an_sae_that_is_not_finite_is_named(tmp_path: Path):
    message = fault_of(tmp_path, tiny_hooked_transformer(), lambda sae: sae.W_enc[0].fill_(math.nan))
    assert "The SAE's W_enc is not finite." in message


def test_an_overflowing_reconstruction_is_named(tmp_path: Path):
    message = fault_of(tmp_path, tiny_hooked_transformer(), lambda sae: sae.W_dec.fill_(1e38))
    assert "The SAE's reconstruction is not finite, while the activation that it reads is." in message


def test_the_models_overflow_on_a_reconstruction_is_named_with_its_place(tmp_path: Path):
    hook = "blocks.2.hook_resid_pre"
    message = fault_of(
        tmp_path, tiny_hooked_transformer(), model_change=lambda model: spoil_hook(model, hook, when_spliced=True)
    )
    assert f"The model overflows at {hook} of the spliced pass, on a reconstruction that is finite" in message


def test_a_downstream_error_is_named_with_its_hook(tmp_path: Path):
    model = spoil_hook(tiny_hooked_transformer(), "blocks.2.hook_resid_pre", when_spliced=True, backward=True)
    message = fault_of(tmp_path, model)
    assert (
        "The gradient of the downstream error at blocks.2.hook_resid_pre is not finite, while its value is" in message
    )


def test_an_error_too_large_for_fp32_is_named_with_its_hook(tmp_path: Path):
    # No norm lies between the two hooks: its own square would overflow too.
    message = fault_of(
        tmp_path, tiny_hooked_transformer(), lambda sae: sae.b_dec.fill_(1e20), hook_name="blocks.1.hook_mlp_out",
        objective=Objective(beta=0.1, downstream_hooks=("blocks.2.hook_resid_pre",), kl=0.0),
    )  # fmt: skip
    assert "The downstream error at blocks.2.hook_resid_pre is not finite, while what it compares is" in message


def test_the_kl_is_named(tmp_path: Path):
    model = spoil_hook(tiny_hooked_transformer(), "ln_final.hook_normalized", when_spliced=True, backward=True)
    message = fault_of(tmp_path, model, objective=Objective.e2e())
    assert "The gradient of the KL is not finite, while its value is" in message


def test_the_saes_own_term_is_named(tmp_path: Path):
    message = fault_of(tmp_path, tiny_hooked_transformer(), sae={"l1_coefficient": 3e38}, objective=Objective.e2e())
    assert "The SAE's own term l1_loss is not finite." in message


def test_the_auxiliary_term_is_named(tmp_path: Path):
    message = fault_of(
        tmp_path, tiny_hooked_transformer(), architecture="topk", sae={"aux_loss_coefficient": 1e39},
        objective=Objective.e2e(), dead_feature_window=1,
    )  # fmt: skip
    assert "The SAE's own term auxiliary_reconstruction_loss is not finite." in message


def test_matryoshkas_level_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of its three prefixes the second is made to fail, in the step and in the search alike."""
    original, calls = SplicedModel.spliced_pass, itertools.count()

    def second_of_three(self: SplicedModel, clean: Any, activation: Tensor, **kwargs: Any) -> Any:
        spoilt = next(calls) % 3 == 1
        return original(self, clean, activation * math.inf if spoilt else activation, **kwargs)

    runner = build(
        tmp_path, tiny_hooked_transformer(), token_dataset()["tokens"], max_skipped_steps=1,
        architecture="matryoshka_batchtopk", objective=Objective.e2e(),
    )  # fmt: skip
    assert len(runner.sae.cfg.matryoshka_widths) == 3
    monkeypatch.setattr(SplicedModel, "spliced_pass", second_of_three)
    with pytest.raises(
        NonFiniteError, match=r"The model overflows at the end of the spliced pass.*of the inner level \d+\)"
    ):
        runner.run()


def test_a_gradient_clip_of_none_is_guarded_too(tmp_path: Path):
    model = spoil_hook(tiny_hooked_transformer(), "ln_final.hook_normalized", when_spliced=True, backward=True)
    message = fault_of(tmp_path, model, objective=Objective.e2e(), max_grad_norm=None)
    assert "The gradient of the KL is not finite" in message


def test_local_training_is_guarded_too(tmp_path: Path):
    message = fault_of(
        tmp_path, tiny_hooked_transformer(), lambda sae: sae.b_dec.fill_(1e20), objective=Objective.local()
    )
    assert "The SAE's own term mse_loss is not finite." in message
