"""An SAE of a Hub repository as the start, through the real client, from a server on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import runner_config, tiny_gpt2_model, tiny_tokenizer, training_sae
from hub_server import HubServer
from hub_server import hub_fixture as hub_fixture
from sae_lens import SAE

from e2e_sae_plugin.cli import main

REPOSITORY = "someone/saes"


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
def test_an_sae_of_a_hub_repository_is_fine_tuned(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
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
    monkeypatch.chdir(tmp_path)

    def finetune(repository: str, sae_id: str) -> int:
        numbers = ["--tokens", "128", "--evaluation-tokens", "64"]
        return main(["finetune", "--sae", repository, "--sae-id", sae_id, *numbers, "--output", "out"])

    assert finetune(REPOSITORY, "layer_1") == 0, capsys.readouterr().err
    tuned = SAE.load_from_disk(str(tmp_path / "out"))
    assert tuned.cfg.metadata.finetuned_from["source"] == f"{REPOSITORY} layer_1"
    for repository, sae_id in ((REPOSITORY, "layer_2"), ("someone/else", "layer_1")):
        capsys.readouterr()
        assert finetune(repository, sae_id) == 1
        assert sae_id in capsys.readouterr().err
