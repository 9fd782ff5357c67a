"""From a run to the Hub: what a run has saved goes up, and nothing that happens there fails the run."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import runner_config, tiny_hooked_transformer, token_dataset
from hub_saes import REPO, texts_of
from hub_server import Fault, HubServer, online
from hub_server import hub_fixture as hub_fixture
from sae_lens import SAE

from e2e_sae_plugin import (
    E2ESAERunnerConfig,
    E2ESAETrainingRunner,
    FinetuneRunner,
    Objective,
    SweepConfig,
    SweepKind,
    finetune_config,
)
from e2e_sae_plugin.checkpoint.folder import DamagedCheckpointError
from e2e_sae_plugin.cli import main
from e2e_sae_plugin.hub import calls
from e2e_sae_plugin.hub.load import load_pretrained
from e2e_sae_plugin.hub.upload import push_to_hub

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PAUSES_SECONDS", (0.0, 0.0, 0.0))


def config_of(tmp_path: Path, architecture: str = "topk", **settings: Any) -> E2ESAERunnerConfig:
    settings = {"output_path": str(tmp_path / "out"), "n_eval_batches": 2, "push_to_hub": REPO, **settings}
    return runner_config(architecture, **settings)


def train(config: E2ESAERunnerConfig) -> SAE[Any]:
    runner = E2ESAETrainingRunner(config, override_dataset=token_dataset(), override_model=tiny_hooked_transformer())
    return runner.run()


def same(first: SAE[Any], second: SAE[Any]) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_finished_sae_goes_up(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(config_of(tmp_path, hub_private=True, verbose=True))
    on_disk = SAE.load_from_disk(tmp_path / "out")
    assert same(SAE.from_pretrained(REPO, HOOK), on_disk)
    assert hub.repositories[REPO].private
    files = hub.files(REPO)
    assert {f"{HOOK}/{name}" for name in ("sparsity.safetensors", "runner_cfg.json", "e2e_runner_cfg.json")} < set(
        files
    )
    held_out = json.loads(files[f"{HOOK}/held_out.json"])
    last = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert held_out["metrics/ce_loss_increase"] == last["metrics/ce_loss_increase"]
    assert f"{held_out['metrics/ce_loss_increase']:+.4f}" in files["README.md"].decode()
    assert "Pushed " in capsys.readouterr().out + capsys.readouterr().err


def test_branch_and_id(hub: HubServer, tmp_path: Path):
    train(config_of(tmp_path, hub_revision="dev", hub_sae_id="seed_0/topk"))
    assert same(load_pretrained(REPO, "seed_0/topk", revision="dev"), SAE.load_from_disk(tmp_path / "out"))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("normalisation", ["none", "expected_average_only_in"])
def test_checkpoints_go_up_as_finished_saes(hub: HubServer, tmp_path: Path, architecture: str, normalisation: str):
    settings = {"checkpoint_path": str(tmp_path / "checkpoints"), "n_checkpoints": 2, "hub_checkpoints": True}
    config = config_of(tmp_path, architecture, sae={"normalize_activations": normalisation}, **settings)
    train(config)
    steps = sorted({path.split("/")[2] for path in hub.files(REPO) if "/checkpoints/" in path}, key=int)
    assert len(steps) == 2
    final = SAE.from_pretrained(REPO, HOOK)
    for step in steps:
        sae = SAE.from_pretrained(REPO, f"{HOOK}/checkpoints/{step}")
        assert sae.cfg.normalize_activations == "none"
        assert sae.cfg.architecture() == final.cfg.architecture()
        assert not same(sae, final)
    assert len(hub.repositories[REPO].commits) == 2
    # A checkpoint of the last step, folded, is the finished SAE to the bit.
    whole = config_of(
        tmp_path, architecture, sae={"normalize_activations": normalisation}, n_checkpoints=0, push_to_hub=None,
        checkpoint_path=str(tmp_path / "last"), output_path=str(tmp_path / "out2"), checkpoint_every_minutes=1e-9,
    )  # fmt: skip
    train(whole)
    (run,) = (tmp_path / "last").iterdir()
    newest = max((path for path in run.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    push_to_hub({"rolling": newest}, REPO)
    pushed, saved = SAE.from_pretrained(REPO, "rolling"), SAE.load_from_disk(tmp_path / "out2")
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(pushed.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_a_damaged_checkpoint_does_not_go_up(hub: HubServer, tmp_path: Path):
    config = config_of(tmp_path, push_to_hub=None, checkpoint_path=str(tmp_path / "c"), n_checkpoints=1)
    train(config)
    (checkpoint,) = (path for run in (tmp_path / "c").iterdir() for path in run.iterdir() if path.name.isdigit())
    weights = checkpoint / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match="other bytes"):
        push_to_hub(checkpoint, REPO)
    assert hub.requests == []
    assert issubclass(DamagedCheckpointError, ValueError)


FAILURES = {
    "nobody is logged in": None,
    "a refusal": Fault("commit", 403, times=None, message="not with {token}"),
    "a failing Hub": Fault("commit", 500, times=None),
    "no connection": Fault("repo_info", "drop", times=None),
    "an answer that makes no sense": Fault("create_repo", 302, times=None),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_does_not_fail_with_the_upload(
    hub: HubServer, tmp_path: Path, failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    fault = FAILURES[failure]
    if fault is None:
        online(monkeypatch, hub, tmp_path / "nobody", token=None)
    else:
        hub.faults.append(fault)
    caplog.set_level(logging.INFO)
    sae = train(config_of(tmp_path, hub_private=True, hub_revision="dev"))
    assert isinstance(sae, SAE)
    assert hub.repositories == {}
    assert ("nobody is logged in" in caplog.text) == (fault is None)  # said at the start, too
    assert "hf_good" not in caplog.text
    # The command that the log gives does it.
    command = re.search(r"^  (e2e-sae push .*)$", caplog.text, re.MULTILINE)
    assert command is not None
    hub.faults.clear()
    online(monkeypatch, hub, tmp_path / "home2")
    assert main(shlex.split(command[1])[1:]) == 0
    assert same(load_pretrained(REPO, HOOK, revision="dev"), SAE.load_from_disk(tmp_path / "out"))
    assert hub.repositories[REPO].private


def test_a_finished_run_shares_what_it_could_not(hub: HubServer, tmp_path: Path):
    settings = {"checkpoint_path": str(tmp_path / "c"), "resume_from_checkpoint": "auto"}
    hub.faults.append(Fault("commit", 500, times=None))
    train(config_of(tmp_path, **settings))
    assert hub.repositories == {}
    hub.faults.clear()
    train(config_of(tmp_path, **settings))  # "this run is finished"
    assert f"{HOOK}/cfg.json" in hub.files(REPO)
    n = len(hub.repositories[REPO].commits)
    train(config_of(tmp_path, **settings))
    assert len(hub.repositories[REPO].commits) == n


def test_where_it_goes_may_change_when_a_run_is_resumed(hub: HubServer, tmp_path: Path):
    settings = {"checkpoint_path": str(tmp_path / "c"), "n_checkpoints": 1, "push_to_hub": None}
    train(config_of(tmp_path, **settings))
    (checkpoint,) = (path for run in (tmp_path / "c").iterdir() for path in run.iterdir() if path.name.isdigit())
    resumed = config_of(
        tmp_path, **{**settings, "push_to_hub": REPO, "resume_from_checkpoint": str(checkpoint)}, overwrite_output=True
    )
    train(resumed)
    assert f"{HOOK}/cfg.json" in hub.files(REPO)


@pytest.mark.slow
def test_a_fine_tuned_sae_goes_up_in_its_originals_form(hub: HubServer, tmp_path: Path):
    train(config_of(tmp_path))
    config = finetune_config(
        load_pretrained(REPO, HOOK), training_tokens=256, output_path=str(tmp_path / "tuned"), hook_name=HOOK,
        model_name=runner_config().model_name, dataset_path="unused", push_to_hub=REPO, hub_sae_id="tuned",
        context_size=8, store_batch_size_prompts=4, train_batch_size_tokens=64, n_eval_batches=2, checkpoint_path=None,
    )  # fmt: skip
    runner = FinetuneRunner(
        config, load_pretrained(REPO, HOOK), override_dataset=token_dataset(), override_model=tiny_hooked_transformer()
    )
    runner.run()
    with pytest.raises(ValueError, match="hub_checkpoints=True is refused in a fine-tune"):
        FinetuneRunner(
            dataclasses.replace(config, hub_checkpoints=True, n_checkpoints=1, checkpoint_path=str(tmp_path / "c")),
            load_pretrained(REPO, HOOK), override_dataset=token_dataset(), override_model=tiny_hooked_transformer(),
        )  # fmt: skip
    assert same(SAE.from_pretrained(REPO, "tuned"), SAE.load_from_disk(tmp_path / "tuned"))
    assert (tmp_path / "tuned/finetune.json").exists() or any((tmp_path / "tuned").glob("*.md"))  # reported before


REFUSED = {
    "no repository's name": ({"push_to_hub": "saes"}, r"push_to_hub='saes' must be OWNER/NAME"),
    "no output": ({"output_path": None}, "needs an output_path"),
    "an id of no folder": ({"hub_sae_id": "../x"}, "hub_sae_id: '../x' cannot be"),
    "an empty branch": ({"hub_revision": ""}, "hub_revision='' is no name for a branch"),
    "no checkpoints": ({"hub_checkpoints": True}, "there are none"),
    "private without a push": ({"push_to_hub": None, "hub_private": True}, "no effect without push_to_hub"),
    "a branch without a push": ({"push_to_hub": None, "hub_revision": "dev"}, "no effect without push_to_hub"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(tmp_path: Path, case: str):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **settings)


def test_a_sweep_is_shared_in_one_commit_afterwards(tmp_path: Path):
    kinds = {"e2e": SweepKind(objective=Objective.e2e(), sparsities=(4,))}
    base = config_of(tmp_path)
    with pytest.raises(ValueError, match=r"base.push_to_hub.*e2e-sae push OWNER/NAME FOLDER"):
        SweepConfig(base=base, kinds=kinds, output_path=str(tmp_path / "sweep"))


def test_nothing_of_the_token_hangs_on_an_error(hub: HubServer):
    hub.faults.append(Fault("repo_info", 400, times=None, message="{token}"))
    with pytest.raises(OSError, match="refused") as caught:
        load_pretrained(REPO, HOOK)
    assert not any("hf_good" in text for text in texts_of(caught.value))
