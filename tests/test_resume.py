"""A run that goes on from a checkpoint is the run that was never stopped, to the bit."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import (
    BUILT_IN_ARCHITECTURES,
    proxy,
    runner_config,
    tiny_gpt2_model,
    tiny_hooked_transformer,
    tiny_tokenizer,
    token_dataset,
)
from marks import slow_except
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file

from e2e_sae_plugin import E2ESAETrainingRunner, Objective, seekable_store
from e2e_sae_plugin.checkpoint import DamagedCheckpointError, read_manifest, verify_checkpoint
from e2e_sae_plugin.checkpoint.resume import config_differences
from e2e_sae_plugin.token_stream import TokenStream

# Every step but the first is a place to go on from.
EVERY_STEP: dict[str, Any] = {"checkpoint_every_minutes": 1e-9, "keep_checkpoints": 1000, "save_final_checkpoint": True}


def text_rows(n: int = 200) -> list[dict[str, str]]:
    """Texts of 0 to 40 tokens, some longer than a sequence, some beginning with the separator."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 41, (n,), generator=generator).tolist()
    return [
        {"text": " ".join(f"t{i}" for i in torch.randint(1, 60, (m,), generator=generator).tolist())} for m in lengths
    ]


def run(folder: Path, dataset: Any = None, model: Any = None, *, name: str = "out", **settings: Any) -> Any:
    folders = {"output_path": str(folder / name), "checkpoint_path": str(folder / "checkpoints")}
    config = runner_config(
        **{**folders, **EVERY_STEP, "training_tokens": 32 * 6, "n_eval_batches": 1, "lr": 1e-2, **settings}
    )
    runner = E2ESAETrainingRunner(
        config,
        override_dataset=token_dataset() if dataset is None else dataset,
        override_model=tiny_hooked_transformer() if model is None else model,
    )
    runner.run()
    return runner


def checkpoints(runner: Any) -> list[Path]:
    """The resumable ones, the oldest first."""
    found = [path for path, manifest in runner.run_folder.checkpoints() if manifest["kind"] != "final"]
    return sorted(found, key=lambda path: int(path.name))


def end_state(runner: Any, name: str = "out") -> dict[str, Any]:
    """All that a finished run leaves, as bytes or exact tensors."""
    output = Path(runner.cfg.output_path)
    (final,) = [path for path, manifest in runner.run_folder.checkpoints() if manifest["kind"] == "final"]
    state = json.loads((final / "trainer_state.json").read_text())
    del state["data"]["rows_state"]  # `datasets` has several ways to write the same place
    del state["random"]["python"]  # beartype draws from it, and checks what the writing of a checkpoint calls too
    return {
        "sae": (output / "sae_weights.safetensors").read_bytes(),
        "sparsity": (output / "sparsity.safetensors").read_bytes(),
        "config": json.loads((output / "cfg.json").read_text()),
        "metrics": (output / "metrics.jsonl").read_text(),
        "optimizer": (final / "optimizer.safetensors").read_bytes(),
        "statistics": (final / "trainer_state.safetensors").read_bytes(),
        "state": {key: value for key, value in state.items() if key != "metrics"},
    }


def assert_same_run(resumed: Any, whole: dict[str, Any]) -> None:
    ours = end_state(resumed)
    for key, value in whole.items():
        assert ours[key] == value, f"{key} differs"


def resume_each(tmp_path: Path, whole_runner: Any, dataset: Any = None, model: Any = None, **settings: Any) -> int:
    """Resume from every checkpoint, each in a copy of the folders as they were when the run was killed there."""
    whole = end_state(whole_runner)
    chosen = checkpoints(whole_runner)
    assert len(chosen) >= 5
    for checkpoint in chosen:
        folder = tmp_path / f"resumed-{checkpoint.name}"
        ours = folder / "checkpoints" / checkpoint.parent.name / checkpoint.name
        shutil.copytree(checkpoint, ours)
        shutil.copytree(whole_runner.cfg.output_path, folder / "out")  # its log reaches beyond the checkpoint
        (folder / "out/cfg.json").unlink()  # it was killed before its end
        torch.manual_seed(999)  # the process that resumes has another random state
        resumed = run(folder, dataset, model, resume_from_checkpoint=str(ours), **settings)
        assert resumed.run_folder.path == ours.parent
        assert_same_run(resumed, whole)
    return len(chosen)


