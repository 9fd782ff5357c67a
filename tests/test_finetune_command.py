"""`e2e-sae finetune` from a shell: a folder to a folder, flags, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import runner_config, sae_config, tiny_gpt2_model, tiny_tokenizer, training_sae
from sae_lens import SAE

from e2e_sae_plugin.cli import main
from e2e_sae_plugin.command_line.parser import number_of_tokens

pytestmark = pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, an SAE of it and a folder of text, all on the disk."""
    monkeypatch.chdir(tmp_path)
    tiny_gpt2_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    Path("corpus").mkdir()
    lines = [{"text": " ".join(f"t{4 + (7 * i + i * j) % 60}" for j in range(40))} for i in range(200)]
    Path("corpus/data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for architecture in ("topk", "standard"):
        sae = training_sae(runner_config(architecture, sae={"d_in": 16}))
        sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "model", "transformer.h.1"
        sae.cfg.metadata.model_class_name, sae.cfg.metadata.context_size = "AutoModelForCausalLM", 8
        sae.cfg.metadata.dataset_path, sae.cfg.metadata.prepend_bos = "corpus", True
        sae.save_inference_model(architecture)
    return tmp_path


def finetune(*flags: str) -> int:
    return main(["finetune", "--device", "cpu", "--evaluation-tokens", "256", "--output", "tuned", *flags])


def test_a_folder_becomes_a_folder_with_the_same_features_and_a_report(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    status = finetune("--sae", "topk", "--tokens", "1.28k", "--lr", "1e-3", "--set", "patience_evaluations=null")
    assert status == 0
    shown = capsys.readouterr().out
    for text in ("Before: CE loss increase", "held-out KL", "share of the gap closed", "mean the same"):
        assert text in shown
    tuned = SAE.load_from_disk("tuned")
    assert tuned.cfg.metadata.finetuned_from["source"] == "topk"
    assert tuned.cfg.metadata.finetuning["training_tokens"] == 1280
    assert tuned.cfg.metadata.exclude_special_tokens is True
    told = json.loads(Path("tuned/finetune_report.json").read_text())
    assert (told["training_tokens"], told["evaluation_sequences"]) == (1280, 32)
    assert Path("tuned/finetune_features.csv").read_text().count("\n") == sae_config().d_sae + 1
    assert json.loads(Path("tuned/e2e_runner_cfg.json").read_text())["lr"] == 1e-3


def test_an_output_that_is_taken_is_refused_and_replaced_on_demand(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert finetune("--sae", "topk", "--tokens", "128", "--trained", "decoder") == 0
    assert finetune("--sae", "topk", "--tokens", "128", "--trained", "lora", "--lora-rank", "2") == 2
    assert "output_path='tuned' holds another run" in capsys.readouterr().err
    assert finetune("--sae", "topk", "--tokens", "128", "--trained", "lora", "--lora-rank", "2", "--overwrite") == 0
    assert SAE.load_from_disk("tuned").cfg.metadata.finetuning["trained_parameters"][0] == "W_dec.A"


def test_a_run_goes_on_by_itself(folder: Path, capsys: pytest.CaptureFixture[str]):
    flags = ("--sae", "topk", "--tokens", "256", "--checkpoint-path", "checkpoints", "--resume", "auto")
    assert finetune(*flags) == 0
    weights = Path("tuned/sae_weights.safetensors").stat().st_mtime_ns
    assert finetune(*flags) == 0
    assert "This run is finished" in capsys.readouterr().out
    assert Path("tuned/sae_weights.safetensors").stat().st_mtime_ns == weights


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--sae", "nowhere"),
            "taken for a release of SAELens or a Hub repository, and needs a sae_id",
        ),
        (("--sae", "corpus"), "holds no SAE. Supported formats: SAELens"),
        (("--sae", "topk", "--tokens", "10"), "training_tokens=10 is less than one step"),
        (("--sae", "topk", "--model", "gpt2"), "model_name='model', not 'gpt2'"),
        (("--sae", "topk", "--hook", "transformer.h.0"), "hook_name='transformer.h.1', not 'transformer.h.0'"),
        (("--sae", "topk", "--sparsity-coefficient", "3"), "--sparsity-coefficient has no effect: architecture 'topk'"),
        (("--sae", "topk", "--set", "learning_rate=1"), "Unknown key 'learning_rate'"),
        (("--sae", "topk", "--set", "lr=[1"), "--set 'lr=[1' is not a value in YAML"),
        (("--sae", "topk", "--set", "trained=decoder"), "--set cannot set trained: use --trained"),
        (("--sae", "topk", "--device", "gpu"), "--device='gpu' cannot be used here"),
        (("--sae", "topk/cfg.json"), "'topk/cfg.json' is a file. Give the folder that it lies in"),
        (("--sae", "topk", "--set", "lr"), "--set takes FIELD=VALUE, got 'lr'"),
        (("--sae", "topk", "--resume", "auto", "--no-checkpoints"), "looks below checkpoint_path, which is None"),
        (("--sae", "standard", "--tokens", "640"), "the SAE's reconstructions are shrunk as by about"),
    ],
)
def test_what_is_refused(flags: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert finetune(*flags) == 2
    assert message in capsys.readouterr().err
    assert not Path("tuned/cfg.json").exists()


def test_a_coefficient_of_the_users_is_taken(folder: Path):
    assert finetune("--sae", "standard", "--tokens", "128", "--sparsity-coefficient", "0.5") == 0
    assert json.loads(Path("tuned/e2e_runner_cfg.json").read_text())["sae"]["l1_coefficient"] == 0.5


@pytest.mark.parametrize(("text", "number"), [("25M", 25_000_000), ("1.5k", 1500), ("2e6", 2_000_000), ("128", 128)])
def test_numbers_of_tokens(text: str, number: int):
    assert number_of_tokens(text) == number


@pytest.mark.parametrize("text", ["", "M", "x", "-5", "0", "1.5", "inf", "nan"])
def test_what_is_no_number_of_tokens_is_refused(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["finetune", "--sae", "x", "--output", "y", f"--tokens={text}"])
    assert exit_info.value.code == 2
    assert "expected a number of tokens such as 25M" in capsys.readouterr().err
