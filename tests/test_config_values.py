"""Values that are not Python's own, and values of another kind, in every config."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import runner_config, sae_config, tiny_hooked_transformer, token_dataset, training_sae
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.config import LoggingConfig

from e2e_sae_plugin import (
    E2ESAERunnerConfig,
    E2ESAETrainingRunner,
    MultiE2ESAERunnerConfig,
    Objective,
    SweepConfig,
    SweepKind,
    finetune_config,
    quick_config,
)
from e2e_sae_plugin.config_values import plain, require_round_trip
from e2e_sae_plugin.model_settings import loading_settings

ARCHITECTURES = ("standard", "topk", "jumprelu", "matryoshka_batchtopk")

# As values come out of arrays, tensors and files.
NUMBER_FORMS = (
    np.asarray,
    torch.tensor,
    lambda number: np.asarray([number])[0],
    lambda number: torch.tensor([number])[0],
)
TEXT_FORMS = (np.str_, Path)


def foreign(draw: st.DrawFn, name: str, value: Any) -> Any:
    """An equal value that is not Python's own."""
    if isinstance(value, bool | int | float):
        forms = NUMBER_FORMS if not isinstance(value, float) else NUMBER_FORMS[::2]  # torch's default float is rounded
        return draw(st.sampled_from(forms))(value)
    if isinstance(value, str):
        return draw(st.sampled_from(TEXT_FORMS if name.endswith("_path") else TEXT_FORMS[:1]))(value)
    if isinstance(value, list) and value:
        return np.asarray(value)
    return value


def draw_foreign(draw: st.DrawFn, part: Any, leave: tuple[str, ...] = ()) -> dict[str, Any]:
    given = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return {name: value if name in leave else foreign(draw, name, value) for name, value in given.items()}


@st.composite
def foreign_configs(draw: st.DrawFn) -> tuple[E2ESAERunnerConfig, dict[str, Any]]:
    """A config, and the same settings in forms of numpy, torch and pathlib."""
    sae = sae_config(draw(st.sampled_from(ARCHITECTURES)))
    config = runner_config(output_path="out", seqpos_slice=(0, 8), n_eval_batches=1)
    config.sae = sae
    expected = E2ESAERunnerConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    # The host's own class compares widths with its size before anything is read here.
    own_sae = type(sae)(**draw_foreign(draw, sae, ("metadata", "matryoshka_widths")))
    return expected, {
        **draw_foreign(draw, expected, ("objective",)),
        "sae": own_sae,
        "logger": LoggingConfig(**draw_foreign(draw, config.logger)),
        "objective": Objective(**draw_foreign(draw, expected.objective)),
        "seqpos_slice": np.asarray([0, 8]).tolist() if draw(st.booleans()) else tuple(np.asarray([0, 8])),
    }


