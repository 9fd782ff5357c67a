"""`Objective`: constructors, round trips, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from e2e_sae_plugin import Objective


def weights(objective: Objective) -> tuple[float, float, float]:
    return objective.kl, objective.beta, objective.mse


def test_default_is_the_kl_alone():
    assert weights(Objective()) == (1.0, 0.0, 0.0)
    assert Objective() == Objective.e2e()


def test_named_constructors_set_the_weights_of_the_paper():
    assert weights(Objective.local()) == (0.0, 0.0, 1.0)
    assert weights(Objective.local(0.25)) == (0.0, 0.0, 0.25)
    assert weights(Objective.e2e(kl=2)) == (2, 0.0, 0.0)
    assert weights(Objective.e2e_downstream(beta=0.0036, kl=0.5)) == (0.5, 0.0036, 0.0)
    assert weights(Objective.e2e_downstream(0.1)) == (1.0, 0.1, 0.0)


def test_named_constructors_take_further_settings_and_let_them_win():
    mixed = Objective.e2e_downstream(0.1, mse=0.2, auxiliary=0.3, matryoshka_levels="sampled")
    assert weights(mixed) == (1.0, 0.1, 0.2)
    assert (mixed.auxiliary, mixed.matryoshka_levels) == (0.3, "sampled")
    assert weights(Objective.local(kl=0.5)) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("objective", "needs"),
    [
        (Objective.local(), False),
        (Objective.e2e(), True),
        (Objective(kl=0, beta=1), True),
        (Objective.local(kl=1e-9), True),
    ],
)
def test_only_kl_and_downstream_need_the_spliced_pass(objective: Objective, needs: bool):
    assert objective.needs_spliced_pass is needs


def test_objective_cannot_be_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Objective().kl = -1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "objective",
    [
        Objective.local(),
        Objective.e2e(3),
        Objective.e2e_downstream(0.5, kl=0.25, downstream_hooks=["a", "b"], auxiliary=0.0),
        Objective(matryoshka_levels="sampled", mse=2),
    ],
)
def test_round_trip_through_json_keeps_every_field(objective: Objective):
    written = json.loads(json.dumps(objective.to_dict()))
    assert set(written) == {f.name for f in dataclasses.fields(Objective)}
    assert Objective.from_dict(written) == objective


def test_from_dict_leaves_out_defaults_and_takes_names():
    assert Objective.from_dict({"beta": 0.5}) == Objective(beta=0.5)
    assert Objective.from_dict("local") == Objective.local()
    assert Objective.from_dict("e2e") == Objective.e2e()


def test_downstream_hooks_become_a_tuple():
    given: Any = ["blocks.2.hook_resid_pre"]
    assert Objective(beta=1, downstream_hooks=given).downstream_hooks == ("blocks.2.hook_resid_pre",)


@pytest.mark.parametrize("name", ["kl", "beta", "mse", "auxiliary"])
@pytest.mark.parametrize("value", [-1, -1e-9, math.nan, math.inf, -math.inf])
def test_negative_and_non_finite_weights_are_refused_by_name(name: str, value: float):
    settings: dict[str, Any] = {"kl": 1.0, name: value}
    with pytest.raises(ValueError, match=rf"Objective\.{name} must be a finite weight >= 0, got {value!r}"):
        Objective(**settings)


@pytest.mark.parametrize("name", ["kl", "beta", "mse", "auxiliary"])
@pytest.mark.parametrize("value", ["1", True, [1.0]])
def test_weights_that_are_no_numbers_are_refused(name: str, value: Any):
    with pytest.raises(
        ValueError, match=rf"Objective\.{name} must be a number( or None)?, got .*{type(value).__name__}"
    ):
        Objective(**{name: value})


@pytest.mark.parametrize("name", ["kl", "beta", "mse"])
def test_none_is_only_allowed_for_the_auxiliary_weight(name: str):
    with pytest.raises(ValueError, match=rf"Objective\.{name} must be a number, got None"):
        Objective.from_dict({name: None})
    assert Objective(auxiliary=None).auxiliary is None


def test_all_weights_zero_is_refused():
    with pytest.raises(ValueError, match=r"kl, beta and mse all 0.*at least one positive weight"):
        Objective(kl=0)
    with pytest.raises(ValueError, match="kl, beta and mse all 0"):
        Objective(kl=0, auxiliary=1.0)


def test_downstream_hooks_without_beta_are_refused():
    with pytest.raises(ValueError, match=r"downstream_hooks is set to \['a'\] but beta is 0.*Give beta"):
        Objective(downstream_hooks=("a",))


def test_empty_downstream_hooks_are_refused():
    with pytest.raises(ValueError, match=r"downstream_hooks is empty. Leave it None"):
        Objective(beta=1, downstream_hooks=())


def test_downstream_hooks_named_twice_are_refused():
    with pytest.raises(ValueError, match="names a hook twice"):
        Objective(beta=1, downstream_hooks=("a", "b", "a"))


@pytest.mark.parametrize("hooks", ["blocks.2.hook_resid_pre", [1, 2]])
def test_downstream_hooks_that_are_no_list_of_names_are_refused(hooks: Any):
    with pytest.raises(ValueError, match="downstream_hooks must be a list of strings or None, got"):
        Objective(beta=1, downstream_hooks=hooks)


def test_unknown_matryoshka_levels_are_refused():
    levels: Any = "some"
    with pytest.raises(ValueError, match="matryoshka_levels must be 'all' or 'sampled', got 'some'"):
        Objective(matryoshka_levels=levels)


def test_unknown_keys_are_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"unknown key 'downstream_hook'.*Did you mean 'downstream_hooks'\?"):
        Objective.from_dict({"downstream_hook": ["a"]})
    with pytest.raises(ValueError, match=r"unknown key 'zzz'. Expected some of \['auxiliary', 'balance_kl', 'beta'"):
        Objective.from_dict({"zzz": 1})


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"objective 'e2e_downstream' is not known. Expected 'local', 'e2e'"):
        Objective.from_dict("e2e_downstream")


def test_finetune_is_the_published_objective():
    objective = Objective.finetune()
    assert (objective.kl, objective.mse, objective.balance_kl, objective.beta) == (0.5, 0.5, True, 0.0)
    assert Objective.from_dict("finetune") == objective
    assert Objective.from_dict(objective.to_dict()) == objective


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"balance_kl": True, "kl": 0.0, "mse": 1.0}, "balance_kl scales the KL .* needs kl > 0"),
        ({"balance_kl": True, "beta": 1.0}, "balance_kl scales the KL .* beta = 0"),
        ({"balance_kl": 2}, "balance_kl must be True or False, got 2"),
    ],
    ids=str,
)
def test_balance_kl_is_refused_where_it_means_nothing(settings: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        Objective(**settings)
