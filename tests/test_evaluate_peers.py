"""`evaluate` agrees with `sae_lens.evals.run_evals` and with `e2e_sae.metrics` wherever they measure the same.

`pytest tests/test_evaluate_peers.py -o log_cli=true -o log_cli_level=INFO` prints the largest relative deviations.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any
from unittest import mock

import pytest
import torch
from authors import HOW_TO_INSTALL, INSTALLED, import_authors
from datasets import Dataset
from helpers import D_HEAD, D_MODEL, VOCABULARY, runner_config, tiny_hooked_transformer, token_batch, training_sae
from rounding import quotient_bound, sum_bound
from sae_lens import SAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from test_splice import naive_run
from torch import Tensor

from e2e_sae_plugin.evaluation.evaluate import evaluate
from e2e_sae_plugin.evaluation.result import Evaluation

logger = logging.getLogger(__name__)

HOOK, LATER = "blocks.0.hook_resid_pre", ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
N_PROMPTS, CONTEXT = 24, 8
IGNORED = [5, 9, 22, 40]
# Logits, log-sum-exp and means are sums in other orders; the model's own pass is the same on both sides.
TOLERANCE = sum_bound(D_MODEL + VOCABULARY + N_PROMPTS * CONTEXT)


def tokens_of_text() -> Tensor:
    return token_batch(N_PROMPTS, CONTEXT, seed=3)


def sae_at(hook_name: str, architecture: str = "standard", d_in: int = 16, **metadata: Any) -> Any:
    sae = training_sae(runner_config(architecture, {"d_in": d_in}))
    for name, value in {"hook_name": hook_name, **metadata}.items():
        setattr(sae.cfg.metadata, name, value)
    return sae


def assert_near(
    found: dict[str, float], expected: dict[str, float], where: str, errors: dict[str, float] | None = None
) -> None:
    """Compares numbers, and logs the largest deviation in units of what rounding allows.

    Args:
        found: ours.
        expected: theirs.
        where: what is compared.
        errors: the deviations that rounding allows where they are not `TOLERANCE` times the number.
    """
    allowed = {name: TOLERANCE * max(abs(value), 1e-2) for name, value in expected.items()} | (errors or {})
    deviations = {name: abs(found[name] - value) / allowed[name] for name, value in expected.items()}
    name, worst = max(deviations.items(), key=lambda entry: entry[1])
    logger.info("%s: largest deviation %.1e of what is allowed (%s), of %d numbers", where, worst, name, len(expected))
    assert worst < 1, deviations
    assert len({*expected.values()}) > 1


# SAELens.


def host_numbers(model: Any, sae: Any, tokens: Tensor, ignored: list[int] | bool = False) -> dict[str, Any]:
    """All of `run_evals`, in one batch: then the means of its batches are those of all tokens."""
    metadata = sae.cfg.metadata
    store = ActivationsStore(
        model=model, dataset=Dataset.from_dict({"tokens": tokens.tolist()}), streaming=False,
        hook_name=metadata.hook_name, hook_head_index=metadata.hook_head_index, context_size=tokens.shape[1],
        d_in=sae.cfg.d_in, n_batches_in_buffer=2, total_training_tokens=tokens.numel(),
        store_batch_size_prompts=len(tokens), train_batch_size_tokens=8, prepend_bos=False,
        normalize_activations="none", device=torch.device("cpu"), dtype="float32",
    )  # fmt: skip
    assert torch.equal(store.get_batch_tokens(), tokens)
    store.reset_input_dataset()
    config = get_eval_everything_config(
        len(tokens), n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1
    )
    groups, features = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=ignored)
    return {name: value for group in groups.values() for name, value in group.items()} | features


def our_numbers(found: Evaluation) -> dict[str, float]:
    """By SAELens's names."""
    first = found.n_sequences if found.metrics["l2_ratio_position_0"] is not None else 0
    later = found.n_tokens - first
    ratio = found.value("l2_ratio_later") * later + (found.value("l2_ratio_position_0") * first if first else 0)
    return {
        "kl_div_with_sae": found.value("kl"),
        "ce_loss_with_sae": found.value("ce_loss_with_sae"),
        "ce_loss_without_sae": found.value("ce_loss_without_sae"),
        "ce_loss_with_ablation": found.value("ce_loss_zero_ablation"),
        "ce_loss_score": found.value("ce_loss_recovered_zero"),
        "explained_variance": found.value("explained_variance"),
        "explained_variance_legacy": found.value("explained_variance_per_token"),
        "mse": found.value("mse"),
        "l0": found.value("l0"),
        "l2_ratio": ratio / found.n_tokens,
    }


