"""One definition of the measured tokens: recorded with results, settable everywhere, and compared."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LoggingConfig, StandardSAE, StandardSAEConfig, TopKTrainingSAEConfig

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective, compare, evaluate
from e2e_sae_plugin.cli import main
from e2e_sae_plugin.demo import demo_tokens, load_demo_model
from e2e_sae_plugin.evaluation import Evaluation, MeasuredTokens, evaluate_many
from e2e_sae_plugin.evaluation.estimate import rarest_seen, share_interval
from e2e_sae_plugin.evaluation.place import Place

BOS = 0
HOOK = "blocks.3.hook_resid_pre"
NOT_RECORDED: Any = None


@pytest.fixture(scope="module")
def model() -> Any:
    return load_demo_model()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return demo_tokens("evaluation", 64)[:12]


def sae(special: Any = NOT_RECORDED, seed: int = 0, **metadata: Any) -> Any:
    torch.manual_seed(seed)
    made = StandardSAE(StandardSAEConfig(d_in=128, d_sae=64))
    made.cfg.metadata.hook_name, made.cfg.metadata.model_name = HOOK, "e2e-sae-demo"
    made.cfg.metadata.exclude_special_tokens = special
    for name, value in metadata.items():
        setattr(made.cfg.metadata, name, value)
    return made


def found(each: Any, model: Any, tokens: torch.Tensor, **settings: Any) -> Evaluation:
    return evaluate(each, model, tokens, n_resamples=20, ablations=False, **settings)


# Which special tokens are measured.


@pytest.mark.parametrize(
    ("recorded", "given", "excluded"),
    [
        (None, None, (BOS,)), (False, None, ()), (True, None, (BOS,)), ([3, 5], None, (3, 5)),
        (False, True, (BOS,)), (True, False, ()), (None, False, ()), (True, [7], (7,)),
    ],
)  # fmt: skip
def test_special_tokens_are_the_records_or_what_is_given(
    recorded: Any, given: Any, excluded: tuple[int, ...], model: Any, tokens: torch.Tensor
):
    result = found(sae(recorded), model, tokens, exclude_special_tokens=given)
    assert result.measured_on is not None
    assert result.measured_on.excluded == excluded
    n_excluded = int(torch.isin(tokens, torch.tensor(excluded)).sum()) if excluded else 0
    assert result.n_tokens == tokens.numel() - n_excluded


def test_an_sae_without_a_record_is_measured_as_the_others(model: Any, tokens: torch.Tensor):
    results = evaluate_many({"a": sae(), "b": sae(False)}, model, tokens, n_resamples=20, ablations=False)
    assert {each.n_tokens for each in results.values()} == {tokens.numel()}


def test_without_a_tokenizer_nothing_is_special(tokens: torch.Tensor):
    model = load_demo_model()
    model.tokenizer = None
    assert found(sae(), model, tokens).n_tokens == tokens.numel()
    with pytest.raises(ValueError, match=r"no tokenizer that says which these are. Give the list of their ids"):
        found(sae(), model, tokens, exclude_special_tokens=True)


def test_different_tokens_are_refused_with_what_makes_them_equal(model: Any, tokens: torch.Tensor):
    saes = {"before": sae(False), "after": sae(True, seed=1)}
    with pytest.raises(
        ValueError, match=r"excluded: \(\) and \(0,\).*Give exclude_special_tokens \(--exclude-special-tokens\)"
    ):
        compare(saes, model, tokens, n_cards=0)
    for given, n in ((True, tokens.numel() - int((tokens == BOS).sum())), (False, tokens.numel())):
        result = compare(saes, model, tokens, n_cards=0, exclude_special_tokens=given)
        assert {each.n_tokens for each in result.evaluations.values()} == {n}
    saes["after"].cfg.metadata.seqpos_slice = (3, None)
    saes["after"].cfg.metadata.exclude_special_tokens = False
    with pytest.raises(
        ValueError, match=r"Give seqpos_slice \(--seqpos-slice\) to measure all of them on the same tokens"
    ):
        compare(saes, model, tokens, n_cards=0)
    assert compare(saes, model, tokens, n_cards=0, seqpos_slice=(3, 10)).evaluations["before"].n_tokens == 7 * len(
        tokens
    )


# What is recorded.


def test_results_say_what_they_were_measured_on(model: Any, tokens: torch.Tensor, tmp_path: Path):
    source = MeasuredTokens(
        1, 1, dataset="my_text", split="test", shuffle_seed=3, rows=((4, 90), (0, 3)), prepend_bos=True
    )
    result = found(sae(), model, tokens, source=source)
    measured_on = result.measured_on
    assert measured_on is not None
    assert (measured_on.n_sequences, measured_on.context_size, measured_on.rows) == (12, 64, ((4, 90), (0, 3)))
    assert (result.model, result.text) == ("e2e-sae-demo", "my_text")
    text = str(result)
    assert text.startswith(f"sae: standard, 128 x 64 on {HOOK} of e2e-sae-demo; ")
    assert "rows 4 to 90 and 0 to 3 of my_text (test), special tokens left out" in text
    result.save(tmp_path / "found.json")
    assert Evaluation.load(tmp_path / "found.json").measured_on == measured_on
    older = {name: value for name, value in result.to_dict().items() if name not in ("measured_on", "model")}
    assert Evaluation.from_dict(older).measured_on is None


def test_two_results_say_in_which_settings_they_differ(model: Any, tokens: torch.Tensor):
    first = found(sae(), model, tokens)
    assert first.differences(found(sae(seed=1), model, tokens)) == []
    other = found(sae(False), model, tokens[:6, :32])
    assert first.differences(other) == [
        "n_sequences: 12 and 6 (--tokens)", "context_size: 64 and 32 (--context-size)",
        "excluded: (0,) and none (--exclude-special-tokens)",
    ]  # fmt: skip
    assert first.differences(found(sae(), model, tokens.flip(0))) == ["the token ids themselves (sha256)"]
    assert first.differences(replace(other, measured_on=None, model="gpt2")) == [
        "model: e2e-sae-demo and gpt2 (--model)", "the text, as the clean model's CE loss tells (--dataset, --tokens)",
    ]  # fmt: skip


def test_differences_by_hand():
    first = MeasuredTokens(4, 8, dataset="a", rows=((0, 3),), prepend_bos=True)
    same = first.of(torch.zeros(4, 8, dtype=torch.long), Place(HOOK))
    assert (same.sha256 is not None, same.rows) == (True, ((0, 3),))
    assert first.differences(replace(first, dataset="b", split="test")) == [
        "dataset: a and b (--dataset)", "split: none and test (--split)",
    ]  # fmt: skip


def test_another_model_than_the_records_is_said(model: Any, tokens: torch.Tensor):
    result = found(sae(model_name="gpt2"), model, tokens)
    assert result.warnings[-1] == "sae: It was trained on 'gpt2' (its record says), and is measured on 'e2e-sae-demo'."
    assert "Warning: sae: It was trained on 'gpt2'" in str(result)
    assert not [text for text in found(sae(), model, tokens).warnings if "trained on" in text]


# Evidence.


def test_what_a_feature_that_does_not_fire_is_below():
    assert rarest_seen(1) == pytest.approx(0.95)
    assert rarest_seen(3000) == pytest.approx(1 / 1001.9, rel=1e-3)
    low, high = share_interval(0, 10)
    assert (low, high) == (0, pytest.approx(0.2775, abs=1e-4))
    assert share_interval(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))


def test_a_few_tokens_call_no_feature_dead(model: Any, tokens: torch.Tensor):
    made = sae()
    with torch.no_grad():
        made.b_enc.fill_(-1e6)
    result = found(made, model, tokens[:1, :6])
    assert result.warnings[0] == "No feature of sae fires on these 5 tokens."
    assert "0  of 64 (the others fire on fewer than 1 in 2 tokens, 95%)" in str(result)


# The command line.


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local SAE of the bundled model, as docs/guides/finetuning.md trains it, for fewer steps."""
    monkeypatch.chdir(tmp_path)
    cfg = E2ESAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=128, d_sae=128, k=8, normalize_activations="expected_average_only_in"),
        objective=Objective.local(), model_name="e2e-sae-demo", hook_name=HOOK, dataset_path="e2e-sae-demo", context_size=64,
        training_tokens=10 * 512, train_batch_size_tokens=512, store_batch_size_prompts=8, b_dec_init_method="mean", lr=4e-3,
        n_batches_for_norm_estimate=2, n_eval_batches=1, output_path="local", checkpoint_path=None, verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    E2ESAETrainingRunner(cfg).run()
    return tmp_path


