"""Runs of several SAEs: what they refuse, what they leave behind, how they go on, and the set that comes of them."""

from __future__ import annotations

import csv
import json
import logging
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny_hooked_transformer, token_batch, token_dataset
from sae_lens import SAE, StandardTrainingSAEConfig
from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
from safetensors.torch import load_file

from e2e_sae_plugin import (
    MultiE2ESAERunnerConfig,
    MultiE2ESAETrainingRunner,
    NonFiniteError,
    RunInterrupted,
    SAESet,
    cli,
    load_sae_set,
)
from e2e_sae_plugin.joint.step import JointStep

HOOKS = {"late": "blocks.2.hook_resid_pre", "early": "blocks.1.hook_resid_pre"}
STEPS = 10


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two SAEs, given in another order than the model's; ten steps of four sequences."""
    defaults: dict[str, Any] = {
        "saes": {
            "late": {"architecture": "standard", "d_in": 16, "d_sae": 32, "l1_coefficient": 0.01},
            "early": {"architecture": "topk", "d_in": 16, "d_sae": 24, "k": 4},
        },
        "hook_names": HOOKS,
        "model_name": "tiny",
        "dataset_path": "tiny",
        "context_size": 8,
        "train_batch_size_tokens": 32,
        "store_batch_size_prompts": 4,
        "training_tokens": 32 * STEPS,
        "lr": 1e-2,
        "n_eval_batches": 1,
        "n_batches_for_norm_estimate": 2,
        "logger": {"wandb_log_frequency": 1, "eval_every_n_wandb_logs": 5},
        "objective": {"kl": 1.0, "beta": 0.01},
        "output_path": str(folder / "out"),
        "verbose": False,
    }
    return {**defaults, **changes}


def runner(folder: Path, **changes: Any) -> MultiE2ESAETrainingRunner:
    config = MultiE2ESAERunnerConfig.from_dict(settings(folder, **changes))
    return MultiE2ESAETrainingRunner(config, override_model=tiny_hooked_transformer(), override_dataset=token_dataset())


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: load_file(path) for path in sorted((folder / "out").glob("*/sae_weights.safetensors"))}


def assert_same(ours: Path, theirs: Path) -> None:
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        for key, value in tensors.items():
            torch.testing.assert_close(found[name][key], value, rtol=0, atol=0, msg=f"{name} {key}")
    for name in ("metrics.jsonl", "joint.csv", "sae_set.json", *(f"{each}/metrics.jsonl" for each in found)):
        assert (ours / "out" / name).read_text() == (theirs / "out" / name).read_text(), name


def put_in(sae: SAE[Any]) -> Any:
    """As a hook of TransformerLens."""
    return lambda activation, hook: sae(activation)  # noqa: ARG005


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    runner(folder).run()
    return folder


# What it leaves behind.


def test_a_run_leaves_one_sae_of_saelens_per_hook_and_a_set(whole: Path):
    out = whole / "out"
    manifest = json.loads((out / "sae_set.json").read_text())
    assert [(each["name"], each["hook_name"], each["folder"]) for each in manifest["saes"]] == [
        ("early", HOOKS["early"], "early"),
        ("late", HOOKS["late"], "late"),
    ]
    assert manifest["training"]["mode"] == "joint"
    for name in HOOKS:
        sae = SAE.load_from_disk(str(out / name))
        assert sae.cfg.metadata.hook_name == HOOKS[name]
        assert sae.cfg.metadata.sae_set["names"] == ["early", "late"]
        assert sae.cfg.metadata.downstream_hooks == ["blocks.2.hook_resid_pre"]  # of the first SAE in the pass
    rows = list(csv.DictReader((out / "joint.csv").read_text().splitlines()))
    assert [row["SAE"] for row in rows] == ["early", "late"]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["losses/overall_loss"] for line in metrics if "losses/overall_loss" in line]
    assert len(losses) == STEPS
    evaluations = [line for line in metrics if "metrics/ce_loss_increase" in line]
    assert [line["step"] for line in evaluations] == [4, 9, 10]
    assert evaluations[-1]["metrics/held_out_l0"] == pytest.approx(float(rows[-1]["L0 so far"]), rel=1e-3)