def assert_agrees_with_the_host(
    found: Evaluation, host: dict[str, Any], where: str, leave_out: tuple[str, ...] = ()
) -> None:
    ours = our_numbers(found)
    # The score is a quotient of differences of losses: what rounding does to these is divided by the second.
    zero, with_sae, clean = (host[f"ce_loss_{name}"] for name in ("with_ablation", "with_sae", "without_sae"))
    score = quotient_bound(zero - with_sae, zero - clean, TOLERANCE * (zero + max(with_sae, clean)))
    # Explained variances are 1 less a quotient of two sums.
    errors = {name: TOLERANCE * (2 - host[name]) for name in ("explained_variance", "explained_variance_legacy")}
    expected = {name: host[name] for name in ours if name not in leave_out}
    assert_near(ours, expected, where, errors | {"ce_loss_score": score})
    assert found.density.tolist() == pytest.approx(host["feature_density"], rel=TOLERANCE)
    assert abs(found.value("ce_loss_increase")) > 1e-3


@pytest.mark.parametrize(
    ("architecture", "training"),
    [
        ("standard", False), ("standard", True), ("gated", False), ("topk", True), ("abstopk", False),
        ("jumprelu", True), ("matching_pursuit", False),
    ],
)  # fmt: skip
def test_run_evals_gives_the_same_numbers(architecture: str, training: bool, tmp_path: Any):
    model, sae, tokens = tiny_hooked_transformer(), sae_at(HOOK, architecture), tokens_of_text()
    if not training:
        sae.save_inference_model(tmp_path)
        sae = SAE.load_from_disk(tmp_path)
    found = evaluate(sae, model, tokens, n_resamples=5)
    assert_agrees_with_the_host(found, host_numbers(model, sae, tokens), f"run_evals, {architecture}")


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_run_evals_of_what_a_batchtopk_exports(architecture: str, tmp_path: Any):
    model, sae, tokens = tiny_hooked_transformer(), sae_at(HOOK, architecture), tokens_of_text()
    sae.topk_threshold.fill_(0.4)
    found = evaluate(sae, model, tokens, n_resamples=5)
    sae.save_inference_model(tmp_path)
    host = host_numbers(model, SAE.load_from_disk(tmp_path), tokens)
    assert_agrees_with_the_host(found, host, f"run_evals, exported {architecture}")


@pytest.mark.parametrize(("d_in", "head"), [(16, None), (D_HEAD, 1)])
def test_run_evals_gives_the_same_numbers_for_heads(d_in: int, head: int | None):
    model, tokens = tiny_hooked_transformer(), tokens_of_text()
    sae = sae_at("blocks.1.attn.hook_z", d_in=d_in, hook_head_index=head)
    found = evaluate(sae, model, tokens, n_resamples=5)
    # The ablation costs so little that the score is a ratio of rounding; the losses that it is made of agree.
    where, leave_out = f"run_evals, hook_z, head {head}", ("ce_loss_score",)
    assert_agrees_with_the_host(found, host_numbers(model, sae, tokens), where, leave_out)


def test_run_evals_gives_the_same_numbers_without_ignored_tokens():
    model, tokens = tiny_hooked_transformer(), tokens_of_text()
    sae = sae_at(HOOK, exclude_special_tokens=IGNORED)
    found = evaluate(sae, model, tokens, n_resamples=5)
    host = host_numbers(model, sae, tokens, ignored=IGNORED)
    # Its ablation takes the ignored tokens' activations too, and n_sequences does not say how many are at position 0.
    assert_agrees_with_the_host(
        found, host, "run_evals, ignored tokens", ("ce_loss_with_ablation", "ce_loss_score", "l2_ratio")
    )
    assert found.n_tokens < tokens.numel()


# The authors.


@pytest.fixture(scope="module")
def authors() -> tuple[Any, Any]:
    """Their `metrics` and `losses`."""
    losses, _ = import_authors()
    with mock.patch("logging.config.dictConfig"), mock.patch.dict(os.environ):
        os.environ.pop("CI", None)
        return importlib.import_module("e2e_sae.metrics"), losses


