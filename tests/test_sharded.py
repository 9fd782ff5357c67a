"""Several gloo processes that each have some of an SAE's features train what one process with all of them trains."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from marks import slow_except
from ranked_runs import End, Run, launch, logs
from test_distributed import SETTINGS, difference

from e2e_sae_plugin import Objective
from e2e_sae_plugin.distributed import Ranks
from e2e_sae_plugin.kernels.sharded import ShardedTokens
from e2e_sae_plugin.kernels.sparse_sae import Encoder
from e2e_sae_plugin.shard import DIVIDED


def _run(
    architecture: str, sae: dict[str, Any] | None = None, excluded: list[int] | None = None, **settings: Any
) -> Run:
    # Adam makes a step of any size from a gradient that is nearly 0, as dead features' are: in fp64 no rounding shows there.
    sae = {"dtype": "float64", **(sae or {})}
    return Run(architecture, {**SETTINGS, "store_batch_size_prompts": 2, "sae": sae, **settings}, excluded=excluded)


VARIANTS: dict[str, Run] = {
    **{name: Run(name, SETTINGS) for name in ("standard", "topk", "batchtopk", "jumprelu")},
    "from the seed": Run("standard", SETTINGS, perturbed=False),
    # Mostly dead features, of which half of d_in, 8, are used; then so few that all are.
    "topk, many dead": _run("topk", {"d_sae": 64, "k": 2}, seed=3),
    "topk, few dead": _run("topk", {"d_sae": 32, "k": 7}, seed=3, dead_feature_window=1),
    "batchtopk, many dead": _run("batchtopk", {"d_sae": 64, "k": 2}, seed=3, objective=Objective(auxiliary=0.1)),
    "topk, k above a rank's features": _run("topk", {"k": 12, "rescale_acts_by_decoder_norm": False}),
    "topk, local first": _run("topk", local_first=0.4),
    "batchtopk, local": _run("batchtopk", objective=Objective.local()),
    "balance_kl": _run("standard", objective=Objective(kl=1.0, mse=1.0, balance_kl=True)),
    "downstream": _run("jumprelu", objective=Objective.e2e_downstream(0.1)),
    "jumprelu, tanh": _run("jumprelu", {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True}),
    "jumprelu, quadratic": _run(
        "jumprelu",
        {
            "jumprelu_sparsity_loss_mode": "quadratic",
            "target_l0": 2,
            "pre_act_loss_coefficient": 0.1,
            "jumprelu_init_threshold": 1.0,
        },
        dead_feature_window=1,
    ),
    "b_dec not on the input": _run("standard", {"apply_b_dec_to_input": False}),
    "scaling": _run("standard", {"normalize_activations": "expected_average_only_in"}, b_dec_init_method="mean"),
    "whitening": _run("topk", {"normalize_activations": "covariance_whitening"}),
    "decoder norms, frozen": _run("topk", keep_decoder_norms=True, frozen_parameters=("b_enc",), max_grad_norm=0.01),
    "frozen b_dec": _run("batchtopk", frozen_parameters=("b_dec",), max_grad_norm=None),
    # 20 of 64 ids, so that the ranks have different numbers of trained tokens; then parts without one.
    "excluded tokens": Run("batchtopk", SETTINGS, excluded=list(range(20))),
    "excluded tokens, separable": _run("jumprelu", excluded=list(range(20))),
    "parts without tokens": _run("topk", {"d_sae": 64, "k": 2}, n_eval_batches=0, excluded=list(range(56)), seed=3),
    "parts without tokens, batchtopk": _run("batchtopk", n_eval_batches=0, excluded=list(range(56))),
    "parts without tokens, jumprelu": _run("jumprelu", n_eval_batches=0, excluded=list(range(56))),
}


# Ranks without tokens need more than two; the other cases are the same with any number.
ON_FOUR = (
    "standard", "topk", "batchtopk", "jumprelu", "topk, many dead", "topk, k above a rank's features", "excluded tokens",
    "parts without tokens", "parts without tokens, batchtopk",
)  # fmt: skip
# On two ranks in `make test`; all others, and these on four, in `make check`.
FIRST = ("standard", "topk", "batchtopk", "jumprelu")
CASES = slow_except(
    [*((name, 2) for name in VARIANTS), *((name, 4) for name in ON_FOUR)], *((name, 2) for name in FIRST)
)


@pytest.fixture(scope="module")
def ends_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], tuple[End, ...]]:
    """What every rank has at the end of a variant, by the number of ranks; sharded but for one process."""
    folder = tmp_path_factory.mktemp("shards")

    @functools.cache
    def launched(size: int, first: bool) -> dict[str, tuple[End, ...]]:
        """The variants of one launch: starting processes takes longer than most runs."""
        names = [name for name in (ON_FOUR if size == 4 else VARIANTS) if (name in FIRST) == first]
        runs = [VARIANTS[name] for name in names]
        if size > 1:
            runs = [dataclasses.replace(run, settings={**run.settings, "shard_dictionary": True}) for run in runs]
        where = folder / f"{size}-{first}"
        of_ranks = launch(size, runs, where)
        assert all(of_ranks), logs(where)
        return dict(zip(names, zip(*of_ranks, strict=True), strict=True))

    return lambda size, name: launched(size, name in FIRST)[name]


def joined(of_ranks: tuple[End, ...]) -> dict[str, torch.Tensor]:
    """The whole SAE's weights from those that each rank has."""
    parts = {name: [end.weights[name] for end in of_ranks] for name in of_ranks[0].weights}
    return {name: torch.cat(each, DIVIDED[name]) if name in DIVIDED else each[0] for name, each in parts.items()}


