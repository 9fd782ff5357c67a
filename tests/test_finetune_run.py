"""A fine-tune from a finished SAE to a finished SAE: every architecture and family, resumes, the report, what is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BUILT_IN_ARCHITECTURES,
    D_HEAD,
    D_MODEL,
    N_HEADS,
    proxy,
    runner_config,
    tiny_bridge,
    tiny_gpt2_model,
    tiny_hooked_transformer,
    tiny_llama_model,
    tiny_tokenizer,
    token_dataset,
    training_sae,
)
from marks import slow_except
from rounding import sum_bound
from sae_lens import SAE

from e2e_sae_plugin import FinetuneRunner, finetune_config
from e2e_sae_plugin.evaluation import measure, reconstruct_with
from e2e_sae_plugin.finetune import runner as runner_module
from e2e_sae_plugin.finetune.checks import implied_l1_coefficient
from e2e_sae_plugin.finetune.start import finished_form, same_weights, training_counterpart

HOOK = "blocks.1.hook_resid_pre"


def finished(folder: Path, architecture: str = "topk", sae: dict[str, Any] | None = None, **metadata: Any) -> SAE[Any]:
    """A trained SAE's export, as `SAE.load_from_disk` gives it, with the metadata that SAELens writes."""
    config = runner_config(architecture, sae=sae, hook_name=metadata.get("hook_name", HOOK))
    training_sae(config).save_inference_model(str(folder))
    loaded = SAE.load_from_disk(str(folder))
    known = {"model_name": "tiny", "hook_name": HOOK, "context_size": 8, "dataset_path": "tiny", "prepend_bos": True}
    for name, value in {**known, **metadata}.items():
        loaded.cfg.metadata[name] = value
    return loaded


def runner_of(sae: SAE[Any], model: Any = None, **settings: Any) -> FinetuneRunner:
    force = settings.pop("force", False)
    defaults: dict[str, Any] = {
        "training_tokens": 32 * 6, "train_batch_size_tokens": 32, "store_batch_size_prompts": 4, "evaluation_tokens": 256,
        "lr": 1e-2, "checkpoint_path": None, "output_path": None, "exclude_special_tokens": [1, 2, 3], "verbose": False,
    }  # fmt: skip
    return FinetuneRunner(
        finetune_config(sae, force=force, **{**defaults, **settings}),
        sae,
        source="a test",
        force=force,
        override_dataset=token_dataset(),
        override_model=tiny_hooked_transformer() if model is None else model,
    )


