"""Sharing SAEs: one commit with all of it, or nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import runner_config, training_sae
from hub_server import HubServer
from hub_server import hub_fixture as hub_fixture
from sae_lens import SAE

from e2e_sae_plugin.hub.upload import push_to_hub

REPO = "someone/saes"


def an_sae(architecture: str = "topk", seed: int = 0) -> SAE:
    torch.manual_seed(seed)
    sae = training_sae(runner_config(architecture))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "gpt2-small", "blocks.1.hook_resid_pre"
    return sae


def test_smoke(hub: HubServer, tmp_path: Path):
    push = push_to_hub({"a": an_sae(), "b": an_sae("standard", 1)}, REPO)
    print(push)
    print(push.card)
    print(hub.requests)
    for name in "ab":
        sae = SAE.from_pretrained(REPO, name)
    assert len(hub.repositories[REPO].commits) == 2
    again = push_to_hub({"a": an_sae(), "b": an_sae("standard", 1)}, REPO)
    print(again)
    assert not again.is_new_commit
