"""What is refused before anything is loaded or trained, and that it is."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import (
    build_trainer,
    proxy,
    runner_config,
    tiny_gpt2_model,
    tiny_hooked_transformer,
    tiny_llama_model,
    token_batch,
    token_dataset,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from e2e_sae_plugin import E2ESAETrainingRunner, Objective, SweepConfig, SweepKind, preflight
from e2e_sae_plugin import runner as runner_module
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.output_folder import mark_output

# Configs.

ANYTHING = st.one_of(st.text(max_size=3), st.lists(st.integers(), max_size=2), st.none())
NO_NUMBER = st.one_of(st.text(alphabet="abc", max_size=3), st.lists(st.integers(), max_size=2))
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])


def not_positive() -> st.SearchStrategy[Any]:
    return st.one_of(st.floats(max_value=0, allow_nan=False), NOT_FINITE, NO_NUMBER)


def below(smallest: int) -> st.SearchStrategy[Any]:
    return st.one_of(st.integers(max_value=smallest - 1), st.just(smallest + 0.5), NO_NUMBER)


def outside(low: float, high: float) -> st.SearchStrategy[Any]:
    """Not in [low, high)."""
    lower, upper = st.floats(max_value=low, exclude_max=True), st.floats(min_value=high)
    return st.one_of(lower, upper, st.just(math.nan), NO_NUMBER)


def words(*allowed: str) -> st.SearchStrategy[Any]:
    return st.text(max_size=8).filter(lambda word: word not in allowed)


# What no value of another setting makes right, each with the setting's name.
INVALID: dict[str, st.SearchStrategy[Any]] = {
    "adam_beta1": outside(0, 1),
    "adam_beta2": outside(0, 1),
    "b_dec_init_method": words("zeros", "mean"),
    "checkpoint_every_minutes": not_positive(),
    "context_size": below(1),
    "dead_feature_window": below(1),
    "eval_batch_size_prompts": below(1),
    "feature_sampling_window": below(1),
    "keep_checkpoints": below(1),
    "local_first": outside(0, 1),
    "lr": not_positive(),
    "lr_decay_steps": st.one_of(below(0), st.integers(min_value=11)),
    "lr_end": st.one_of(st.floats(max_value=0, exclude_max=True), NOT_FINITE, NO_NUMBER),
    "lr_scheduler_name": words("constant", "cosineannealing", "cosineannealingwarmrestarts"),
    "lr_warm_up_steps": st.one_of(below(0), st.integers(min_value=11)),
    "max_grad_norm": not_positive(),
    "max_skipped_steps": below(1),
    "model_class_name": words("HookedTransformer", "TransformerBridge", "AutoModelForCausalLM"),
    "n_checkpoints": below(0),
    "n_eval_batches": below(0),
    "overwrite_output": NO_NUMBER,
    "seed": NO_NUMBER,
    "store_batch_size_prompts": below(1),
    "train_batch_size_tokens": st.one_of(below(1), st.integers(min_value=1, max_value=200).filter(lambda n: n % 8)),
    "training_tokens": below(32),
    "verbose": NO_NUMBER,
    "hook_name": st.just(""),
}
VALID: dict[str, st.SearchStrategy[Any]] = {
    "adam_beta1": st.sampled_from([0.0, 0.9]),
    "checkpoint_every_minutes": st.sampled_from([None, 0.5, 30]),
    "keep_checkpoints": st.integers(1, 5),
    "lr": st.sampled_from([1e-5, 1]),
    "lr_scheduler_name": st.sampled_from(["constant", "cosineannealing"]),
    "lr_warm_up_steps": st.integers(0, 4),
    "max_grad_norm": st.sampled_from([None, 1, 10.0]),
    "max_skipped_steps": st.integers(1, 100),
    "n_checkpoints": st.integers(0, 9),
    "n_eval_batches": st.integers(0, 3),
    "objective": st.sampled_from(
        [Objective.e2e(), Objective.local(), Objective.e2e_downstream(0.1), Objective(mse=1.0)]
    ),
    "seed": st.integers(0, 2**31),
    "store_batch_size_prompts": st.integers(1, 9),
    "training_tokens": st.integers(10, 20).map(lambda n: 32 * n),
}


@given(name=st.sampled_from(sorted(INVALID)), data=st.data(), others=st.fixed_dictionaries({}, optional=VALID))
@settings(max_examples=600)
def test_an_invalid_setting_is_refused_by_its_name_whatever_the_others(
    name: str, data: st.DataObject, others: dict[str, Any]
):
    value = data.draw(INVALID[name])
    chosen: dict[str, Any] = {"checkpoint_path": "/tmp/never-made", "training_tokens": 320, **others, name: value}
    if name in ("lr_warm_up_steps", "lr_decay_steps"):
        chosen["training_tokens"] = 320
    with pytest.raises(ValueError, match=name):
        runner_config(**chosen)
    assert not Path("/tmp/never-made").exists()


@given(others=st.fixed_dictionaries({}, optional=VALID))
@settings(max_examples=100)
def test_valid_settings_are_accepted_in_every_combination(others: dict[str, Any]):
    config = runner_config(**{"checkpoint_path": "checkpoints", "training_tokens": 320, **others})
    again = E2ESAERunnerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


@pytest.mark.parametrize(
    ("chosen", "match"),
    [
        ({"keep_checkpoints": 3}, "keep_checkpoints=3 has no effect without a checkpoint_path"),
        ({"checkpoint_every_minutes": 5.0}, r"checkpoint_every_minutes=5\.0 has no effect without a checkpoint_path"),
        (
            {"resume_from_checkpoint": "auto"},
            "resume_from_checkpoint='auto' looks below checkpoint_path, which is None",
        ),
        (
            {"lr_warm_up_steps": 6, "lr_decay_steps": 6},
            "lr_warm_up_steps=6 and lr_decay_steps=6 do not fit .* 10 steps",
        ),
        ({"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 10}, "lr_warm_up_steps=10 .* do not fit"),
        (
            {"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 11},
            "n_restart_cycles must be from 1 to the 10 steps",
        ),
        ({"lr_scheduler_name": "cosineannealing", "lr_decay_steps": 2, "lr_end": 0.0}, "lr_decay_steps=2 has nothing"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(chosen: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        runner_config(**chosen)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("standard", "l1_warm_up_steps"), ("gated", "l1_warm_up_steps"), ("jumprelu", "l0_warm_up_steps")],
)
def test_a_warm_up_that_does_not_end_is_refused(architecture: str, name: str):
    assert (
        getattr(runner_config(architecture, sae={name: 9}).sae, name) == 9
    )  # the tenth step has the whole coefficient
    with pytest.raises(
        ValueError, match=rf"sae\.{name}=10 does not end .* has 10 steps .* would reach 90 % of its value"
    ):
        runner_config(architecture, sae={name: 10})
    base = {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_pre", "context_size": 8, "training_tokens": 320}
    sae = {"architecture": architecture, "d_in": 16, "d_sae": 32, name: 40}
    with pytest.raises(ValueError, match=rf"sae\.{name}=40 does not end within the run"):
        SweepConfig(
            base={**base, "train_batch_size_tokens": 32, "sae": sae},
            kinds={"e2e": SweepKind(Objective.e2e(), (0.1,))},
            output_path="sweep",
        )


def test_the_coefficient_after_the_longest_warm_up_is_that_of_the_last_step():
    config = runner_config(sae={"l1_warm_up_steps": 9, "l1_coefficient": 0.5})
    trainer = build_trainer(config, data=iter(token_batch(seed=step) for step in range(10)))
    coefficient = 0.0
    while not trainer.is_done:
        coefficient = trainer.get_coefficients()["l1"]
        trainer.advance()
    assert trainer.n_training_steps == config.n_steps == 10
    assert coefficient == 0.5


@pytest.mark.parametrize(
    ("architecture", "chosen", "expected"),
    [
        ("topk", {}, []),  # SAELens's defaults of 1,000 and 2,000 steps
        ("topk", {"dead_feature_window": 9, "feature_sampling_window": 10}, []),
        (
            "topk",
            {"feature_sampling_window": 11},
            ["feature_sampling_window=11 is longer than the run of 10 steps: no feature sparsities"],
        ),
        (
            "standard",
            {"dead_feature_window": 10},
            ["dead_feature_window=10 is not shorter than the run of 10 steps: no feature is counted as dead."],
        ),
        (
            "topk",
            {"objective": Objective.e2e(auxiliary=0.5)},
            ["dead_feature_window=1000 is .* counted as dead, and objective.auxiliary has no effect."],
        ),
        (
            "jumprelu",
            {"sae": {"pre_act_loss_coefficient": 0.1}},
            ["dead_feature_window=1000 is .* counted as dead, and sae.pre_act_loss_coefficient has no effect."],
        ),
        ("gated", {"objective": Objective.e2e(auxiliary=0.5)}, []),  # its term is for all features
    ],
    ids=str,
)
def test_windows_that_the_run_does_not_fill_are_named_where_they_were_asked_for(
    architecture: str, chosen: dict[str, Any], expected: list[str], caplog: pytest.LogCaptureFixture
):
    runner_config(architecture, verbose=True, **chosen)
    said = [record.getMessage() for record in caplog.records if "_window=" in record.getMessage()]
    assert len(said) == len(expected)
    for text, pattern in zip(said, expected, strict=True):
        assert re.match(pattern, text)


@pytest.mark.parametrize("chosen", [{"n_checkpoints": 3}, {"save_final_checkpoint": True}], ids=str)
def test_checkpoints_of_saelens_without_a_path_are_accepted_and_write_nothing(
    chosen: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    config = runner_config(**chosen)
    ((name, value),) = chosen.items()
    assert f"{name}={value!r} writes no checkpoints: checkpoint_path is None." in caplog.text
    E2ESAETrainingRunner(config, token_dataset(), tiny_hooked_transformer()).run()
    assert list(tmp_path.iterdir()) == []


# Folders.


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test: refusals come before."""

    def fail(*_: object) -> None:
        pytest.fail("a model was loaded before the check")

    monkeypatch.setattr(runner_module, "load_model_for", fail)


