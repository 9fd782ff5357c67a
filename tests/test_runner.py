"""Whole runs on tiny models: what is written, what is refused, what an interrupted run leaves."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import (
    BUILT_IN_ARCHITECTURES,
    D_HEAD,
    VOCABULARY,
    parameters_of,
    proxy,
    runner_config,
    tiny_bridge,
    tiny_gpt2_model,
    tiny_hooked_transformer,
    tiny_tokenizer,
    token_batch,
    token_dataset,
    training_sae,
)
from marks import slow_except
from sae_lens import SAE
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file
from torch import Tensor

from e2e_sae_plugin import E2ESAERunnerConfig, E2ESAETrainingRunner, Objective, build, runner
from e2e_sae_plugin.architectures import UNTRAINABLE_NORMALISATIONS
from e2e_sae_plugin.token_stream import TokenStream


def build_runner(config: E2ESAERunnerConfig, dataset: Any = None, model: Any = None, **overrides: Any) -> Any:
    return E2ESAETrainingRunner(
        config,
        override_dataset=token_dataset() if dataset is None else dataset,
        override_model=tiny_hooked_transformer() if model is None else model,
        **overrides,
    )


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cpu_activations(sae: Any, n: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    x = 3 * torch.randn(n, sae.cfg.d_in, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        acts = sae.encode(x)
        return x, acts, sae.decode(acts)


# What a run writes.


def test_a_run_writes_the_files_of_the_host_and_its_own(tmp_path: Path):
    config = runner_config(
        objective=Objective.e2e_downstream(0.01), output_path=str(tmp_path / "out"), n_eval_batches=2, verbose=True
    )
    sae = build_runner(config).run()
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "runner_cfg.json", "e2e_runner_cfg.json",
        "metrics.jsonl",
    }  # fmt: skip
    host = LanguageModelSAERunnerConfig.from_dict(json.loads((out / "runner_cfg.json").read_text()))
    assert (host.hook_name, host.lr, host.sae) == (config.hook_name, config.lr, config.sae)
    assert E2ESAERunnerConfig.from_dict(json.loads((out / "e2e_runner_cfg.json").read_text())) == config
    metadata = json.loads((out / "cfg.json").read_text())["metadata"]
    assert Objective.from_dict(metadata["objective"]) == config.objective
    assert metadata["downstream_hooks"] == ["blocks.2.hook_resid_pre"]
    assert metadata["hook_name"] == config.hook_name
    assert metadata["l0"] > 0
    sparsity = load_file(out / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (32,)
    assert (sparsity <= 0).all()
    loaded = SAE.load_from_disk(out)
    x, acts, _ = cpu_activations(loaded)
    torch.testing.assert_close(acts, sae.encode(x).detach(), rtol=1e-4, atol=1e-5)
    assert acts.abs().max() > 0.1


def test_metrics_go_to_a_file_without_wandb(tmp_path: Path):
    config = runner_config(
        objective=Objective.e2e_downstream(0.01), output_path=str(tmp_path), n_eval_batches=2, training_tokens=320
    )
    build_runner(config).run()
    lines = metrics_of(tmp_path)
    steps = [line for line in lines if "losses/kl_loss" in line]
    assert [line["step"] for line in steps] == list(range(10))
    assert [line["n_training_samples"] for line in steps] == [32 * (n + 1) for n in range(10)]
    for line in steps:
        assert line["losses/downstream_mse_loss"] > 0
        assert line["losses/mse_loss"] > 0
        assert line["losses/overall_loss"] == pytest.approx(
            line["losses/kl_loss"] + 0.01 * line["losses/downstream_mse_loss"] + line["losses/l1_loss"], rel=1e-4
        )
    evaluations = [line for line in lines if "metrics/ce_loss_increase" in line]
    assert [line["step"] for line in evaluations] == [4, 9, 10]  # every fifth step, and at the end
    for line in evaluations:
        assert line["metrics/ce_loss_increase"] == pytest.approx(
            line["metrics/ce_loss_with_sae"] - line["metrics/ce_loss_without_sae"]
        )
        assert line["metrics/held_out_downstream_mse/blocks.2.hook_resid_pre"] > 0


def test_no_output_path_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    build_runner(runner_config(n_eval_batches=1)).run()
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_starts_its_metrics_anew(tmp_path: Path):
    for _ in range(2):
        build_runner(runner_config(output_path=str(tmp_path), training_tokens=64, overwrite_output=True)).run()
    assert [line["step"] for line in metrics_of(tmp_path)] == [0, 1]


WITHOUT_US = """
import sys, warnings
warnings.simplefilter("ignore")
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "e2e_sae_plugin":
            raise ImportError("e2e_sae_plugin is not installed here")