@pytest.mark.parametrize(("name", "size"), CASES)
def test_shards_end_where_one_process_does(
    name: str, size: int, ends_of: Callable[[int, str], tuple[End, ...]]
) -> None:
    (alone,), ranks = ends_of(1, name), ends_of(size, name)
    assert [end.error for end in (alone, *ranks)] == [None] * (size + 1)
    assert difference(alone.weights, joined(ranks)) < 1e-6
    for end in ranks:
        assert difference(alone.statistics, end.statistics) == 0  # of the whole SAE, on every rank
        for whole in set(end.weights) - set(DIVIDED):
            assert torch.equal(end.weights[whole], ranks[0].weights[whole])  # b_dec, to the bit
        assert len(end.metrics) == len(alone.metrics)
        for mine, theirs in zip(end.metrics, alone.metrics, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_a_rank_has_its_part_of_weights_and_moments(
    name: str, size: int, ends_of: Callable[[int, str], tuple[End, ...]]
) -> None:
    (alone,) = ends_of(1, name)
    everywhere = 0 if name == "frozen b_dec" else 16  # b_dec, of d_in
    for end in ends_of(size, name):
        assert end.n_trained == (alone.n_trained - everywhere) // size + everywhere
        assert end.n_moments == (alone.n_moments - 2 * everywhere) // size + 2 * everywhere


@pytest.mark.slow
def test_the_variants_show_what_they_are_for(ends_of: Callable[[int, str], tuple[End, ...]]) -> None:
    """Dead features, parts without tokens: or the equalities above say little."""

    def of(name: str, metric: str) -> list[float]:
        return [m[metric] for m in ends_of(2, name)[1].metrics if metric in m]

    for name in ("topk, many dead", "batchtopk, many dead", "topk, few dead", "parts without tokens"):
        assert max(of(name, "losses/auxiliary_reconstruction_loss")) > 0
    assert max(of("topk, many dead", "sparsity/dead_features")) > 8
    assert 0 < max(of("topk, few dead", "sparsity/dead_features")) <= 8
    assert max(of("jumprelu, quadratic", "losses/pre_act_loss")) > 0
    assert of("standard", "metrics/held_out_l0")
    assert int(ends_of(2, "parts without tokens")[0].statistics["counts"][0]) < 0.25 * 640


def test_of_equal_features_those_of_lower_numbers_are_taken() -> None:
    """Each token's k largest are k, also where features of two ranks are equal; a rank without features has none."""
    x = torch.randn(70, 6, generator=torch.Generator().manual_seed(0))
    pairs = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    weights = [pairs, torch.cat([pairs, torch.zeros(6, 1)], 1), torch.zeros(6, 0)]
    sizes, k = [w.shape[1] for w in weights], 7

    def padded(weight: torch.Tensor) -> torch.Tensor:
        # The largest alone, in the order of features, as each rank hands them over.
        pre = x @ weight
        values, features = pre.topk(min(k, pre.shape[1]), dim=1)
        values = values.gather(1, features.argsort(1))
        return torch.nn.functional.pad(values, (0, k - values.shape[1]), value=-torch.inf)

    chosen = torch.zeros(70, sum(sizes))
    for rank, weight in enumerate(weights):
        ranks = SimpleNamespace(
            rank=rank,
            size=3,
            exchange=lambda _: torch.tensor([[float(size)] for size in sizes]),
            all_rows=lambda *_: torch.cat([padded(each) for each in weights]),
        )
        active = ShardedTokens(cast(Ranks, ranks), None).largest(x, Encoder(weight, weight.new_zeros(sizes[rank])), k)
        assert active.n_features == sizes[rank]
        chosen[active.tokens, active.features + sum(sizes[:rank])] = 1
    order = torch.cat([x @ weight for weight in weights], 1).sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(chosen, torch.zeros_like(chosen).scatter_(1, order, 1))