@pytest.mark.slow
def test_the_trained_set_costs_less_than_an_untrained_one(tmp_path: Path):
    model, tokens = tiny_hooked_transformer(), token_batch(n_prompts=16, seed=9)
    found: list[float] = []
    for lr, name in ((1e-12, "untrained"), (2e-2, "trained")):
        saes = runner(tmp_path / name, lr=lr, training_tokens=3200, objective="e2e").run()
        found.append(saes.evaluate(model, tokens).rows[-1].kl.value)
    assert found[1] < 0.8 * found[0]


def test_the_evaluation_is_that_of_the_whole_model_with_saes_put_in(whole: Path):
    saes, tokens = load_sae_set(whole / "out"), token_batch(n_prompts=6, seed=3)
    model = tiny_hooked_transformer()
    result = saes.evaluate(model, tokens, batch_size_prompts=4)
    assert [row.name for row in result.rows] == ["early", "late"]

    def cross_entropy(names: list[str]) -> float:
        hooks: list[Any] = [(HOOKS[name], put_in(saes.saes[name])) for name in names]
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks, prepend_bos=False)
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))

    clean = cross_entropy([])
    assert result.ce_loss_without_sae == pytest.approx(clean, abs=1e-5)
    first, last = result.rows
    assert first.ce_loss_increase.value == pytest.approx(cross_entropy(["early"]) - clean, abs=1e-5)
    assert first.ce_loss_increase_alone == first.ce_loss_increase
    assert last.ce_loss_increase.value == pytest.approx(cross_entropy(["early", "late"]) - clean, abs=1e-5)
    assert last.ce_loss_increase_alone.value == pytest.approx(cross_entropy(["late"]) - clean, abs=1e-5)
    assert first.l0.value == pytest.approx(4, abs=0.5)
    assert result.l0 == pytest.approx(first.l0.value + last.l0.value)
    assert result.n_tokens == 48


def test_a_set_is_put_into_a_model_of_saelens_in_one_call(whole: Path):
    saes, tokens = load_sae_set(whole / "out"), token_batch(n_prompts=2)
    plain = tiny_hooked_transformer()
    model = HookedSAETransformer(plain.cfg)
    model.load_state_dict(plain.state_dict())
    clean = model(tokens, prepend_bos=False)
    assert saes.attach(model) is model
    hooks: list[Any] = [(HOOKS[name], put_in(sae)) for name, sae in saes.saes.items()]
    expected = plain.run_with_hooks(tokens, fwd_hooks=hooks, prepend_bos=False)
    torch.testing.assert_close(model(tokens, prepend_bos=False), expected, rtol=1e-4, atol=1e-4)
    model.reset_saes()
    torch.testing.assert_close(
        saes.attach(model, use_error_term=True)(tokens, prepend_bos=False), clean, rtol=1e-3, atol=1e-3
    )
    with pytest.raises(
        ValueError, match="HookedSAETransformer or a SAETransformerBridge of SAELens; got a HookedTransformer"
    ):
        saes.attach(plain)


def test_what_saelens_cannot_leave_out_is_refused_or_said(whole: Path, caplog: pytest.LogCaptureFixture):
    tokens, plain = token_batch(n_prompts=2), tiny_hooked_transformer()
    tokens[:, 0] = 1
    model = HookedSAETransformer(plain.cfg)
    model.load_state_dict(plain.state_dict())
    saes = load_sae_set(whole / "out")
    saes.saes["late"].cfg.metadata.hook_head_index = 1
    with pytest.raises(ValueError, match="'late' is of head 1 alone, and SAELens would apply it to all heads"):
        saes.attach(model)
    assert not model._acts_to_saes
    saes.saes["late"].cfg.metadata.hook_head_index = None
    for sae in saes.saes.values():
        sae.cfg.metadata.exclude_special_tokens = [1]

    def kept(sae: SAE[Any]) -> Any:
        return lambda x, hook: torch.where((tokens == 1)[..., None], x, sae(x))  # noqa: ARG005

    hooks: list[Any] = [(HOOKS[name], kept(sae)) for name, sae in saes.saes.items()]
    expected = plain.run_with_hooks(tokens, fwd_hooks=hooks, prepend_bos=False)
    torch.testing.assert_close(saes.attach(model)(tokens, prepend_bos=False), expected, rtol=1e-4, atol=1e-4)
    saes.saes["early"].cfg.metadata.seqpos_slice = (1, None)
    with caplog.at_level(logging.WARNING):
        saes.attach(model)
    assert "early was trained on the positions (1, None), but is applied to all" in caplog.text


