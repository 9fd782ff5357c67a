"""The host's methods that this package re-implements or calls against its naming rules have not changed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.standard_sae import StandardTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

# (host method, sha256 of its source in sae-lens 6.54.12, what of ours follows it)
FOLLOWED: list[tuple[Callable[..., Any], str, str]] = [
    (
        LanguageModelSAETrainingRunner.run,
        "8d21360c373ea4d8dd8d5f93bdf31cc842acc426afe095f00452344992ac15d5",
        "runner.E2ESAETrainingRunner.run",
    ),
    (
        LanguageModelSAETrainingRunner.run_trainer_with_interruption_handling,
        "87cfb32d0035f06f908e91cbdfb1f2986525028f5c3a45b7e09117ad9ac3d887",
        "runner.E2ESAETrainingRunner.run_trainer_with_interruption_handling",
    ),
    (
        SAETrainer.fit,
        "4c5471712766ff467ffac0e84233d34a71feca95345692014ba8fcf64c434747",
        "trainer.E2ESAETrainer.fit and fold_activation_scaling",
    ),
    (SAETrainer.step, "2ff7739cd5d3f5886c70809aab473ba3fcf62980bac360adefc0de3ea8afde0c", "trainer.E2ESAETrainer.step"),
    (
        SAETrainer._train_step,
        "f609adeefc260444d2d9256bf3b6e5346469a9f7b258cb92da2f3bcb1f229bc2",
        "trainer.E2ESAETrainer.step, _sae_forward and _update",
    ),
    (
        SAETrainer._is_logging_step,
        "bd0db408cb149f75f69308544de2db134b64165606e4fca3fd2a7dcb26d6c99e",
        "trainer.E2ESAETrainer._is_logging_step",
    ),
    (
        SAETrainer._run_and_log_evals,
        "03b7e0e5753677a3246584f00db9f4dd2758a7d247cc074985e5065d494f7b52",
        "trainer.E2ESAETrainer.evaluate and _is_evaluation_step",
    ),
    (
        TrainingSAE.training_forward_pass,
        "56466380b617ff34400a1c9870a02f2dcf60eda2fe0adc8f2d4bced6f9e62b9a",
        "kernels.relu_sae.training_forward_pass",
    ),
    (
        StandardTrainingSAE.calculate_aux_loss,
        "5c226123b7590046445c826541e4f2b7068f869b5f1d8debd7f91cc573127ebc",
        "kernels.relu_sae.training_forward_pass",
    ),
    (
        StandardTrainingSAE.encode_with_hidden_pre,
        "0749d62ae9b8c2b29d2b7b9cce93422353647acec1843fb4b9624f4a92678d89",
        "kernels.relu_sae.training_forward_pass",
    ),
    (
        StandardTrainingSAE.decode,
        "ab3493a65dd79fb1e596736262e571baaf9225c1b5ec624fde2a52e312fb1d28",
        "kernels.relu_sae.training_forward_pass",
    ),
    (
        TrainingSAE.process_sae_in,
        "de4a381e7364582141e745cdbde1f5452d9bcc870692a7b94e012e87241db452",
        "kernels.relu_sae.training_forward_pass",
    ),
    (
        MatryoshkaBatchTopKTrainingSAE._iterable_decode,
        "5a5cb4471147216956f1f29be0b82618bf884fc3ed4c879099ba083117ada41f",
        "architectures.inner_reconstructions",
    ),
]


def source_digest(method: Callable[..., Any]) -> str:
    return hashlib.sha256(inspect.getsource(method).encode()).hexdigest()


@pytest.mark.parametrize(("method", "digest", "ours"), FOLLOWED, ids=lambda value: getattr(value, "__qualname__", ""))
def test_host_method_that_is_re_implemented_has_not_changed(method: Callable[..., Any], digest: str, ours: str):
    found = source_digest(method)
    assert found == digest, (
        f"The installed SAELens has another {method.__qualname__} than sae-lens 6.54.12. Read what changed in "
        f"{inspect.getsourcefile(method)}, carry it over to e2e_sae_plugin.{ours} (which follows it), then put "
        f"{found!r} here."
    )
