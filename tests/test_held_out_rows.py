"""Held out is held out: runs record the rows that they trained on, and measuring takes others, or says what overlaps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import proxy, runner_config, sae_config, tiny_gpt2_model, token_batch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from e2e_sae_plugin import E2ESAETrainingRunner, FinetuneRunner, Objective, finetune_config, load_sae
from e2e_sae_plugin.comparison.inputs import TextSettings, evaluation_tokens
from e2e_sae_plugin.data.rows import RECORD, TrainedRows, overlap_share, same_dataset, trained_rows
from e2e_sae_plugin.sweep import SweepConfig, SweepKind, SweepRunner

pytestmark = pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")

CONTEXT, N_ROWS = 8, 100
HOOK = "transformer.h.0"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model() -> Any:
    return proxy(tiny_gpt2_model())


def rows() -> Tensor:
    """Every row another one."""
    return token_batch(N_ROWS, CONTEXT)


def write_tokens(path: str = "a.parquet") -> str:
    Dataset.from_dict({"tokens": rows().tolist()}).to_parquet(path)
    return path


def run(model: Any, path: str, folder: str = "sae", n_steps: int = 10, **settings: Any) -> SAE[Any]:
    """Steps of 4 rows each; 4 held out."""
    defaults: dict[str, Any] = {"n_eval_batches": 1, "training_tokens": 32 * n_steps, "streaming": False}
    config = runner_config(dataset_path=path, hook_name=HOOK, output_path=folder, **{**defaults, **settings})
    E2ESAETrainingRunner(config, override_model=model).run()
    return load_sae(folder)


def measured(model: Any, n_prompts: int, *saes: SAE[Any], **text: Any) -> list[list[int]]:
    named = {f"sae{i}": sae for i, sae in enumerate(saes)}
    return evaluation_tokens(named, model, n_prompts * CONTEXT, TextSettings(**text))[0].tolist()


def record_of(sae: SAE[Any]) -> dict[str, Any]:
    return trained_rows(sae)[-1].to_dict()


# What is recorded.


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_records_its_rows(streaming: bool, model: Any):
    record = record_of(run(model, write_tokens(), streaming=streaming))
    assert record == {
        "dataset_path": "a.parquet", "first_row": 4, "last_row": 43, "epochs": 1, "training_tokens": 320,
        "held_out_sequences": 4, "read_from": 0, "n_rows": None if streaming else 100, "context_size": 8, "split": None,
        "text_column": None, "shuffle_seed": None, "streaming": streaming,
    }  # fmt: skip


def test_rows_count_from_the_head_of_the_dataset(model: Any):
    record = record_of(run(model, write_tokens(), skip_examples=20, max_examples=60, shuffle_seed=3, n_steps=5))
    assert (record["read_from"], record["first_row"], record["last_row"], record["n_rows"]) == (20, 24, 43, 80)
    assert record["shuffle_seed"] == 3


def test_an_epoch_that_ends_is_recorded(model: Any):
    record = record_of(run(model, write_tokens(), n_steps=30))
    assert (record["epochs"], record["first_row"], record["last_row"]) == (2, 4, 99)


def test_a_text_that_is_held_out_in_part_counts_as_trained_on(model: Any):
    Path("a.jsonl").write_text("".join(json.dumps({"text": f"t{i} " * 50}) + "\n" for i in range(40, 60)))
    record = record_of(run(model, "a.jsonl", n_steps=4))
    # 4 sequences of BOS and 7 tokens are held out of the first text of 50 tokens; 16 more end in the third.
    assert (record["first_row"], record["last_row"]) == (0, 2)


def test_checkpoints_and_resumed_runs_record_the_same(model: Any, here: Path):
    settings: dict[str, Any] = {"checkpoint_path": "ck", "checkpoint_every_minutes": 1e-9, "keep_checkpoints": 100}
    whole = record_of(run(model, write_tokens(), n_steps=30, **settings))
    (folder,) = (here / "ck").iterdir()
    (third,) = folder.glob("96")
    record = json.loads((third / "cfg.json").read_text())["metadata"][RECORD]
    assert [(each["last_row"], each["training_tokens"]) for each in record] == [(15, 96)]
    for step in ("96", "832"):  # before and after the dataset's end
        resumed = run(model, "a.parquet", f"again{step}", 30, **settings, resume_from_checkpoint=str(folder / step))
        assert record_of(resumed) == whole


def test_what_comes_later_keeps_what_was_recorded(model: Any):
    run(model, write_tokens(), n_steps=5)
    second = run(model, "a.parquet", "second", n_steps=5, skip_examples=50, from_pretrained_path="sae")
    assert [(each.first_row, each.last_row) for each in trained_rows(second)] == [(4, 23), (54, 73)]


def test_a_dataset_object_has_no_name(model: Any):
    config = runner_config(dataset_path="a.parquet", hook_name=HOOK, output_path="sae")
    E2ESAETrainingRunner(
        config, override_model=model, override_dataset=Dataset.from_dict({"tokens": rows().tolist()})
    ).run()
    assert record_of(load_sae("sae"))["dataset_path"] is None


def test_saes_of_a_sweep_record_theirs(model: Any):
    base = runner_config(dataset_path=write_tokens(), hook_name=HOOK, n_eval_batches=1, streaming=False)
    SweepRunner(SweepConfig(base, {"e2e": SweepKind(Objective.e2e(), (0.1, 0.2))}, "sweep"), override_model=model).run()
    records = [record_of(load_sae(path.parent)) for path in Path("sweep").glob("*/cfg.json")]
    assert [(each["dataset_path"], each["first_row"], each["last_row"]) for each in records] == [
        ("a.parquet", 4, 43)
    ] * 2


# What is measured on.


def test_rows_after_those_that_were_trained_on_come_first(model: Any):
    sae = run(model, write_tokens())
    tokens, source = evaluation_tokens({"sae": sae}, model, 20 * CONTEXT)
    assert tokens.tolist() == rows()[44:64].tolist()
    assert (source.dataset, source.rows, source.context_size) == ("a.parquet", ((44, 63),), CONTEXT)


def test_where_they_run_out_those_that_were_held_out_follow(model: Any, caplog: pytest.LogCaptureFixture):
    sae = run(model, write_tokens(), n_steps=23)
    assert measured(model, 7, sae) == rows()[[96, 97, 98, 99, 0, 1, 2]].tolist()
    assert not caplog.text.count("trained on")
    assert measured(model, 100, sae) == rows()[[96, 97, 98, 99, 0, 1, 2, 3]].tolist()
    assert "a.parquet has only 8 of the 100 sequences" in caplog.text


def test_of_a_dataset_that_was_read_to_its_end_the_held_out_head_is_left(model: Any):
    Path("a.jsonl").write_text("".join(json.dumps({"text": f"t{i} " * (i + 20)}) + "\n" for i in range(4, 10)))
    config = runner_config(
        dataset_path="a.jsonl", hook_name=HOOK, output_path="sae", n_eval_batches=1, training_tokens=960
    )
    runner = E2ESAETrainingRunner(config, override_model=model)
    runner.run()
    held_out = runner.tokens.held_out
    assert held_out is not None
    assert measured(model, 50, load_sae("sae")) == held_out.tolist()  # though the rest of their texts was trained on


def test_where_nothing_is_left_the_overlap_is_said(model: Any, caplog: pytest.LogCaptureFixture):
    sae = run(model, write_tokens(), n_steps=30, n_eval_batches=0)
    assert measured(model, 10, sae) == rows()[:10].tolist()
    assert (
        "sae0 was trained on 100% of the rows that it is measured on. Measure on other text (--dataset)" in caplog.text
    )


def test_rows_that_are_asked_for_are_taken_and_the_overlap_said(model: Any, caplog: pytest.LogCaptureFixture):
    sae = run(model, write_tokens())
    assert measured(model, 10, sae, skip_examples=39) == rows()[39:49].tolist()
    assert "sae0 was trained on 50% of the rows" in caplog.text
    caplog.clear()
    assert measured(model, 10, sae, skip_examples=60, max_examples=3) == rows()[60:63].tolist()
    assert "trained on" not in caplog.text


def test_several_saes_are_measured_on_what_none_has_seen(model: Any):
    first = run(model, write_tokens(), "first", n_steps=5)
    second = run(model, "a.parquet", "second", n_steps=10)
    assert measured(model, 3, first, second) == rows()[44:47].tolist()


def test_another_dataset_is_read_from_its_head(model: Any, caplog: pytest.LogCaptureFixture):
    sae = run(model, write_tokens())
    write_tokens("b.parquet")
    assert measured(model, 5, sae, dataset_path="b.parquet") == rows()[:5].tolist()
    assert measured(model, 5, sae, dataset_path="./a.parquet") == rows()[44:49].tolist()  # the same one
    assert "trained on" not in caplog.text


def test_rows_are_those_of_the_recorded_order(model: Any, caplog: pytest.LogCaptureFixture):
    sae = run(model, write_tokens(), shuffle_seed=5)
    shuffled = Dataset.from_dict({"tokens": rows().tolist()}).shuffle(seed=5)["tokens"]
    assert measured(model, 5, sae) == shuffled[44:49]
    assert "trained on" not in caplog.text
    assert len(measured(model, 5, sae, shuffle_seed=6)) == 5
    assert "sae0 was trained on a.parquet too, on rows that its record does not tell" in caplog.text


def test_token_files_count_rows_of_one_context(model: Any, caplog: pytest.LogCaptureFixture):
    rows().numpy().astype(np.uint16).tofile("a.bin")
    sae = run(model, "a.bin")
    assert measured(model, 3, sae) == rows()[44:47].tolist()
    measured(model, 3, sae, context_size=4)
    assert "trained on a.bin too, on rows that its record does not tell" in caplog.text


def saelens_sae(**metadata: Any) -> SAE[Any]:
    """As SAELens saves one: its metadata name the dataset, and `runner_cfg.json` the tokens."""
    sae: Any = TrainingSAE.from_dict(sae_config().to_dict())
    known = {"dataset_path": "a.parquet", "context_size": CONTEXT, "hook_name": HOOK, "prepend_bos": True}
    for name, value in {**known, **metadata}.items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_inference_model("saelens")
    return sae


def test_of_saes_of_saelens_the_rows_are_estimated(model: Any, caplog: pytest.LogCaptureFixture):
    Dataset.from_dict({"tokens": token_batch(2000, CONTEXT).tolist()}).to_parquet("a.parquet")
    saelens_sae()
    Path("saelens/runner_cfg.json").write_text(json.dumps({"training_tokens": 320}))
    sae = load_sae("saelens")
    # 320 tokens and 640 sequences of read-ahead are 680 rows, and a tenth more.
    assert measured(model, 3, sae) == token_batch(2000, CONTEXT)[748:751].tolist()
    assert "trained on" not in caplog.text
    Path("saelens/runner_cfg.json").unlink()
    measured(model, 3, load_sae("saelens"))
    assert "sae0 was trained on a.parquet too, on rows that its record does not tell" in caplog.text


def test_one_dataset_by_its_name_or_place(here: Path):
    write_tokens()
    assert same_dataset("a.parquet", str(here / "a.parquet"))
    assert same_dataset("/elsewhere/a.parquet", "a.parquet")
    assert same_dataset("owner/text", "owner/text")
    assert not same_dataset("owner/text", "other/text")
    assert not same_dataset("/elsewhere/b.parquet", "a.parquet")


def test_overlap_by_hand():
    trained = [TrainedRows("a", 10, 19, 1, 0), TrainedRows("a", 15, 29, 1, 0)]
    assert overlap_share(trained, [(0, 9)]) == 0
    assert overlap_share(trained, [(25, 34)]) == 0.5
    assert overlap_share(trained, [(5, 14), (28, 37)]) == 7 / 20
    assert overlap_share(trained, []) == 0


# Fine-tuning.


def tuned_config(sae: SAE[Any], **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "training_tokens": 160, "evaluation_tokens": 32, "train_batch_size_tokens": 32, "store_batch_size_prompts": 4,
        "sae_settings": {"l1_coefficient": 0.02}, "output_path": "tuned", "verbose": False, "model_name": "tiny",
    }  # fmt: skip
    return finetune_config(sae, **{**defaults, **settings})


def test_a_fine_tune_goes_on_with_rows_that_the_original_has_not_seen(model: Any, caplog: pytest.LogCaptureFixture):
    original = run(model, write_tokens(), shuffle_seed=5)
    cfg = tuned_config(original)
    assert (cfg.skip_examples, cfg.shuffle_seed, cfg.streaming) == (44, 5, False)
    runner = FinetuneRunner(cfg, original, override_model=model)
    tuned = runner.run()
    assert [(each.first_row, each.last_row) for each in trained_rows(tuned)] == [(4, 43), (48, 67)]
    assert runner.report is not None
    assert runner.report.measured_on is not None
    assert runner.report.measured_on.rows == ((44, 47),)
    assert "trained on" not in caplog.text
    shuffled = Dataset.from_dict({"tokens": rows().tolist()}).shuffle(seed=5)["tokens"]
    assert measured(model, 5, original, tuned) == shuffled[68:73]


def test_a_fine_tune_without_other_rows_says_so(model: Any, caplog: pytest.LogCaptureFixture):
    original = run(model, write_tokens(), n_steps=23, n_eval_batches=0)
    cfg = tuned_config(original)
    assert cfg.skip_examples == 0  # 8 rows are not enough
    FinetuneRunner(cfg, original, override_model=model)
    assert "The SAE was trained on 100% of the rows that are held out" in caplog.text


def test_a_fine_tune_of_an_sae_of_saelens_says_what_is_not_known(model: Any, caplog: pytest.LogCaptureFixture):
    write_tokens()
    saelens_sae()
    original = load_sae("saelens")
    FinetuneRunner(tuned_config(original, streaming=False), original, override_model=model)
    assert "The SAE was trained on a.parquet too, on rows that its record does not tell" in caplog.text


def test_a_dataset_object_is_fine_tuned_on_as_it_is(model: Any, caplog: pytest.LogCaptureFixture):
    original = run(model, write_tokens())
    given = Dataset.from_dict({"tokens": rows().tolist()})
    with caplog.at_level(logging.INFO, logger="e2e_sae_plugin"):
        runner = FinetuneRunner(tuned_config(original), original, override_model=model, override_dataset=given)
    assert "override_dataset is read as it is: skip_examples=44 is not used" in caplog.text
    assert runner.tokens.held_out is not None
    assert runner.tokens.held_out.tolist() == rows()[:4].tolist()


# A dataset that repeats itself.


def repeated(n_times: int | None, n_rows: int = 10) -> IterableDataset:
    few = rows()[:n_rows].tolist()
    return IterableDataset.from_generator(lambda: ({"tokens": row} for row in few)).repeat(n_times)


def test_held_out_rows_of_a_repeated_stream_are_not_trained_on(model: Any, caplog: pytest.LogCaptureFixture):
    config = runner_config(hook_name=HOOK, n_eval_batches=1)
    stream = E2ESAETrainingRunner(config, override_model=model, override_dataset=repeated(None)).tokens
    drawn = torch.cat([next(stream) for _ in range(6)]).tolist()
    assert drawn == (rows()[4:10].tolist() * 4)
    assert caplog.text.count("Row 10 of override_dataset is one that is held out for evaluation") == 1


def test_a_stream_of_held_out_rows_alone_ends(model: Any):
    config = runner_config(hook_name=HOOK, n_eval_batches=1)
    stream = E2ESAETrainingRunner(config, override_model=model, override_dataset=repeated(None, 4)).tokens
    with pytest.raises(ValueError, match="repeats rows that are held out for evaluation, and has no others"):
        next(stream)


def test_short_texts_may_come_twice_but_not_in_a_stream_that_repeats_itself(
    model: Any, caplog: pytest.LogCaptureFixture
):
    config = runner_config(hook_name=HOOK, n_eval_batches=1)
    same = Dataset.from_dict({"text": ["t9 t8 t7 t6"] * 40})
    next(E2ESAETrainingRunner(config, override_model=model, override_dataset=same).tokens)
    assert "held out" not in caplog.text
    lines = [f"t{i} t8 t7 t6 t5 t9" for i in range(40, 60)]
    again = IterableDataset.from_generator(lambda: ({"text": line} for line in lines)).repeat(9)
    stream = E2ESAETrainingRunner(config, override_model=model, override_dataset=again).tokens
    drawn = torch.cat([next(stream) for _ in range(12)])
    assert stream.n_held_out_rows == 5
    assert not torch.isin(drawn, torch.arange(40, 44)).any()  # of the fifth, the end is trained on
    assert "Row 20 of override_dataset is one that is held out" in caplog.text
