"""One loader of data for every command and run: what users have is accepted, the rest refused by file and row."""

from __future__ import annotations

import gc
import gzip
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from helpers import proxy, runner_config, sae_config, tiny_gpt2_model, token_batch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import TrainingSAE
from sparsify.data import MemmapDataset
from torch import Tensor

from e2e_sae_plugin import E2ESAETrainingRunner, Objective
from e2e_sae_plugin.cli import main
from e2e_sae_plugin.comparison.inputs import TextSettings, evaluation_tokens
from e2e_sae_plugin.data import DataSettings, load_data
from e2e_sae_plugin.sweep import SweepConfig, SweepKind, SweepRunner
from e2e_sae_plugin.token_stream import TokenStream

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning"),
    # `datasets` leaves a CSV file open whose rows are not all read.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"),
]

CONTEXT = 8
TEXTS = [" ".join(f"t{4 + (7 * i + j) % 50}" for j in range(5 + i % 9)) for i in range(120)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model() -> Any:
    return proxy(tiny_gpt2_model())


def rows(texts: list[Any], column: str = "text") -> str:
    return "".join(json.dumps({column: text}) + "\n" for text in texts)


def write_text(path: str, texts: list[str] = TEXTS) -> str:
    """The texts in a file of the kind that the path's ending says."""
    if path.endswith(".jsonl.gz"):
        Path(path).write_bytes(gzip.compress(rows(texts).encode()))
    elif path.endswith(".jsonl"):
        Path(path).write_text(rows(texts))
    elif path.endswith(".json"):
        Path(path).write_text(json.dumps([{"text": text} for text in texts]))
    elif path.endswith((".csv", ".tsv")):
        Dataset.from_dict({"text": texts}).to_csv(path, sep="\t" if path.endswith("tsv") else ",")
    elif path.endswith(".parquet"):
        Dataset.from_dict({"text": texts}).to_parquet(path)
    elif path.endswith(".arrow"):
        Dataset.from_dict({"text": texts}).save_to_disk("for_arrow")
        Path("for_arrow/data-00000-of-00001.arrow").rename(path)
    else:
        Path(path).write_text("\n".join(texts) + "\n")
    return path


def runner(model: Any, dataset_path: str, dataset: Any = None, **settings: Any) -> E2ESAETrainingRunner:
    config = runner_config(dataset_path=dataset_path, hook_name="transformer.h.0", **settings)
    return E2ESAETrainingRunner(config, override_model=model, override_dataset=dataset)


def batches(model: Any, dataset_path: str, n: int = 4, **settings: Any) -> Tensor:
    """The first batches of a run on that data."""
    stream = runner(model, dataset_path, **settings).tokens
    return torch.cat([next(stream) for _ in range(n)])


def load(dataset_path: str, **settings: Any) -> Any:
    return load_data(DataSettings(dataset_path, **settings), CONTEXT)


def sae(**metadata: Any) -> Any:
    made: Any = TrainingSAE.from_dict(sae_config().to_dict())
    for name, value in metadata.items():
        setattr(made.cfg.metadata, name, value)
    return made


def measured(model: Any, dataset_path: str, n_prompts: int) -> Tensor:
    """The first sequences of an evaluation on that data."""
    text = TextSettings(dataset_path, context_size=CONTEXT)
    return evaluation_tokens({"sae": sae()}, model, n_prompts * CONTEXT, text)[0]


# What is accepted.


@pytest.mark.parametrize("path", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_run_and_an_evaluation_read_files_of_text(path: str, model: Any):
    expected = torch.cat(
        [next(s) for s in [runner(model, "", Dataset.from_dict({"text": TEXTS})).tokens] for _ in range(4)]
    )
    write_text(path)
    assert torch.equal(batches(model, path), expected)
    assert torch.equal(batches(model, path, streaming=True), expected)
    Path("inside").mkdir()
    Path(path).rename(f"inside/{path}")
    assert torch.equal(batches(model, "inside"), expected)
    assert torch.equal(batches(model, f"./inside/{path}"), expected)
    assert torch.equal(measured(model, "inside", 16), expected)


@pytest.mark.parametrize("name", ["text", "json"])
def test_a_folder_may_be_called_like_a_kind_of_file(name: str, model: Any):
    Path(name).mkdir()
    write_text(f"{name}/a.jsonl")
    assert len(batches(model, name)) == 16


def test_folders_that_save_to_disk_wrote(model: Any):
    Dataset.from_dict({"text": TEXTS}).save_to_disk("one")
    DatasetDict(
        {"train": Dataset.from_dict({"text": TEXTS}), "test": Dataset.from_dict({"text": TEXTS[50:]})}
    ).save_to_disk("d")
    expected = batches(model, "one")
    assert torch.equal(batches(model, "d"), expected)
    assert not torch.equal(batches(model, "d", split="test"), expected)
    with pytest.raises(ValueError, match=r"has no split='nope'. It has train, test \(--split\)"):
        load("d", split="nope")
    with pytest.raises(ValueError, match="holds one dataset without splits"):
        load("one", split="train")


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_a_folder(streaming: bool):
    Path("data").mkdir()
    write_text("data/validation.jsonl", ["a"])
    write_text("data/test.jsonl", ["b"])
    settings = {"streaming": streaming}
    assert list(load("data", split="test", **settings)) == [{"text": "b"}]
    with pytest.raises(ValueError, match=r"has no split 'train'. It has validation, test"):
        load("data", **settings)
    Path("data/test.jsonl").unlink()
    assert list(load("data", **settings)) == [{"text": "a"}]


@pytest.mark.parametrize("column", ["tokens", "input_ids", "token_ids", "ids", "anything"])
@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "disk"])
def test_tokens_of_any_usual_name_and_type(column: str, kind: str, model: Any):
    tokens = token_batch(40, CONTEXT)
    made = Dataset.from_dict(
        {column: tokens.int().tolist(), "attention_mask": torch.ones_like(tokens).tolist(), "n": [1] * 40}
    )
    Path("data").mkdir()
    if kind == "parquet":
        made.to_parquet("data/a.parquet")
    elif kind == "jsonl":
        made.to_json("data/a.jsonl")
    else:
        made.save_to_disk("data")
    path = "data/data-00000-of-00001.arrow" if kind == "arrow" else "data"
    assert torch.equal(batches(model, path), tokens[:16])
    assert torch.equal(measured(model, path, 8), tokens[:8])


