"""`e2e-sae evaluate` and `e2e-sae compare` from a shell, on the bundled model."""

from __future__ import annotations

import functools
import logging
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from test_comparison import made_up_sae, put

from e2e_sae_plugin.cli import main
from e2e_sae_plugin.comparison import inputs
from e2e_sae_plugin.comparison.inputs import TextSettings, dataset_of, evaluation_tokens, load_model_of, text_name
from e2e_sae_plugin.comparison.report import report_in
from e2e_sae_plugin.demo import bundled, demo_tokens, load_demo_model
from e2e_sae_plugin.evaluation.result import Evaluation, weights_sha256

pytestmark = pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")

DEMO: dict[str, Any] = {"d_in": 128, "d_sae": 64, "hook_name": "blocks.3.hook_resid_pre", "model_name": "e2e-sae-demo"}


@pytest.fixture(scope="module")
def demo_model() -> Any:
    return load_demo_model()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_model: Any) -> Path:
    """SAEs of the bundled model, which is loaded once; its text is tokenised once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundled, "load_demo_model", lambda device: demo_model.to(device))
    monkeypatch.setattr(inputs, "demo_tokens", held_out)
    for kind in ("local", "e2e"):
        for seed in (0, 1):
            made_up_sae(kind, 4.0, seed, context_size=128, **DEMO).save_model(f"saes/{kind}-{seed}")
    return tmp_path


held_out = functools.cache(demo_tokens)


def evaluate(*flags: str) -> int:
    return main(["evaluate", "--device", "cpu", "--tokens", "1k", *flags])


def compare(*flags: str) -> int:
    return main(["compare", "--device", "cpu", "--tokens", "1k", *flags])


def test_evaluate_prints_a_table_and_writes_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert evaluate("saes/e2e-0", "--output", "new/found.json") == 0
    shown = capsys.readouterr().out
    found = Evaluation.load("new/found.json")
    assert (found.name, found.n_sequences, found.n_tokens) == ("e2e-0", 7, 7 * 128)
    assert found.to_dict() == Evaluation.from_dict(found.to_dict()).to_dict()
    assert f"{found.value('ce_loss_increase'):+.4f}" in shown
    assert (
        "e2e-0: standard, 128 x 64 on blocks.3.hook_resid_pre of e2e-sae-demo; 896 tokens in 7 sequences of e2e-sae-demo\n"
        "  tokens                               e2e-sae-demo (evaluation)\n"
    ) in shown
    assert found.text == "e2e-sae-demo"
    assert found.weights_sha256 == weights_sha256(SAE.load_from_disk("saes/e2e-0"))


def test_compare_writes_a_report_and_goes_on_from_it(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    flags = ("saes", "--output", "out", "--cards", "1", "--exact", "2", "--title", "Both kinds")
    assert compare(*flags) == 0
    shown = capsys.readouterr().out
    assert "CE loss increase" in shown
    assert "Replaces" not in shown
    assert "The report is out/report.html; beside it report.md, tables/, figures/ and importance/." in shown
    text = Path("out/report.md").read_text()
    assert text.startswith("# Both kinds\n\n4 SAEs on blocks.3.hook_resid_pre of e2e-sae-demo")
    assert "896 tokens in 7 sequences of e2e-sae-demo (evaluation); clean CE loss" in text
    assert sorted(path.name for path in Path("out/evaluations").iterdir()) == [
        "e2e-0.json", "e2e-1.json", "local-0.json", "local-1.json",
    ]  # fmt: skip
    assert len(list(Path("out/importance").iterdir())) == 4
    with caplog.at_level(logging.INFO):
        assert compare(*flags) == 0
    assert "4 of 4 evaluations are those in out/evaluations." in caplog.text
    assert Path("out/report.md").read_text() == text
    written = datetime.fromtimestamp(Path("out/report.md").stat().st_mtime)
    assert 'Replaces the report "Both kinds" of 4 SAEs (' in capsys.readouterr().out
    assert report_in(Path("out")) == f'"Both kinds" of 4 SAEs ({written:%Y-%m-%d %H:%M})'
    assert report_in(Path("saes")) is None
    assert compare("saes/e2e-0", "--output", "out", "--cards", "0") == 0
    assert 'Replaces the report "Both kinds" of 4 SAEs' in capsys.readouterr().out
    assert str(report_in(Path("out"))).startswith('"SAEs compared" of 1 SAE (')


def test_a_folder_of_checkpoints_is_refused_with_the_nearest_sae(folder: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("old/9000", "run/512", "run/10240", "run/2560", "run/best"):
        made_up_sae("e2e", **DEMO).save_model(f"ck/{name}")
    for name, written in (("old/9000", 1), ("run/512", 4), ("run/10240", 2), ("run/2560", 3), ("run/best", 5)):
        os.utime(f"ck/{name}/cfg.json", (written, written))
    Path("ck/run/99999").mkdir()
    Path("ck/run/99999/cfg.json").write_text("{}")  # without weights
    for command in (["evaluate", "ck"], ["push", "me/demo", "ck", "--dry-run"]):
        assert main(command) == 2
        assert "nor does a folder in it. Did you mean ck/run/10240?" in capsys.readouterr().err
    Path("deep").mkdir()
    Path("ck").rename("deep/ck")
    assert main(["evaluate", "deep"]) == 2
    assert "Did you mean deep/ck/run/10240?" in capsys.readouterr().err


def test_labels_name_and_group(folder: Path):
    assert compare("before=saes/e2e-0", "after=saes/e2e-1", "--output", "out", "--cards", "0") == 0
    text = Path("out/tables/saes.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in text[1:]] == [["after", "after"], ["before", "before"]]
    assert not Path("out/importance").exists()


def test_warnings_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]):
    sae = made_up_sae("e2e", **DEMO)
    put(sae, b_enc=-1e9)
    sae.save_model("dead")
    assert compare("dead", "--output", "out") == 0
    assert "Warning: No feature of dead fires on these 896 tokens." in capsys.readouterr().out
    assert evaluate("dead") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("nowhere",), "There is no folder 'nowhere'. Expected a folder, or RELEASE:SAE_ID"),
        (("saes/e2e-0", "saes/e2e-0"), "e2e-0 and e2e-0' are one SAE, weight for weight"),
        (("saes", "--cards", "-1"), "--cards and --exact take whole numbers from 0 on, got -1 and 0"),
        (("saes", "--exact", "3", "--cards", "0"), "--exact has no effect without cards"),
        (("saes", "other_hook"), "not at the same place of the model"),
        (("saes", "other_model"), "SAEs of different models cannot be compared as if equal"),
        (
            ("saes", "narrow"),
            "narrow has d_in=16, but the activations at 'blocks.3.hook_resid_pre' have 128 dimensions",
        ),
        (("broken",), "broken: b_dec is not finite"),
        (("saes", "--device", "gpu"), "--device='gpu' cannot be used here"),
        (("saes", "--context-size", "300"), "context_size=300 is longer than the model's context of 256 tokens"),
        (("saes", "--context-size", "1"), "context_size (--context-size) must be at least 2, got 1"),
        (("saes", "--context-size", "0"), "context_size (--context-size) must be at least 2, got 0"),
        (("saes", "--batch-prompts", "0"), "batch_size_prompts must be at least 1, got 0"),
        (("nameless",), "The SAE's metadata name no model. Give model_name (--model)"),
        (
            ("nameless", "--model", "e2e-sae-dem"),
            "no model that TransformerLens knows. The nearest names: e2e-sae-demo, ",
        ),
    ],
)
def test_what_is_refused(flags: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    made_up_sae("e2e", **{**DEMO, "hook_name": "blocks.2.hook_resid_pre"}).save_model("other_hook")
    made_up_sae("e2e", **{**DEMO, "model_name": "gpt2"}).save_model("other_model")
    made_up_sae("e2e", **{**DEMO, "d_in": 16}).save_model("narrow")
    made_up_sae("e2e", **{**DEMO, "model_name": None}).save_model("nameless")
    broken = made_up_sae("e2e", **DEMO)
    with torch.no_grad():
        broken.b_dec[0] = float("nan")
    broken.save_model("broken")
    assert compare("--output", "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not Path("out/report.html").exists()


def test_evaluate_takes_one_sae(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert evaluate("saes") == 2
    assert "'saes' holds 4 SAEs. Name one of them, use e2e-sae compare, or" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--tokens", "0"), ("--model-class", "Mamba"), ("--card", "3")])
def test_flags_that_do_not_exist_exit_with_2(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "saes", *flags])
    assert exit_info.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("evaluate", ("--output FILE", "95 % intervals", "e2e-sae evaluate demo_output/e2e")),
        ("compare", ("--output DIR", "--cards N", "--exact N", "--title", "LABEL=SAE", "report.html", "Interrupted")),
    ],
)
def test_help(command: str, parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for part in (*parts, "--tokens", "--dataset", "--hook", "default 100k", "examples:"):
        assert part in text


# Model and text.


@pytest.fixture
def texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of text files; what `datasets` makes of it stays in the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    (folder / "corpus").mkdir()
    for i in range(3):
        lines = "".join(f"def function_{i}_{j}(value):\n    return value + {j}\n" for j in range(40))
        (folder / f"corpus/{i}.txt").write_text(lines)
    return "corpus"


def test_text_of_ones_own_is_measured_on(folder: Path, texts: str):
    assert evaluate("saes/e2e-0", "--dataset", texts, "--output", "own.json") == 0
    assert evaluate("saes/e2e-0", "--output", "demo.json") == 0
    own, demo = Evaluation.load("own.json"), Evaluation.load("demo.json")
    assert own.n_sequences == demo.n_sequences == 7
    assert own.value("ce_loss_without_sae") != demo.value("ce_loss_without_sae")
    assert (own.text, demo.text) == ("corpus", "e2e-sae-demo")


def test_what_text_is_called(folder: Path):
    Path("texts/mine").mkdir(parents=True)
    for dataset, name in (
        ("Skylion007/openwebtext", "Skylion007/openwebtext"), ("texts/mine/", "mine"),
        ("/data/on/another/machine", "machine"), (str(folder / "texts"), "texts"), (".", folder.name), ("", None),
        (None, None),
    ):  # fmt: skip
        assert text_name(dataset) == name
    assert dataset_of(made_up_sae(**DEMO)) == "e2e-sae-demo"
    assert dataset_of(made_up_sae(**DEMO), "other") == "other"
    assert dataset_of(made_up_sae(**{**DEMO, "model_name": "gpt2"}, dataset_path="a/b")) == "a/b"


def test_short_text_is_used_whole_and_says_so(folder: Path, texts: str, demo_model: Any, caplog: Any):
    sae = made_up_sae("e2e", **DEMO)
    text = TextSettings(texts, context_size=64)
    tokens, source = evaluation_tokens({"sae": sae}, demo_model, 100_000, text)
    assert (source.dataset, source.prepend_bos) == ("corpus", True)
    assert tokens.shape[1] == 64
    assert 5 < len(tokens) < 100_000 // 64
    assert (tokens[:, 0] == demo_model.tokenizer.bos_token_id).all()
    assert f"{texts} has only {len(tokens)} of the 1562 sequences of 64 tokens." in caplog.text
    Path("tiny").mkdir()
    Path("tiny/a.txt").write_text("x\n")
    with pytest.raises(ValueError, match=r"'tiny' has no sequence of 256 tokens\. Use more text"):
        evaluation_tokens({"sae": sae}, demo_model, 1000, TextSettings("tiny", context_size=256))


def test_text_of_the_bundled_model_is_what_nobody_trained_on(folder: Path, demo_model: Any):
    for sae in (made_up_sae(**DEMO), made_up_sae(**DEMO, dataset_path="something/else")):
        tokens, source = evaluation_tokens({"sae": sae}, demo_model, 1000)
        assert torch.equal(tokens, held_out("evaluation", 128)[:7])
        assert (source.dataset, source.split) == ("e2e-sae-demo", "evaluation")
    nameless = made_up_sae(**{**DEMO, "model_name": None})
    again, _ = evaluation_tokens({"sae": nameless}, demo_model, 1000, TextSettings("e2e-sae-demo"))
    assert torch.equal(again, tokens)
    with pytest.raises(ValueError, match=r"metadata name no dataset\. Give dataset \(--dataset\)"):
        evaluation_tokens({"sae": nameless}, demo_model, 1000)


def test_the_model_is_the_metadatas_or_the_one_that_is_given(folder: Path, demo_model: Any, monkeypatch: Any):
    assert load_model_of(made_up_sae(**DEMO)) is demo_model
    assert load_model_of(made_up_sae(**{**DEMO, "model_name": "gpt2"}), model_name="e2e-sae-demo") is demo_model
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(inputs, "load_language_model", lambda *what: asked.append(what))
    sae = made_up_sae(model_name="gpt2", model_from_pretrained_kwargs={"center_writing_weights": False})
    load_model_of(sae, dtype="bfloat16")
    sae.cfg.metadata.model_class_name = "AutoModelForCausalLM"
    load_model_of(sae)
    assert asked == [
        ("HookedTransformer", "gpt2", "cpu", {"center_writing_weights": False, "dtype": "bfloat16"}),
        ("AutoModelForCausalLM", "gpt2", "cpu", {"center_writing_weights": False}),
    ]


def test_a_damaged_sae_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "sae"
    made = StandardSAE(StandardSAEConfig(d_in=128, d_sae=64))
    made.cfg.metadata.model_name, made.cfg.metadata.hook_name = "e2e-sae-demo", "blocks.3.hook_resid_pre"
    made.save_model(folder)
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert main(["evaluate", str(folder)]) == 2
    assert f"The SAE in {str(folder)!r} is corrupt" in capsys.readouterr().err


def saved_sae(folder: Path) -> str:
    made = StandardSAE(StandardSAEConfig(d_in=128, d_sae=64))
    made.cfg.metadata.model_name, made.cfg.metadata.hook_name = "e2e-sae-demo", "blocks.3.hook_resid_pre"
    made.save_model(folder)
    return str(folder)


def test_the_bundled_model_is_loaded_as_one_class_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", saved_sae(tmp_path / "sae"), "--model-class", "TransformerBridge"]) == 2
    assert "--model-class" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_bundled_model_is_loaded_in_the_dtype_that_is_asked_for(dtype: str, tmp_path: Path):
    sae = SAE.load_from_disk(saved_sae(tmp_path / "sae"))
    model = load_model_of(sae, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