def refused(match: str, **chosen: Any) -> None:
    with pytest.raises(ValueError, match=match):
        E2ESAETrainingRunner(runner_config(**chosen), override_dataset=token_dataset())


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("field", ["output_path", "checkpoint_path"])
def test_folders_that_cannot_be_written_are_refused_before_the_model_is_loaded(field: str, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("a person's")
    for path in (file, file / "inside/deeper"):
        refused(f"{field}='{path}' cannot be a folder: '{file}' is no folder", **{field: str(path)})
    assert file.read_text() == "a person's"
    refused(f"{field}='/proc/sys/here' cannot be written: ", **{field: "/proc/sys/here"})


@pytest.mark.usefixtures("no_model")
def test_a_disk_without_room_is_refused_with_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free = 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, free))  # pyright: ignore
    folders = {"output_path": str(tmp_path / "out"), "checkpoint_path": str(tmp_path / "checkpoints")}
    # 16 x 500k weights, twice, and biases, in fp32: 66 MB; 5 + 2 + 1 checkpoints of three times that, and the SAE.
    large = {"d_sae": 500_000}
    refused(
        r"has 1\.00 GB free, but the SAE and its checkpoints .* can need 1\.67 GB",
        sae=large,
        n_checkpoints=5,
        **folders,
    )
    built = E2ESAETrainingRunner(
        runner_config(sae=large, n_checkpoints=1, **folders),
        override_dataset=token_dataset(), override_model=tiny_hooked_transformer(),
    )  # fmt: skip
    assert built.sae.cfg.d_sae == 500_000
    refused("lower n_checkpoints or keep_checkpoints", sae=large, n_checkpoints=1, keep_checkpoints=4, **folders)


