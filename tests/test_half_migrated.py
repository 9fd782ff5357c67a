"""Scripts in which one of the two names was changed and the other forgotten, and other first mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from helpers import runner_config, sae_config, tiny_hooked_transformer, token_dataset
from sae_lens import LanguageModelSAETrainingRunner

from e2e_sae_plugin import E2ESAERunnerConfig, Objective


def test_our_config_in_the_hosts_runner_is_refused_and_not_trained_locally():
    runner = LanguageModelSAETrainingRunner(
        runner_config(), override_model=tiny_hooked_transformer(), override_dataset=token_dataset()
    )
    with pytest.raises(ValueError, match=r"would leave the objective out\. Use E2ESAETrainingRunner"):
        runner.run()


def test_the_hosts_config_in_our_runner_is_refused_by_name():
    # In a process of its own: the tests check every annotation, and say the same first in other words.
    script = """
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, StandardTrainingSAEConfig
from e2e_sae_plugin import E2ESAETrainingRunner
sae = StandardTrainingSAEConfig(d_in=8, d_sae=16)
E2ESAETrainingRunner(LanguageModelSAERunnerConfig(sae=sae, logger=LoggingConfig(log_to_wandb=False)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "ValueError: This runner takes an E2ESAERunnerConfig, got a LanguageModelSAERunnerConfig." in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": {"architecture": "topk"}}, "sae must be a TrainingSAEConfig of SAELens, got"),
        ({"logger": {"log_to_wandb": False}}, "logger must be a LoggingConfig of SAELens, got"),
        ({"seqpos_slice": 4}, "seqpos_slice must be a list of whole numbers or None, got 4"),
        ({"objective": "e2e+ds"}, r"e2e\+ds, for instance, is \{kl: 1, beta: 0\.004\}"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_name(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        E2ESAERunnerConfig(**{"sae": sae_config(), **changes})


@pytest.mark.parametrize("none", ["None", "none", "null"])
def test_none_as_a_flag_says_it_is_none(none: str):
    cfg = runner_config(output_path=none, checkpoint_path=none)
    assert cfg.output_path is None
    assert cfg.checkpoint_path is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"objective": "e2e"}, r"The config has no sae\. Expected for instance sae: \{architecture: topk"),
        ({"sae": {"architecture": "jumprelo"}}, "got 'jumprelo'. Did you mean 'jumprelu'?"),
        ({"sae": {"architecture": "topk"}, "normalize_activations": "none"}, "It belongs below 'sae'."),
        ({"sae": {"architecture": "topk"}, "log_to_wandb": False}, "It belongs below 'logger'."),
        ({"sae": {"architecture": "topk"}, "beta": 0.1}, "It belongs below 'objective'."),
        ({"sae": {"architecture": "topk"}, "hook_layer": 3}, "Did you mean 'hook_name'?"),
    ],
)
def test_what_a_file_lacks_or_has_elsewhere_is_named(config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message if "\\" in message else re.escape(message)):
        E2ESAERunnerConfig.from_dict(config)


def test_a_batch_that_is_not_whole_sequences_is_told_one_that_keeps_the_micro_batch():
    with pytest.raises(
        ValueError, match="Nearest usable: 1020 or 1080; 960 in micro-batches of store_batch_size_prompts=16"
    ):
        runner_config(
            context_size=64, seqpos_slice=(4, None), store_batch_size_prompts=16, train_batch_size_tokens=1024,
            training_tokens=10_000, objective=Objective.e2e(),
        )  # fmt: skip