@pytest.mark.parametrize("several", [False, True])
def test_memory_mapped_tokens_as_sparsify_reads_them(several: bool, model: Any):
    tokens = token_batch(40, CONTEXT)
    numbers = tokens.numpy().astype(np.uint16)
    Path("data").mkdir()
    if several:
        numbers[:10].tofile("data/0.bin")
        np.append(numbers[10:], [1, 2, 3]).astype(np.uint16).tofile("data/1.bin")  # a rest that fills no row
    else:
        numbers.tofile("data/a.bin")
    path = "data" if several else "data/a.bin"
    assert torch.equal(batches(model, path, n=10), tokens)
    theirs = MemmapDataset("data/0.bin" if several else "data/a.bin", CONTEXT)
    ours = load(path)
    assert torch.equal(torch.tensor(ours[:10]["tokens"]), torch.stack([theirs[i]["input_ids"] for i in range(10)]))
    shuffled = load(path, shuffle_seed=3, max_examples=5)
    assert sorted(map(tuple, shuffled["tokens"])) != sorted(map(tuple, tokens[:5].tolist()))
    assert {tuple(row) for row in shuffled["tokens"]} <= {tuple(row) for row in tokens.tolist()}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of datasets, which lets a CSV file go
def test_a_text_column_of_another_name(model: Any):
    Path("a.jsonl").write_text(rows(TEXTS, "body"))
    assert torch.equal(batches(model, "a.jsonl"), batches(model, write_text("b.jsonl")))
    Dataset.from_dict({"title": ["t9"] * 120, "body": TEXTS, "tokens": [3] * 120}).to_csv("c.csv")
    with pytest.raises(ValueError, match=r"several columns that could be read: 'title' \(text\), 'body' \(text\)"):
        batches(model, "c.csv")
    assert torch.equal(batches(model, "c.csv", text_column="body"), batches(model, "b.jsonl"))
    gc.collect()


