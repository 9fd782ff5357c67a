"""A home or cache that cannot be written is named, with the variable that moves it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import config
from helpers import runner_config, tiny_hooked_transformer
from huggingface_hub import constants

from e2e_sae_plugin import E2ESAETrainingRunner
from e2e_sae_plugin.cache_folders import cache_problem, explained_cache_errors
from e2e_sae_plugin.hub.calls import HubError, hub_call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "def f(x): return x"}\n' * 200)
    return folder


def test_a_home_that_cannot_be_made_is_named_on_the_command_line(text: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    settings = {
        "model_name": "e2e-sae-demo", "dataset_path": str(text), "hook_name": "blocks.3.hook_resid_pre", "context_size": 16,
        "training_tokens": 64, "train_batch_size_tokens": 32, "store_batch_size_prompts": 2, "n_eval_batches": 0,
        "output_path": str(tmp_path / "out"), "checkpoint_path": None, "logger": {"log_to_wandb": False},
        "sae": {"architecture": "topk", "d_in": 128, "d_sae": 64, "k": 4},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    home = str(tmp_path / "file/home")
    elsewhere = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    command = [sys.executable, "-W", "ignore", "-m", "e2e_sae_plugin", "train", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env={**elsewhere, "HOME": home}, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"e2e-sae train: The cache folder '{home}/.cache/huggingface/datasets' cannot be written: Not a"
    )
    assert "Set HF_DATASETS_CACHE, or HF_HOME for all of Hugging Face's caches, to a folder that can be" in last


def test_a_cache_that_cannot_be_made_is_named_in_python(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(OSError, match=r"The cache folder '.*/file/cache' cannot be written: Not a directory") as caught:
        E2ESAETrainingRunner(runner_config(dataset_path=str(text)), override_model=tiny_hooked_transformer())
    assert isinstance(caught.value.__cause__, NotADirectoryError)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_the_hubs_cache_is_named_too(code: int):
    inside = str(Path(constants.HF_HUB_CACHE) / "models--me--x/blobs")
    with pytest.raises(HubError, match=r"Could not fetch x: The cache folder .* Set HF_HUB_CACHE, or HF_HOME"):
        hub_call("fetch x", _fail, OSError(code, os.strerror(code), inside))


def _fail(error: OSError) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError("no file"),
        FileNotFoundError(
            errno.ENOENT, "No such file or directory", str(Path(constants.HF_HUB_CACHE) / "models--a/blobs/b")
        ),
        PermissionError(errno.EACCES, "Permission denied", "/somewhere/else"),
    ],
    ids=["nameless", "missing in the cache", "elsewhere"],
)
def test_other_errors_stay_as_they_are(error: OSError):
    assert cache_problem(error) is None
    with pytest.raises(type(error)) as caught, explained_cache_errors():
        raise error
    assert caught.value is error