def finished_run(folder: Path, **chosen: Any) -> None:
    config = runner_config(output_path=str(folder), **chosen)
    E2ESAETrainingRunner(config, override_dataset=token_dataset(), override_model=tiny_hooked_transformer()).run()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_run_in_the_output_folder_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    finished_run(tmp_path / "out")
    before = content(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "load_model_for", lambda _: pytest.fail("loaded"))
        refused(
            "holds another run, which would be overwritten.*(?s:.)*lr: 0.001 -> 0.5",
            output_path=str(tmp_path / "out"),
            lr=0.5,
        )
    assert content(tmp_path / "out") == before
    finished_run(tmp_path / "out", lr=0.5, overwrite_output=True)
    assert content(tmp_path / "out")["sae_weights.safetensors"] != before["sae_weights.safetensors"]


def test_overwriting_leaves_nothing_of_the_run_before(tmp_path: Path):
    """Not even while the new one is still training, when its config is there already."""
    finished_run(tmp_path / "out")
    config = runner_config(output_path=str(tmp_path / "out"), lr=0.5, overwrite_output=True)
    mark_output(config, tmp_path / "out", starts_anew=True)
    assert set(content(tmp_path / "out")) == {"e2e_runner_cfg.json"}
    finished_run(tmp_path / "out", lr=0.5, overwrite_output=True)
    assert "sae_weights.safetensors" in content(tmp_path / "out")


def test_a_finished_run_is_not_trained_again_unless_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    finished_run(tmp_path / "out")
    before = content(tmp_path / "out")
    refused("holds the finished SAE of this very run", output_path=str(tmp_path / "out"))
    assert content(tmp_path / "out") == before
    finished_run(tmp_path / "out", overwrite_output=True)
    (tmp_path / "out/cfg.json").unlink()  # as if it had been killed before its end
    with caplog.at_level(logging.WARNING, logger="e2e_sae_plugin"):
        finished_run(tmp_path / "out")
    assert "holds an earlier start of this very run, which did not finish" in caplog.text


def test_a_checkpoint_is_no_place_for_the_output(tmp_path: Path):
    (tmp_path / "manifest.json").write_text("{}")
    refused("is a checkpoint, which would be damaged", output_path=str(tmp_path))