@pytest.mark.skipif(not INSTALLED, reason=HOW_TO_INSTALL)
@pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")
@torch.no_grad()
def test_the_authors_give_the_same_numbers(authors: tuple[Any, Any]):
    metrics, losses = authors
    model, sae, tokens = tiny_hooked_transformer(), sae_at(HOOK), tokens_of_text()
    found = evaluate(sae, model, tokens, n_resamples=5)
    clean_logits, clean = naive_run(model, tokens, {}, [HOOK, *LATER])
    feature_acts = sae.encode(clean[HOOK])
    sae_out = sae.decode(feature_acts)
    logits, changed = naive_run(model, tokens, {HOOK: sae_out}, LATER)
    changed[HOOK] = sae_out
    output = metrics.calc_output_metrics(tokens, clean_logits, logits)
    ours = {
        "top1": found.value("top1_agreement"),
        "statistical distance": found.value("statistical_distance"),
        "CE": found.value("ce_loss_without_sae"),
        "CE with the SAE": found.value("ce_loss_with_sae"),
        "CE difference": -found.value("ce_loss_increase"),
        "KL": found.value("kl"),
        "L0": found.value("l0"),
    }
    prefix = "performance/train/"
    theirs = {
        "top1": float(metrics.top1_consistency(clean_logits, logits)),
        "statistical distance": float(metrics.statistical_distance(clean_logits, logits)),
        "CE": output[f"{prefix}orig_model_ce_loss"],
        "CE with the SAE": output[f"{prefix}sae_model_ce_loss"],
        "CE difference": output[f"{prefix}difference_ce_loss"],
        "KL": float(losses.LogitsKLLoss(coeff=1.0).calc_loss(logits, clean_logits)),
        "L0": float(torch.norm(feature_acts, p=0, dim=-1).mean()),
    }
    for hook in (HOOK, *LATER):
        layer = found.layers[hook]
        ours[f"explained variance {hook}"] = layer.explained_variance_per_token.value
        ours[f"explained variance, LayerNorm {hook}"] = layer.layernorm_explained_variance_per_token.value
        ours[f"MSE {hook}"] = layer.mse.value / 16  # theirs is a mean over dimensions
        pair = changed[hook], clean[hook]
        theirs[f"explained variance {hook}"] = float(losses.calc_explained_variance(*pair).mean())
        theirs[f"explained variance, LayerNorm {hook}"] = float(
            losses.calc_explained_variance(*pair, layer_norm=True).mean()
        )
        in_to_orig = losses.InToOrigLoss(hook_positions=[hook], total_coeff=1.0)
        theirs[f"MSE {hook}"] = float(in_to_orig.calc_loss(*pair))
    errors = {name: TOLERANCE * (2 - value) for name, value in theirs.items() if "explained" in name}
    difference = TOLERANCE * (theirs["CE"] + theirs["CE with the SAE"])
    assert_near(ours, theirs, "the authors", errors | {"CE difference": difference})


@pytest.mark.skipif(not INSTALLED, reason=HOW_TO_INSTALL)
@pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")
@torch.no_grad()
def test_the_authors_count_the_same_features_alive(authors: tuple[Any, Any]):
    metrics, _ = authors
    model, sae, tokens = tiny_hooked_transformer(), sae_at(HOOK, "topk"), tokens_of_text()
    found = evaluate(sae, model, tokens, n_resamples=5)
    _, clean = naive_run(model, tokens, {}, [HOOK])
    counted = metrics.ActFrequencyMetrics({"here": sae.cfg.d_sae}, torch.device("cpu"))
    acts = mock.create_autospec(metrics.SAEActs, instance=True)
    acts.c = sae.encode(clean[HOOK])
    counted.update_dict_el_frequencies({"here": acts}, tokens.numel())
    log = counted.collect_for_logging(log_wandb_histogram=False, post_training=True)
    assert log["sparsity/alive_dict_elements_final/here"] == found.n_alive
    assert log["sparsity/alive_dict_elements_indices_final/here"] == found.alive.nonzero()[:, 0].tolist()
    assert counted.dict_el_frequencies["here"].tolist() == pytest.approx(found.density.tolist(), rel=TOLERANCE)
    assert 0 < found.n_alive < sae.cfg.d_sae