def test_rows_are_shuffled_left_out_and_limited_in_that_order():
    write_text("a.jsonl")
    shuffled = Dataset.from_dict({"text": TEXTS}).shuffle(seed=5)["text"]
    found = load("a.jsonl", shuffle_seed=5, skip_examples=10, max_examples=20)
    assert found["text"] == shuffled[10:30]
    streamed = load("a.jsonl", shuffle_seed=5, skip_examples=10, max_examples=20, streaming=True)
    texts = [row["text"] for row in streamed]
    assert len(set(texts)) == 20
    assert texts == [row["text"] for row in streamed]
    assert load("a.jsonl", max_examples=10**6)["text"] == TEXTS


def test_rows_without_text_are_left_out_and_said(model: Any, caplog: pytest.LogCaptureFixture):
    holes = [None, *TEXTS[:7], None, *TEXTS[7:]]
    Path("a.jsonl").write_text(rows(holes))
    expected = batches(model, write_text("b.jsonl"))
    for streaming in (False, True):
        assert torch.equal(batches(model, "a.jsonl", streaming=streaming), expected)
    assert "Row 0 of dataset_path='a.jsonl' has no value in column 'text': such rows are left out." in caplog.text
    assert torch.equal(measured(model, "a.jsonl", 16), expected)


def test_nothing_about_trust_remote_code(model: Any, caplog: pytest.LogCaptureFixture):
    write_text("a.jsonl")
    with caplog.at_level(logging.DEBUG):
        batches(model, "a.jsonl")
        measured(model, "a.jsonl", 8)
    assert "trust_remote_code" not in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert all("passed in a model" in text for text in warnings)  # the host's, of override_model


# What is refused.


def latin(path: str) -> None:
    Path(path).write_bytes("\n".join(TEXTS[:3]).encode() + "\ncafé\n".encode("latin-1"))


