"""Several gloo processes train what one process with the same global batch trains."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BUILT_IN_ARCHITECTURES
from marks import slow_except
from ranked_runs import End, Run, launch, logs
from sae_lens.config import LoggingConfig

from e2e_sae_plugin import Objective

# Two sequences on each of four ranks, dead features and logs early, estimates of every kind.
SETTINGS: dict[str, Any] = {
    "train_batch_size_tokens": 64,
    "training_tokens": 640,
    "dead_feature_window": 2,
    "n_eval_batches": 1,
    "eval_batch_size_prompts": 4,
    "store_batch_size_prompts": 8,
}
EVERY_STEP = LoggingConfig(log_to_wandb=False, wandb_log_frequency=1, eval_every_n_wandb_logs=1)
VARIANTS: dict[str, Run] = {
    **{name: Run(name, SETTINGS) for name in BUILT_IN_ARCHITECTURES},
    "batchtopk, local": Run("batchtopk", {**SETTINGS, "objective": Objective.local()}),
    "topk, auxiliary as a share of the KL": Run("topk", {**SETTINGS, "sae": {"d_sae": 64, "k": 2}, "seed": 3}),
    "balance_kl": Run("standard", {**SETTINGS, "objective": Objective(kl=1.0, mse=1.0, balance_kl=True)}),
    "downstream": Run("jumprelu", {**SETTINGS, "objective": Objective.e2e_downstream(0.1)}),
    "sampled levels": Run(
        "matryoshka_batchtopk", {**SETTINGS, "objective": Objective(matryoshka_levels="sampled"), "local_first": 0.3}
    ),
    # 20 of 64 ids, so that the ranks have different numbers of trained tokens.
    "excluded tokens": Run("batchtopk", SETTINGS, excluded=list(range(20))),
    "excluded tokens, separable": Run("gated", SETTINGS, excluded=list(range(20))),
    # Some parts have not one token to train on.
    "parts without tokens": Run("topk", {**SETTINGS, "n_eval_batches": 0}, excluded=list(range(56))),
    "scaling": Run(
        "standard",
        {**SETTINGS, "sae": {"normalize_activations": "expected_average_only_in"}, "b_dec_init_method": "mean"},
    ),
    "whitening": Run("topk", {**SETTINGS, "sae": {"normalize_activations": "covariance_whitening"}}),
    "adapter": Run("standard", {**SETTINGS, "adapter": "low_rank", "adapter_rank": 2}),
    "decoder norms, frozen": Run(
        "topk", {**SETTINGS, "keep_decoder_norms": True, "frozen_parameters": ("b_enc",), "max_grad_norm": 0.01}
    ),
    "early stop": Run("standard", {**SETTINGS, "patience_evaluations": 1, "lr": 3.0, "logger": EVERY_STEP}),
}

# On two ranks in `make test`; all others, and these on four, in `make check`.
FIRST = ("standard", "batchtopk", "downstream", "excluded tokens")
CASES = slow_except(itertools.product(VARIANTS, (2, 4)), *((name, 2) for name in FIRST))


@pytest.fixture(scope="module")
def ends_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], tuple[End, ...]]:
    """What every rank has at the end of a variant, by the number of ranks; 0 is one process with other micro-batches."""
    folder = tmp_path_factory.mktemp("ranks")

    @functools.cache
    def launched(size: int, first: bool) -> dict[str, tuple[End, ...]]:
        """The variants of one launch: starting processes takes longer than most runs."""
        runs = {name: run for name, run in VARIANTS.items() if (name in FIRST) == first}
        if size == 0:
            runs = {name: _in_small_parts(run) for name, run in runs.items()}
        where = folder / f"{size}-{first}"
        of_ranks = launch(max(size, 1), list(runs.values()), where)
        assert all(of_ranks), logs(where)
        return dict(zip(runs, zip(*of_ranks, strict=True), strict=True))

    return lambda size, name: launched(size, name in FIRST)[name]


def _in_small_parts(run: Run) -> Run:
    return Run(run.architecture, {**run.settings, "store_batch_size_prompts": 2}, excluded=run.excluded)


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


@pytest.mark.parametrize(("name", "size"), CASES)
def test_ranks_end_where_one_process_does(name: str, size: int, ends_of: Callable[[int, str], tuple[End, ...]]) -> None:
    (alone,), (rounded,), ranks = ends_of(1, name), ends_of(0, name), ends_of(size, name)
    assert alone.error is None
    assert alone.weights
    # Adam makes a step of any size from a gradient that is nearly 0, so rounding may show there.
    tolerance = max(1e-6, 3 * difference(alone.weights, rounded.weights))
    assert tolerance < 1e-4
    for rank, end in enumerate(ranks):
        assert end.error is None, rank
        assert difference(alone.weights, end.weights) <= tolerance
        assert difference(alone.statistics, end.statistics) == 0
        assert difference(ranks[0].weights, end.weights) == 0  # replicas, to the bit
        assert len(end.metrics) == len(alone.metrics)
        for mine, theirs in zip(end.metrics, alone.metrics, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-4, abs=2e-5)


@pytest.mark.slow
def test_the_variants_show_what_they_are_for(ends_of: Callable[[int, str], tuple[End, ...]]) -> None:
    """The auxiliary loss is there, the run stops early, and parts are without tokens: or the equalities above say little."""

    def of(name: str) -> End:
        return ends_of(1, name)[0]

    assert (
        max(
            m.get("losses/auxiliary_reconstruction_loss", 0) for m in of("topk, auxiliary as a share of the KL").metrics
        )
        > 0
    )
    assert int(of("early stop").statistics["counts"][1]) < 10
    assert int(of("parts without tokens").statistics["counts"][0]) < 0.25 * 640
