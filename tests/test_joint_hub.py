"""Sets of SAEs on the Hub: a run's folder goes up as it is, and comes back as a set; frozen SAEs come from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hub_saes import REPO, an_sae
from hub_server import HubServer
from hub_server import hub_fixture as hub_fixture
from sae_lens import SAE
from test_joint_run import HOOKS, runner, settings

from e2e_sae_plugin import load_sae_set, push_to_hub
from e2e_sae_plugin.hub import calls


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PAUSES_SECONDS", (0.0, 0.0, 0.0))


def assert_same(first: SAE[Any], second: SAE[Any]) -> None:
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=0)


def test_a_set_goes_up_and_comes_back(hub: HubServer, tmp_path: Path):
    saes = runner(tmp_path, training_tokens=64).run()
    push_to_hub(tmp_path / "out", REPO)
    loaded = load_sae_set(REPO)
    assert list(loaded.saes) == ["early", "late"]
    for name, sae in saes.saes.items():
        assert_same(sae, loaded.saes[name])
        assert_same(sae, SAE.from_pretrained(REPO, name))  # plain SAELens
    assert loaded.training == saes.training
    assert list(load_sae_set(REPO, names=["late"]).saes) == ["late"]
    with pytest.raises(ValueError, match=r"names=\['x'\]: the set of"):
        load_sae_set(REPO, names=["x"])


def test_a_frozen_sae_may_come_from_the_hub(hub: HubServer, tmp_path: Path):
    saes = runner(tmp_path / "first", training_tokens=64).run()
    push_to_hub(tmp_path / "first/out", REPO)
    one = {"saes": {"last": settings(tmp_path)["saes"]["late"]}, "hook_names": {"last": HOOKS["late"]}}
    second = runner(tmp_path, **one, frozen={"early": f"{REPO}:early"}, training_tokens=64).run()
    assert list(second.saes) == ["early", "last"]
    assert_same(saes.saes["early"], second.saes["early"])


def test_saes_that_do_not_belong_together_are_no_set(hub: HubServer):
    push_to_hub({"a": an_sae(), "b": an_sae(seed=1)}, REPO)
    with pytest.raises(ValueError, match="do not say that they belong together: 'a' has no sae_set"):
        load_sae_set(REPO)