@pytest.mark.slow
def test_the_documented_before_and_after(trained: Path, capsys: pytest.CaptureFixture[str], caplog: Any):
    """docs/guides/finetuning.md: fine-tune, then compare before with after."""
    tune = [
        "--tokens", "2048", "--evaluation-tokens", "1024", "--batch-tokens", "512", "--no-checkpoints", "--device", "cpu",
        "--set", "verbose=false",
    ]  # fmt: skip
    assert main(["finetune", "--sae", "local", "--output", "tuned", *tune]) == 0
    assert "trained on" not in caplog.text
    flags = ["--device", "cpu", "--tokens", "1024", "--cards", "0"]
    assert main(["compare", "before=local", "after=tuned", *flags, "--output", "compared"]) == 0
    assert "special tokens" not in Path("compared/report.md").read_text()
    report = json.loads(Path("tuned/finetune_report.json").read_text())
    (evaluation,) = (
        json.loads(Path(f"compared/evaluations/{name}.json").read_text())["evaluation"] for name in ("after",)
    )
    for name in ("excluded", "seqpos_slice", "context_size"):
        assert report["measured_on"][name] == evaluation["measured_on"][name], name
    # The same rows give the numbers of the report, too.
    first, last = report["measured_on"]["rows"][0]
    capsys.readouterr()
    rows = ["--skip-examples", str(first), "--max-examples", str(last - first + 1)]
    assert main(["evaluate", "local", *flags[:4], "--output", "found.json", *rows]) == 0
    found = Evaluation.load("found.json")
    assert found.value("kl") == pytest.approx(report["estimates"]["kl"]["before"]["value"], rel=1e-4)
    assert found.value("ce_loss_without_sae") == pytest.approx(report["ce_loss_without_sae"], rel=1e-5)


