"""The progress bar shows the terms that a run has."""

from __future__ import annotations

import pytest
import torch
from sae_lens.saes.sae import TrainStepOutput

from e2e_sae_plugin.progress import Progress


def output(**losses: float) -> TrainStepOutput:
    nothing = torch.zeros(())
    named = {f"{name}_loss": torch.tensor(value) for name, value in losses.items()}
    return TrainStepOutput(nothing, nothing, nothing, nothing, nothing, named)


@pytest.mark.parametrize(
    ("auxiliary", "shown"), [(0.0, "kl=0.25, L0"), (0.5, "kl=0.25, auxiliary_reconstruction=0.5, L0")]
)
def test_a_term_that_is_zero_is_left_out(
    auxiliary: float, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with Progress(20, 0) as progress:
        terms = output(kl=0.25, auxiliary_reconstruction=auxiliary)
        progress.show(1, 20, terms, torch.tensor(4.0), now=True)
    assert shown in capsys.readouterr().err