def test_a_run_returns_a_mapping_as_saelens_does(tmp_path: Path):
    saes = runner(tmp_path).run()
    assert isinstance(saes, Mapping)
    assert (list(saes), len(saes), "late" in saes, "nope" in saes) == (["early", "late"], 2, True, False)
    assert {name: sae.cfg.d_sae for name, sae in saes.items()} == {"early": 24, "late": 32}
    assert dict(saes) == saes.saes == dict(**saes)
    assert saes == SAESet(dict(saes))
    with pytest.raises(KeyError):
        saes["nope"]


def test_part_of_a_set(whole: Path):
    assert list(load_sae_set(whole / "out", names=["late"]).saes) == ["late"]
    with pytest.raises(ValueError, match=r"names=\['lat'\]: the set of .* has \['early', 'late'\]"):
        load_sae_set(whole / "out", names=["lat"])
    with pytest.raises(ValueError, match=r"has no sae_set\.json"):
        load_sae_set(whole / "out/late")
    with pytest.raises(ValueError, match="revision and token have no meaning"):
        load_sae_set(whole / "out", revision="main")


def test_saes_that_leave_out_other_tokens_are_not_measured_together(whole: Path):
    saes = load_sae_set(whole / "out")
    saes.saes["late"].cfg.metadata.seqpos_slice = [1, None]
    with pytest.raises(ValueError, match="'early' and 'late' leave out different tokens"):
        saes.evaluate(tiny_hooked_transformer(), token_batch())
    with pytest.raises(ValueError, match="no SAE in the set"):
        SAESet({}).evaluate(tiny_hooked_transformer(), token_batch())


# Going on.


