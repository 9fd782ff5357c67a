"""Whole runs with a sharded dictionary: checkpoints and the finished SAE are those of the whole, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers import runner_config
from ranked_runs import Run, launch, logs, signal_to
from sae_lens import SAE
from sae_lens.config import LoggingConfig
from safetensors.torch import load_file
from test_distributed import SETTINGS, difference
from test_distributed_runs import checkpoints, settings

from e2e_sae_plugin import E2ESAETrainingRunner
from e2e_sae_plugin.checkpoint import verify_checkpoint
from e2e_sae_plugin.checkpoint.folder import read_manifest
from e2e_sae_plugin.cost.estimate import estimate_run
from e2e_sae_plugin.distributed import Ranks
from e2e_sae_plugin.rank_checks import check_ranks

STOP = {3: partial(signal_to, 0, signal.SIGTERM), 6: partial(signal_to, 0, signal.SIGTERM)}


def _of_step(step: int) -> dict[int, Any]:
    return {step: STOP[step]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [("topk", [(2, True), (1, False), (4, True)]), ("batchtopk", [(4, False), (4, True), (2, True)])],
)
def test_a_run_goes_on_with_another_number_of_ranks_and_without_shards(
    architecture: str, sizes: list[tuple[int, bool]], tmp_path: Path
) -> None:
    """Stopped after steps 3 and 6; the files at the end are those of one process that nothing happened to."""
    special = {"keep_decoder_norms": architecture == "topk", "checkpoint_every_minutes": None}
    ((alone,),) = launch(1, [Run(architecture, settings(tmp_path / "alone", **special))], tmp_path / "alone")
    assert alone.error is None
    for (size, shards), stop in zip(sizes, (_of_step(3), _of_step(6), {}), strict=True):
        run = Run(architecture, settings(tmp_path, shard_dictionary=shards, **special), at_step=stop)
        ends = launch(size, [run], tmp_path)
        assert [(end.error, end.status) for (end,) in ends] == [(None, 143 if stop else None)] * size, logs(tmp_path)
        if stop:
            newest = max(checkpoints(tmp_path), key=lambda path: read_manifest(path)["n_training_steps"])
            verify_checkpoint(newest)
            assert read_manifest(newest)["n_training_steps"] == next(iter(stop)) + 1
    assert "Resumed from" in logs(tmp_path)["log0"]
    assert_saved_alike(tmp_path / "alone/out", tmp_path / "out")
    size = sizes[-1][0]
    again = launch(size, [Run(architecture, settings(tmp_path, shard_dictionary=True, **special))], tmp_path)
    assert [end.error for (end,) in again] == [None] * size
    assert logs(tmp_path)["log0"].count("This run is finished") == 1


def assert_saved_alike(one: Path, other: Path) -> None:
    """Finished SAEs: the same files, numbers, and what SAELens makes of them."""
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for name in ("sae_weights.safetensors", "sparsity.safetensors"):
        mine, theirs = load_file(one / name), load_file(other / name)
        assert mine.keys() == theirs.keys()
        assert difference(mine, theirs) < 1e-6
    configs = [json.loads((folder / "cfg.json").read_text()) for folder in (one, other)]
    for config in configs:
        assert config["metadata"].pop("l0") > 0
    assert configs[0] == configs[1]
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    outputs = [SAE.load_from_disk(folder)(x) for folder in (one, other)]
    assert torch.allclose(*outputs, atol=1e-5)


def test_the_checkpoint_is_that_of_the_whole(tmp_path: Path) -> None:
    """Every file of a milestone, the final checkpoint and what `run()` returns; one process and two shards."""
    special = {"n_checkpoints": 1, "save_final_checkpoint": True, "checkpoint_every_minutes": None}
    folders = [tmp_path / "alone", tmp_path / "shards"]
    for folder, size in zip(folders, (1, 2), strict=True):
        run = Run("jumprelu", settings(folder, shard_dictionary=size > 1, resume_from_checkpoint=None, **special))
        assert [end.error for (end,) in launch(size, [run], folder)] == [None] * size, logs(folder)
    assert logs(folders[1])["log1"].strip() == ""
    alone, shards = (checkpoints(folder) for folder in folders)
    assert [path.name for path in alone] == [path.name for path in shards]
    assert len(alone) == 2
    for one, other in zip(alone, shards, strict=True):
        verify_checkpoint(other)
        assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
        for path in one.glob("*.safetensors"):
            mine, theirs = load_file(path), load_file(other / path.name)
            assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
            numbers = [name for name in mine if not name.startswith("random.")]
            assert all(torch.allclose(mine[n].double(), theirs[n].double(), atol=1e-6) for n in numbers), path


@pytest.mark.slow
def test_shards_of_a_saved_sae_start_from_its_weights(tmp_path: Path) -> None:
    first = Run("standard", settings(tmp_path / "first", resume_from_checkpoint=None))
    assert launch(1, [first], tmp_path / "first")[0][0].error is None
    saved = {"from_pretrained_path": str(tmp_path / "first/out"), "resume_from_checkpoint": None}
    for size in (1, 2):
        folder = tmp_path / str(size)
        run = Run("standard", settings(folder, shard_dictionary=size > 1, **saved), perturbed=False)
        assert [end.error for (end,) in launch(size, [run], folder)] == [None] * size, logs(folder)
    assert_saved_alike(tmp_path / "1/out", tmp_path / "2/out")
    before, after = (load_file(tmp_path / where / "out/sae_weights.safetensors") for where in ("first", "2"))
    assert 1e-4 < difference(before, after) < 0.1


def be_in_the_way(path: Path, rank: int) -> None:
    """For `Run.at_step`: the weights cannot be saved there afterwards."""
    if rank == 0:
        (path / "sae_weights.safetensors/in the way").mkdir(parents=True)


@pytest.mark.slow
def test_an_sae_that_cannot_be_saved_leaves_a_checkpoint(tmp_path: Path) -> None:
    """To which every rank gives its part."""
    spoilt = {9: partial(be_in_the_way, tmp_path / "out")}
    ends = launch(2, [Run("topk", settings(tmp_path, shard_dictionary=True), at_step=spoilt)], tmp_path)
    assert (ends[0][0].error or "").startswith("OSError: The finished SAE could not be saved"), ends[0][0].error
    (checkpoint,) = checkpoints(tmp_path)
    verify_checkpoint(checkpoint)
    assert read_manifest(checkpoint)["n_training_steps"] == 10
    shutil.rmtree(tmp_path / "out/sae_weights.safetensors")
    ends = launch(2, [Run("topk", settings(tmp_path, shard_dictionary=True))], tmp_path)
    assert [end.error for (end,) in ends] == [None, None]
    SAE.load_from_disk(tmp_path / "out")


BYTES: dict[str, int] = {}


def count_bytes(_rank: int) -> None:
    """For `Run.at_step`: from here on, `BYTES` has what this rank hands to the others, by kind of message."""
    for name, handed in (("all_gather", 1), ("reduce_scatter", 1), ("all_reduce", 0)):
        original = getattr(torch.distributed, name)

        def counted(
            *args: Any, _name: str = name, _original: Any = original, _handed: int = handed, **named: Any
        ) -> Any:
            parts = args[_handed] if isinstance(args[_handed], list) else [args[_handed]]
            if (
                parts[0].is_floating_point() and parts[0].dtype == torch.float32
            ):  # fp64 are few numbers by way of the CPU
                BYTES[_name] = BYTES.get(_name, 0) + sum(part.nbytes for part in parts)
            return _original(*args, **named)

        setattr(torch.distributed, name, counted)
    BYTES.clear()


def report_bytes(rank: int) -> None:
    """For `Run.at_step`."""
    if rank == 0:
        sys.stdout.write(f"BYTES {json.dumps(BYTES)}\n")
        sys.stdout.flush()


@pytest.mark.slow
def test_the_ranks_send_what_the_documentation_says(tmp_path: Path) -> None:
    """Of 64 tokens of 16 dimensions in all: activations and gradients of 32 to all, reconstructions of 64, k of each."""
    quiet = {
        "n_eval_batches": 0,
        "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=100),
        "verbose": False,
    }
    of_shards = {**SETTINGS, **quiet, "shard_dictionary": True, "dead_feature_window": 1000}
    run = Run("topk", of_shards, at_step={5: count_bytes, 6: report_bytes})
    assert [end.error for (end,) in launch(2, [run], tmp_path)] == [None, None]
    found = re.search("BYTES (.*)", logs(tmp_path)["log0"])
    assert found is not None
    few = (
        2 + (32 + 4) + (16 + 1)
    )  # weighing the auxiliary loss; fired features, losses; b_dec, whether it has a gradient
    k, tokens = 4, 4 * 32 * 16
    assert json.loads(found[1]) == {
        "all_gather": 2 * tokens + 4 * 64 * k,
        "reduce_scatter": 2 * tokens,
        "all_reduce": 4 * few,
    }


def test_a_lost_rank_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """No other rank has its features, so none of the step at which it was lost can be written."""
    kill = {6: partial(signal_to, 1, signal.SIGKILL)}
    every_step = settings(tmp_path, shard_dictionary=True, checkpoint_every_minutes=1e-9)
    ends = launch(2, [Run("topk", every_step, at_step=kill)], tmp_path)
    assert ends[1] == []
    assert (ends[0][0].error or "").startswith("LostRankError")
    newest = max(checkpoints(tmp_path), key=lambda path: read_manifest(path)["n_training_steps"])
    assert read_manifest(newest)["n_training_steps"] == 6
    text = logs(tmp_path)["log0"]
    assert text.count("A rank of 2 was lost at step 6. No rank has all of the sharded dictionary") == 1
    assert f"set resume_from_checkpoint={str(newest.absolute())!r}" in text
    (end,) = launch(1, [Run("topk", settings(tmp_path, checkpoint_every_minutes=1e-9))], tmp_path)[0]
    assert end.error is None


@pytest.mark.slow
def test_a_run_that_is_not_finite_stops_on_all_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    diverging = settings(tmp_path, shard_dictionary=True, lr=1e30, max_grad_norm=None, max_skipped_steps=2)
    ends = launch(2, [Run("standard", {**diverging, "n_eval_batches": 0})], tmp_path)
    for (end,) in ends:
        assert (end.error or "").startswith("NonFiniteError: 2 steps in a row"), end.error
    (checkpoint,) = checkpoints(tmp_path)
    verify_checkpoint(checkpoint)
    assert logs(tmp_path)["log0"].count("Saved a checkpoint") == 1


def test_ranks_whose_features_do_not_divide_are_refused(tmp_path: Path) -> None:
    ends = launch(2, [Run("standard", {**SETTINGS, "shard_dictionary": True, "sae": {"d_sae": 33}})], tmp_path)
    for (end,) in ends:
        assert "d_sae=33 features between 2 ranks" in (end.error or "")
        assert "Nearest usable: 32 or 34." in (end.error or "")


def test_more_active_features_asked_for_than_a_rank_has_are_refused() -> None:
    sae = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 17}
    config = runner_config("jumprelu", sae, shard_dictionary=True)
    check_ranks(runner_config("jumprelu", sae), cast(Ranks, SimpleNamespace(size=2)))
    with pytest.raises(ValueError, match="target_l0=17 is more than the 16 features"):
        check_ranks(config, cast(Ranks, SimpleNamespace(size=2)))


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gated", {}, "cannot train architecture 'gated'. Use one of"),
        ("matryoshka_batchtopk", {}, "cannot train architecture 'matryoshka_batchtopk'"),
        ("abstopk", {}, "cannot train architecture 'abstopk'"),
        ("matching_pursuit", {}, "cannot train architecture 'matching_pursuit'"),
        ("standard", {"adapter": "low_rank"}, "is refused with adapter='low_rank'"),
        ("standard", {"patience_evaluations": 1, "n_eval_batches": 1}, "is refused with patience_evaluations=1"),
        ("topk", {"autocast": True}, "is refused with autocast=True"),
        ("topk", {"compile_sae": True}, "is refused with compile_sae=True"),
        (
            "standard",
            {"sae": {"normalize_activations": "layer_norm"}},
            "refused with sae.normalize_activations='layer_norm'",
        ),
        ("standard", {"sae": {"lp_norm": 0.5}}, r"refused with sae.lp_norm=0.5"),
    ],
)
def test_what_shards_cannot_do_is_refused_by_name(architecture: str, changes: dict[str, Any], message: str) -> None:
    runner_config(architecture, **changes)
    with pytest.raises(ValueError, match=f"shard_dictionary=True.*{message}"):
        runner_config(architecture, shard_dictionary=True, **changes)


def test_one_process_and_the_estimate_refuse_shards() -> None:
    with pytest.raises(ValueError, match="shard_dictionary=True has no effect: this is one process"):
        E2ESAETrainingRunner(runner_config(shard_dictionary=True))
    with pytest.raises(ValueError, match="shard_dictionary=True is not in the model of cost"):
        estimate_run(runner_config(shard_dictionary=True))