def test_random_states_are_those_of_the_checkpoint(tmp_path: Path):
    whole = run(tmp_path)
    trainer = whole._build_trainer()
    checkpoint = checkpoints(whole)[2]
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["random"]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    trainer.load_trainer_state(checkpoint)
    assert json.loads(json.dumps(random.getstate())) == saved["python"]
    assert np.random.get_state()[1].tolist() == saved["numpy"][1]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    assert torch.get_rng_state().equal(load_file(checkpoint / "trainer_state.safetensors")["random.torch"])


# Every architecture, schedule and normalisation.


@pytest.mark.parametrize("architecture", slow_except(BUILT_IN_ARCHITECTURES, "standard", "batchtopk"))
def test_every_architecture_resumes_to_the_bit(architecture: str, tmp_path: Path):
    settings: dict[str, Any] = {
        "architecture": architecture,
        "objective": Objective.e2e_downstream(0.01),
        "dead_feature_window": 2,
    }
    assert resume_each(tmp_path, run(tmp_path, **settings), **settings) >= 5


SCALED = {"sae": {"normalize_activations": "expected_average_only_in"}, "b_dec_init_method": "mean"}


@pytest.mark.parametrize(
    "settings",
    slow_except(
        [
            {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 2, "lr_end": 1e-4},
            {"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 2},
            {"lr_decay_steps": 3, "sae": {"l1_warm_up_steps": 4}},
            {"architecture": "topk", "local_first": 0.5},
            {"architecture": "matryoshka_batchtopk", "objective": Objective(matryoshka_levels="sampled")},
            {"feature_sampling_window": 2, "max_grad_norm": None},
            {"objective": Objective.local()},
            {"exclude_special_tokens": [5, 6, 7]},
            {"n_checkpoints": 2},
            SCALED,
            {"sae": {"normalize_activations": "covariance_whitening"}},
            {"sae": {"dtype": "bfloat16"}},
            {"objective": Objective.finetune(), "keep_decoder_norms": True, "frozen_parameters": ("b_dec",)},
        ],
        SCALED,
        {"architecture": "topk", "local_first": 0.5},
    ),
    ids=str,
)
def test_every_schedule_and_normalisation_resumes_to_the_bit(settings: dict[str, Any], tmp_path: Path):
    resume_each(tmp_path, run(tmp_path, **settings), **settings)


# Every kind of data.


def jsonl(folder: Path, rows: list[dict[str, Any]], n_files: int = 3) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.jsonl" for index in range(n_files)]
    for index, path in enumerate(paths):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[index::n_files]))
    return [str(path) for path in paths]


def text_dataset(kind: str, folder: Path) -> Any:
    rows = text_rows()
    if kind == "map":
        return Dataset.from_list(rows)
    if kind == "map, shuffled":
        return Dataset.from_list(rows).shuffle(seed=1)
    if kind == "stream":
        return Dataset.from_list(rows).to_iterable_dataset(num_shards=4)
    if kind == "stream of files":
        return IterableDataset.from_generator(read_lines, gen_kwargs={"paths": jsonl(folder / "data", rows)})
    if kind == "stream, mapped":
        return Dataset.from_list(rows).to_iterable_dataset(num_shards=4).map(lambda row: {"text": row["text"] + " t9"})
    if kind == "stream, mapped in batches":
        stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
        return stream.map(lambda batch: {"text": [text + " t9" for text in batch["text"]]}, batched=True, batch_size=7)
    if kind == "stream, filtered":
        return Dataset.from_list(rows).to_iterable_dataset(num_shards=4).filter(lambda row: len(row["text"]) > 5)
    assert kind == "stream, shuffle buffer"
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=4).shuffle(seed=5, buffer_size=16)