@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
def test_a_signal_saves_and_the_same_run_goes_on(
    step: int, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    interrupt_at(step, monkeypatch)
    with pytest.raises(RunInterrupted):
        runner(tmp_path).run()
    monkeypatch.undo()
    runner(tmp_path).run()
    assert_same(tmp_path, whole)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = JointStep.__call__

    def interrupted(self: JointStep, batch: torch.Tensor) -> Any:
        if self._leader.n_training_steps == step:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(JointStep, "__call__", interrupted)


def test_a_run_that_failed_in_a_step_goes_on_with_that_step(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    original = JointStep._gradient

    def failing(self: JointStep, *args: Any) -> Any:
        if self._leader.n_training_steps == 6:
            original(self, *args)
            raise RuntimeError("out of memory")
        return original(self, *args)

    monkeypatch.setattr(JointStep, "_gradient", failing)
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="out of memory"):
        runner(tmp_path).run()
    assert "run the joint run again to go on" in caplog.text
    monkeypatch.undo()
    runner(tmp_path).run()
    assert_same(tmp_path, whole)


def test_a_run_that_was_stopped_while_it_saved_saves_anew(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch):
    from e2e_sae_plugin.joint.member import JointMemberRunner

    original = JointMemberRunner.finish

    def killed(self: JointMemberRunner, trainer: Any) -> None:
        if self.member.name == "early":  # the second that is saved
            raise KeyboardInterrupt
        original(self, trainer)

    monkeypatch.setattr(JointMemberRunner, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path).run()
    assert (tmp_path / "out/late/cfg.json").exists()
    assert not (tmp_path / "out/early/cfg.json").exists()
    monkeypatch.undo()
    runner(tmp_path).run()
    assert_same(tmp_path, whole)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runner(tmp_path).run()
    before = weights(tmp_path)
    monkeypatch.setattr(JointStep, "__call__", lambda *_: pytest.fail("it is finished"))
    assert list(runner(tmp_path).run().saes) == ["early", "late"]
    assert weights(tmp_path).keys() == before.keys()


def test_another_run_is_not_overwritten(tmp_path: Path, whole: Path):
    with pytest.raises(
        ValueError, match=r"holds another run of several SAEs. It differs in:\n  agreement: 0.0 there, 0.5"
    ):
        runner(whole, agreement=0.5).run()
    runner(tmp_path).run()
    runner(tmp_path, agreement=0.5, overwrite_output=True).run()
    assert load_sae_set(tmp_path / "out").training["agreement"] == 0.5


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = JointStep.__call__

    def broken(self: JointStep, batch: torch.Tensor) -> Any:
        if self._leader.n_training_steps == 3:
            with torch.no_grad():
                self._leader.sae.b_dec[:] = float("nan")
        return original(self, batch)

    monkeypatch.setattr(JointStep, "__call__", broken)
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        runner(tmp_path, max_skipped_steps=2).run()


# A local part.

LOCAL_FIRST: dict[str, Any] = {
    "local_first": 0.5,
    "objective": {"kl": 1.0, "mse": 0.1},
    "saes": {  # one of them reads two batches before its first step, to find the scale of its activations
        "late": {"architecture": "standard", "d_in": 16, "d_sae": 32, "l1_coefficient": 0.01},
        "early": {
            "architecture": "topk",
            "d_in": 16,
            "d_sae": 24,
            "k": 4,
            "normalize_activations": "expected_average_only_in",
        },
    },
}  # fmt: skip


def test_the_local_part_trains_each_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    at_the_turn: dict[str, dict[str, torch.Tensor]] = {}
    original = JointStep.__call__

    def noting(self: JointStep, batch: torch.Tensor) -> Any:
        if not at_the_turn:
            for name, trainer in self.trainers.items():
                assert trainer.n_training_steps == STEPS // 2
                at_the_turn[name] = {key: value.clone() for key, value in trainer.sae.state_dict().items()}
        return original(self, batch)

    monkeypatch.setattr(JointStep, "__call__", noting)
    runner(tmp_path / "joint", **LOCAL_FIRST).run()
    monkeypatch.undo()
    # The same SAEs, their run over at the turn; TopK's normalisation is folded when it ends, so the other is compared.
    saes = {**LOCAL_FIRST["saes"]}
    alone = {"saes": saes, "mode": "independent", "objective": "local", "training_tokens": 32 * STEPS // 2}
    runner(tmp_path / "alone", **alone).run()
    for key, value in weights(tmp_path / "alone")["late"].items():
        torch.testing.assert_close(at_the_turn["late"][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [0, STEPS // 2 - 2])
def test_a_run_that_was_stopped_after_its_local_part_goes_on(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runner(tmp_path / "whole", **LOCAL_FIRST).run()
    interrupt_at(STEPS // 2 + step, monkeypatch)
    with pytest.raises(RunInterrupted):
        runner(tmp_path / "ours", **LOCAL_FIRST).run()
    monkeypatch.undo()
    runner(tmp_path / "ours", **LOCAL_FIRST).run()
    assert_same(tmp_path / "ours", tmp_path / "whole")


def test_a_run_that_was_stopped_in_its_local_part_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from e2e_sae_plugin.trainer import E2ESAETrainer

    runner(tmp_path / "whole", **LOCAL_FIRST).run()
    original = E2ESAETrainer.advance

    def interrupted(self: E2ESAETrainer) -> Any:
        if self.n_training_steps == 2 and self.runner_cfg.hook_name == HOOKS["early"]:
            signal.raise_signal(signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(E2ESAETrainer, "advance", interrupted)
    with pytest.raises(RunInterrupted):
        runner(tmp_path / "ours", **LOCAL_FIRST).run()
    monkeypatch.undo()
    runner(tmp_path / "ours", **LOCAL_FIRST).run()
    assert_same(tmp_path / "ours", tmp_path / "whole")


# The other modes.


def test_greedy_trains_one_after_the_other_among_frozen_ones(tmp_path: Path):
    saes = runner(tmp_path / "greedy", mode="greedy").run()
    assert list(saes.saes) == ["early", "late"]
    # The first is alone in its pass; the second is what a joint run with the first frozen trains.
    early = settings(tmp_path)["saes"]["early"]
    late = settings(tmp_path)["saes"]["late"]
    frozen = {"early": str(tmp_path / "greedy/out/early")}
    second = runner(tmp_path / "second", saes={"late": late}, hook_names={"late": HOOKS["late"]}, frozen=frozen).run()
    assert list(second.saes) == ["early", "late"]  # the frozen one is copied beside it
    for name, value in saes.saes["late"].state_dict().items():
        torch.testing.assert_close(second.saes["late"].state_dict()[name], value, rtol=0, atol=0)
    for name, value in saes.saes["early"].state_dict().items():
        torch.testing.assert_close(second.saes["early"].state_dict()[name], value, rtol=0, atol=0)
    alone = runner(
        tmp_path / "alone", mode="independent", saes={"early": early}, hook_names={"early": HOOKS["early"]}
    ).run()
    for name, value in saes.saes["early"].state_dict().items():
        torch.testing.assert_close(alone.saes["early"].state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_the_agreement_of_a_greedy_run_is_with_frozen_saes_behind(tmp_path: Path, whole: Path):
    late = {"late": str(whole / "out/late")}
    first = {"early": settings(tmp_path)["saes"]["early"], "first": settings(tmp_path)["saes"]["early"]}
    hooks = {"early": HOOKS["early"], "first": "blocks.0.hook_resid_pre"}
    saes = runner(tmp_path, mode="greedy", saes=first, hook_names=hooks, frozen=late, agreement=0.1).run()
    assert list(saes.saes) == ["first", "early", "late"]
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines if "losses/agreement_loss/late" in line} == {1, 2}
    # The second stage's SAE sits behind the frozen one: it has no reader, and trains without the term.
    saes = runner(
        tmp_path / "b", mode="greedy", agreement=0.1, frozen={"early": str(whole / "out/early")},
        saes={"first": first["first"], "last": first["first"]},
        hook_names={"first": "blocks.0.hook_resid_pre", "last": HOOKS["late"]},
    ).run()  # fmt: skip
    assert list(saes.saes) == ["first", "early", "last"]
    with pytest.raises(ValueError, match="no frozen SAE sits behind 'last', the first that is trained"):
        runner(
            tmp_path / "c", mode="greedy", agreement=0.1, frozen={"early": str(whole / "out/early")},
            saes={"last": first["first"]}, hook_names={"last": HOOKS["late"]},
        ).run()  # fmt: skip


def test_an_interrupted_greedy_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runner(tmp_path / "whole", mode="greedy").run()
    original = JointStep.__call__
    seen: list[str] = []

    def interrupted(self: JointStep, batch: torch.Tensor) -> Any:
        seen.append(next(iter(self.trainers)))
        if seen[-1] == "late" and self._leader.n_training_steps == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(JointStep, "__call__", interrupted)
    with pytest.raises(RunInterrupted):
        runner(tmp_path / "ours", mode="greedy").run()
    monkeypatch.undo()
    seen_before = len(seen)
    assert seen_before == STEPS + 5
    runner(tmp_path / "ours", mode="greedy").run()
    assert_same(tmp_path / "ours", tmp_path / "whole")


def test_independent_saes_are_those_of_runs_of_their_own(tmp_path: Path):
    from e2e_sae_plugin import E2ESAETrainingRunner

    saes = runner(tmp_path, mode="independent", objective="e2e").run()
    config = MultiE2ESAERunnerConfig.from_dict(settings(tmp_path / "alone", mode="independent", objective="e2e"))
    for name, member in config.members().items():
        E2ESAETrainingRunner(
            member.config, override_model=tiny_hooked_transformer(), override_dataset=token_dataset()
        ).run()
        alone = load_file(tmp_path / f"alone/out/{name}/sae_weights.safetensors")
        for key, value in load_file(tmp_path / f"out/{name}/sae_weights.safetensors").items():
            torch.testing.assert_close(value, alone[key], rtol=0, atol=0)
    assert list(saes.saes) == list(load_sae_set(tmp_path / "out").saes)


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "both"}, "mode must be one of"),
        ({"hook_names": {"late": "blocks.2.hook_resid_pre"}}, r"missing: \['early'\]"),
        ({"hook_names": "blocks.1.hook_resid_pre"}, "'late' and 'early' overlap: both sit at hook"),
        ({"hook_name": "x"}, "hook_name is for one SAE"),
        ({"agreement": -1}, "agreement must be a finite weight"),
        ({"mode": "independent", "agreement": 1.0}, "agreement=1.0 has no effect with mode='independent'"),
        ({"mode": "independent", "frozen": {"x": "y"}}, "frozen=.* has no effect with mode='independent'"),
        ({"objective": "local"}, "needs an objective with a spliced pass"),
        ({"objective": {"kl": 0.5, "mse": 0.5, "balance_kl": True}}, "balance_kl"),
        ({"patience_evaluations": 2}, "patience_evaluations=2 is not supported"),
        ({"checkpoint_blocks": True}, "checkpoint_blocks=True is not supported"),
        ({"store_batch_size_prompts": 2}, "saes.early: architecture 'topk' needs all of a step's tokens at once"),
        ({"training_token": 3}, "Did you mean 'training_tokens'"),
        ({"frozen": {"late": "x"}}, r"\['late'\] are in saes, to be trained, and in frozen"),
        ({"push_to_hub": "a/b"}, "push_to_hub='a/b' is refused in a run of several SAEs"),
        ({"mode": "greedy", "agreement": 0.1}, "agreement=0.1 has no effect with mode='greedy'"),
        ({"saes": {}}, r"hook_names must have the names of saes|saes is empty"),
        ({"output_path": ""}, "output_path of several SAEs must name a folder"),
    ],
)
def test_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MultiE2ESAERunnerConfig.from_dict(settings(tmp_path, **changes))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("sweep", "b"), "'sweep' has the name of a file or folder of the run itself"),
        (("metrics.jsonl", "b"), "'metrics.jsonl' has the name of a file or folder"),
        (("Joint.csv", "b"), "'Joint.csv' has the name of a file or folder"),
        (("a", "A"), "'a' and 'A' would share a folder on some file systems"),
        ((1, "b"), "The SAE 1 must have a text for a name, got int: quote it in YAML"),
        (("a/b", "b"), "expected letters, digits"),
    ],
)
def test_names_that_cannot_be_folders(tmp_path: Path, names: tuple[Any, Any], message: str):
    one = {"architecture": "topk", "d_in": 16, "d_sae": 24, "k": 4}
    given = {"saes": dict.fromkeys(names, one), "hook_names": dict(zip(names, HOOKS.values(), strict=True))}
    with pytest.raises(ValueError, match=message):
        MultiE2ESAERunnerConfig.from_dict(settings(tmp_path, **given))


def test_what_does_not_fit_names_the_sae(tmp_path: Path):
    saes = settings(tmp_path)["saes"]
    bad = {**saes, "early": {**saes["early"], "k": "ten"}}
    with pytest.raises(ValueError, match=r"saes\.early: k in sae must be a whole number, got 'ten'"):
        MultiE2ESAERunnerConfig.from_dict(settings(tmp_path, saes=bad))
    with pytest.raises(ValueError, match=r"early: sae\.d_in=8 does not match 'blocks\.1\.hook_resid_pre'"):
        runner(tmp_path, saes={**saes, "early": {**saes["early"], "d_in": 8}}).run()


def test_one_sae_alone_is_no_joint_run(tmp_path: Path):
    one = {"saes": {"late": settings(tmp_path)["saes"]["late"]}, "hook_names": {"late": HOOKS["late"]}}
    with pytest.raises(ValueError, match="mode='joint' splices several SAEs together, and there is one alone"):
        MultiE2ESAERunnerConfig.from_dict(settings(tmp_path, **one))


def test_matryoshka_is_refused_by_name(tmp_path: Path):
    saes = settings(tmp_path)["saes"]
    saes["early"] = {
        "architecture": "matryoshka_batchtopk", "d_in": 16, "d_sae": 24, "k": 4, "matryoshka_widths": [8, 24],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"saes\.early: a Matryoshka SAE"):
        MultiE2ESAERunnerConfig.from_dict(settings(tmp_path, saes=saes))


def test_overlap_under_two_names_is_refused_before_training(tmp_path: Path):
    hooks = {"late": "blocks.0.hook_resid_post", "early": "blocks.1.hook_resid_pre"}
    with pytest.raises(ValueError, match="overlap: both sit at one place"):
        runner(tmp_path, hook_names=hooks, objective="e2e").run()


def test_an_agreement_that_nobody_reads_is_refused(tmp_path: Path, whole: Path):
    one = {"saes": {"last": settings(tmp_path)["saes"]["late"]}, "hook_names": {"last": HOOKS["late"]}}
    with pytest.raises(ValueError, match="no SAE reads what a trained one writes"):
        runner(tmp_path, **one, frozen={"early": str(whole / "out/early")}, agreement=1.0).run()


def test_a_frozen_sae_that_is_not_there_or_leaves_out_other_tokens(tmp_path: Path, whole: Path):
    one = {"saes": {"last": settings(tmp_path)["saes"]["late"]}, "hook_names": {"last": HOOKS["late"]}}
    with pytest.raises(ValueError, match=r"frozen\.early: .* holds several SAEs, early, late\. Name the folder"):
        runner(tmp_path, **one, frozen={"early": str(whole / "out")}).run()
    with pytest.raises(ValueError, match=r"frozen\.early: There is no folder"):
        runner(tmp_path, **one, frozen={"early": str(tmp_path / "nothing")}).run()
    with pytest.raises(ValueError, match=r"frozen\.early leaves out other tokens than this run"):
        runner(
            tmp_path,
            **one,
            frozen={"early": str(whole / "out/early")},
            seqpos_slice=[1, None],
            train_batch_size_tokens=28,
        ).run()


# The ways to say it.


def test_configs_of_saelens_and_the_file_say_the_same(tmp_path: Path):
    given = settings(tmp_path)
    saes = {**given["saes"], "late": StandardTrainingSAEConfig(d_in=16, d_sae=32, l1_coefficient=0.01)}
    ours = MultiE2ESAERunnerConfig(**{**given, "saes": saes})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    loaded = MultiE2ESAERunnerConfig.load(tmp_path / "run.yaml")
    for name, member in loaded.members().items():
        assert member.config.to_dict() == ours.members()[name].config.to_dict()
    again = MultiE2ESAERunnerConfig.from_dict(loaded.to_dict())
    assert again.to_dict() == loaded.to_dict()


@pytest.mark.slow
def test_the_command_line_trains_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    given = settings(
        Path(), model_name="e2e-sae-demo", dataset_path="e2e-sae-demo", context_size=32, train_batch_size_tokens=128,
        training_tokens=256, output_path="out", verbose=True,
        saes={
            "a": {"architecture": "topk", "d_in": 128, "d_sae": 64, "k": 4},
            "b": {"architecture": "topk", "d_in": 128, "d_sae": 64, "k": 4},
        },
        hook_names={"a": "blocks.1.hook_resid_pre", "b": "blocks.3.hook_resid_pre"},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    assert cli.main(["train", "--config", "run.yaml"]) == 0
    assert "| b | blocks.3.hook_resid_pre |" in capsys.readouterr().out
    assert list(load_sae_set(tmp_path / "out").saes) == ["a", "b"]
    assert cli.main(["train", "--config", "run.yaml", "--resume", "auto"]) == 0
    printed = capsys.readouterr()
    assert "This run is finished: its SAEs are in out." in printed.out + printed.err
    assert cli.main(["train", "--config", "run.yaml", "--resume", "somewhere"]) == 2
    assert "it takes no other flags; got --resume somewhere" in capsys.readouterr().err
    assert cli.main(["estimate", "--config", "run.yaml"]) == 2
    assert "names several SAEs (saes), and this is for a run with one" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_joint_prints_the_table_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number, name in enumerate("ab"):
        config: Any = MultiE2ESAERunnerConfig.from_dict(
            settings(
                tmp_path, mode="independent", objective="e2e", model_name="e2e-sae-demo", dataset_path="e2e-sae-demo",
                context_size=16, train_batch_size_tokens=64, training_tokens=64, output_path=str(tmp_path / "out"),
                saes={name: {"architecture": "topk", "d_in": 128, "d_sae": 64, "k": 4 + number}},
                hook_names={name: f"blocks.{1 + number}.hook_resid_pre"}, overwrite_output=True,
            )
        )  # fmt: skip
        MultiE2ESAETrainingRunner(config).run()
    ours = ["evaluate", str(tmp_path / "out"), "--tokens", "200"]
    assert cli.main([*ours, "--joint", "--output", str(tmp_path / "table.csv")]) == 0
    printed = capsys.readouterr().out
    assert "2 SAEs of e2e-sae-demo, on 192 tokens of e2e-sae-demo (evaluation)" in printed
    assert "| a | blocks.1.hook_resid_pre | 4.0 [4.0, 4.0] | 4.0 |" in printed
    assert "| b | blocks.2.hook_resid_pre | 5.0 [5.0, 5.0] | 9.0 |" in printed
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [float(row["L0 so far"]) for row in rows] == [4.0, 9.0]
    assert cli.main(ours) == 2
    assert "all in one pass (--joint)" in capsys.readouterr().err
    assert cli.main([*ours, "--joint", "--hook", "blocks.1.hook_resid_pre"]) == 2
    assert "--hook names one place, and has no meaning with --joint" in capsys.readouterr().err
