"""An SAE as the files of a repository of the tests' Hub, and the cache that they come to lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_saes import REPO, an_sae
from hub_server import HubServer
from hub_server import hub_fixture as hub_fixture
from huggingface_hub import close_session, constants
from sae_lens import SAE

from e2e_sae_plugin.hub import calls
from e2e_sae_plugin.hub.download import resolve

ID = "layer_1"
CFG, WEIGHTS, SPARSITY, SUMS = (
    f"{ID}/{name}" for name in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "checksums.sha256")
)


def files_of(folder: Path, sae_id: str = ID, seed: int = 0) -> dict[str, bytes]:
    an_sae(seed=seed).save_inference_model(str(folder))
    return {f"{sae_id}/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(tmp_path_factory.mktemp("sae"))


@pytest.fixture(scope="module")
def other_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same SAE id, other weights."""
    return files_of(tmp_path_factory.mktemp("sae"), seed=1)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calls, "PAUSES_SECONDS", (0.0, 0.0, 0.0))


def with_sums(files: Mapping[str, bytes], mark: str = " ") -> dict[str, bytes]:
    lines = [f"{hashlib.sha256(body).hexdigest()} {mark}{Path(name).name}\n" for name, body in files.items()]
    return {**files, SUMS: "".join(lines).encode()}


def flipped(body: bytes) -> bytes:
    """One bit, in the last weight: the file can still be read."""
    return body[:-1] + bytes([body[-1] ^ 1])


def weights_of(body: bytes) -> Any:
    from safetensors.torch import load

    return load(body)


def is_of(sae: SAE[Any], files: Mapping[str, bytes]) -> bool:
    state = weights_of(files[WEIGHTS])
    return all(torch.equal(value, state[name]) for name, value in sae.state_dict().items())


def cached_bodies() -> list[bytes]:
    """All content that the cache has, of snapshots and blobs."""
    root = Path(constants.HF_HUB_CACHE)
    paths = [*root.glob("models--*/blobs/*"), *root.glob("models--*/snapshots/**/*")]
    return [path.read_bytes() for path in paths if path.is_file()]


def snapshot(hub: HubServer, repo_id: str = REPO, branch: str = "main") -> Path:
    return resolve(repo_id, hub.repositories[repo_id].branches[branch]).snapshot


def stop(hub: HubServer) -> None:
    hub.stop()
    close_session()
