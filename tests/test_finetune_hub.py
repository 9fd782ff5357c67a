"""An SAE of a Hub repository as the start, through the real client, from a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import runner_config, tiny_gpt2_model, tiny_tokenizer, training_sae
from sae_lens import SAE

REPOSITORY, COMMIT = "someone/saes", "0" * 39 + "1"


def handler_of(folder: Path) -> type[BaseHTTPRequestHandler]:
    """Serves `folder` as the files of REPOSITORY on main."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            prefix = f"/{REPOSITORY}/resolve/main/"
            file = folder / self.path.removeprefix(prefix)
            known = self.path.startswith(prefix)
            body = file.read_bytes() if known and file.is_file() else b""
            self.send_response(200 if body else 404)
            if body:
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            else:
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    return Handler


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that takes this server for the Hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(tmp_path / "repository"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_an_sae_of_a_hub_repository_is_fine_tuned(hub: dict[str, str], tmp_path: Path):
    tiny_gpt2_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "corpus").mkdir()
    line = json.dumps({"text": " ".join(f"t{4 + i % 60}" for i in range(40))}) + "\n"
    (tmp_path / "corpus/data.jsonl").write_text(200 * line)
    sae = training_sae(runner_config("topk"))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "model", "transformer.h.1"
    sae.cfg.metadata.model_class_name, sae.cfg.metadata.context_size = "AutoModelForCausalLM", 8
    sae.cfg.metadata.dataset_path = "corpus"
    sae.save_inference_model(str(tmp_path / "repository/layer_1"))

    def finetune(repository: str, sae_id: str) -> subprocess.CompletedProcess[str]:
        flags = [
            "--sae",
            repository,
            "--sae-id",
            sae_id,
            "--tokens",
            "128",
            "--evaluation-tokens",
            "64",
            "--output",
            "out",
        ]
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "e2e_sae_plugin", "finetune", *flags],
            cwd=tmp_path, env=hub, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    done = finetune(REPOSITORY, "layer_1")
    assert done.returncode == 0, done.stderr
    tuned = SAE.load_from_disk(str(tmp_path / "out"))
    assert tuned.cfg.metadata.finetuned_from["source"] == f"{REPOSITORY} layer_1"
    for repository, sae_id in ((REPOSITORY, "layer_2"), ("someone/else", "layer_1")):
        failed = finetune(repository, sae_id)
        assert failed.returncode == 1
        assert "Traceback" not in failed.stderr
        assert sae_id in failed.stderr
        assert repository in failed.stderr
