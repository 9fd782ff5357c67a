"""Each SAE of a sweep is the SAE that its config trains alone; one that fails leaves the others as they would be."""

from __future__ import annotations

import csv
import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import D_MODEL, runner_config, tiny_hooked_transformer, token_dataset
from marks import slow_except
from sae_lens import SAE
from safetensors.torch import load_file
from torch import Tensor

from e2e_sae_plugin import E2ESAETrainingRunner, SweepConfig, SweepKind, SweepRunner
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.step import SplicedStepTrainer
from e2e_sae_plugin.sweep import SweepFailed
from e2e_sae_plugin.sweep import runner as sweep_runner
from e2e_sae_plugin.sweep.config import SPARSITY_FIELD
from e2e_sae_plugin.sweep.member import MemberRunner
from e2e_sae_plugin.trainer import E2ESAETrainer

STEPS = 6
KINDS: dict[str, dict[str, Any]] = {
    "local": {"objective": "local", "sparsities": [0.01]},
    "e2e": {"objective": "e2e", "sparsities": [0.01], "lr": 3e-3},
    "e2e+ds": {"objective": {"kl": 1, "beta": 0.01}, "sparsities": [0.02]},
}


def settings(folder: Path, kinds: dict[str, Any] | None = None, **base: Any) -> dict[str, Any]:
    """Steps of 4 sequences in 2 micro-batches; the end's evaluation and one in the middle."""
    own = {name: base.pop(name) for name in ("seeds", "hook_names", "checkpoint_path") if name in base}
    return {
        "base": {
            "model_name": "tiny",
            "hook_name": "blocks.1.hook_resid_pre",
            "dataset_path": "tiny",
            "context_size": 8,
            "train_batch_size_tokens": 32,
            "store_batch_size_prompts": 2,
            "training_tokens": 32 * STEPS,
            "lr": 1e-2,
            "n_eval_batches": 1,
            "n_batches_for_norm_estimate": 2,
            "checkpoint_every_minutes": None,
            "logger": {"log_to_wandb": False, "wandb_log_frequency": 1, "eval_every_n_wandb_logs": 3},
            "verbose": False,
            "b_dec_init_method": "zeros",
            **base,
            "sae": {"architecture": "standard", "d_in": D_MODEL, "d_sae": 32, **base.get("sae", {})},
        },
        "kinds": KINDS if kinds is None else kinds,
        "output_path": str(folder / "sweep"),
        **own,
    }


def sweep(
    folder: Path, kinds: dict[str, Any] | None = None, *, part: tuple[int, int] = (1, 1), data: Any = None,
    model: Any = None, **base: Any,
) -> SweepRunner:  # fmt: skip
    return SweepRunner(
        SweepConfig.from_dict(settings(folder, kinds, **base)),
        override_model=tiny_hooked_transformer() if model is None else model,
        override_dataset=token_dataset() if data is None else data,
        part=part,
    )


def train_alone(folder: Path, kinds: dict[str, Any] | None = None, **base: Any) -> dict[str, Path]:
    """The same SAEs, one run after the other."""
    found: dict[str, Path] = {}
    for name, member in SweepConfig.from_dict(settings(folder, kinds, **base)).members().items():
        E2ESAETrainingRunner(
            member.config, override_model=tiny_hooked_transformer(), override_dataset=token_dataset()
        ).run()
        found[name] = Path(str(member.config.output_path))
    return found