@pytest.mark.parametrize(
    ("path", "write", "message"),
    [
        ("a.txt", latin, "/a.txt', line 4, is not UTF-8. Save the file as UTF-8"),
        ("d/b.jsonl", lambda path: Path(path).write_text('{"text": "a"}\n{"text": \n'), "/b.jsonl', line 2, is not a JSON"),
        ("a.parquet", lambda path: Path(path).write_bytes(b"PAR1 no"), "/a.parquet' cannot be read"),
        ("a.bin", lambda path: Path(path).write_bytes(b"abc"), "/a.bin' has 3 bytes, which are no uint16"),
        ("a.bin", lambda path: np.arange(100, dtype=np.uint32).tofile(path), "seems to hold numbers of 32 bits"),
        ("a.bin", lambda path: np.arange(3, dtype=np.uint16).tofile(path), "holds fewer tokens than one sequence"),
        ("a.pdf", lambda path: Path(path).touch(), "/a.pdf' is not a data file. Expected files \\(.txt,"),
        ("d", lambda _: None, "/d' holds no data. Expected files"),
        ("./nope.txt", lambda _: None, "There is no file or folder './nope.txt'. Expected files"),
        ("/nope", lambda _: None, "There is no file or folder '/nope'"),
        ("a.jsonl", lambda path: Path(path).touch(), "/a.jsonl' is empty. Use data with rows"),
        ("a.csv", lambda path: Path(path).touch(), "/a.csv' is empty"),
        ("a.csv", lambda path: Path(path).write_text("text\n"), "a.csv' (has|there are) no rows"),
        ("a.csv", lambda path: Path(path).write_text("n,m\n1,2\n"), "no column of texts or lists of whole numbers: 'n'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_read_is_refused_by_file_and_row(
    path: str, write: Callable[[str], Any], message: str, streaming: bool
):
    Path("d").mkdir()
    write(path)
    with pytest.raises(ValueError, match=message) as refused:
        load("d" if path.startswith("d/") else path, streaming=streaming)
    assert len(str(refused.value).splitlines()) == 1


def test_files_of_several_kinds_are_refused():
    Path("d").mkdir()
    write_text("d/a.jsonl")
    write_text("d/b.txt")
    Path("d/README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match=r"of several kinds, such as a.jsonl and b.txt. Name one file"):
        load("d")
    for name in ("a.jsonl", "b.txt"):
        Path(f"d/{name}").unlink()
    write_text("d/a.parquet")
    Path("d/sae_lens.json").write_text("{}")  # what SAELens's pretokenize runner writes beside data
    assert len(load("d")) == len(TEXTS)


def test_a_row_that_is_no_text_is_named(model: Any):
    stream = IterableDataset.from_generator(lambda: ({"text": text} for text in ["t4 t5", 7.5]))
    with pytest.raises(ValueError, match=r"Row 1 of override_dataset holds a float in column 'text'. Expected text"):
        next(runner(model, "", stream).tokens)


def test_a_streamed_file_that_breaks_later_is_named(model: Any):
    Path("a.txt").write_bytes((b"t4 t5 " * 5000 + b"\n") * 800 + b"\xe9\n")  # beyond what is read at once
    stream = runner(model, "a.txt", streaming=True, train_batch_size_tokens=CONTEXT * 4).tokens
    with pytest.raises(ValueError, match=r"dataset_path='a.txt' cannot be read after row \d+: 'utf-8' codec"):
        list(stream.store._iterate_raw_dataset())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_examples": 0}, "max_examples must be at least 1"), ({"skip_examples": -1}, "skip_examples must be 0 or more"),
        ({"shuffle_seed": -1}, "shuffle_seed must be 0 or more"), ({"split": ""}, "split must be a name"),
        ({"text_column": ""}, "text_column must be a name"), ({"max_examples": 2.5}, "max_examples must be a whole number"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_the_config(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        runner_config(**settings)


def test_settings_without_effect_are_refused(model: Any):
    given = Dataset.from_dict({"text": TEXTS})
    refused = {"split": "test", "text_column": "x", "shuffle_seed": 1, "skip_examples": 1, "max_examples": 3}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"{name}=.* has no effect with override_dataset"):
            runner(model, "", given, **{name: value})
    with pytest.raises(ValueError, match=r"After skip_examples=500, the dataset 'a\.jsonl' has no rows"):
        runner(model, write_text("a.jsonl"), skip_examples=500, streaming=False)
    with pytest.raises(ValueError, match=r"dataset_path='a\.jsonl' has no rows"):
        runner(model, "a.jsonl", skip_examples=500, streaming=True)
    with pytest.raises(ValueError, match="'e2e-sae-demo' has one split and one column"):
        load_data(DataSettings("e2e-sae-demo", split="test"), 64)
    np.zeros(64, dtype=np.uint16).tofile("a.bin")
    with pytest.raises(ValueError, match="holds token ids alone"):
        load("a.bin", text_column="text")


# Resuming.


@pytest.mark.parametrize(
    "settings", [{}, {"streaming": True}, {"shuffle_seed": 4}, {"shuffle_seed": 4, "streaming": True}]
)
@pytest.mark.parametrize("path", ["a.jsonl", "a.bin"])
def test_a_stream_goes_on_exactly_where_it_stood(path: str, settings: dict[str, Any], model: Any):
    if path == "a.bin":
        token_batch(60, CONTEXT).numpy().astype(np.uint16).tofile(path)
    else:
        Path(path).write_text(rows([text if i % 5 else None for i, text in enumerate(TEXTS)]))
    settings = {**settings, "skip_examples": 3, "max_examples": 50, "n_eval_batches": 1}

    def stream() -> TokenStream:
        return runner(model, path, **settings).tokens

    whole = stream()
    expected = [next(whole) for _ in range(40)]  # into the second epoch and beyond
    for n in (1, 2, 7, 19, 30):
        stopped = stream()
        for _ in range(n):
            next(stopped)
        resumed = stream()
        resumed.resume(*stopped.state())
        assert torch.equal(next(resumed), expected[n]), n
        assert torch.equal(next(resumed), expected[n + 1]), n


# Every command.


def test_a_sweep_loads_its_data_once_with_its_settings(model: Any, monkeypatch: pytest.MonkeyPatch):
    from e2e_sae_plugin.data import load as loading

    loaded: list[DataSettings] = []
    real = loading.load_data
    monkeypatch.setattr(
        loading, "load_data", lambda settings, context: loaded.append(settings) or real(settings, context)
    )
    Path("a.jsonl").write_text(rows(TEXTS, "body"))
    data: dict[str, Any] = {"dataset_path": "a.jsonl", "text_column": "body", "shuffle_seed": 2, "streaming": False}
    base = runner_config(hook_name="transformer.h.0", **data)
    config = SweepConfig(base, {"e2e": SweepKind(Objective.e2e(), (0.1, 0.2))}, "sweep")
    assert len(SweepRunner(config, override_model=model).run()) == 2
    assert loaded == [DataSettings(**data)]
    with pytest.raises(ValueError, match="text_column='body' has no effect with override_dataset"):
        SweepRunner(SweepConfig(base, config.kinds, "other"), model, Dataset.from_dict({"text": TEXTS})).run()


GUARD = """
import os, socket, sys
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)
def refuse(*_, **__):
    print("a request went out", file=sys.stderr)
    os._exit(9)
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from e2e_sae_plugin.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_local_data_need_no_network(here: Path):
    source = "\n".join(f"def function_{i}(x): return x + {i}" for i in range(3000))
    Path("code.txt").write_text(source)
    Path("guard.py").write_text(GUARD)
    train = [
        "train", "--model_name", "e2e-sae-demo", "--dataset_path", "code.txt", "--hook_name", "blocks.3.hook_resid_pre",
        "--architecture", "topk", "--d_in", "128", "--d_sae", "256", "--k", "8", "--training_tokens", "2048",
        "--train_batch_size_tokens", "512", "--store_batch_size_prompts", "4", "--n_eval_batches", "1",
        "--eval_batch_size_prompts", "2", "--output_path", "sae", "--checkpoint_path", "ck", "--log_to_wandb", "false",
        "--max_examples", "2000", "--shuffle_seed", "1", "--verbose", "false",
    ]  # fmt: skip
    evaluate = ["evaluate", "sae", "--tokens", "1k", "--dataset", "code.txt", "--skip-examples", "2000"]
    for command in (train, evaluate):
        done = subprocess.run(
            [sys.executable, "guard.py", *command], capture_output=True, text=True,
            env={**os.environ, "HF_HOME": str(here / "home"), "HF_DATASETS_CACHE": str(here / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "trust_remote_code" not in done.stderr


def test_commands_say_what_they_cannot_read(capsys: pytest.CaptureFixture[str], here: Path):
    small = StandardSAE(StandardSAEConfig(d_in=128, d_sae=64))
    small.cfg.metadata = sae(hook_name="blocks.3.hook_resid_pre", model_name="e2e-sae-demo").cfg.metadata
    small.save_model("sae")
    latin("a.txt")
    tune = ["finetune", "--sae", "sae", "--output", "out", "--tokens", "2k", "--context-size", "128"]
    for command in (["evaluate", "sae"], ["compare", "sae"], [*tune, "--sparsity-coefficient", "1"]):
        assert main([*command, "--dataset", "a.txt", "--device", "cpu"]) == 2, command
        assert "a.txt', line 4, is not UTF-8" in capsys.readouterr().err
        assert main([*command, "--dataset", "./nope", "--device", "cpu"]) == 2
        assert "There is no file or folder './nope'" in capsys.readouterr().err


@pytest.mark.parametrize("model_class", ["HookedTransformer", "TransformerBridge", "AutoModelForCausalLM"])
def test_commands_say_that_there_is_no_such_model(model_class: str, capsys: pytest.CaptureFixture[str]):
    StandardSAE(StandardSAEConfig(d_in=128, d_sae=64)).save_model("sae")
    Path("empty").mkdir()
    flags = ["--model-class", model_class, "--hook", "x", "--device", "cpu"]
    messages = {"./nope": "There is no folder './nope'", "empty": "'empty' (model_name, --model) holds no model"}
    for name, message in messages.items():
        assert main(["evaluate", "sae", "--model", name, *flags]) == 2
        assert message in capsys.readouterr().err