@given(configs=foreign_configs())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_numbers_paths_and_text_of_other_libraries_are_read_as_pythons(configs: tuple[E2ESAERunnerConfig, Any]):
    expected, given_settings = configs
    config = E2ESAERunnerConfig(**given_settings)
    assert json.loads(json.dumps(config.to_dict())) == json.loads(json.dumps(expected.to_dict()))
    require_round_trip(config)
    for part in (config, config.sae, config.logger, config.objective):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            assert type(value).__module__ not in ("numpy", "torch", "pathlib"), field.name


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from([0.5, 256.0, -1.0, float("nan"), float("inf")]),
    st.sampled_from(["", "text", b"bytes", 1j, object(), {1, 2}, {3: 4}, {"a": object()}, [None], [0.5, "x"], ()]),
    st.sampled_from([10**400, -(10**400)]),
    st.builds(np.asarray, st.lists(st.integers(0, 9), max_size=2)), st.just(torch.ones(2, 2)), st.just(torch.float16),
    st.just(torch.device("cpu")), st.just(Path("folder")), st.just(np.datetime64("2020-01-01")), st.just(np.float32(0.1)),
    st.just(np.bool_(True)), st.just(len),
)  # fmt: skip
PARTS: dict[str, tuple[str, ...]] = {
    "": tuple(sorted({field.name for field in dataclasses.fields(E2ESAERunnerConfig)} - {"hook_eval", "sae"})),
    "sae": ("d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "reshape_activations"),
    "logger": tuple(field.name for field in dataclasses.fields(LoggingConfig)),
    "objective": tuple(field.name for field in dataclasses.fields(Objective)),
}
PLACES = [(part, name) for part, names in PARTS.items() for name in names]


@given(place=st.sampled_from(PLACES), value=JUNK)
@settings(max_examples=600, deadline=None, derandomize=True)
def test_a_config_that_is_accepted_can_be_written_and_read(place: tuple[str, str], value: Any):
    part, name = place
    settings_: dict[str, Any] = {"checkpoint_path": "checkpoints", "output_path": "out"}
    try:
        if part == "sae":
            config = runner_config(**settings_, sae={name: value})
        elif part == "logger":
            config = runner_config(**settings_, logger=LoggingConfig(**{"log_to_wandb": False, name: value}))
        elif part == "objective":
            config = runner_config(**settings_, objective=Objective(**{name: value}))
        else:
            config = runner_config(**{**settings_, name: value})
    except ValueError:
        return
    require_round_trip(config)


@pytest.mark.parametrize(
    ("given_sae", "expected"),
    [({"d_sae": 256.0}, 256), ({"d_sae": np.float64(256)}, 256), ({"d_sae": torch.tensor(256)}, 256)],
    ids=str,
)
def test_a_whole_number_is_read_as_one(given_sae: dict[str, Any], expected: int):
    d_sae = runner_config(sae=given_sae).sae.d_sae
    assert (d_sae, type(d_sae)) == (expected, int)


@pytest.mark.parametrize("value", [256.5, torch.ones(1), "256", True, None, 1j, np.datetime64("2020-01-01")], ids=str)
def test_what_is_no_whole_number_is_refused(value: Any):
    with pytest.raises(ValueError, match=r"sae\.d_sae must be a whole number, got"):
        runner_config(sae={"d_sae": value})


def test_dtypes_and_devices_of_torch_are_named():
    config = runner_config(
        dtype=torch.float32, device=torch.device("cpu"), llm_device=torch.device("cpu"), sae={"dtype": torch.float32},
        model_from_pretrained_kwargs={"dtype": torch.bfloat16},
    )  # fmt: skip
    assert (config.dtype, config.device, config.llm_device, config.sae.dtype) == ("float32", "cpu", "cpu", "float32")
    assert config.model_from_pretrained_kwargs == {"dtype": "bfloat16"}
    for model_class in ("HookedTransformer", "TransformerBridge", "AutoModelForCausalLM"):
        loaded = loading_settings(model_class, {"dtype": "bfloat16", "torch_dtype": "float16"}, "cpu")
        assert loaded == {"dtype": torch.bfloat16, "torch_dtype": torch.float16}
        assert loading_settings(model_class, {"dtype": "auto"}, "cpu") == {"dtype": "auto"}


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ({"model_from_pretrained_kwargs": {"attention": object()}}, "model_from_pretrained_kwargs"),
        ({"sae": {"l1_coefficient": 0.1, "lp_norm": float("nan")}}, "sae.lp_norm"),
    ],
)
def test_what_no_file_can_hold_is_refused_by_name(chosen: dict[str, Any], name: str):
    with pytest.raises(ValueError, match=rf"{name}=.* cannot be saved with the run"):
        runner_config(**chosen)