@pytest.fixture(autouse=True)
def _coefficients_are_free(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The tiny SAEs are not trained, so nothing can be told from their shrinkage."""
    if "l1" not in request.node.name:
        monkeypatch.setattr(runner_module, "check_l1_coefficient", lambda *_: None)


@pytest.mark.parametrize("architecture", slow_except(BUILT_IN_ARCHITECTURES, "standard", "jumprelu", "batchtopk"))
def test_every_architecture_starts_from_the_original_and_ends_in_its_form(architecture: str, tmp_path: Path):
    original = finished(tmp_path / "original", architecture)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    runner = runner_of(original, output_path=str(tmp_path / "tuned"))
    assert same_weights(finished_form(runner.sae, original), original)  # pyright: ignore[reportArgumentType]
    tuned = runner.run()
    assert all(torch.equal(before[name], value) for name, value in original.state_dict().items())
    loaded = SAE.load_from_disk(str(tmp_path / "tuned"))
    assert type(loaded) is type(original)
    assert same_weights(loaded, tuned)
    for name, value in before.items():
        assert torch.equal(loaded.state_dict()[name], value) == (name in ("threshold", "topk_threshold")), name
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), original.W_dec.norm(dim=1), rtol=sum_bound(D_MODEL), atol=0)
    assert {name: value for name, value in vars(loaded.cfg).items() if name != "metadata"} == {
        name: value for name, value in vars(original.cfg).items() if name != "metadata"
    }


def test_the_metadata_tell_where_it_comes_from(tmp_path: Path):
    original = finished(tmp_path / "original", neuronpedia_id="tiny/1-res/7", l0=99.0)
    runner_of(original, output_path=str(tmp_path / "tuned")).run()
    metadata = SAE.load_from_disk(str(tmp_path / "tuned")).cfg.metadata
    lineage = metadata.finetuned_from
    assert (lineage["source"], lineage["hook_name"], lineage["neuronpedia_id"]) == ("a test", HOOK, "tiny/1-res/7")
    assert len(lineage["weights_sha256"]) == 64
    assert metadata.finetuning["training_tokens"] == 32 * 6
    assert metadata.finetuning["trained_parameters"] == ["W_dec", "W_enc", "b_dec", "b_enc"]
    assert (metadata.objective["balance_kl"], metadata.neuronpedia_id) == (True, None)
    assert metadata.exclude_special_tokens == [1, 2, 3]
    assert metadata.l0 is None  # of the original
    assert lineage["l0"] == 99
    assert metadata.training_architecture_details["aux_loss_coefficient"] == 1
    # A fine-tune of a fine-tune keeps the whole line.
    second = SAE.load_from_disk(str(tmp_path / "tuned"))
    runner_of(second, output_path=str(tmp_path / "twice")).run()
    assert SAE.load_from_disk(str(tmp_path / "twice")).cfg.metadata.finetuned_from["finetuned_from"] == lineage


@pytest.mark.parametrize(
    ("trained", "moves"),
    [
        ("all", {"W_enc", "b_enc", "W_dec", "b_dec"}),
        ("decoder", {"W_dec", "b_dec"}),
        ("scale_and_bias", {"W_dec", "b_dec"}),
        ("lora", {"W_enc", "b_enc", "W_dec", "b_dec"}),
    ],
)
def test_what_is_trained_moves_and_nothing_else(trained: Any, moves: set[str], tmp_path: Path):
    original = finished(tmp_path, "jumprelu", {"jumprelu_init_threshold": 0.1})
    runner = runner_of(original, trained=trained)
    tuned = runner.run()
    assert {
        name for name, value in original.state_dict().items() if not torch.equal(value, tuned.state_dict()[name])
    } == moves
    if trained == "scale_and_bias":
        assert runner.report is not None
        assert float(runner.report.movement.decoder.min()) == pytest.approx(1)


@pytest.mark.slow
def test_enough_steps_close_part_of_the_gap(tmp_path: Path):
    runner = runner_of(finished(tmp_path), training_tokens=32 * 100, lr=3e-2, patience_evaluations=None)
    runner.run()
    report = runner.report
    assert report is not None
    estimates = report.estimates()
    assert estimates["kl"]["change"]["high"] < 0
    assert estimates["kl"]["after"]["value"] < 0.9 * estimates["kl"]["before"]["value"]
    assert not any("KL has grown" in text for text in report.warnings())
    turned = dataclasses.replace(report, before=report.after, after=report.before)
    assert "Warning: The KL has grown: lower lr" in str(turned)


@pytest.mark.parametrize("family", slow_except(["hooked_transformer", "bridge", "gpt2", "llama"], "llama"))
def test_every_family_in_bfloat16_under_an_sae_in_fp32(family: str, tmp_path: Path):
    model = {
        "hooked_transformer": lambda: tiny_hooked_transformer().to(torch.bfloat16),
        "bridge": lambda: tiny_bridge().to(torch.bfloat16),
        "gpt2": lambda: proxy(tiny_gpt2_model().bfloat16()),
        "llama": lambda: proxy(tiny_llama_model().bfloat16()),
    }[family]()
    hook = {"gpt2": "transformer.h.0", "llama": "model.layers.0", "bridge": "blocks.1.hook_in"}.get(family, HOOK)
    original = finished(tmp_path, hook_name=hook, model_name=None)
    runner = runner_of(original, model, model_name="tiny", training_tokens=64)
    tuned = runner.run()
    assert (tuned.W_dec.dtype, runner.trainer.n_skipped_steps) == (torch.float32, 0)
    assert not same_weights(original, tuned)


def test_an_sae_that_reshapes_heads_by_itself(tmp_path: Path):
    hook = "blocks.1.attn.hook_z"
    original = finished(tmp_path / "o", "standard", {"reshape_activations": "hook_z"}, hook_name=hook)
    assert original.hook_z_reshaping_mode
    assert original.cfg.d_in == N_HEADS * D_HEAD
    runner_of(original, output_path=str(tmp_path / "tuned")).run()
    assert SAE.load_from_disk(str(tmp_path / "tuned")).hook_z_reshaping_mode


def test_the_report_is_what_the_two_saes_measure(tmp_path: Path):
    original = finished(tmp_path / "original")
    runner = runner_of(original, output_path=str(tmp_path / "tuned"))
    tuned = runner.run()
    assert runner.report is not None
    told = json.loads((tmp_path / "tuned" / "finetune_report.json").read_text())
    for when, sae in (("before", original), ("after", tuned)):
        found = measure(
            reconstruct_with(sae), runner.spliced_model, runner.report_tokens, excluded=torch.tensor([1, 2, 3])
        )
        for name in ("ce_loss_increase", "kl", "l0", "explained_variance"):
            estimate = told["estimates"][name][when]
            assert estimate["value"] == pytest.approx(getattr(found, name), rel=1e-5, abs=1e-7)
            assert estimate["low"] - 1e-9 <= estimate["value"] <= estimate["high"] + 1e-9
        assert told["dead_features"][when] == sae.cfg.d_sae - found.n_alive
    increases = [told["estimates"]["ce_loss_increase"][when]["value"] for when in ("before", "after")]
    has_gap = told["estimates"]["ce_loss_increase"]["before"]["low"] > 0
    assert ("gap_closed" in told["estimates"]) == has_gap
    if has_gap:
        closed = told["estimates"]["gap_closed"]["change"]["value"]
        assert closed == pytest.approx(1 - increases[1] / increases[0], rel=1e-4)
    assert len(runner.report_tokens) == 32
    assert runner.evaluation_tokens is not None
    assert len(runner.evaluation_tokens) == 4
    cosines = torch.cosine_similarity(original.W_dec, tuned.W_dec, dim=1).detach()
    assert told["cosines"]["decoder"]["median"] == pytest.approx(float(cosines.quantile(0.5)), abs=1e-5)
    assert told["cosines"]["decoder"]["minimum"] == pytest.approx(float(cosines.min()), abs=1e-5)
    table = (tmp_path / "tuned" / "finetune_report.md").read_text()
    for text in (
        "CE loss increase",
        "share of the gap closed",
        "KL",
        "L0",
        "explained variance",
        "features not firing",
    ):
        assert text in table
        assert text in str(runner.report)
    with (tmp_path / "tuned" / "finetune_features.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["feature"]) for line in lines] == list(range(32))
    verdicts = [line["verdict"] for line in lines]
    assert {v: verdicts.count(v) for v in ("same", "changed", "rare", "silent")} == runner.report.labels.counts()


def test_a_resumed_fine_tune_ends_with_the_same_sae_and_report(tmp_path: Path):
    original = finished(tmp_path / "original", "jumprelu")
    every: dict[str, Any] = {
        "checkpoint_path": str(tmp_path / "c"), "checkpoint_every_minutes": 1e-9, "keep_checkpoints": 100,
        "patience_evaluations": None,
    }  # fmt: skip
    runner_of(original, output_path=str(tmp_path / "whole"), **every).run()
    folders = [path for path in sorted((tmp_path / "c").rglob("[0-9]*")) if (path / "cfg.json").exists()]
    assert len(folders) == 6
    for index in (0, 4, 5):
        name = f"again{index}"
        runner_of(original, output_path=str(tmp_path / name), resume_from_checkpoint=str(folders[index]), **every).run()
        for file in ("sae_weights.safetensors", "cfg.json", "finetune_report.json", "finetune_features.csv"):
            assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / name / file).read_bytes(), file


def test_a_finished_fine_tune_is_not_done_again_and_its_report_is_made_up_for(tmp_path: Path):
    original = finished(tmp_path / "original")
    settings: dict[str, Any] = {
        "output_path": str(tmp_path / "out"), "checkpoint_path": str(tmp_path / "c"), "resume_from_checkpoint": "auto",
    }  # fmt: skip
    runner_of(original, **settings).run()
    report = tmp_path / "out" / "finetune_report.json"
    first, weights = report.read_bytes(), (tmp_path / "out" / "sae_weights.safetensors").stat().st_mtime_ns
    runner_of(original, **settings).run()
    report.unlink()  # as if the power had failed between the last step and the report
    tuned = runner_of(original, **settings).run()
    assert report.read_bytes() == first
    assert (tmp_path / "out" / "sae_weights.safetensors").stat().st_mtime_ns == weights
    assert same_weights(tuned, SAE.load_from_disk(str(tmp_path / "out")))


def test_another_original_does_not_go_on_from_the_checkpoint(tmp_path: Path):
    settings: dict[str, Any] = {"checkpoint_path": str(tmp_path / "c"), "checkpoint_every_minutes": 1e-9}
    runner_of(finished(tmp_path / "one"), **settings).run()
    other = finished(tmp_path / "two")
    with torch.no_grad():
        other.b_dec.add_(1)
    newest = max(path for path in (tmp_path / "c").rglob("[0-9]*") if (path / "cfg.json").exists())
    with pytest.raises(ValueError, match="override_sae is another SAE"):
        runner_of(other, **settings, resume_from_checkpoint=str(newest))


def test_a_model_by_another_name_is_refused_unless_forced(tmp_path: Path):
    original = finished(tmp_path, model_name="gpt2-small")
    model = tiny_hooked_transformer(model_name="pythia-70m")
    with pytest.raises(ValueError, match=r"override_model is 'pythia-70m', but the SAE is of model_name='gpt2-small'"):
        runner_of(original, model)
    assert runner_of(original, model, force=True).force


def test_another_tokenizer_is_refused_unless_forced(tmp_path: Path):
    original = finished(tmp_path / "original")
    model = tiny_hooked_transformer()
    model.tokenizer = tiny_tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    runner_of(original, model, output_path=str(tmp_path / "tuned")).run()
    tuned = SAE.load_from_disk(str(tmp_path / "tuned"))
    assert len(tuned.cfg.metadata.tokenizer_sha256) == 64
    assert runner_of(tuned, model)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    model.tokenizer = tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="tokenizer is not the one that the SAE was trained with"):
        runner_of(tuned, model)
    assert runner_of(tuned, model, force=True)


def test_another_width_is_refused_even_when_forced(tmp_path: Path):
    original = finished(tmp_path)
    with pytest.raises(
        ValueError, match=r"sae.d_in=16 does not match 'blocks.1.mlp.hook_post', whose activations have 32"
    ):
        runner_of(original, hook_name="blocks.1.mlp.hook_post", force=True)


def test_no_tokens_for_the_report_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="n_eval_batches=0 leaves no tokens for the report"):
        runner_of(finished(tmp_path), n_eval_batches=0, patience_evaluations=None)


def test_an_sae_that_is_not_finite_is_refused(tmp_path: Path):
    original = finished(tmp_path)
    with torch.no_grad():
        original.W_dec[3, 0] = float("nan")  # pyright: ignore[reportIndexIssue]
    with pytest.raises(ValueError, match="The SAE's W_dec is not finite"):
        runner_of(original)


def test_the_sae_that_is_fine_tuned_is_not_overwritten(tmp_path: Path):
    original = finished(tmp_path / "original")
    with pytest.raises(ValueError, match="holds the SAE that is fine-tuned, which would be lost"):
        runner_of(original, output_path=str(tmp_path / "original"), overwrite_output=True)
    assert same_weights(SAE.load_from_disk(str(tmp_path / "original")), original)


def test_a_config_of_another_sae_is_refused(tmp_path: Path):
    one, other = finished(tmp_path / "one"), finished(tmp_path / "other", sae={"k": 5})
    cfg = finetune_config(
        one, training_tokens=64, train_batch_size_tokens=32, evaluation_tokens=32, checkpoint_path=None
    )
    given: dict[str, Any] = {"override_dataset": token_dataset(), "override_model": tiny_hooked_transformer()}
    with pytest.raises(ValueError, match=r"The config has sae.k=4, but the SAE has 5: it would compute something else"):
        FinetuneRunner(cfg, other, **given)
    with pytest.raises(ValueError, match=r"The config is of a 'topk' SAE, but this one is of architecture 'gated'"):
        FinetuneRunner(cfg, finished(tmp_path / "gated", "gated"), **given)
    cfg.from_pretrained_path = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"from_pretrained_path=.* has no effect: a fine-tune starts from the SAE"):
        FinetuneRunner(cfg, one, **given)


def test_thin_evidence_is_told(tmp_path: Path):
    few = runner_of(finished(tmp_path), evaluation_tokens=8, eval_batch_size_prompts=4)
    few.run()
    assert "come from 4 sequences alone and mean little" in str(few.report)


def test_a_gap_that_is_none_has_no_share(tmp_path: Path):
    original = finished(tmp_path)
    runner = runner_of(original)
    runner.run()
    report = runner.report
    assert report is not None
    sums = report.before.sums
    sums._values["ce_spliced"] = sums._values["ce_clean"][:]
    assert "gap_closed" not in report.estimates()
    assert "none to close" in str(report)


def test_the_implied_l1_coefficient_is_that_of_an_sae_at_rest(tmp_path: Path):
    """One feature, positive inputs, `min over f of (x - f)^2 + lambda f`: f = x - lambda / 2."""
    sae = finished(tmp_path, "standard")
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        parameters: Any = dict(sae.named_parameters())
        parameters["W_enc"][0, 0] = parameters["W_dec"][0, 0] = 1
        parameters["b_enc"][0] = -0.15
    x = torch.zeros(50, 16)
    x[:, 0] = torch.linspace(1, 3, 50)
    assert implied_l1_coefficient(sae, x) == pytest.approx(0.3, rel=1e-5)


def test_an_l1_coefficient_of_other_activations_is_refused(tmp_path: Path):
    original = finished(tmp_path, "standard")
    x = tiny_hooked_transformer().run_with_cache(torch.tensor(token_dataset()["tokens"][:40]))[1][HOOK].flatten(0, 1)
    with torch.no_grad():  # shrink what a least-squares decoder would write, as an L1 does
        acts = original.encode(x)
        solution = torch.linalg.lstsq(acts, x - x.mean(0)).solution
        original.W_dec.copy_(0.95 * solution)
        original.b_dec.copy_(x.mean(0))
    original.cfg.apply_b_dec_to_input = False
    implied = implied_l1_coefficient(original, x)
    assert implied > 0
    details: Any = original.cfg.metadata.training_architecture_details
    for coefficient, is_right in ((implied, True), (30 * implied, False), (implied / 30, False)):
        details["l1_coefficient"] = coefficient
        runner = runner_of(original)
        if is_right:
            runner.run()
            continue
        with pytest.raises(ValueError, match=r"the SAE's reconstructions are shrunk as by about .*sae_settings="):
            runner.run()
    assert runner_of(original, sae_settings={"l1_coefficient": implied * 7}).run() is not None


def test_training_counterpart_leaves_the_config_alone(tmp_path: Path):
    original = finished(tmp_path)
    runner = runner_of(original)
    config = runner.cfg.sae
    training_counterpart(original, config)
    assert config.metadata.model_name is None
