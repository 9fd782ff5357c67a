"""How a run starts: `b_dec` at the mean activation, and a first part that is trained locally."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import build_trainer, runner_config, token_batch
from torch import Tensor

from e2e_sae_plugin import E2ESAERunnerConfig, Objective
from e2e_sae_plugin.initialisation import estimate_activation_scaling, initialise_b_dec

NORMALISATIONS = ["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale", "covariance_whitening"]


def trainer_on_data(architecture: str = "standard", sae: dict[str, Any] | None = None, **settings: Any) -> Any:
    config = runner_config(architecture, sae, n_batches_for_norm_estimate=3, **settings)
    return build_trainer(config, data=(token_batch(4, seed=i) for i in itertools.count()))


@pytest.mark.parametrize("b_dec_on_input", [False, True])
@pytest.mark.parametrize("normalize", NORMALISATIONS)
def test_b_dec_starts_at_the_mean_so_that_an_sae_without_features_returns_it(normalize: str, b_dec_on_input: bool):
    settings = {"normalize_activations": normalize, "apply_b_dec_to_input": b_dec_on_input}
    trainer = trainer_on_data("standard", settings, b_dec_init_method="mean")
    estimate_activation_scaling(trainer)
    estimated = normalize in ("expected_average_only_in", "covariance_whitening")
    initialise_b_dec(trainer)
    batches = [token_batch(4, seed=i + (3 if estimated else 0)) for i in range(3)]  # the scaling's estimate took three
    sae_in = trainer.scaled_sae_in(trainer.clean_micro_batches(torch.cat(batches)))
    with torch.no_grad():
        trainer.sae.b_enc.fill_(-1e6)  # no feature fires
        residual = sae_in - trainer.sae(sae_in)
        if normalize in ("layer_norm", "constant_norm_rescale"):  # the mean is one of normalised activations
            raw_b_dec = trainer.sae.b_dec.clone()
            trainer.sae.b_dec.zero_()
            residual = trainer.sae.process_sae_in(sae_in) - raw_b_dec
    assert residual.std() > 0.01
    torch.testing.assert_close(residual.mean(0), torch.zeros(residual.shape[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "samples", "identity"),
    [("zeros", 0, None), ("mean", 32, None), ("auto", 32, None), ("auto", 0, "the fingerprint of a given SAE")],
)
def test_b_dec_is_left_alone_in_a_run_that_is_resumed_or_has_an_sae_already(
    method: Any, samples: int, identity: str | None
):
    trainer = trainer_on_data(b_dec_init_method=method)
    trainer.n_training_samples, trainer.identity = samples, {"override_sae": identity}
    before = trainer.sae.b_dec.detach().clone()
    initialise_b_dec(trainer)
    assert torch.equal(trainer.sae.b_dec, before)


def test_b_dec_of_a_new_sae_starts_at_the_mean_by_default():
    by_default, from_mean = (trainer_on_data(b_dec_init_method=method) for method in ("auto", "mean"))
    for trainer in (by_default, from_mean):
        initialise_b_dec(trainer)
    assert torch.equal(by_default.sae.b_dec, from_mean.sae.b_dec)
    assert E2ESAERunnerConfig(sae=by_default.runner_cfg.sae, verbose=False).b_dec_init_method == "auto"


def test_the_first_part_of_a_run_is_local_and_the_rest_is_the_objectives():
    objective = Objective.e2e_downstream(beta=0.5)
    trainer = trainer_on_data("topk", objective=objective, local_first=0.3, training_tokens=320)
    kinds = []
    for _ in range(10):
        output = trainer.step(next(trainer.data_provider))
        kinds.append("kl_loss" in output.losses)
        assert kinds[-1] == ("downstream_mse_loss" in output.losses)
    assert kinds == [False] * 3 + [True] * 7


def test_steps_of_the_local_part_are_those_of_a_local_run():
    def weights(**settings: Any) -> dict[str, Tensor]:
        trainer = trainer_on_data("topk", training_tokens=320, **settings)
        for _ in range(4):
            trainer.step(next(trainer.data_provider))
        return {name: parameter.detach().clone() for name, parameter in trainer.sae.named_parameters()}

    mixed, local = weights(objective=Objective.e2e(), local_first=0.4), weights(objective=Objective.local())
    for name, value in local.items():  # but for the rounding of Adam's fused kernel, which local runs do without
        torch.testing.assert_close(mixed[name], value, rtol=1e-5, atol=1e-7)
    others = weights(objective=Objective.e2e())
    assert any((mixed[name] - other).abs().max() > 1e-4 for name, other in others.items())


def test_a_run_without_a_local_part_never_trains_locally():
    trainer = trainer_on_data("topk", objective=Objective.e2e())
    assert trainer.objective == Objective.e2e()
    trainer.step(next(trainer.data_provider))
    assert trainer.objective == Objective.e2e()


# What is counted when.


def test_a_step_that_fails_is_not_counted_so_that_a_resumed_run_does_it_again(monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_on_data("topk")
    trainer.step(next(trainer.data_provider))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.spliced_model, "spliced_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.step(next(trainer.data_provider))
    assert trainer.n_training_samples == 32
    assert trainer.n_frac_active_samples == 32


def test_sampled_matryoshka_levels_follow_from_the_step_alone():
    """So that a resumed run draws what the run would have drawn."""
    levels = {}
    for first in (0, 3):  # the second run starts at step 3
        objective = Objective(kl=1, matryoshka_levels="sampled")
        trainer = trainer_on_data("matryoshka_batchtopk", objective=objective)
        for step in range(first, 12):
            trainer.n_training_steps = step
            output = trainer.step(token_batch(4, seed=step))
            drawn = [name for name in output.losses if name.startswith("kl_loss_")]
            assert levels.setdefault(step, drawn) == drawn
            assert len(drawn) == 1
    assert len({names[0] for names in levels.values()}) > 1


def test_the_local_part_runs_the_model_no_further_than_the_saes_hook():
    trainer = trainer_on_data(
        "topk", objective=Objective.e2e_downstream(beta=0.5), local_first=0.3, training_tokens=320
    )
    calls: list[int] = []
    trainer.spliced_model.model.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    trainer.step(next(trainer.data_provider))
    assert not calls
    trainer.n_training_samples = 160
    trainer.step(next(trainer.data_provider))
    assert len(calls) == 2  # clean and spliced