def test_a_link_that_leads_nowhere_and_a_name_too_long_are_refused(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused("output_path='.*link' cannot be a folder", output_path=str(tmp_path / "link"))
    refused("output_path='.*' cannot be written: File name too long", output_path=str(tmp_path / ("x" * 300)))
    refused("output_path must name a folder, or be None; got an empty string", output_path="")


def test_paths_may_be_path_objects(tmp_path: Path):
    config = runner_config(output_path=tmp_path / "out", checkpoint_path=tmp_path / "checkpoints")
    assert (config.output_path, str(config.checkpoint_path).startswith(str(tmp_path))) == (str(tmp_path / "out"), True)


@pytest.mark.usefixtures("no_model")
def test_a_run_that_has_only_begun_and_an_sae_of_others_are_protected_too(tmp_path: Path):
    begun, others = tmp_path / "begun", tmp_path / "others"
    begun.mkdir()
    (begun / "e2e_runner_cfg.json").write_text(json.dumps(runner_config(seed=5).to_dict()))
    refused("holds another run.*(?s:.)*seed: 5 -> 42", output_path=str(begun))
    (begun / "e2e_runner_cfg.json").write_text("{")
    refused("holds another run, which would be overwritten: .*e2e_runner_cfg.json' is damaged", output_path=str(begun))
    others.mkdir()
    (others / "cfg.json").write_text("{}")
    refused(r"holds another SAE or run \(cfg.json\), which would be overwritten", output_path=str(others))


# Devices, models, data.


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("field", ["device", "llm_device"])
def test_a_device_that_is_not_there_is_refused(field: str):
    refused(f"{field}='nonsense' cannot be used here", **{field: "nonsense"})
    if not torch.cuda.is_available():
        refused(f"{field}='cuda' cannot be used here", **{field: "cuda"})


@pytest.mark.usefixtures("no_model")
def test_a_config_tells_that_hook_and_width_do_not_fit_before_the_weights_are_read(tmp_path: Path):
    tiny_llama_model().config.save_pretrained(tmp_path)  # no weights
    chosen: dict[str, Any] = {"model_name": str(tmp_path), "model_class_name": "AutoModelForCausalLM"}
    refused("names layer 3, but .* has layers 0 to 2", hook_name="model.layers.3", **chosen)
    refused(
        "context_size=32 is longer than the context of .*, 16 tokens", hook_name="model.layers.1", context_size=32,
        train_batch_size_tokens=32, **chosen,
    )  # fmt: skip
    bridge: dict[str, Any] = {"model_name": str(tmp_path), "model_class_name": "TransformerBridge"}
    refused("residual stream of 16 dimensions. Set sae.d_in=16", sae={"d_in": 24}, **bridge)


def test_a_hooked_transformers_shape_is_known_without_its_weights(monkeypatch: pytest.MonkeyPatch):
    class Config:
        n_layers, d_model, n_ctx = 12, 768, 1024

    monkeypatch.setattr(preflight, "get_pretrained_model_config", lambda _: Config)
    monkeypatch.setattr(runner_module, "load_model_for", lambda _: pytest.fail("loaded"))
    refused("residual stream of 768 dimensions. Set sae.d_in=768", model_name="gpt2")
    refused("names layer 12, but 'gpt2' has layers 0 to 11", model_name="gpt2", hook_name="blocks.12.hook_resid_pre")


def test_models_whose_config_cannot_be_had_go_to_their_loader():
    for name in ("no-such-model", "gpt2"):  # offline
        preflight.check_model_shape(runner_config(model_name=name))
        preflight.check_model_shape(runner_config(model_name=name, model_class_name="AutoModelForCausalLM"))


def test_tokens_that_are_no_integers_are_refused():
    floats = Dataset.from_dict({"tokens": [[0.5] * 8] * 20})
    with pytest.raises(
        ValueError, match=r"Column 'tokens' of the dataset holds torch.float\d+ numbers, expected integer"
    ):
        E2ESAETrainingRunner(
            runner_config(n_eval_batches=1), override_dataset=floats, override_model=tiny_hooked_transformer()
        )


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
def test_text_without_a_tokenizer_is_refused():
    text = Dataset.from_dict({"text": ["t5 t6"] * 20})
    with pytest.raises(ValueError, match=r"The dataset holds text \(column 'text'\), but the model has no tokenizer"):
        E2ESAETrainingRunner(
            runner_config(n_eval_batches=1), override_dataset=text, override_model=tiny_hooked_transformer()
        )


def test_a_damaged_sae_to_start_from_is_refused_by_name(tmp_path: Path):
    finished_run(tmp_path / "out")
    weights = tmp_path / "out/sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"sae_weights.safetensors' \(from_pretrained_path\) is damaged"):
        E2ESAETrainingRunner(
            runner_config(from_pretrained_path=str(tmp_path / "out")), override_dataset=token_dataset(),
            override_model=proxy(tiny_gpt2_model()),
        )  # fmt: skip