def read_lines(paths: list[str]) -> Any:
    for path in paths:
        for line in Path(path).read_text().splitlines():
            yield json.loads(line)


TEXT_KINDS = (
    "map", "map, shuffled", "stream", "stream of files", "stream, mapped", "stream, mapped in batches",
    "stream, filtered", "stream, shuffle buffer",
)  # fmt: skip


@pytest.mark.parametrize("kind", slow_except(TEXT_KINDS, "map", "stream, mapped in batches", "stream, shuffle buffer"))
@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
def test_raw_text_resumes_to_the_bit(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    dataset, model = text_dataset(kind, tmp_path), proxy(tiny_gpt2_model())
    settings: dict[str, Any] = {"hook_name": "transformer.h.1", "model_class_name": "AutoModelForCausalLM"}
    whole = run(tmp_path, dataset, model, **settings)
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        resume_each(tmp_path, whole, dataset, model, **settings)
    assert ("cannot jump to its place" in caplog.text) == (kind == "stream, shuffle buffer")


def test_a_stream_that_does_not_find_back_to_its_state_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Were a shuffle buffer not recognised, what comes after the jump would tell."""
    monkeypatch.setattr(seekable_store, "has_shuffle_buffer", lambda _: False)
    stream = token_dataset(200).to_iterable_dataset(num_shards=4).shuffle(seed=5, buffer_size=8)
    jumps: list[bool] = []
    goes_on_from = TokenStream._goes_on_from

    def note(self: TokenStream, place: Any, state: Any) -> bool:
        jumps.append(goes_on_from(self, place, state))
        return jumps[-1]

    monkeypatch.setattr(TokenStream, "_goes_on_from", note)
    n = resume_each(tmp_path, run(tmp_path, stream), stream)
    assert jumps.count(True) == n
    assert jumps.count(False) >= 2


def test_a_stream_is_not_read_again_up_to_its_place(tmp_path: Path):
    read: list[int] = []

    def note(row: dict[str, Any], index: int) -> dict[str, Any]:
        read.append(index)
        return row

    stream = token_dataset(64).to_iterable_dataset(num_shards=4).map(note, with_indices=True)
    whole = run(tmp_path, stream)
    checkpoint = checkpoints(whole)[-2]
    assert checkpoint.name == str(32 * 5)  # one step of 4 sequences is left, after 4 held-out and 20 trained ones
    read.clear()
    run(tmp_path, stream, resume_from_checkpoint=str(checkpoint))
    beyond_the_head = [index for index in read if index > 4]
    assert min(beyond_the_head) == 4 + 4 * 4  # the last batch that was trained on is read again, and compared
    assert max(beyond_the_head) >= 4 + 5 * 4


@pytest.mark.parametrize("kind", ["stream", "map"])
@pytest.mark.parametrize("n_rows", [13, 40])
def test_pretokenised_data_resume_to_the_bit_across_epochs(kind: str, n_rows: int, tmp_path: Path):
    dataset: Any = token_dataset(n_rows)
    if kind == "stream":
        dataset = dataset.to_iterable_dataset(num_shards=2)
    resume_each(tmp_path, run(tmp_path, dataset), dataset)


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
def test_texts_that_are_not_joined_resume_to_the_bit(tmp_path: Path):
    settings: dict[str, Any] = {"disable_concat_sequences": True}
    dataset, model = Dataset.from_list(text_rows()), tiny_hooked_transformer()
    model.set_tokenizer(tiny_tokenizer())
    resume_each(tmp_path, run(tmp_path, dataset, model, **settings), dataset, model, **settings)


def test_other_data_are_refused(tmp_path: Path):
    whole = run(tmp_path)
    checkpoint = checkpoints(whole)[2]
    same_head = token_dataset()["tokens"][:10] + token_dataset(200)["tokens"][100:]
    with pytest.raises(
        ValueError, match=r"not the one that the checkpoint was made with: from sequence \d+ of epoch 1"
    ):
        run(tmp_path, Dataset.from_dict({"tokens": same_head}), resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="held-out sequences at the head of the dataset are not those"):
        run(tmp_path, token_dataset(200).select(range(50, 200)), resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="not the one that the checkpoint was made with"):
        run(tmp_path, token_dataset().select(range(9)), resume_from_checkpoint=str(checkpoint))


# Which checkpoint.


def test_a_config_that_differs_in_what_matters_is_refused_with_the_differences(tmp_path: Path):
    checkpoint = checkpoints(run(tmp_path))[0]
    with pytest.raises(ValueError, match="is of another run than this config's") as refused:
        run(tmp_path, resume_from_checkpoint=str(checkpoint), lr=1e-3, sae={"l1_coefficient": 2.0}, seed=3)
    assert "lr: 0.01 -> 0.001" in str(refused.value)
    assert "seed: 42 -> 3" in str(refused.value)
    assert "sae.l1_coefficient: 0.01 -> 2.0" in str(refused.value)
    assert "output_path" not in str(refused.value)
    with pytest.raises(ValueError, match=r"objective\.beta: 0\.0 -> 1\.0"):
        run(tmp_path, resume_from_checkpoint=str(checkpoint), objective=Objective.e2e_downstream(1.0))
    with pytest.raises(ValueError, match=r"sae\.architecture: 'standard' -> 'topk'"):
        run(tmp_path, resume_from_checkpoint=str(checkpoint), architecture="topk")


def test_a_setting_that_an_older_version_did_not_have_counts_as_its_default(tmp_path: Path):
    config = runner_config(keep_decoder_norms=False, objective=Objective(matryoshka_levels="all"))
    saved = config.to_dict()
    del saved["keep_decoder_norms"], saved["objective"]["matryoshka_levels"], saved["sae"]["lp_norm"]
    assert config_differences(saved, config) == []
    assert config_differences({**saved, "later_field": 3}, config) == ["later_field: 3 -> '(absent)'"]
    changed = runner_config(max_grad_norm=2.0)
    older = {name: value for name, value in changed.to_dict().items() if name != "max_grad_norm"}
    assert config_differences(older, changed) == ["max_grad_norm: 1.0 -> 2.0"]


def test_what_does_not_matter_may_differ(tmp_path: Path):
    whole = run(tmp_path)
    resumed = run(
        tmp_path, name="elsewhere", resume_from_checkpoint=str(checkpoints(whole)[1]), keep_checkpoints=3,
        checkpoint_every_minutes=None, verbose=True, max_skipped_steps=2, n_checkpoints=1,
    )  # fmt: skip
    assert (tmp_path / "elsewhere/sae_weights.safetensors").read_bytes() == end_state(whole)["sae"]
    assert resumed.sae is not whole.sae


def test_auto_starts_anew_where_there_is_nothing_and_goes_on_where_there_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="e2e_sae_plugin"):
        first = run(tmp_path, resume_from_checkpoint="auto")
    assert "no checkpoint of this run below" in caplog.text
    newest = checkpoints(first)[-1]
    before = end_state(first)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="e2e_sae_plugin"):
        finished = run(tmp_path, resume_from_checkpoint="auto")
    assert "This run is finished" in caplog.text
    assert end_state(first) == before
    assert finished.is_finished
    (tmp_path / "out/cfg.json").unlink()  # killed before its end
    with caplog.at_level(logging.INFO, logger="e2e_sae_plugin"):
        again = run(tmp_path, resume_from_checkpoint="auto")
    assert f"Resumed from {newest}" in caplog.text
    assert again.run_folder.path == first.run_folder.path
    assert_same_run(again, before)


def test_auto_leaves_other_runs_alone_and_says_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run(tmp_path)
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        other = run(tmp_path, name="other", resume_from_checkpoint="auto", lr=1e-3)
    assert "are of other runs" in caplog.text
    assert "lr: 0.01 -> 0.001" in caplog.text
    assert other.resumed_from is None


def test_auto_falls_back_to_the_newest_whole_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = run(tmp_path)
    whole, found = end_state(first), checkpoints(first)
    weights = found[-1] / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    (found[-2] / "manifest.json").write_text("{")
    (found[-3] / "e2e_runner_cfg.json").write_text("[]")
    (tmp_path / "out/cfg.json").unlink()
    with caplog.at_level(logging.INFO, logger="e2e_sae_plugin"):
        again = run(tmp_path, resume_from_checkpoint="auto")
    for path in found[-3:]:
        assert "Passed over: " in caplog.text
        assert str(path) in caplog.text
    assert f"Resumed from {found[-4]}" in caplog.text
    assert_same_run(again, whole)


def test_auto_does_not_start_anew_over_damaged_checkpoints(tmp_path: Path):
    first = run(tmp_path)
    found = checkpoints(first)
    for index, path in enumerate(found):
        victim = path / ("optimizer.safetensors", "manifest.json", "e2e_runner_cfg.json")[index % 3]
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    (tmp_path / "out/cfg.json").unlink()
    with pytest.raises(DamagedCheckpointError, match="finds damaged checkpoints alone") as refused:
        run(tmp_path, resume_from_checkpoint="auto")
    assert all(str(path) in str(refused.value) for path in found)


def other_weights() -> Any:
    model = tiny_hooked_transformer()
    with torch.no_grad():
        model.blocks[2].mlp.W_out.mul_(1.01)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue, reportIndexIssue]
    return model


def test_another_model_is_another_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = run(tmp_path)
    with pytest.raises(ValueError, match="the language model has other weights"):
        run(tmp_path, model=other_weights(), resume_from_checkpoint=str(checkpoints(first)[0]))
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        other = run(tmp_path, model=other_weights(), name="other", resume_from_checkpoint="auto")
    assert other.resumed_from is None
    assert "differs in the language model has other weights" in caplog.text
    # A finished run of another model is not this one, and is protected.
    with pytest.raises(ValueError, match="holds the finished SAE"):
        run(tmp_path, model=tiny_hooked_transformer(seed=3), name="other", checkpoint_path=str(tmp_path / "c"),
            resume_from_checkpoint="auto")  # fmt: skip


def test_another_sae_to_start_from_is_another_run(tmp_path: Path):
    config = runner_config(checkpoint_path=str(tmp_path / "c"), **{**EVERY_STEP, "save_final_checkpoint": False})

    def start(seed: int, **settings: Any) -> Any:
        torch.manual_seed(seed)
        sae = TrainingSAE.from_dict(config.sae.to_dict())
        changed = runner_config(
            checkpoint_path=str(tmp_path / "c"), **{**EVERY_STEP, "save_final_checkpoint": False}, **settings
        )
        return E2ESAETrainingRunner(
            changed, override_dataset=token_dataset(), override_model=tiny_hooked_transformer(), override_sae=sae
        )

    first = start(1)
    first.run()
    checkpoint = str(checkpoints(first)[2])
    assert start(1, resume_from_checkpoint=checkpoint).resumed_from is not None
    with pytest.raises(ValueError, match="override_sae is another SAE"):
        start(2, resume_from_checkpoint=checkpoint)
    assert start(2, resume_from_checkpoint="auto").resumed_from is None


# The log.


def test_a_log_that_is_not_the_runs_keeps_whole_lines_until_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    first = run(tmp_path)
    checkpoint, log = checkpoints(first)[2], tmp_path / "out/metrics.jsonl"
    whole = log.read_text().splitlines()
    log.write_text(log.read_text()[:150])
    (tmp_path / "out/cfg.json").unlink()
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        run(tmp_path, resume_from_checkpoint=str(checkpoint))
    assert "is not what it was at the checkpoint" in caplog.text
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps[-4:] == [json.loads(line)["step"] for line in whole][-4:]
    assert steps == sorted(steps)


def test_another_output_folder_gets_the_log_so_far(tmp_path: Path):
    first = run(tmp_path)
    run(tmp_path, name="elsewhere", resume_from_checkpoint=str(checkpoints(first)[2]))
    assert (tmp_path / "elsewhere/metrics.jsonl").read_bytes() == (tmp_path / "out/metrics.jsonl").read_bytes()


def test_a_finished_sae_is_not_gone_on_from(tmp_path: Path):
    runner = run(tmp_path)
    (final,) = [path for path, manifest in runner.run_folder.checkpoints() if manifest["kind"] == "final"]
    assert final.name == f"final_{32 * 6}"
    with pytest.raises(ValueError, match="holds the finished SAE of its run"):
        run(tmp_path, resume_from_checkpoint=str(final))


@pytest.mark.parametrize("name", ["nope", "checkpoints"])
def test_a_folder_that_is_no_checkpoint_is_refused_by_name(name: str, tmp_path: Path):
    newest = checkpoints(run(tmp_path))[-1].parent
    named = newest if name == "checkpoints" else tmp_path / name
    with pytest.raises(DamagedCheckpointError, match=f"resume_from_checkpoint: .*{named.name}") as refused:
        run(tmp_path, resume_from_checkpoint=str(named))
    assert ("The newest checkpoint inside it is" in str(refused.value)) == (name == "checkpoints")


def test_checkpoints_of_the_host_are_refused_with_what_to_do(tmp_path: Path):
    folder = tmp_path / "host/1000"
    folder.mkdir(parents=True)
    (folder / "trainer_state.pt").write_bytes(b"pickle")
    with pytest.raises(DamagedCheckpointError, match=r"one of SAELens's own, which hold pickles.*from_pretrained_path"):
        run(tmp_path, resume_from_checkpoint=str(folder))


# What a checkpoint is.


def test_a_checkpoint_holds_everything_and_no_pickle(tmp_path: Path):
    runner = run(tmp_path, n_checkpoints=1)
    for checkpoint in checkpoints(runner):
        names = {path.name for path in checkpoint.iterdir()}
        assert names == {
            "activation_scaler.json", "cfg.json", "e2e_runner_cfg.json", "manifest.json", "optimizer.safetensors",
            "runner_cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "trainer_state.json",
            "trainer_state.safetensors",
        }  # fmt: skip
        manifest = verify_checkpoint(checkpoint)
        assert set(manifest["files"]) == names - {"manifest.json"}
        assert manifest["n_training_samples"] == int(checkpoint.name)
        for path in checkpoint.iterdir():
            assert path.read_bytes()[:2] != b"PK"  # torch's zip of pickles
    newest = checkpoints(runner)[-1]
    loaded = TrainingSAE.load_from_disk(newest)
    assert torch.equal(loaded.W_dec, load_file(newest / "sae_weights.safetensors")["W_dec"])
    assert SAE.load_from_disk(newest).cfg.d_sae == 32


def test_milestones_stay_and_rolling_checkpoints_make_room(tmp_path: Path):
    runner = run(tmp_path, n_checkpoints=2, keep_checkpoints=2, training_tokens=32 * 9)
    kinds = {path.name: read_manifest(path)["kind"] for path in checkpoints(runner)}
    assert [name for name, kind in kinds.items() if kind == "rolling"] == ["256", "288"]
    # The host saves at the first step beyond each third of the run.
    assert [name for name, kind in kinds.items() if kind == "milestone"] == ["128", "224"]


def test_an_architecture_with_a_file_format_of_its_own_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """SAELens lets an architecture change its weights on their way to the file and back; both ways may round."""
    from sae_lens import StandardTrainingSAE

    def halve(self: Any, state: dict[str, Any]) -> None:
        state["W_dec"] = (state["W_dec"] / 3).contiguous()

    def double(self: Any, state: dict[str, Any]) -> None:
        state["W_dec"] = state["W_dec"] * 3

    monkeypatch.setattr(StandardTrainingSAE, "process_state_dict_for_saving", halve)
    monkeypatch.setattr(StandardTrainingSAE, "process_state_dict_for_loading", double)
    whole = run(tmp_path)
    assert (checkpoints(whole)[0] / "sae_state.safetensors").exists()
    resume_each(tmp_path, whole)