@pytest.mark.slow
def test_flags_change_which_tokens_are_measured(trained: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["evaluate", "local", "--device", "cpu", "--tokens", "1k", "--output", "found.json"]
    counts: dict[str, int] = {}
    for name, more in {
        "recorded": [], "no": ["--exclude-special-tokens", "no"], "yes": ["--exclude-special-tokens", "yes"],
        "ids": ["--exclude-special-tokens", "0,5"], "positions": ["--seqpos-slice", "1", "4"],
    }.items():  # fmt: skip
        assert main([*flags, *more]) == 0
        counts[name] = Evaluation.load("found.json").n_tokens
    assert counts["recorded"] == counts["no"] == 15 * 64  # the record says False
    assert counts["yes"] < counts["no"]
    assert counts["ids"] <= counts["yes"]
    assert counts["positions"] == 15 * 3
    with pytest.raises(SystemExit):
        main([*flags, "--exclude-special-tokens", "maybe"])
    assert "expected yes, no, or token ids such as 0,2; got 'maybe'" in capsys.readouterr().err


def test_bos_can_be_left_out_of_the_text(trained: Path, caplog: pytest.LogCaptureFixture):
    Path("code.txt").write_text("\n".join(f"def name_{i}(x): return x + {i}" for i in range(2000)))
    flags = [
        "evaluate",
        "local",
        "--device",
        "cpu",
        "--tokens",
        "1k",
        "--dataset",
        "code.txt",
        "--output",
        "found.json",
    ]
    with caplog.at_level(logging.INFO):
        results: dict[str, Evaluation] = {}
        for name in ("yes", "no"):
            assert main([*flags, "--prepend-bos", name]) == 0
            results[name] = Evaluation.load("found.json")
    (difference,) = [each for each in results["yes"].differences(results["no"]) if "prepend_bos" in each]
    assert difference == "prepend_bos: True and False (--prepend-bos)"
    assert "Measured on rows 0 to" in caplog.text