@pytest.mark.parametrize(
    ("chosen", "match"),
    [
        ({"exclude_special_tokens": {1, 2}}, "must be True or False or a list of whole numbers, got {1, 2}"),
        ({"exclude_special_tokens": "bos"}, "must be True or False or a list of whole numbers, got 'bos'"),
        ({"model_from_pretrained_kwargs": True}, "must be a mapping or None, got True"),
        ({"frozen_parameters": "threshold"}, "must be a list of strings, got 'threshold'"),
        ({"seqpos_slice": (0.5, None)}, r"must be a list of whole numbers or None, got \(0\.5, None\)"),
        ({"seqpos_slice": ()}, r"must be \(start, stop\) or"),
        (
            {"sequence_separator_token": 1.5},
            r"must be a whole number or one of \['bos', 'eos', 'sep'\] or None, got 1\.5",
        ),
        ({"lr": 10**400}, "must be a number, got 1000"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_values_of_another_kind_are_refused_with_the_kinds_that_there_are(chosen: dict[str, Any], match: str):
    (name,) = chosen
    with pytest.raises(ValueError, match=f"{name} {match}"):
        runner_config(**chosen)


def test_a_value_that_was_set_afterwards_is_found_before_the_run(tmp_path: Path):
    config = runner_config(output_path=str(tmp_path / "out"))
    config.frozen_parameters = 3
    with pytest.raises((ValueError, TypeError)):
        E2ESAETrainingRunner(config, token_dataset(), tiny_hooked_transformer())
    assert not (tmp_path / "out").exists()


def test_a_run_of_such_numbers_is_the_run_of_pythons(tmp_path: Path):
    def run(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        config = runner_config(
            "topk", output_path=tmp_path / name, checkpoint_path=str(tmp_path / f"{name}-c"), n_checkpoints=1, **changes
        )
        runner = E2ESAETrainingRunner(config, token_dataset(), tiny_hooked_transformer())
        return dict(runner.run().state_dict())

    plain_run = run("plain", sae={"k": 4, "d_sae": 32}, lr=0.25, training_tokens=320)
    other = {"lr": np.float32(0.25), "training_tokens": torch.tensor(320), "seed": np.int64(42)}
    other_run = run("other", sae={"k": np.int64(4), "d_sae": np.float32(32)}, **other)
    for name, value in plain_run.items():
        torch.testing.assert_close(other_run[name], value, rtol=0, atol=0)


SHARED: dict[str, Any] = {
    "model_name": "tiny", "dataset_path": Path("tiny"), "context_size": np.int32(8), "train_batch_size_tokens": np.int64(32),
    "store_batch_size_prompts": np.int64(4), "training_tokens": np.float64(320), "lr": np.float32(0.25),
    "logger": {"wandb_log_frequency": np.int64(1), "log_to_wandb": np.bool_(False)}, "dtype": torch.float32,
}  # fmt: skip
TOPK: dict[str, Any] = {"architecture": "topk", "d_in": np.int64(16), "d_sae": torch.tensor(32), "k": np.int64(4)}


def as_python(value: dict[str, Any]) -> dict[str, Any]:
    """By JSON, whose values are Python's own."""
    return json.loads(json.dumps(plain(value)))


def test_a_sweep_takes_arrays(tmp_path: Path):
    def sweep(sparsities: Any, seeds: Any, **own: Any) -> dict[str, dict[str, Any]]:
        cfg = SweepConfig(
            base={
                **SHARED,
                "hook_name": "blocks.1.hook_resid_pre",
                "sae": {"architecture": "topk", "d_in": 16, "d_sae": 32},
            },
            kinds={"e2e": SweepKind(Objective.e2e(), sparsities, own)},
            output_path=tmp_path / "sweep",
            seeds=seeds,
        )
        return {name: as_python(member.config.to_dict()) for name, member in cfg.members().items()}

    found = sweep(np.asarray([2, 4]), np.arange(2), lr=np.float32(0.5))
    assert found == sweep((2, 4), (0, 1), lr=0.5)
    assert list(found) == ["e2e-2-seed0", "e2e-4-seed0", "e2e-2-seed1", "e2e-4-seed1"]


def test_a_run_of_several_takes_them_too(tmp_path: Path):
    def several(saes: Any, shared: Any, agreement: Any, objective: Any) -> MultiE2ESAERunnerConfig:
        return MultiE2ESAERunnerConfig(
            saes={"one": saes, "two": saes},
            hook_names={"one": "blocks.1.hook_resid_pre", "two": np.str_("blocks.2.hook_resid_pre")},
            output_path=tmp_path / "out", agreement=agreement, objective=objective, **shared,
        )  # fmt: skip

    found = several(TOPK, SHARED, np.float32(0.5), {"kl": np.float32(0.5)})
    expected = several(as_python(TOPK), as_python(SHARED), 0.5, Objective.e2e(0.5))
    assert found.to_dict() == expected.to_dict()
    require_round_trip(found)
    with pytest.raises(ValueError, match=r"model_from_pretrained_kwargs=.* cannot be saved with the run"):
        several(TOPK, {**SHARED, "model_from_pretrained_kwargs": {"a": object()}}, 0, None)


def test_the_recipes_take_them_too(tmp_path: Path):
    hook = "blocks.1.hook_resid_pre"
    python: dict[str, Any] = {
        "d_in": 16, "training_tokens": 4096, "d_sae": 32, "k": 4, "context_size": 8, "lr": 0.25,
        "dataset_path": str(tmp_path),
    }  # fmt: skip
    other: dict[str, Any] = {
        "d_in": np.int64(16), "training_tokens": np.float64(4096), "d_sae": torch.tensor(32), "k": np.int64(4),
        "context_size": np.int64(8), "lr": np.float32(0.25), "dataset_path": tmp_path,
    }  # fmt: skip
    configs = [quick_config(hook, checkpoint_path=None, **each) for each in (python, other)]
    assert configs[0].to_dict() == configs[1].to_dict()
    sae = training_sae(runner_config("topk"))
    for name, value in {"model_name": "tiny", "hook_name": hook, "dataset_path": "tiny", "context_size": 8}.items():
        sae.cfg.metadata[name] = value
    python = {"training_tokens": 640, "evaluation_tokens": 64, "context_size": 8, "lr": 0.25, "model_dtype": "bfloat16"}
    other = {
        "training_tokens": np.float64(640), "evaluation_tokens": torch.tensor(64), "context_size": np.int64(8),
        "lr": np.float32(0.25), "model_dtype": torch.bfloat16,
    }  # fmt: skip
    configs = [finetune_config(sae, checkpoint_path=None, **each) for each in (python, other)]
    assert configs[0].to_dict() == configs[1].to_dict()
    require_round_trip(configs[1])
