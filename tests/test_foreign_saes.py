"""SAE folders of sparsify, of dictionary_learning and of old versions of SAELens: equal activations, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_folders import CLASSES, D_IN, D_SAE, K, computed, library_class, state_dict, write_dictionary
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

from e2e_sae_plugin.cli import main
from e2e_sae_plugin.comparison.subjects import load_subjects
from e2e_sae_plugin.evaluation.result import Evaluation, weights_sha256
from e2e_sae_plugin.finetune.start import load_sae, training_config, training_counterpart
from e2e_sae_plugin.hub.gather import gather
from e2e_sae_plugin.joint.joint_run import load_frozen


def inputs(d_in: int = D_IN) -> Tensor:
    return 2 * torch.randn(50, d_in, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_computes(sae: SAE[Any], x: Tensor, acts: Tensor, out: Tensor) -> None:
    # Sums of some 16 products of numbers of size 10, in float32.
    torch.testing.assert_close(sae.encode(x).double(), acts.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sae(x).double(), out.double(), rtol=1e-5, atol=1e-3)


def sparse_coder(d_in: int = D_IN, **settings: Any) -> SparseCoder:
    torch.manual_seed(0)
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=D_SAE, k=K, **settings))
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return coder


# sparsify.


@pytest.mark.parametrize("settings", [{}, {"normalize_decoder": False}, {"multi_topk": True}])
def test_sparsify_gives_what_sparsify_gives(settings: dict[str, Any], tmp_path: Path):
    coder, x = sparse_coder(**settings), inputs()
    coder.save_to_disk(tmp_path / "run" / "layers.3")
    (tmp_path / "run" / "config.json").write_text(
        json.dumps({"model": "EleutherAI/pythia-70m", "dataset": "owner/text", "ctx_len": 64, "exclude_tokens": [0, 2]})
    )
    sae = load_sae(tmp_path / "run" / "layers.3")
    with torch.no_grad():
        top = coder.encode(x)
        acts = torch.zeros(len(x), D_SAE).scatter(1, top.top_indices, top.top_acts)
        # Not `coder(x)`, which ends with the reconstruction from 4 k features where multi_topk is set.
        assert_computes(sae, x, acts, coder.decode(top.top_acts, top.top_indices))
    metadata = sae.cfg.metadata
    assert (metadata.model_name, metadata.dataset_path, metadata.context_size) == (
        "EleutherAI/pythia-70m",
        "owner/text",
        64,
    )
    assert (metadata.hook_name, metadata.exclude_special_tokens) == ("blocks.3.hook_resid_post", [0, 2])


@pytest.mark.parametrize(
    ("folder", "hook"),
    [
        ("layers.10", "blocks.10.hook_resid_post"), ("h.2", "blocks.2.hook_resid_post"),
        ("layers.4/seed1", "blocks.4.hook_resid_post"), ("layers.3.mlp", None), ("my_sae", None),
    ],
)  # fmt: skip
def test_sparsify_names_folders_after_modules(folder: str, hook: str | None, tmp_path: Path):
    sparse_coder().save_to_disk(tmp_path / folder)
    assert load_sae(tmp_path / folder).cfg.metadata.hook_name == hook


def test_weights_keep_their_dtype(tmp_path: Path):
    sparse_coder().to(torch.bfloat16).save_to_disk(tmp_path / "layers.0")
    sae = load_sae(tmp_path / "layers.0")
    assert (sae.W_dec.dtype, sae.cfg.dtype) == (torch.bfloat16, "bfloat16")


@pytest.mark.parametrize(
    ("setting", "value"), [("activation", "groupmax"), ("transcode", True), ("skip_connection", True), ("signed", True)]
)
def test_what_saelens_has_no_sae_for_is_refused_by_name(setting: str, value: Any, tmp_path: Path):
    sparse_coder().save_to_disk(tmp_path / "layers.0")
    path = tmp_path / "layers.0" / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    with pytest.raises(ValueError, match=rf"cfg.json' has {setting}={value!r}, .* TopK SAEs can be loaded"):
        load_sae(tmp_path / "layers.0")


def test_a_folder_of_hookpoints_stands_for_all_of_them(tmp_path: Path):
    for layer in (2, 10):
        sparse_coder().save_to_disk(tmp_path / "run" / f"layers.{layer}")
    (tmp_path / "run" / "optimizer").mkdir()
    assert [each.name for each in load_subjects([str(tmp_path / "run")])] == ["layers.10", "layers.2"]
    with pytest.raises(ValueError, match=r"holds no SAE. Name one of the folders in it: layers.10, layers.2"):
        load_sae(tmp_path / "run")
    with pytest.raises(ValueError, match=r"frozen.a: .* holds several SAEs, layers.10, layers.2"):
        load_frozen("a", str(tmp_path / "run"))


# dictionary_learning.


@pytest.mark.parametrize("dict_class", CLASSES)
def test_dictionary_learning_gives_what_its_formulas_give(dict_class: str, tmp_path: Path):
    state = state_dict(dict_class)
    sae = load_sae(write_dictionary(tmp_path / "sae", dict_class, state))
    assert_computes(sae, inputs(), *computed(dict_class, state, inputs()))
    metadata = sae.cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("EleutherAI/pythia-70m", "blocks.3.hook_resid_post")
    assert metadata.context_size == 128


@pytest.mark.parametrize("dict_class", CLASSES)
def test_dictionary_learning_gives_what_the_library_gives(dict_class: str, tmp_path: Path):
    library = library_class(dict_class)
    if library is None:
        pytest.skip("dictionary-learning is not installed (pip install --no-deps dictionary-learning)")
    folder = write_dictionary(tmp_path / "sae", dict_class, state_dict(dict_class))
    theirs = library.from_pretrained(str(folder / "ae.pt"))
    with torch.no_grad():
        assert_computes(load_sae(folder), inputs(), theirs.encode(inputs()), theirs(inputs()))


def test_decoder_rows_of_norm_1_stay_as_they_are(tmp_path: Path):
    state = state_dict("AutoEncoder")
    state["decoder.weight"] = torch.nn.functional.normalize(state["decoder.weight"], dim=0)
    sae = load_sae(write_dictionary(tmp_path / "sae", "AutoEncoder", state))
    assert torch.equal(sae.W_enc, state["encoder.weight"].T)
    assert torch.equal(sae.W_dec, state["decoder.weight"].T)


def test_a_threshold_that_was_never_set_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    state = {**state_dict("BatchTopKSAE"), "threshold": torch.tensor(-1.0)}
    sae = load_sae(write_dictionary(tmp_path / "sae", "BatchTopKSAE", state))
    assert "has no threshold yet" in caplog.text
    assert_computes(sae, inputs(), *computed("BatchTopKSAE", state, inputs()))


@pytest.mark.parametrize(
    "trainer", [{"submodule_name": "mlp_out_layer_3"}, {"layer": None}, {"submodule_name": "attention_layer_3"}]
)
def test_no_hook_is_guessed(trainer: dict[str, Any], tmp_path: Path):
    folder = write_dictionary(tmp_path / "sae", "AutoEncoder", state_dict("AutoEncoder"), **trainer)
    assert load_sae(folder).cfg.metadata.hook_name is None


def write_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)


def change_state(folder: Path, **changes: Tensor | None) -> None:
    state = {**torch.load(folder / "ae.pt"), **changes}
    torch.save({name: value for name, value in state.items() if value is not None}, folder / "ae.pt")


def run_code(folder: Path) -> None:
    torch.save({"encoder.weight": Path("a pickled object")}, folder / "ae.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: write_config(f, '{"trainer": {"dict_class": "CrossCoder"}}'), "dict_class='CrossCoder'.*AutoEncoderTopK"),
        (lambda f: write_config(f, "{}"), "dict_class=None"),
        (lambda f: write_config(f, "[]"), "holds no JSON object"),
        (lambda f: write_config(f, '{"trainer"'), "is corrupt"),
        (lambda f: (f / "config.json").unlink(), "is incomplete: .*config.json"),
        (lambda f: (f / "ae.pt").write_bytes(b"PK torn"), "ae.pt' is corrupt, or holds more than tensors"),
        (run_code, "ae.pt' is corrupt, or holds more than tensors, which could run code"),
        (lambda f: torch.save(torch.zeros(3), f / "ae.pt"), "holds no state_dict"),
        (lambda f: torch.save({"W_skip": torch.zeros(3)}, f / "ae.pt"), "is incomplete: no 'W_dec'"),
        (lambda f: change_state(f, skip=torch.zeros(3)), 'do not fit its config: .*Unexpected key.*"skip"'),
        (lambda f: change_state(f, bias=None), 'do not fit its config: .*Missing key.*"b_dec"'),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_said_by_name(damage: Any, message: str, tmp_path: Path):
    folder = write_dictionary(tmp_path / "sae", "AutoEncoder", state_dict("AutoEncoder"))
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_sae(folder)


# Old folders of SAELens.


def flat_folder(folder: Path, *, dtype: bool = True) -> TopKSAE:
    """A TopK SAE as SAELens 3 to 5 saved it: all settings flat in `cfg.json`."""
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, apply_b_dec_to_input=False))
    folder.mkdir()
    save_file(
        {name: value.contiguous() for name, value in sae.state_dict().items()}, folder / "sae_weights.safetensors"
    )
    flat = {
        "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
        "d_in": D_IN, "d_sae": D_SAE, "model_name": "gpt2-small", "hook_name": "blocks.1.hook_resid_pre",
        "apply_b_dec_to_input": False,
        "context_size": 128, "dataset_path": "owner/text", "normalize_activations": "none",
        "sae_lens_training_version": "3.20.0",
        **({"dtype": "torch.float32"} if dtype else {}),
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(flat))
    return sae


@pytest.mark.parametrize("dtype", [True, False])
def test_a_flat_folder_loads_and_is_pushed_in_the_present_format(dtype: bool, tmp_path: Path):
    original = flat_folder(tmp_path / "old", dtype=dtype)
    (shared,) = gather(tmp_path / "old", tmp_path / "work")
    assert shared.sae_id == "blocks.1.hook_resid_pre"
    for sae in (load_sae(tmp_path / "old"), SAE.load_from_disk(shared.folder)):
        assert weights_sha256(sae) == weights_sha256(original)
        assert (sae.cfg.architecture(), sae.cfg.metadata.model_name) == ("topk", "gpt2-small")
    assert json.loads((shared.folder / "cfg.json").read_text())["metadata"]["hook_name"] == "blocks.1.hook_resid_pre"


def test_a_cfg_json_without_dtype_takes_the_weights(tmp_path: Path):
    StandardSAE(StandardSAEConfig(d_in=4, d_sae=8, dtype="bfloat16")).save_model(tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "dtype"})
    )
    assert load_sae(tmp_path / "sae").cfg.dtype == "bfloat16"


# What is done with them.


def foreign_folder(kind: str, folder: Path, d_in: int = D_IN) -> Path:
    if kind == "sparsify":
        folder = folder / "layers.2"
        sparse_coder(d_in).save_to_disk(folder)
        (folder.parent / "config.json").write_text(json.dumps({"model": "e2e-sae-demo"}))
        return folder
    return write_dictionary(folder / kind, kind, state_dict(kind, d_in), layer=2, lm_name="e2e-sae-demo")


@pytest.mark.parametrize("kind", ["sparsify", *CLASSES])
def test_all_of_them_can_be_fine_tuned_and_pushed(kind: str, tmp_path: Path):
    folder = foreign_folder(kind, tmp_path / "saes")
    sae, x = load_sae(folder), inputs()
    coefficient = {"l1_coefficient": 1.0} if sae.cfg.architecture() in ("standard", "gated") else {}
    trained = training_counterpart(sae, training_config(sae, coefficient))
    with torch.no_grad():
        assert torch.equal(trained.encode(x), sae.encode(x))
    (shared,) = gather(folder, tmp_path / "work")
    again = SAE.load_from_disk(shared.folder)
    assert weights_sha256(again) == weights_sha256(sae)
    with torch.no_grad():
        assert torch.equal(again(x), sae(x))


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
@pytest.mark.slow
def test_evaluate_and_compare_take_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    first, second = (foreign_folder(kind, tmp_path, 128) for kind in ("sparsify", "BatchTopKSAE"))
    flags = ["--device", "cpu", "--tokens", "512", "--dataset", "e2e-sae-demo"]
    assert main(["evaluate", str(first), *flags, "--output", "found.json"]) == 0
    found = Evaluation.load("found.json")
    assert (found.hook_name, found.architecture) == ("blocks.2.hook_resid_post", "topk")
    assert found.value("l0") <= K
    assert main(["compare", f"a={first}", f"b={second}", *flags, "--output", "out", "--cards", "0"]) == 0
    shutil.copytree(first, "moved")
    assert main(["evaluate", "moved", *flags, "--hook", "blocks.2.hook_resid_post", "--model", "e2e-sae-demo"]) == 0
    assert load_file("moved/sae.safetensors").keys() == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
