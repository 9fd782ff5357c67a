"""An SAE of a Hub repository as the start, through the real client, from a server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import runner_config, tiny_gpt2_model, tiny_tokenizer, training_sae
from hub_server import HubServer, environment
from hub_server import hub_fixture as hub_fixture
from sae_lens import SAE
from time_limits import hang_seconds

REPOSITORY = "someone/saes"


@pytest.mark.slow
def test_an_sae_of_a_hub_repository_is_fine_tuned(hub: HubServer, tmp_path: Path):
    tiny_gpt2_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "corpus").mkdir()
    line = json.dumps({"text": " ".join(f"t{4 + i % 60}" for i in range(40))}) + "\n"
    (tmp_path / "corpus/data.jsonl").write_text(200 * line)
    sae = training_sae(runner_config("topk"))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "model", "transformer.h.1"
    sae.cfg.metadata.model_class_name, sae.cfg.metadata.context_size = "AutoModelForCausalLM", 8
    sae.cfg.metadata.dataset_path = "corpus"
    sae.save_inference_model(str(tmp_path / "saes/layer_1"))
    files = {f"layer_1/{path.name}": path.read_bytes() for path in (tmp_path / "saes/layer_1").iterdir()}
    hub.create(REPOSITORY, files)
    variables = {**environment(hub, tmp_path / "home"), "OMP_NUM_THREADS": "1"}

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
            cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=hang_seconds(), check=False,
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
