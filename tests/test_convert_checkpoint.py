"""What is refused of a checkpoint and its config, by name, and that no code of it is run."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from convert_runs import CONTEXT, HOOK, authors_config

from e2e_sae_plugin.convert import convert
from e2e_sae_plugin.convert.checkpoint import read_checkpoint

D_IN, D_SAE = 4, 6
PLACE = "blocks-1-hook_resid_pre"
ENCODER, DECODER = f"{PLACE}.encoder.0.weight", f"{PLACE}.decoder.weight"
State = dict[str, Any]


def state(place: str = PLACE) -> State:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "encoder.0.weight": (D_SAE, D_IN),
        "encoder.0.bias": (D_SAE,),
        "decoder.weight": (D_IN, D_SAE),
        "decoder.bias": (D_IN,),
    }
    return {f"{place}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}  # fmt: skip


def saved(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "samples_8.pt", **options)
    return folder / "samples_8.pt"


def test_tensors_are_turned_and_the_dictionary_normalised(tmp_path: Path):
    content = state()
    (place, weights), = read_checkpoint(saved(tmp_path, content)).items()  # fmt: skip
    assert place == HOOK
    assert (weights.d_in, weights.d_sae) == (D_IN, D_SAE)
    assert torch.equal(weights.W_enc, content[ENCODER].T)
    column = content[DECODER][:, 2]
    torch.testing.assert_close(weights.W_dec[2], column / (column**2).sum().sqrt())


def test_the_weights_outlive_the_file(tmp_path: Path):
    path = saved(tmp_path, state())
    weights = read_checkpoint(path)[HOOK]
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(weights.W_enc, state()[ENCODER].T)


def test_underscores_and_several_hooks_are_read(tmp_path: Path):
    content = {**state("blocks-0-hook_mlp_out"), **state("blocks-11-attn-hook_z")}
    assert list(read_checkpoint(saved(tmp_path, content))) == ["blocks.0.hook_mlp_out", "blocks.11.attn.hook_z"]


def test_the_format_before_zip_files_is_read(tmp_path: Path):
    path = saved(tmp_path, state(), _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path)[HOOK].W_enc, state()[ENCODER].T)


def without(name: str) -> State:
    return {key: value for key, value in state().items() if key != name}


def changed(name: str, value: Any) -> State:
    return {**state(), name: value}


def with_value(name: str, value: float) -> State:
    content = state()
    content[name].view(-1)[3] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without(DECODER), rf"samples_8\.pt lacks {HOOK}: decoder\.weight\."),
        ({**state(), "blocks-2-hook_resid_pre.encoder.0.bias": torch.ones(6)}, r"lacks blocks\.2\.\S+: encoder\.weight"),
        ({**state(), f"{PLACE}.threshold": torch.ones(6)}, rf"has keys that no SAE of the authors has: {PLACE}\.threshold"),
        ({**state(), "optimizer": torch.ones(6)}, "no SAE of the authors has: optimizer"),
        ({**state(), "tlens_model.embed.W_E": torch.ones(6)}, "has: tlens_model.embed.W_E"),
        ({"saes.x.codebook": torch.ones(2, 2)}, r"holds a codebook \(saes\.x\.codebook\), not an SAE"),
        ({**state(), f"{PLACE}.encoder.weight": torch.ones(6, 4)}, r"has encoder\.weight of blocks\.1\.\S+ twice"),
        ({**state(), "encoder.weight": torch.ones(6, 4)}, "names the hook of some of its tensors and not of others"),
        ({"saes.empty": torch.ones(1)}, r"has: saes\.empty"),
        (changed(DECODER, torch.ones(6, 4)), r"decoder\.weight has the shape \[6, 4\], but .* so \[4, 6\] was expected"),
        (changed(f"{PLACE}.decoder.bias", torch.ones(6)), r"decoder\.bias has the shape \[6\]"),
        (changed(ENCODER, torch.ones(6)), r"encoder\.weight must have the shape \[d_sae, d_in\], got \[6\]"),
        (changed(ENCODER, torch.ones(0, 4)), r"must have the shape \[d_sae, d_in\], got \[0, 4\]"),
        (changed(ENCODER, torch.ones(6, 4).long()), r"a dense tensor of floating-point .* torch\.strided torch\.int64"),
        (changed(ENCODER, torch.eye(6, 4).to_sparse()), "got torch.sparse_coo"),
        (changed(ENCODER, [1.0]), "got list"),
        (with_value(ENCODER, float("nan")), r"8\.pt, blocks\.1\.\S+: encoder\.weight has values that are not finite"),
        (with_value(f"{PLACE}.decoder.bias", float("-inf")), r"decoder\.bias has values that are not finite"),
        (changed(DECODER, torch.full((4, 6), 1e300, dtype=torch.float64)), "not finite in float32"),
        ({}, "is empty: it holds no tensors"),
        ({"tlens_model.W": torch.ones(1), "saes.x": torch.ones(1)}, r"has: saes\.x"),
        ([torch.ones(2)], "holds list, not the state_dict"),
        ({1: torch.ones(2)}, "not the state_dict"),
    ],
    ids=range(23),
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused_by_name(content: Any, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        read_checkpoint(saved(tmp_path, content))


class Code:
    """What a malicious file holds: reading it calls a function."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(zipped: bool, tmp_path: Path):
    path = saved(tmp_path, {**state(), "more": Code(tmp_path / "ran")}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"samples_8\.pt is refused: to read it, \S*mkdir would have to be called"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # it is what it says
    assert (tmp_path / "ran").exists()


def test_a_whole_module_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear would have to be called.*state_dict\(\)"):
        read_checkpoint(saved(tmp_path, torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(kept: float, zipped: bool, tmp_path: Path):
    path = saved(tmp_path, state(), _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"samples_8\.pt cannot be read as a checkpoint: it is damaged, truncated"):
        read_checkpoint(path)


def test_no_length_of_a_file_passes_or_surprises(tmp_path: Path):
    """Older files are one pickle after another, with an end of its own for each length."""
    path = saved(tmp_path, state(), _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for length in range(1, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"samples_8\.pt"):
            read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04 not a zip", pickle.dumps({"a": 1}), b"\x80\x02."])
def test_other_files_are_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "samples_8.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"samples_8\.pt"):
        read_checkpoint(path)


# The config beside it.


def run(folder: Path, config: Any, content: State | None = None) -> Path:
    saved(folder, state() if content is None else content)
    text = config if isinstance(config, str) else yaml.dump(config)
    (folder / "final_config.yaml").write_text(text)
    return folder


def fitting(**changes: Any) -> dict[str, Any]:
    return authors_config("e2e", **{"saes__dict_size_to_input_ratio": 1.5, **changes})


def test_a_config_that_fits_is_read(tmp_path: Path):
    (found,) = convert(run(tmp_path, fitting()))
    assert found.config is not None
    assert found.config.context_size == CONTEXT


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("saes: [", r"final_config\.yaml is not valid YAML"),
        ("!!python/object/apply:os.mkdir [x]", "is not valid YAML"),
        ("[1, 2]", "has no section 'saes'"),
        ("train: {lr: 1}", "has no section 'saes'"),
        (fitting(saes__type_of_sparsifier="codebook"), r"saes\.type_of_sparsifier is 'codebook'"),
        (fitting(saes__k=32), r"saes\.k=32 is a setting of codebooks"),
        (fitting(saes__sae_positions=None), r"saes\.sae_positions must be the name of a hook or a list .* got None"),
        (fitting(saes__sae_positions=[]), r"got \[\]"),
        (fitting(saes__sae_positions=[3]), r"got \[3\]"),
        (fitting(saes__sae_positions=["blocks.2"]), r"has SAEs at blocks\.1\.\S+, but final_config\.yaml is of a run"),
        (fitting(saes__dict_size_to_input_ratio=3.0), r"has 6 features at .*_ratio=3 for 4 dimensions, 12 features"),
        (fitting(tlens_model_name=["gpt2"]), "tlens_model_name must be a model's name"),
    ],
    ids=range(12),
)  # fmt: skip
def test_a_config_that_does_not_fit_is_refused(config: Any, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        convert(run(tmp_path, config))


@pytest.mark.parametrize("key", ["sae_position_names", "sae_position_name"])
def test_older_names_of_the_positions_are_read(key: str, tmp_path: Path):
    config = fitting()
    config["saes"] = {key: HOOK, "dict_size_to_input_ratio": 1.5}
    assert convert(run(tmp_path, config))[0].sae.cfg.metadata.hook_name == HOOK


@pytest.mark.parametrize("positions", ["hook_resid_pre", [HOOK, "blocks.2.hook_resid_pre"]])
def test_one_sae_without_a_hook_needs_a_config_with_one_hook(positions: Any, tmp_path: Path):
    bare = {key.removeprefix(f"{PLACE}."): value for key, value in state().items()}
    with pytest.raises(ValueError, match="holds one SAE and does not say at which hook"):
        convert(run(tmp_path, fitting(saes__sae_positions=positions), bare))
    assert convert(run(tmp_path, fitting(saes__sae_positions=HOOK), bare))[0].sae.cfg.metadata.hook_name == HOOK


def test_every_tensor_counts(tmp_path: Path):
    """A change to any of the four tensors changes what is converted."""
    reference = read_checkpoint(saved(tmp_path, state()))[HOOK].state_dict()
    for key in state():
        content = state()
        content[key].view(-1)[0] += 0.5
        other = read_checkpoint(saved(tmp_path, content))[HOOK].state_dict()
        different = [name for name in other if not torch.equal(other[name], reference[name])]
        assert len(different) == 1, (key, different)


def test_messages_name_no_more_than_a_few_keys(tmp_path: Path):
    with pytest.raises(ValueError, match="and 14 more") as raised:
        read_checkpoint(saved(tmp_path, {f"layer{n}": torch.ones(1) for n in range(20)}))
    assert len(re.findall("layer", str(raised.value))) == 6
