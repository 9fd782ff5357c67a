"""What a config without `objective` trains, and what is said of sparsity coefficients that were chosen for another loss."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from helpers import build_trainer, runner_config, sae_config, token_batch

from e2e_sae_plugin import E2ESAERunnerConfig, Objective


def recipe(architecture: str = "topk", **settings: Any) -> E2ESAERunnerConfig:
    """As a user of SAELens writes it: no objective."""
    given = runner_config(architecture, **{"training_tokens": 32 * 100, **settings}).to_dict()
    for name in (
        "objective",
        "local_first",
        "b_dec_init_method",
        *(n for n in ("lr_decay_steps",) if n not in settings),
    ):
        del given[name]
    kept = {name: settings[name] for name in ("objective", "local_first") if name in settings}
    return E2ESAERunnerConfig.from_dict({**given, **kept})


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu", "batchtopk"])
def test_without_an_objective_a_run_is_local_first_and_ends_on_kl_and_squared_error(architecture: str):
    config = recipe(architecture)
    assert config.objective == Objective.finetune()
    assert config.local_first == 0.8
    assert config.lr_decay_steps == 20  # the last fifth of 100 steps
    assert config.b_dec_init_method == "auto"
    again = E2ESAERunnerConfig.from_dict(config.to_dict())
    assert (again.local_first, again.lr_decay_steps, again.objective) == (0.8, 20, config.objective)


@pytest.mark.parametrize(
    ("settings", "local_first", "decay"),
    [
        ({"objective": Objective.e2e()}, 0.0, 0),  # what is asked for by name is done as it is
        ({"objective": Objective.local()}, 0.0, 0),
        ({"objective": Objective.finetune()}, 0.8, 20),
        ({"local_first": 0.5}, 0.5, 0),
        ({"local_first": 0.0}, 0.0, 0),
        ({"lr_scheduler_name": "cosineannealing"}, 0.8, 0),  # the user's own schedule stays
        ({"lr_decay_steps": 40}, 0.8, 40),
        ({"lr_warm_up_steps": 90}, 0.8, 0),  # no room for both
        ({"training_tokens": 32 * 9}, 0.0, 0),  # too short for two parts
        ({"from_pretrained_path": "an SAE that exists"}, 0.0, 0),
    ],
    ids=str,
)
def test_what_a_config_says_itself_stays(settings: dict[str, Any], local_first: float, decay: int):
    config = recipe(**settings)
    assert (config.local_first, config.lr_decay_steps) == (local_first, decay)


def test_both_parts_are_trained():
    config = recipe("standard")
    trainer = build_trainer(config, data=(token_batch(4, seed=i) for i in range(100)))
    kinds = ["kl_loss" in trainer.step(next(trainer.data_provider)).losses for _ in range(100)]
    assert kinds == [False] * 80 + [True] * 20


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


@pytest.mark.parametrize(("coefficient", "warns"), [(50.0, True), (1e-6, False)])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_a_coefficient_for_a_squared_error_beside_a_kl_alone_is_named_with_both_numbers(
    architecture: str, coefficient: float, warns: bool, caplog: pytest.LogCaptureFixture
):
    name = "l0_coefficient" if architecture == "jumprelu" else "l1_coefficient"
    config = runner_config(architecture, {name: coefficient}, training_tokens=32 * 13)
    trainer = build_trainer(config, data=(token_batch(4, seed=i) for i in range(13)))
    while not trainer.is_done:
        trainer.advance()
    assert (f"{name}={coefficient:g} suits a squared error" in said(caplog)) is warns
    assert said(caplog).count("At step 10 the sparsity term is") == int(warns)


def test_beside_a_squared_error_the_same_coefficient_is_left_alone(caplog: pytest.LogCaptureFixture):
    config = runner_config(
        "standard", {"l1_coefficient": 50.0}, objective=Objective.finetune(), training_tokens=32 * 13
    )
    trainer = build_trainer(config, data=(token_batch(4, seed=i) for i in range(13)))
    while not trainer.is_done:
        trainer.advance()
    assert "sparsity term" not in said(caplog)


def test_the_default_of_the_class_is_the_recipe():
    assert E2ESAERunnerConfig(sae=sae_config("topk"), verbose=False).objective == Objective.finetune()