def assert_same_sae(ours: Path, theirs: Path) -> None:
    for name in ("sae_weights.safetensors", "sparsity.safetensors", "metrics.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), f"{ours.name}: {name} differs"
    our_config, their_config = (json.loads((path / "cfg.json").read_text()) for path in (ours, theirs))
    for config in (our_config, their_config):
        for name in ("kind", "sparsity"):  # what a sweep adds
            config["metadata"].pop(name, None)
    assert our_config == their_config


def assert_same_sweep(ours: Path, theirs: Path, n: int) -> None:
    """`n` SAEs of two sweeps' folders, and the tables."""
    names = sorted(path.parent.name for path in (theirs / "sweep").glob("*/cfg.json"))
    assert len(names) == n
    for name in names:
        assert_same_sae(ours / "sweep" / name, theirs / "sweep" / name)
    assert (ours / "sweep/sweep.csv").read_text() == (theirs / "sweep/sweep.csv").read_text()


def assert_all_trained(saes: dict[str, Any]) -> None:
    assert [name for name, sae in saes.items() if sae is None] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of `KINDS` that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    sweep(folder).run()
    return folder


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "sweep/sweep.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def break_at(monkeypatch: pytest.MonkeyPatch, name: str, step: int, error: Exception | None = None) -> None:
    """From that step on (counted from 0), one SAE of a sweep has a loss that is not finite, or raises `error`."""
    original = SplicedStepTrainer.sae_forward

    def broken(self: SplicedStepTrainer, sae_in: Tensor) -> Any:
        if Path(str(self.runner_cfg.output_path)).name == name and self.n_training_steps >= step:
            if error is not None:
                raise error
            sae_in = sae_in * float("nan")
        return original(self, sae_in)

    monkeypatch.setattr(SplicedStepTrainer, "sae_forward", broken)


# The same SAE as alone.


@pytest.mark.parametrize("architecture", slow_except(["standard", "topk", "batchtopk", "jumprelu"], "batchtopk"))
def test_each_sae_is_the_one_that_is_trained_alone_to_the_bit(architecture: str, tmp_path: Path):
    sparsity = 4 if SPARSITY_FIELD[architecture] == "k" else 0.01
    kinds = {name: {**kind, "sparsities": [sparsity]} for name, kind in KINDS.items()}
    base: dict[str, Any] = {
        "sae": {"architecture": architecture, "normalize_activations": "expected_average_only_in"},
        "b_dec_init_method": "mean",
        "dead_feature_window": 2,
    }
    saes = sweep(tmp_path, kinds, **base).run()
    alone = train_alone(tmp_path / "alone", kinds, **base)
    assert list(saes) == list(alone) and len(saes) == 3  # noqa: PT018
    weights: list[Tensor] = []
    for name, path in alone.items():
        assert_same_sae(tmp_path / "sweep" / name, path)
        sae = saes[name]
        assert sae is not None
        assert all(
            value.equal(sae.state_dict()[key]) for key, value in load_file(path / "sae_weights.safetensors").items()
        )
        weights.append(sae.W_dec.detach())
    assert not any(weights[i].equal(weights[j]) for i, j in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.slow
def test_kinds_at_different_places_of_the_stream_and_hooks_inside_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One kind estimates on 2 + 2 batches before its first step, one on 2, one on none; one stops early."""
    kinds: dict[str, Any] = {
        "both": {**KINDS["e2e+ds"], "b_dec_init_method": "mean", "sae": {"normalize_activations": "covariance_whitening"}},
        "mean": {**KINDS["local"], "b_dec_init_method": "mean", "patience_evaluations": 1, "lr": 1e-9},
        "none": KINDS["e2e"],
        "topk": {"objective": "e2e", "sparsities": [4], "local_first": 0.5, "sae": {"architecture": "topk"}},
    }  # fmt: skip
    kinds["mean"]["objective"] = "e2e"
    base: dict[str, Any] = {"hook_names": ["blocks.1.hook_mlp_out", "blocks.1.hook_resid_pre"]}
    runner = sweep(tmp_path, kinds, **base)
    places: set[int] = set()
    original = MemberRunner.attempt

    def note(self: MemberRunner, action: Any) -> Any:
        result = original(self, action)
        places.add(self.place)
        return result

    monkeypatch.setattr(MemberRunner, "attempt", note)
    saes = runner.run()
    monkeypatch.undo()
    assert max(places) == STEPS + 4
    alone = train_alone(tmp_path / "alone", kinds, **base)
    assert list(saes) == list(alone)
    assert len(alone) == 4 * 2
    for name, path in alone.items():
        assert_same_sae(tmp_path / "sweep" / name, path)


def test_there_is_one_clean_pass_per_micro_batch_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Any] = []
    original = sweep_runner.SharedCleanPasses

    def note(*args: Any, **settings: Any) -> Any:
        made.append(original(*args, **settings))
        return made[-1]

    monkeypatch.setattr(sweep_runner, "SharedCleanPasses", note)
    model, entered = tiny_hooked_transformer(), []
    model.blocks[0].register_forward_pre_hook(lambda *_: entered.append(1))  # spliced passes begin after it
    runner = sweep(tmp_path, model=model, n_eval_batches=0, seeds=[0, 1])
    in_rounds = SweepRunner._in_rounds

    def counted(self: SweepRunner, *args: Any) -> None:
        entered.clear()
        in_rounds(self, *args)

    monkeypatch.setattr(SweepRunner, "_in_rounds", counted)
    assert len(runner.run()) == 6
    assert made[0].n_passes == len(entered) == 2 * STEPS


def test_the_batches_that_all_have_read_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also those that an SAE that failed, or stopped early, has not read."""
    kept: list[int] = []
    forget = sweep_runner.SharedBatches.forget_what_all_have_read

    def note(self: Any) -> None:
        forget(self)
        kept.append(len(self._kept))

    monkeypatch.setattr(sweep_runner.SharedBatches, "forget_what_all_have_read", note)
    break_at(monkeypatch, "e2e-0.01-seed42", 1)
    assert sweep(tmp_path, max_skipped_steps=1).run()["e2e-0.01-seed42"] is None
    assert kept == [0] * STEPS


def test_the_table_and_the_metadata_say_what_is_what(tmp_path: Path):
    runner = sweep(tmp_path, seeds=[3])
    runner.run()
    rows = table(tmp_path)
    assert list(rows) == list(runner.cfg.members())
    row = rows["e2e+ds-0.02-seed3"]
    assert (row["kind"], row["sparsity"], row["seed"], row["status"]) == ("e2e+ds", "0.02", "3", "finished")
    assert row["hook_name"] == "blocks.1.hook_resid_pre"
    last = json.loads((tmp_path / "sweep/e2e+ds-0.02-seed3/metrics.jsonl").read_text().splitlines()[-1])
    for column in ("ce_loss_increase", "held_out_kl", "held_out_l0", "held_out_explained_variance"):
        assert float(row[column]) == last[f"metrics/{column}"]
    metadata = SAE.load_from_disk(str(tmp_path / "sweep/e2e+ds-0.02-seed3")).cfg.metadata
    assert (metadata.kind, metadata.sparsity, metadata.seed) == ("e2e+ds", 0.02, 3)


def test_the_bar_and_the_messages_are_as_quiet_as_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    kinds = {"local": {"objective": "local", "sparsities": [0.01]}}
    sweep(tmp_path, kinds).run()
    assert "Sweep" not in capsys.readouterr().err
    sweep(tmp_path / "loud", kinds, verbose=True).run()
    assert "Sweep" in capsys.readouterr().err


# One that fails.


HOW = ("a rate that diverges", "not finite in the middle", "an error of its own")


@pytest.mark.parametrize("how", slow_except(HOW, "an error of its own"))
def test_an_sae_that_fails_leaves_the_others_as_they_would_be(
    how: str, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    bad = {"bad": {"objective": "e2e", "sparsities": [0.03], "max_skipped_steps": 2}}
    if how == "a rate that diverges":
        bad["bad"] |= {"lr": 1e30, "max_grad_norm": None}
    else:
        break_at(monkeypatch, "bad-0.03-seed42", 2, RuntimeError("out of luck") if "own" in how else None)
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        saes = sweep(tmp_path, {**bad, **KINDS}).run()
    assert [name for name, sae in saes.items() if sae is None] == ["bad-0.03-seed42"]
    assert "bad-0.03-seed42 has failed and is left out from here on: " in caplog.text
    for path in (whole / "sweep").glob("*/cfg.json"):
        assert_same_sae(tmp_path / "sweep" / path.parent.name, path.parent)
    failure = json.loads((tmp_path / "sweep/bad-0.03-seed42/failed.json").read_text())
    if how == "an error of its own":
        assert failure == {"error": "RuntimeError: out of luck", "step": 2}
    else:
        assert failure["error"].startswith("NonFiniteError: 2 steps in a row (max_skipped_steps)")
        assert failure["step"] < STEPS
    assert not (tmp_path / "sweep/bad-0.03-seed42/cfg.json").exists()
    rows = table(tmp_path)
    assert {name: row["status"] for name, row in rows.items()} == {
        name: "failed" if sae is None else "finished" for name, sae in saes.items()
    }
    assert rows["bad-0.03-seed42"]["held_out_kl"] == ""


def test_one_that_has_failed_is_tried_again_and_the_others_are_left_alone(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    break_at(monkeypatch, "local-0.01-seed42", 3, RuntimeError("out of memory"))
    assert sweep(tmp_path).run()["local-0.01-seed42"] is None
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/sae_weights.safetensors")}
    assert len(before) == 2
    assert_all_trained(sweep(tmp_path).run())
    assert_same_sweep(tmp_path, whole, 3)
    assert not (tmp_path / "sweep/local-0.01-seed42/failed.json").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_one_that_fails_before_its_first_step_or_at_its_end_is_a_failure_like_any_other(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    for method in ("begin", "end"):
        original = getattr(E2ESAETrainer, method)

        def fail(self: E2ESAETrainer, original: Any = original) -> Any:
            if "e2e-0.01" in str(self.runner_cfg.output_path):
                raise RuntimeError("not today")
            return original(self)

        monkeypatch.setattr(E2ESAETrainer, method, fail)
        saes = sweep(tmp_path / method).run()
        monkeypatch.undo()
        assert [name for name, sae in saes.items() if sae is None] == ["e2e-0.01-seed42"]
        assert table(tmp_path / method)["e2e-0.01-seed42"]["status"] == "failed"
        assert_same_sae(tmp_path / method / "sweep/local-0.01-seed42", whole / "sweep/local-0.01-seed42")


def test_when_all_fail_the_sweep_has_failed_and_says_why(tmp_path: Path):
    kinds = {name: {**kind, "lr": 1e30, "max_grad_norm": None, "max_skipped_steps": 1} for name, kind in KINDS.items()}
    runner = sweep(tmp_path, kinds)
    with pytest.raises(SweepFailed, match="All 3 SAEs of the sweep failed: NonFiniteError: 1 steps in a row"):
        runner.run()
    assert {row["status"] for row in table(tmp_path).values()} == {"failed"}
    with pytest.raises(SweepFailed):
        runner.run()  # tried again
    assert_all_trained(sweep(tmp_path / "healthy").run())


def test_a_full_disk_is_no_sae_s_failure(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The sweep stops with a checkpoint, and goes on when there is room."""
    original = E2ESAETrainingRunner.save_final_sae

    def full(self: E2ESAETrainingRunner, *args: Any) -> None:
        if "e2e-0.01" in str(self.cfg.output_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, *args)

    monkeypatch.setattr(E2ESAETrainingRunner, "save_final_sae", full)
    with pytest.raises(OSError, match="No space left on device"), caplog.at_level(logging.WARNING, "e2e_sae_plugin"):
        sweep(tmp_path).run()
    monkeypatch.undo()
    assert f"OSError. Saved {tmp_path / 'sweep-checkpoints/sweep' / str(STEPS - 1)}: run the sweep again" in caplog.text
    assert not list((tmp_path / "sweep").glob("*/failed.json"))
    steps: list[str] = []
    step = SplicedStepTrainer.step

    def note(self: SplicedStepTrainer, batch: Tensor) -> Any:
        steps.append(Path(str(self.runner_cfg.output_path)).name)
        return step(self, batch)

    monkeypatch.setattr(SplicedStepTrainer, "step", note)
    assert_all_trained(sweep(tmp_path).run())
    assert steps == ["e2e+ds-0.02-seed42"]  # the one whose turn would have come after it
    for path in (whole / "sweep").glob("*/cfg.json"):
        ours, theirs = tmp_path / "sweep" / path.parent.name, path.parent
        assert (ours / "sae_weights.safetensors").read_bytes() == (theirs / "sae_weights.safetensors").read_bytes()


def test_a_step_that_an_os_error_interrupts_is_not_lost(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch):
    break_at(monkeypatch, "e2e-0.01-seed42", 3, OSError("the driver"))
    with pytest.raises(OSError, match="the driver"):
        sweep(tmp_path).run()
    monkeypatch.undo()
    assert_all_trained(sweep(tmp_path).run())
    assert_same_sweep(tmp_path, whole, 3)


def test_data_that_cannot_be_read_any_further_stop_the_sweep_with_a_checkpoint(tmp_path: Path):
    rows = token_dataset(40)["tokens"]
    broken = [[*row[:-1], 999] if index == 20 else row for index, row in enumerate(rows)]
    with pytest.raises(ValueError, match="The dataset holds token id 999"):
        sweep(tmp_path, data=token_dataset(40).from_dict({"tokens": broken}), n_eval_batches=0).run()
    sweep(tmp_path, data=token_dataset(40), n_eval_batches=0).run()  # mended
    sweep(tmp_path / "whole", data=token_dataset(40), n_eval_batches=0).run()
    assert_same_sweep(tmp_path, tmp_path / "whole", 3)
    assert json.loads((tmp_path / "sweep-checkpoints/sweep/5/sweep_state.json").read_text())["round"] == 5


# Configs.


def refused(tmp_path: Path, message: str, change: dict[str, Any] | None = None, **base: Any) -> None:
    given = settings(tmp_path, None, **base)
    with pytest.raises(ValueError, match=message):
        SweepConfig.from_dict({**given, **(change or {})})


def test_names_and_order_of_the_members(tmp_path: Path):
    kinds = {"a": {"objective": "local", "sparsities": ["1e-5", 2, 1e6]}, "b+c.d_e": KINDS["e2e"]}
    config = SweepConfig.from_dict(settings(tmp_path, kinds, seeds=[1, 0]))
    assert list(config.members()) == [
        f"{name}-seed{seed}" for seed in (1, 0) for name in ("a-1e-05", "a-2", "a-1e+06", "b+c.d_e-0.01")
    ]
    member = config.members()["a-1e-05-seed0"]
    assert (member.kind, member.sparsity, member.seed, member.hook_name) == ("a", 1e-5, 0, "blocks.1.hook_resid_pre")
    assert member.config.sae.l1_coefficient == 1e-5
    assert member.config.output_path == str(tmp_path / "sweep/a-1e-05-seed0")
    assert member.config.checkpoint_path is None
    hooks = ["blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre"]
    config = SweepConfig.from_dict(settings(tmp_path, {"b": KINDS["e2e"]}, hook_names=hooks))
    assert list(config.members()) == [f"{hook}-b-0.01-seed42" for hook in hooks]
    assert [member.config.hook_name for member in config.members().values()] == hooks
    one_hook = SweepConfig.from_dict(settings(tmp_path, {"b": KINDS["e2e"]}, hook_names=hooks[1:]))
    assert [member.hook_name for member in one_hook.members().values()] == hooks[1:]
    assert list(one_hook.members()) == ["b-0.01-seed42"]


def test_a_kind_has_settings_of_its_own_and_the_base_stays_as_it_is(tmp_path: Path):
    kinds = {
        "topk": {"objective": "e2e", "sparsities": [4.0], "sae": {"architecture": "topk"}, "lr": "3e-4"},
        "l1": {"objective": {"kl": 1, "beta": "1e-4"}, "sparsities": ["3e-3"], "sae": {"l1_warm_up_steps": "2"}},
    }
    given = settings(tmp_path, kinds, lr="1e-3", checkpoint_every_minutes="5e-1")
    members = SweepConfig.from_dict(given).members()
    topk, l1 = (member.config for member in members.values())
    assert (topk.sae.architecture(), topk.sae.k, type(topk.sae.k), topk.lr) == ("topk", 4, int, 3e-4)
    assert (l1.sae.l1_coefficient, l1.sae.l1_warm_up_steps, l1.lr, l1.objective.beta) == (3e-3, 2, 1e-3, 1e-4)
    assert SweepConfig.from_dict(given).checkpoint_every_minutes == 0.5
    assert given == settings(tmp_path, kinds, lr="1e-3", checkpoint_every_minutes="5e-1")


@pytest.mark.parametrize(("architecture", "field"), SPARSITY_FIELD.items())
def test_what_sparsities_mean_for_each_architecture(architecture: str, field: str, tmp_path: Path):
    sae: dict[str, Any] = {"architecture": architecture}
    sae |= {"matryoshka_widths": [8, 32]} if architecture == "matryoshka_batchtopk" else {}
    sae |= {"decoder_init_norm": 1.0} if architecture == "matching_pursuit" else {}
    config = SweepConfig.from_dict(settings(tmp_path, {"x": {"objective": "e2e", "sparsities": [3]}}, sae=sae))
    assert getattr(config.members()["x-3-seed42"].config.sae, field) == 3


def test_the_base_may_be_a_config(tmp_path: Path):
    base = runner_config(output_path=str(tmp_path / "unused"), checkpoint_path=str(tmp_path / "unused"))
    config = SweepConfig(
        base, {"e2e": SweepKind(Objective.e2e(), (0.1, 0.2), {"lr": 0.5})}, tmp_path / "sweep", seeds=(1,)
    )
    assert [member.config.lr for member in config.members().values()] == [0.5, 0.5]
    assert config.members()["e2e-0.2-seed1"].config.sae.l1_coefficient == 0.2
    assert config.checkpoint_path == str(tmp_path / "sweep-checkpoints")
    assert config.checkpoint_every_minutes == 15.0


def test_where_checkpoints_go(tmp_path: Path):
    given = settings(tmp_path)
    assert SweepConfig.from_dict({**given, "output_path": "a/b/"}).checkpoint_path == "a/b-checkpoints"
    assert SweepConfig.from_dict({**given, "checkpoint_path": None}).checkpoint_path is None
    sweep(tmp_path, {"e2e": KINDS["e2e"]}, checkpoint_path=None, checkpoint_every_minutes=1e-9).run()
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": {}}, "Unknown key 'kind' in the sweep. Did you mean 'kinds'?"),
        ({"kinds": {}}, "needs at least one kind"),
        ({"kinds": ["local"]}, "kinds of the sweep must be a mapping"),
        ({"base": "x.yaml"}, "base of the sweep must be a mapping"),
        ({"output_path": ""}, "output_path of a sweep must name a folder, got ''"),
        ({"output_path": None}, "output_path of a sweep must name a folder, got None"),
        ({"checkpoint_path": 3}, "checkpoint_path of a sweep must name a folder, got 3"),
        ({"seeds": [1, 1]}, r"seeds of a sweep must be a list without repetitions, got \[1, 1\]"),
        ({"seeds": 3}, "seeds of a sweep must be a list without repetitions, got 3"),
        ({"seeds": []}, "seeds of a sweep is empty"),
        ({"seeds": ["one"]}, "local-0.01-seedone: seed in config must be a whole number, got 'one'"),
        ({"seeds": [0, "0"]}, "Two SAEs of the sweep would be named 'local-0.01-seed0'"),
        ({"hook_names": []}, "hook_names of a sweep is empty"),
        ({"hook_names": "blocks.1.hook_resid_pre"}, "hook_names of a sweep must be a list"),
    ],
)  # fmt: skip
def test_sweeps_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path):
    refused(tmp_path, message, change)


@pytest.mark.parametrize("name", ["base", "kinds", "output_path"])
def test_a_part_that_is_missing_is_named(name: str, tmp_path: Path):
    given = settings(tmp_path)
    del given[name]
    with pytest.raises(ValueError, match=f"The sweep has no '{name}'"):
        SweepConfig.from_dict(given)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"sparsities": [0.1]}, "kinds.x must be a mapping with an objective and sparsities"),
        (["local"], "kinds.x must be a mapping with an objective and sparsities"),
        ({"objective": "e2e", "sparsities": []}, "kinds.x.sparsities must be a list without repetitions"),
        ({"objective": "e2e", "sparsities": 0.1}, "kinds.x.sparsities must be a list, got 0.1"),
        ({"objective": "e2e", "sparsities": "0.1"}, "kinds.x.sparsities must be a list, got '0.1'"),
        ({"objective": "e2e", "sparsities": [1, 1.0]}, "kinds.x.sparsities must be a list without repetitions"),
        ({"objective": "e2e", "sparsities": ["much"]}, "kinds.x.sparsities must be finite numbers, got 'much'"),
        ({"objective": "e2e", "sparsities": [True]}, "kinds.x.sparsities must be finite numbers, got True"),
        ({"objective": "e2e", "sparsities": ["inf"]}, "kinds.x.sparsities must be finite numbers, got inf"),
        ({"objective": "e2e", "sparsities": [1.0000001, 1.0000002]}, "Two SAEs of the sweep would be named 'x-1-seed42'"),
        ({"objective": "e3e", "sparsities": [1]}, "kinds.x: objective 'e3e' is not known"),
        ({"objective": {"kk": 1}, "sparsities": [1]}, "kinds.x: objective has an unknown key 'kk'"),
        ({"objective": {"kl": "much"}, "sparsities": [1]}, "kinds.x: kl in objective must be a number, got 'much'"),
        ({"objective": None, "sparsities": [1]}, "kinds.x.objective must be a name or a mapping, got None"),
        ({"objective": "e2e", "sparsities": [1], "lrr": 1}, "Unknown key 'lrr' in kinds.x. Did you mean 'lr'?"),
        ({"objective": "e2e", "sparsities": [1], "context_size": 4}, "sets 'context_size', which all SAEs of a sweep share"),
        ({"objective": "e2e", "sparsities": [1], "seed": 4}, "sets 'seed', which all SAEs of a sweep share"),
        ({"objective": "e2e", "sparsities": [1], "lr": "fast"}, "x-1-seed42: lr in config must be a number, got 'fast'"),
        ({"objective": "e2e", "sparsities": [1], "sae": "topk"}, "kinds.x.sae must be a mapping, got 'topk'"),
        ({"objective": "e2e", "sparsities": [1], "sae": {"kk": 1}}, "x-1-seed42: Unknown key 'kk' in sae"),
        ({"objective": "e2e", "sparsities": [1], "sae": {"architecture": "topkk"}}, "'topkk' has no sparsity setting"),
        ({"objective": "e2e", "sparsities": [2.5], "sae": {"architecture": "topk"}}, "must be a whole number, got 2.5"),
    ],
)  # fmt: skip
def test_kinds_that_are_refused(kind: Any, message: str, tmp_path: Path):
    refused(tmp_path, message, {"kinds": {"x": kind}})


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b", "-a", "ä"])
def test_a_kind_whose_name_is_no_folder_name_is_refused(name: str, tmp_path: Path):
    refused(tmp_path, "names folders: expected letters", {"kinds": {name: KINDS["e2e"]}})


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"learning_rate": 1}, "Unknown key 'learning_rate' in base"),
        ({"lrr": 1}, "Unknown key 'lrr' in base. Did you mean 'lr'?"),
        ({"logger": {"log_to_wandb": True}}, "log_to_wandb=True is refused in a sweep"),
        ({"logger": "wandb"}, "base.logger must be a mapping, got 'wandb'"),
        ({"resume_from_checkpoint": "auto"}, "resume_from_checkpoint='auto' is refused in a sweep"),
        ({"adapter": "low_rank"}, "adapter='low_rank' is refused in a sweep"),
        ({"from_pretrained_path": "x"}, "from_pretrained_path='x' is refused in a sweep"),
        ({"n_checkpoints": 2}, "n_checkpoints=2 has no effect in a sweep"),
        ({"n_checkpoints": 5}, "n_checkpoints=5 has no effect in a sweep"),
        ({"keep_checkpoints": 5}, "keep_checkpoints=5 has no effect in a sweep"),
        ({"save_final_checkpoint": True}, "save_final_checkpoint=True has no effect in a sweep"),
        ({"checkpoint_every_minutes": 0}, "checkpoint_every_minutes must be a finite number above 0, or None"),
        ({"checkpoint_every_minutes": "often"}, "checkpoint_every_minutes in base must be a number, got 'often'"),
        ({"lr": -1}, "local-0.01-seed42: lr must be"),
        ({"training_tokens": 1}, "less than one step of train_batch_size_tokens"),
        ({"sae": {"architecture": "transcoder"}}, "'transcoder' has no sparsity setting that a sweep knows"),
    ],
)  # fmt: skip
def test_bases_that_are_refused(base: dict[str, Any], message: str, tmp_path: Path):
    refused(tmp_path, message, **base)


def test_without_a_word_about_it_nothing_goes_to_weights_and_biases(tmp_path: Path):
    given = settings(tmp_path)
    for logger in (None, {}, {"wandb_log_frequency": 5}):
        config = SweepConfig.from_dict({**given, "base": {**given["base"], "logger": logger}})
        assert not any(member.config.logger.log_to_wandb for member in config.members().values())
    assert config.members()["e2e-0.01-seed42"].config.logger.wandb_log_frequency == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a list", "must hold a mapping of settings, got list"),
        ("a: [", "is not valid YAML"),
        (None, "there is no file"),
    ],
)
def test_files_that_are_refused(content: str | None, message: str, tmp_path: Path):
    path = tmp_path / "sweep.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        SweepConfig.load(path)


@pytest.mark.parametrize("part", [(0, 1), (2, 1), (1, 5), (-1, 2)])
def test_parts_that_are_refused(part: tuple[int, int], tmp_path: Path):
    with pytest.raises(ValueError, match=r"part=\(" + str(part[0])):
        sweep(tmp_path, part=part)


def test_an_sae_that_does_not_fit_is_refused_before_anything_is_trained(tmp_path: Path):
    with pytest.raises(ValueError, match=r"sae\.d_in=16 does not match 'blocks\.1\.mlp\.hook_post'"):
        sweep(tmp_path, hook_names=["blocks.1.hook_resid_pre", "blocks.1.mlp.hook_post"]).run()
    assert not list((tmp_path / "sweep").glob("*/metrics.jsonl"))
    assert not list((tmp_path / "sweep").glob("*/*.json"))


# Folders.


@pytest.mark.slow
def test_another_run_where_an_sae_would_go_is_refused_and_can_be_replaced(tmp_path: Path):
    sweep(tmp_path).run()
    with pytest.raises(ValueError, match=r"of e2e-0\.01-seed42 holds another run, which would be overwritten") as no:
        sweep(tmp_path, {"e2e": {**KINDS["e2e"], "lr": 0.5}}).run()
    assert "lr: 0.003 -> 0.5" in str(no.value)
    assert "base.overwrite_output" in str(no.value)
    other = tiny_hooked_transformer()
    with torch.no_grad():
        other.W_E.mul_(1.1)
    with pytest.raises(ValueError, match="holds an SAE that was trained with other weights of the language model"):
        sweep(tmp_path, model=other).run()
    kinds = {"e2e": {**KINDS["e2e"], "lr": 0.02}}
    assert_all_trained(sweep(tmp_path, kinds, overwrite_output=True).run())
    alone = train_alone(tmp_path / "alone", kinds)
    assert_same_sae(tmp_path / "sweep/e2e-0.01-seed42", alone["e2e-0.01-seed42"])


def test_a_finished_sweep_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = sweep(tmp_path).run()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/*/*")}
    monkeypatch.setattr(SplicedStepTrainer, "step", None)
    again = sweep(tmp_path).run()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/*/*")} == before
    for name, sae in first.items():
        ours = again[name]
        assert sae is not None
        assert ours is not None
        assert ours.W_dec.equal(sae.W_dec)


@pytest.mark.slow
def test_a_grid_that_grows_trains_what_is_new_alone_and_from_the_beginning(tmp_path: Path):
    sweep(tmp_path).run()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/*/*")}
    kinds = {**KINDS, "e2e": {**KINDS["e2e"], "sparsities": [0.01, 0.04]}}
    assert len(sweep(tmp_path, kinds).run()) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    sweep(tmp_path / "whole", kinds).run()
    assert_same_sweep(tmp_path, tmp_path / "whole", 4)


def test_the_parts_of_a_sweep_give_what_one_process_gives(tmp_path: Path):
    sweep(tmp_path / "whole", seeds=[0, 1]).run()
    first, second = (sweep(tmp_path, seeds=[0, 1], part=(index, 2)).run() for index in (1, 2))
    assert list(first)[:2] == ["local-0.01-seed0", "e2e+ds-0.02-seed0"]
    assert first.keys().isdisjoint(second) and len(first) + len(second) == 6  # noqa: PT018
    assert_same_sweep(tmp_path, tmp_path / "whole", 6)


@pytest.mark.parametrize(
    ("base", "change", "name"),
    [
        ({"objective": "e2e"}, {}, "objective"),
        ({"seed": 3}, {"seeds": [0, 1]}, "seed"),
        (
            {"sae": {"architecture": "standard", "d_in": 16, "d_sae": 32, "l1_coefficient": 1.0}},
            {},
            "sae.l1_coefficient",
        ),
    ],
)
def test_what_the_grid_sets_replaces_the_base(
    base: dict[str, Any], change: dict[str, Any], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    given = settings(tmp_path)
    replaced = SweepConfig.from_dict({**given, "base": {**given["base"], **base}, **change})
    assert f"base.{name} is not used: the sweep sets it for each SAE." in caplog.text
    expected = SweepConfig.from_dict({**given, **change}).members()
    found = replaced.members()
    assert found.keys() == expected.keys()
    for key, member in expected.items():
        assert found[key].config.to_dict() == member.config.to_dict()


def test_the_file_of_a_single_run_is_a_base(tmp_path: Path):
    config = runner_config("topk").to_dict()
    cfg = SweepConfig.from_dict(
        {"base": config, "kinds": {"e2e": {"objective": "e2e", "sparsities": [2, 6]}}, "output_path": str(tmp_path)}
    )
    ks = {name: member.config.to_dict()["sae"]["k"] for name, member in cfg.members().items()}
    assert ks == {"e2e-2-seed42": 2, "e2e-6-seed42": 6}


@pytest.mark.parametrize("saved", [False, True])
def test_what_a_config_has_from_the_default_recipe_is_not_the_kinds(saved: bool, tmp_path: Path):
    config = runner_config("topk", objective=Objective.finetune())
    assert (config.local_first, config.lr_decay_steps) == (0.8, 2)
    base = config.to_dict() if saved else config
    kinds = {"local": SweepKind(Objective.local(), (2,)), "e2e": SweepKind(Objective.e2e(), (2,))}
    found = SweepConfig(base=base, kinds=kinds, output_path=tmp_path).members()
    assert len(found) == 2
    for member in found.values():
        assert (member.config.local_first, member.config.lr_decay_steps) == (0, 0)


def test_a_local_part_that_was_asked_for_is_every_kinds(tmp_path: Path):
    kinds = {"e2e": SweepKind(Objective.e2e(), (2,))}
    base = runner_config("topk", local_first=0.5)
    (member,) = SweepConfig(base=base, kinds=kinds, output_path=tmp_path).members().values()
    assert member.config.local_first == 0.5


def test_a_file_in_the_place_of_the_output_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    cfg = SweepConfig.from_dict({**settings(tmp_path), "output_path": str(tmp_path / "file")})
    with pytest.raises(ValueError, match=r"is a file\. Name a folder"):
        SweepRunner(cfg)
    assert (tmp_path / "file").read_text() == "mine"