sys.meta_path.insert(0, Blocked())
try:
    import e2e_sae_plugin
except ImportError:
    pass
else:
    sys.exit("not blocked")
import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
folder = sys.argv[1]
given = load_file(folder + "/given.safetensors")
found = {}
for name in sys.argv[2:]:
    sae = SAE.load_from_disk(folder + "/" + name)
    with torch.no_grad():
        acts = sae.encode(given["x"])
        found[name + ".acts"], found[name + ".out"] = acts.to_dense().contiguous(), sae.decode(acts).contiguous()
save_file(found, folder + "/found.safetensors")
"""


@pytest.mark.slow
def test_a_process_without_this_package_computes_the_same_activations(tmp_path: Path):
    from safetensors.torch import save_file

    expected: dict[str, Tensor] = {}
    x = torch.empty(0)
    for architecture in BUILT_IN_ARCHITECTURES:
        config = runner_config(architecture, output_path=str(tmp_path / architecture), training_tokens=96)
        build_runner(config).run()
        x, acts, out = cpu_activations(SAE.load_from_disk(tmp_path / architecture))
        expected[f"{architecture}.acts"], expected[f"{architecture}.out"] = acts.to_dense(), out
    save_file({"x": x}, tmp_path / "given.safetensors")
    command = [sys.executable, "-c", WITHOUT_US, str(tmp_path), *BUILT_IN_ARCHITECTURES]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
        assert value.abs().max() > 0.01


# What training does.


@pytest.mark.parametrize("architecture", slow_except(BUILT_IN_ARCHITECTURES, "standard", "topk", "jumprelu"))
def test_the_kl_falls_during_a_short_run(architecture: str, tmp_path: Path):
    config = runner_config(
        architecture, output_path=str(tmp_path), lr=1e-2, training_tokens=32 * 60, dead_feature_window=10
    )
    build_runner(config).run()
    kl = [line["losses/kl_loss"] for line in metrics_of(tmp_path) if "losses/kl_loss" in line]
    assert len(kl) == 60
    first, last = sum(kl[:5]) / 5, sum(kl[-5:]) / 5
    assert last < 0.8 * first, (first, last)


@pytest.mark.parametrize(
    ("family", "hook_name"),
    [("bridge", "blocks.1.hook_resid_pre"), ("gpt2", "transformer.h.0"), ("gpt2", "transformer.h.1.mlp")],
)
def test_other_model_families_run(family: str, hook_name: str, tmp_path: Path):
    model: Any = tiny_bridge() if family == "bridge" else proxy(tiny_gpt2_model())
    config = runner_config(
        hook_name=hook_name, model_class_name="TransformerBridge" if family == "bridge" else "AutoModelForCausalLM",
        objective=Objective.e2e_downstream(0.001), output_path=str(tmp_path), lr=1e-2, training_tokens=32 * 30,
        n_eval_batches=1,
    )  # fmt: skip
    build_runner(config, model=model).run()
    kl = [line["losses/kl_loss"] for line in metrics_of(tmp_path) if "losses/kl_loss" in line]
    assert sum(kl[-3:]) < 0.9 * sum(kl[:3])
    assert "metrics/ce_loss_increase" in metrics_of(tmp_path)[-1]


def test_models_are_loaded_from_a_folder_for_both_families_that_can(tmp_path: Path):
    model = tiny_gpt2_model().eval()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tokens = token_batch(1)
    expected = model(tokens).logits
    for class_name in ("AutoModelForCausalLM", "TransformerBridge"):
        config = runner_config(model_name=str(tmp_path / "model"), model_class_name=class_name)
        loaded = build.load_model_for(config)
        torch.testing.assert_close(loaded(tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_name", "said"),
    [
        ("gpt2-smal", "'gpt2-smal' is no model that TransformerLens knows. The nearest names: gpt2-small, "),
        ("EleutherAI/pythia-70", "The nearest names: EleutherAI/pythia-70m, pythia-70m, "),
        ("E2E_sae_demo", "The nearest names: e2e-sae-demo, "),
        ("my-own", "The nearest names: "),  # some, however far
    ],
)
def test_a_model_that_nobody_knows_is_refused_with_its_nearest_names(model_name: str, said: str):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        build.load_model_for(runner_config(model_name=model_name))
    text = str(refused.value)
    assert len(text) < 800  # TransformerLens's own lists several hundred
    assert text.split("nearest names: ")[1].split(". A model")[0].count(", ") == 3
    for hint in (
        "(--model-class) AutoModelForCausalLM or TransformerBridge",
        "override_model",
        "--model of",
        "evaluate()",
    ):
        assert hint in text


def test_held_out_sequences_are_never_trained_on_even_in_a_second_epoch(monkeypatch: pytest.MonkeyPatch):
    config = runner_config(n_eval_batches=2, eval_batch_size_prompts=3, training_tokens=32 * 12)
    dataset = token_dataset(20)
    rows = token_batch(20).tolist()
    built = build_runner(config, dataset)
    held_out = built.evaluation_tokens
    assert held_out.tolist() == rows[:6]  # the head of the dataset
    trained: list[list[int]] = []
    step = runner.E2ESAETrainer.step
    monkeypatch.setattr(
        runner.E2ESAETrainer, "step", lambda self, batch: (trained.extend(batch.tolist()), step(self, batch))[1]
    )
    built.run()
    assert len(trained) == 48  # 12 steps of 4, from 14 sequences an epoch
    assert built.tokens.epoch == 3
    assert trained[:14] == rows[6:]
    assert trained[14:28] == rows[6:]
    assert not any(sequence in held_out.tolist() for sequence in trained)


def test_given_evaluation_tokens_leave_the_whole_dataset_for_training():
    given = token_batch(3, seed=77)
    built = build_runner(runner_config(n_eval_batches=1), token_dataset(8), override_evaluation_tokens=given)
    assert built.evaluation_tokens is given
    assert built.tokens.held_out is None
    assert next(built.tokens).tolist() == token_dataset(8)["tokens"][:4]


def test_text_is_tokenised_as_the_host_does_it():
    rows = Dataset.from_dict({"text": [" ".join(f"t{i}" for i in range(4, 40))] * 40})
    model = proxy(tiny_gpt2_model())
    config = runner_config(
        hook_name="transformer.h.0", model_class_name="AutoModelForCausalLM", is_dataset_tokenized=False
    )
    with pytest.warns(UserWarning, match="Dataset is not tokenized"):
        built = build_runner(config, rows, model)
    batch = next(built.tokens)
    with pytest.warns(UserWarning, match="Dataset is not tokenized"):
        host = ActivationsStore.from_config(model, config, override_dataset=rows)
    assert torch.equal(batch, host.get_batch_tokens(4))
    assert batch[:, 0].tolist() == [1, 1, 1, 1]  # begins with bos, as prepend_bos asks
    assert batch[0, 1:5].tolist() == [4, 5, 6, 7]


NORMALISATIONS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale", "covariance_whitening")


@pytest.mark.parametrize(
    ("architecture", "normalisation"),
    slow_except(
        [
            (architecture, normalisation)
            for architecture in BUILT_IN_ARCHITECTURES
            for normalisation in NORMALISATIONS
            if normalisation not in UNTRAINABLE_NORMALISATIONS.get(architecture, ())  # refused, see test_config.py
        ],
        *(("standard", normalisation) for normalisation in NORMALISATIONS),
    ),
)
def test_each_normalisation_trains_and_folds(architecture: str, normalisation: str, tmp_path: Path):
    config = runner_config(
        architecture, {"normalize_activations": normalisation}, output_path=str(tmp_path), training_tokens=32 * 12,
        dead_feature_window=3, n_eval_batches=2,
    )  # fmt: skip
    built = build_runner(config)
    before = parameters_of(built.sae)["W_dec"]
    evaluated: dict[str, float] = {}
    build_trainer = built._build_trainer

    def keep_trainer() -> Any:
        trainer = build_trainer()
        evaluated["trainer"] = trainer
        return trainer

    built._build_trainer = keep_trainer
    sae = built.run()
    trainer: Any = evaluated["trainer"]
    assert not torch.equal(parameters_of(sae)["W_dec"], before)
    assert (trainer.activation_scaler.scaling_factor, trainer.activation_scaler.whitening) == (None, None)
    # The folded SAE that was saved does to raw activations what the unfolded one did at the last evaluation.
    loaded = SAE.load_from_disk(tmp_path)
    estimated = normalisation in ("expected_average_only_in", "covariance_whitening")
    assert loaded.cfg.normalize_activations == ("none" if estimated else normalisation)
    from e2e_sae_plugin.evaluation import measure, reconstruct_with

    after = measure(reconstruct_with(loaded), built.evaluation_model, built.evaluation_tokens).to_log()
    for name in ("metrics/held_out_kl", "metrics/held_out_mse", "metrics/held_out_l0"):
        assert after[name] == pytest.approx(trainer.last_evaluation[name], rel=2e-3, abs=1e-4), name


# Fine-tuning, overriding, resuming.


def test_weights_come_from_a_folder_and_the_users_config_wins(tmp_path: Path):
    trained = build_runner(runner_config(output_path=str(tmp_path), lr=1e-2)).run()
    config = runner_config(sae={"l1_coefficient": 0.123}, from_pretrained_path=str(tmp_path))
    built = build_runner(config)
    assert built.sae.cfg.l1_coefficient == 0.123
    for name, value in parameters_of(trained).items():
        torch.testing.assert_close(parameters_of(built.sae)[name], value)
    output = built._build_trainer().step(token_batch(4))
    acts, sae = output.feature_acts.detach(), trained
    l1 = (acts * sae.W_dec.norm(dim=1)).sum(-1).mean()
    torch.testing.assert_close(output.losses["l1_loss"], 0.123 * l1.detach(), rtol=1e-4, atol=1e-5)


def test_weights_that_are_missing_or_do_not_fit_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"from_pretrained_path=.* holds no sae_weights.safetensors"):
        build_runner(runner_config(from_pretrained_path=str(tmp_path)))
    build_runner(runner_config(output_path=str(tmp_path), training_tokens=32)).run()
    with pytest.raises(ValueError, match=r"do not fit the 'standard' SAE of the config .d_in=16, d_sae=48"):
        build_runner(runner_config(sae={"d_sae": 48}, from_pretrained_path=str(tmp_path)))


def test_a_given_sae_is_the_one_that_is_trained():
    sae = training_sae(runner_config())
    before = parameters_of(sae)
    result = build_runner(runner_config(), override_sae=sae).run()
    assert result is sae
    assert not torch.equal(parameters_of(sae)["W_enc"], before["W_enc"])


def test_the_same_seed_gives_the_same_sae_and_another_seed_another_one():
    first, again, other = (build_runner(runner_config(seed=seed)).run() for seed in (0, 0, 1))
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.allclose(first.W_dec, other.W_dec)


# Interruption: see test_interruption.py.


def test_a_run_that_fails_before_its_first_step_leaves_no_checkpoint(tmp_path: Path):
    config = runner_config(checkpoint_path=str(tmp_path / "checkpoints"), n_eval_batches=0)
    built = build_runner(config, token_dataset(3))
    with pytest.raises(ValueError, match="ran out"):
        built.run()
    assert not (tmp_path / "checkpoints").exists()


# Refusals: the data.


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="override_dataset has no rows, so the dataset ran out before one batch"):
        build_runner(runner_config(), Dataset.from_dict({"tokens": []}))


def test_an_empty_streamed_dataset_is_refused():
    def nothing() -> Any:
        yield from ()

    with pytest.raises(ValueError, match="has no rows, so the dataset ran out before one batch"):
        build_runner(runner_config(), IterableDataset.from_generator(nothing))


def test_a_dataset_that_cannot_fill_the_held_out_sequences_is_refused():
    with pytest.raises(ValueError, match=r"ran out before the held-out sequences: it holds 5 sequences .* 8 held out"):
        build_runner(runner_config(n_eval_batches=2), token_dataset(5))


def test_a_dataset_that_cannot_fill_one_step_is_refused():
    built = build_runner(runner_config(n_eval_batches=1), token_dataset(7))
    with pytest.raises(ValueError, match=r"ran out before one batch: it holds 7 .* 4 held out .* plus 4 for one step"):
        built.run()


def test_token_ids_beyond_the_vocabulary_are_refused():
    rows = token_batch(20)
    rows[9, 3] = VOCABULARY
    built = build_runner(runner_config(), Dataset.from_dict({"tokens": rows.tolist()}))
    next(built.tokens)
    next(built.tokens)
    with pytest.raises(ValueError, match=r"token id 64 .up to sequence 12 .* knows ids 0 to 63.*tokenizer"):
        next(built.tokens)
    negative = torch.full((20, 8), -1)
    with pytest.raises(ValueError, match="holds token id -1"):
        next(build_runner(runner_config(), Dataset.from_dict({"tokens": negative.tolist()})).tokens)


def test_a_context_longer_than_the_models_is_refused():
    config = runner_config(context_size=32, train_batch_size_tokens=64)
    with pytest.raises(ValueError, match="context_size=32 is longer than the model's context of 16 tokens"):
        build_runner(config, token_dataset(20, context_size=32))


def test_pre_tokenised_rows_shorter_than_the_context_are_refused():
    with pytest.raises(ValueError, match="pretokenized dataset has context_size 6, but the provided context_size is 8"):
        build_runner(runner_config(), token_dataset(20, context_size=6))
    rows = token_batch(20).tolist()
    rows[6] = rows[6][:5]
    built = build_runner(runner_config(), Dataset.from_dict({"tokens": rows}))
    next(built.tokens)
    with pytest.raises(ValueError, match=r"Sequence 6 of the dataset .epoch 1. has 5 tokens, expected context_size=8"):
        next(built.tokens)


@pytest.mark.filterwarnings("ignore:pretokenized dataset has context_size 12|[\\s\\S]*:RuntimeWarning")  # the host's
def test_pre_tokenised_rows_longer_than_the_context_are_cut():
    built = build_runner(runner_config(), token_dataset(20, context_size=12))
    assert next(built.tokens).tolist() == [row[:8] for row in token_batch(4 * 5, 12)[:4].tolist()]


def test_batches_are_drawn_in_order_and_epochs_follow_each_other(caplog: pytest.LogCaptureFixture):
    built = build_runner(runner_config(), token_dataset(6))
    rows = token_dataset(6)["tokens"]
    stream: TokenStream = built.tokens
    assert next(stream).tolist() == rows[:4]
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        assert next(stream).tolist() == rows[4:] + rows[:2]
    assert "epoch 2 begins" in caplog.text


# Refusals: the model and the SAE.


@pytest.mark.parametrize(
    ("settings", "sae", "match"),
    [
        ({}, {"d_in": 24}, r"sae.d_in=24 does not match 'blocks.1.hook_resid_pre'.* 16 dimensions. Set sae.d_in=16\."),
        ({"hook_name": "blocks.1.attn.hook_z"}, {"d_in": D_HEAD}, r"2 x 8 dimensions. Set sae.d_in=16, or hook_head_index"),
        ({"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 1}, {}, r"sae.d_in=16 does not match.*Set sae.d_in=8"),
        ({"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 2}, {"d_in": 8}, "hook_head_index=2 is out .* 2 heads"),
        ({"hook_name": "blocks.1.attn.hook_z", "hook_head_index": -1}, {"d_in": 8}, "hook_head_index=-1 is out of range"),
        ({"hook_head_index": 0}, {}, "hook_head_index=0 needs a hook with heads, such as blocks.0.attn.hook_z"),
        ({"hook_name": "blocks.7.hook_resid_pre"}, {}, "no hook_name 'blocks.7.hook_resid_pre'. Near matches"),
        (
            {"hook_name": "blocks.2.hook_resid_pre", "objective": Objective.e2e_downstream(1.0)}, {},
            "beta is positive but no downstream hook is left",
        ),
        (
            {"objective": Objective(beta=1, downstream_hooks=("blocks.0.hook_resid_pre",))}, {},
            "'blocks.0.hook_resid_pre' is not downstream of the SAE",
        ),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_configs_that_do_not_fit_the_model_are_refused(settings: dict[str, Any], sae: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        build_runner(runner_config(sae=sae, **settings))


def test_a_run_on_one_head_evaluates_that_head(tmp_path: Path):
    config = runner_config(
        sae={"d_in": D_HEAD}, hook_name="blocks.1.attn.hook_z", hook_head_index=1, n_eval_batches=1,
        output_path=str(tmp_path),
    )  # fmt: skip
    build_runner(config).run()
    assert metrics_of(tmp_path)[-1]["metrics/held_out_mse"] > 0
    assert json.loads((tmp_path / "cfg.json").read_text())["metadata"]["hook_head_index"] == 1


def test_wandb_without_a_login_is_refused_before_the_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(runner, "load_model_for", lambda _: pytest.fail("the model was loaded first"))
    config = runner_config(logger=LoggingConfig())
    with pytest.raises(ValueError, match=r"no Weights & Biases login. Run `wandb login`, set WANDB_API_KEY"):
        E2ESAETrainingRunner(config, override_dataset=token_dataset())


def test_wandb_offline_gets_the_same_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    logged: list[tuple[int, dict[str, Any]]] = []
    artifacts: list[Any] = []

    import wandb

    monkeypatch.setattr(wandb, "init", lambda **settings: logged.append((-1, settings)))
    monkeypatch.setattr(wandb, "log", lambda metrics, step: logged.append((step, metrics)))
    monkeypatch.setattr(wandb, "log_artifact", lambda artifact, **_: artifacts.append(artifact))
    monkeypatch.setattr(wandb, "finish", lambda: logged.append((-2, {})))
    config = runner_config(
        logger=LoggingConfig(wandb_log_frequency=1, eval_every_n_wandb_logs=5), n_eval_batches=1,
        output_path=str(tmp_path / "out"), feature_sampling_window=5,
    )  # fmt: skip
    build_runner(config).run()
    (_, settings), *rest = logged
    assert settings["config"]["objective"] == config.objective.to_dict()
    assert rest[-1][0] == -2
    to_file = metrics_of(tmp_path / "out")
    to_wandb = [(step, metrics) for step, metrics in rest[:-1]]
    assert [line["step"] for line in to_file] == [step for step, _ in to_wandb]
    for line, (_, metrics) in zip(to_file, to_wandb, strict=True):
        assert {k: v for k, v in metrics.items() if isinstance(v, int | float)}.items() <= line.items()
    assert any("plots/feature_density_line_chart" in metrics for _, metrics in to_wandb)
    assert len(artifacts) == 2


# Modes.


def test_the_summary_says_what_was_reached_and_where_it_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = runner_config(n_eval_batches=1, output_path=str(tmp_path), verbose=True)
    build_runner(config).run()
    printed = capsys.readouterr().out
    assert "Trained a standard SAE (16 x 32) on blocks.1.hook_resid_pre for 10 steps, 320 tokens." in printed
    assert "CE loss increase" in printed
    assert str(tmp_path) in printed
    assert "none counted as dead: the run is not longer than dead_feature_window=1,000 steps\n" in printed
    build_runner(runner_config("topk", verbose=True)).run()
    assert "dead_feature_window=1,000 steps, so the auxiliary loss has not acted" in capsys.readouterr().out
    build_runner(runner_config("topk", verbose=True, dead_feature_window=3)).run()
    assert re.search(r"  features   \d+ of 32 dead", capsys.readouterr().out)


def test_exclude_special_tokens_leaves_them_out_of_training(tmp_path: Path):
    rows = token_batch(40)
    rows[:, 0] = 1
    config = runner_config(exclude_special_tokens=[1], output_path=str(tmp_path), n_eval_batches=1)
    built = build_runner(config, Dataset.from_dict({"tokens": rows.tolist()}))
    trainer = built._build_trainer()
    batch = next(built.tokens)
    output = trainer.step(batch)
    assert len(output.feature_acts) == int((batch != 1).sum()) <= 28
    built.run()
    assert metrics_of(tmp_path)[-1]["n_training_samples"] == 320


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.slow
def test_compile_sae_trains_to_the_same_weights():
    eager = build_runner(runner_config(training_tokens=96)).run()
    compiled = build_runner(runner_config(training_tokens=96, compile_sae=True)).run()
    torch.testing.assert_close(compiled.W_dec, eager.W_dec, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (torch.full((4, 8), 9999), "holds token ids 9999 to 9999, but the model knows ids 0 to 63"),
        (torch.full((4, 8), -1), "holds token ids -1 to -1"),
        (torch.ones(0, 8, dtype=torch.long), r"at least one prompt, got shape \(0, 8\)"),
        (torch.ones(4, 6, dtype=torch.long), r"with context_size=8.*got shape \(4, 6\)"),
        (torch.ones(4, 8), "must be a tensor of integer token ids, got one of torch.float32"),
    ],
)
def test_evaluation_tokens_that_cannot_be_evaluated_are_refused_before_the_first_step(tokens: Any, match: str):
    with pytest.raises(ValueError, match="override_evaluation_tokens.*" + match):
        E2ESAETrainingRunner(
            runner_config(n_eval_batches=1), override_dataset=token_dataset(),
            override_model=tiny_hooked_transformer(), override_evaluation_tokens=tokens,
        )  # fmt: skip
