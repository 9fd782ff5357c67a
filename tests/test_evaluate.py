"""`evaluate` against naive code on all the logits at once, and against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BUILT_IN_ARCHITECTURES,
    D_HEAD,
    D_MODEL,
    FAMILIES,
    N_HEADS,
    VOCABULARY,
    module_names,
    runner_config,
    shared_model,
    tiny_hooked_transformer,
    tiny_tokenizer,
    token_batch,
    training_sae,
)
from rounding import sum_bound
from sae_lens import SAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from test_splice import later_residuals, naive_run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from e2e_sae_plugin.evaluation.evaluate import check_tokens, evaluate, evaluate_many
from e2e_sae_plugin.evaluation.result import Evaluation
from e2e_sae_plugin.evaluation.running import CURVE_POINTS, RunningMeans, SAESums, layer_norm
from e2e_sae_plugin.evaluation.sums import SequenceSums, bootstrap_weights
from e2e_sae_plugin.kernels import kl

HOOK, LAST_HOOK = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
EXCLUDED = [5, 9, 22, 40, 41, 42, 50]
FEW: dict[str, Any] = {"n_resamples": 20}


def sae_at(hook_name: str | None = HOOK, architecture: str = "standard", d_in: int = D_MODEL, **metadata: Any) -> Any:
    """A training SAE whose metadata say where it sits."""
    sae = training_sae(runner_config(architecture, {"d_in": d_in}))
    for name, value in {"hook_name": hook_name, "exclude_special_tokens": False, **metadata}.items():
        setattr(sae.cfg.metadata, name, value)
    return sae


def inference_form(sae: Any, folder: Path) -> Any:
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


def perfect_sae(d_in: int = D_MODEL, hook_name: str = HOOK) -> Any:
    """Reconstructs everything: features are the positive and the negative parts."""
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=2 * d_in, apply_b_dec_to_input=False))
    eye = torch.eye(d_in)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
    sae.cfg.metadata.hook_name = hook_name
    return sae


def dead_sae() -> Any:
    sae = sae_at()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    return sae


# Of numbers that are made of logits, a log-sum-exp and a mean over the tokens, in another order; losses are below 10.
_ERROR = sum_bound(D_MODEL + VOCABULARY + 13 * 8)
ROUNDING: dict[str, Any] = {"rel": _ERROR, "abs": 10 * _ERROR}


# Naive code: every logit at once, formulas written out.


@dataclass
class Naive:
    metrics: dict[str, float]
    layers: dict[str, dict[str, float]]
    l0: Tensor
    """`[n_tokens]`."""
    active: Tensor
    """`[n_tokens, d_sae]`."""
    per_token: dict[str, Tensor]
    """`[batch, pos]`, of all tokens."""


def naive_layer(clean: Tensor, changed: Tensor) -> dict[str, float]:
    """Of `[n_tokens, d]`."""
    found: dict[str, float] = {}
    for kind in ("", "layernorm_"):
        if kind:
            clean, changed = (
                (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
                for x in (clean, changed)
            )
        error, variance = (changed - clean).pow(2).sum(1), (clean - clean.mean(0)).pow(2).sum(1)
        if not kind:
            found["mse"] = float(error.mean())
        found[f"{kind}explained_variance"] = float(1 - error.mean() / variance.mean())
        found[f"{kind}explained_variance_per_token"] = float((1 - error / variance).mean())
    return found


@torch.no_grad()
def naive_evaluation(
    model: Any, sae: Any, tokens: Tensor, hook: str, later: Sequence[str], mask: Tensor, head: int | None = None
) -> Naive:
    clean_logits, clean = naive_run(model, tokens, {}, [hook, *later])
    acts = (clean[hook] if head is None else clean[hook][:, :, head]).flatten(2)
    feature_acts = sae.encode(acts)
    sae_out = sae.decode(feature_acts)

    def logits_with(replacement: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value = clean[hook].clone()
        target = value if head is None else value[:, :, head]
        target[mask] = replacement[mask].reshape(target[mask].shape)
        return naive_run(model, tokens, {hook: value}, list(later))

    logits, changed = logits_with(sae_out)
    zero_logits, _ = logits_with(torch.zeros_like(acts))
    mean_logits, _ = logits_with(acts[mask].mean(0).expand_as(acts))
    predicted = mask[:, :-1]

    def ce(of: Tensor) -> Tensor:
        return F.cross_entropy(of[:, :-1].double().transpose(1, 2), tokens[:, 1:], reduction="none")

    log_y, log_y_hat = clean_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    per_token = {
        "kl": (log_y.exp() * (log_y - log_y_hat)).sum(-1),
        "top1_agreement": (clean_logits.argmax(-1) == logits.argmax(-1)).double(),
        "statistical_distance": (log_y.exp() - log_y_hat.exp()).abs().sum(-1) / 2,
        "l0": (feature_acts != 0).sum(-1).double(),
        "ce_increase": F.pad(ce(logits) - ce(clean_logits), (0, 1)),
    }
    clean_ce, with_ce, zero_ce, mean_ce = (
        float(ce(of)[predicted].mean()) for of in (clean_logits, logits, zero_logits, mean_logits)
    )
    ratio = sae_out.norm(dim=-1) / acts.norm(dim=-1)
    first = torch.zeros_like(mask)
    first[:, 0] = True
    values = {hook: (acts, sae_out), **{name: (clean[name], changed[name]) for name in later}}
    layers = {name: naive_layer(*(x.flatten(2)[mask].double() for x in pair)) for name, pair in values.items()}
    metrics = {
        "ce_loss_without_sae": clean_ce,
        "ce_loss_with_sae": with_ce,
        "ce_loss_increase": with_ce - clean_ce,
        "ce_loss_zero_ablation": zero_ce,
        "ce_loss_mean_ablation": mean_ce,
        "ce_loss_recovered_zero": (zero_ce - with_ce) / (zero_ce - clean_ce),
        "ce_loss_recovered_mean": (mean_ce - with_ce) / (mean_ce - clean_ce),
        **{
            name: float(per_token[name][mask].mean()) for name in ("kl", "top1_agreement", "statistical_distance", "l0")
        },
        **{name: layers[hook][name] for name in ("mse", "explained_variance", "explained_variance_per_token")},
        "l2_ratio_position_0": float(ratio[mask & first].mean()),
        "l2_ratio_later": float(ratio[mask & ~first].mean()),
    }
    active = feature_acts[mask] != 0
    return Naive(metrics, layers, active.sum(1), active, per_token)


def assert_equal(found: Evaluation, naive: Naive) -> None:
    close: Any = {"rel": 1e-4, "abs": 1e-5}
    assert found.metrics.keys() == naive.metrics.keys()
    for name, value in naive.metrics.items():
        if math.isnan(value):  # no token at position 0
            assert found.metrics[name] is None
        else:
            assert found.value(name) == pytest.approx(value, **close), name
    assert list(found.layers) == list(naive.layers)
    for hook, layer in naive.layers.items():
        for name, value in layer.items():
            assert getattr(found.layers[hook], name).value == pytest.approx(value, **close), (hook, name)
    assert found.l0_counts.tolist() == torch.bincount(naive.l0).tolist()
    assert torch.equal(found.density, naive.active.double().mean(0))
    assert torch.equal(found.alive, naive.active.any(0))
    assert found.n_alive == found.alive_curve[-1][1] == int(naive.active.any(0).sum())
    assert found.n_tokens == found.alive_curve[-1][0] == len(naive.active)
    # Nothing above holds because there is nothing.
    assert abs(found.value("ce_loss_increase")) > 1e-3
    assert found.value("kl") > 1e-3
    assert 0 < found.value("l0") < 32


@pytest.mark.parametrize("chunk", [1, 200, 2**23])
def test_every_metric_equals_naive_code_whatever_the_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kl, "CHUNK_LOGIT_ELEMENTS", chunk)
    model, sae, tokens = tiny_hooked_transformer(), sae_at(), token_batch(7)
    found = evaluate(sae, model, tokens, batch_size_prompts=3, **FEW)
    mask = torch.ones_like(tokens).bool()
    assert_equal(found, naive_evaluation(model, sae, tokens, HOOK, [LAST_HOOK], mask))


@pytest.mark.parametrize("positions", [(None,), (1, -2)])
@pytest.mark.parametrize("hook_name", [HOOK, "blocks.0.hook_mlp_out", "blocks.0.attn.hook_z"])
def test_metrics_are_those_of_the_tokens_that_the_sae_is_applied_to(hook_name: str, positions: Any):
    model, tokens = tiny_hooked_transformer(), token_batch(7)
    sae = sae_at(hook_name, seqpos_slice=positions, exclude_special_tokens=EXCLUDED)
    mask = torch.zeros_like(tokens).bool()
    mask[:, slice(*positions)] = True
    mask &= ~torch.isin(tokens, torch.tensor(EXCLUDED))
    found = evaluate(sae, model, tokens, batch_size_prompts=2, **FEW)
    later = later_residuals("hooked_transformer", hook_name)
    assert_equal(found, naive_evaluation(model, sae, tokens, hook_name, later, mask))
    assert found.n_tokens < tokens[:, slice(*positions)].numel()


def test_special_tokens_are_those_of_the_models_tokenizer():
    model, tokens = tiny_hooked_transformer(), token_batch(7)
    tokens[:, 0], tokens[2, 3] = 1, 2
    model.set_tokenizer(tiny_tokenizer())
    sae = sae_at(exclude_special_tokens=True)
    mask = tokens > 3
    mask |= tokens == 0
    found = evaluate(sae, model, tokens, **FEW)
    assert_equal(found, naive_evaluation(model, sae, tokens, HOOK, [LAST_HOOK], mask))
    assert found.metrics["l2_ratio_position_0"] is None


def test_one_head_is_spliced_alone():
    hook_name = "blocks.1.attn.hook_z"
    model, tokens = tiny_hooked_transformer(), token_batch(7)
    sae = sae_at(hook_name, d_in=D_HEAD, hook_head_index=1)
    mask = torch.ones_like(tokens).bool()
    found = evaluate(sae, model, tokens, **FEW)
    assert_equal(found, naive_evaluation(model, sae, tokens, hook_name, [LAST_HOOK], mask, head=1))


def family_cases() -> list[Any]:
    cases = []
    for family in FAMILIES:
        if family in ("hooked_transformer", "bridge"):
            names = ["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"]
        else:
            parts = module_names(family)
            names = [f"{parts['layers']}.0", f"{parts['layers']}.0.{parts['mlp']}"]
        cases += [pytest.param(family, name, id=f"{family}-{name}") for name in names]
    return cases


@pytest.mark.parametrize(("family", "hook_name"), family_cases())
def test_every_family_of_models(family: str, hook_name: str):
    model, sae, tokens = shared_model(family), sae_at(hook_name), token_batch(5)
    found = evaluate(sae, model, tokens, **FEW)
    later = later_residuals(family, hook_name)
    assert later
    assert_equal(found, naive_evaluation(model, sae, tokens, hook_name, later, torch.ones_like(tokens).bool()))


# By hand.


@pytest.fixture
def worked_example() -> Evaluation:
    """Two sequences, of two tokens and of one, in two batches."""
    sae = StandardSAE(StandardSAEConfig(d_in=2, d_sae=3))
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 6.0]])
    x_hat = x + torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    acts = torch.tensor([[1.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    means, shared, sums = RunningMeans(), SequenceSums(), SAESums(3)
    batches = ((slice(0, 2), torch.tensor([0, 0])), (slice(2, 3), torch.tensor([0])))
    for part, _ in batches:
        means.add({"here": x[part]})
    for part, sequence in batches:
        sums.add_features(acts[part], sequence, 1)
        sums.add_norms(x[part], x_hat[part], torch.tensor([0, 1, 1])[part], sequence, 1)
        sums.add_layer("here", x[part], x_hat[part], means, sequence, 1)
        for kind, value, mean in (
            ("", x[part], means["here"]),
            ("layernorm_", layer_norm(x[part]), means.normalised["here"]),
        ):
            shared.add(f"{kind}variance/here", (value - mean).pow(2).sum(1), sequence, 1)
        for into, name, values in (
            (shared, "ce_clean", [1.0, 3.0, 4.0]),
            (sums.sums, "ce", [2.0, 3.0, 7.0]),
            (sums.sums, "kl", [1.0, 1.0, 4.0]),
            (sums.sums, "top1_agreement", [1.0, 0.0, 1.0]),
            (sums.sums, "statistical_distance", [0.0, 0.5, 0.25]),
            (shared, "n_tokens", [1.0, 1.0, 1.0]),
            (shared, "n_predicted", [1.0, 0.0, 1.0]),
        ):
            into.add(name, torch.tensor(values)[part], sequence, 1)
    return sums.result(
        "by hand", sae, hook_name="here", shared=shared, means=means, ablations=False, n_resamples=50, confidence=0.9,
        seed=3,
    )  # fmt: skip


def test_the_worked_examples_means(worked_example: Evaluation):
    assert worked_example.value("ce_loss_increase") == pytest.approx(4 / 2)  # two tokens predict something
    assert worked_example.value("kl") == pytest.approx(2)
    assert worked_example.value("l0") == 1
    assert worked_example.value("top1_agreement") == pytest.approx(2 / 3)
    assert worked_example.value("statistical_distance") == pytest.approx(0.25)
    # Norms in: 0 (taken as 1, as in SAELens), 2, sqrt(52); out: 1, sqrt(5), sqrt(80). The last is at position 1.
    assert worked_example.value("l2_ratio_position_0") == pytest.approx(1)
    assert worked_example.value("l2_ratio_later") == pytest.approx((math.sqrt(5) / 2 + math.sqrt(80 / 52)) / 2)


def test_the_worked_examples_explained_variances(worked_example: Evaluation):
    layer = worked_example.layers["here"]
    # Mean activation (2, 2): squared distances 8, 4, 20; squared errors 1, 1, 4.
    assert layer.mse.value == pytest.approx(2)
    assert layer.explained_variance.value == pytest.approx(1 - 6 / 32)
    assert layer.explained_variance_per_token.value == pytest.approx((7 / 8 + 3 / 4 + 4 / 5) / 3)
    # After LayerNorm (0, 0), (1, -1), (-1, 1), and (1, -1) in place of the first: it is the mean, which says nothing.
    assert layer.layernorm_explained_variance.value == pytest.approx(1 - 2 / 4, abs=1e-4)
    assert layer.layernorm_explained_variance_per_token.value == pytest.approx((0 + 1 + 1) / 3, abs=1e-4)


def test_the_worked_examples_features(worked_example: Evaluation):
    assert worked_example.l0_counts.tolist() == [1, 1, 1]
    assert worked_example.l0_quantiles((0.1, 1 / 3, 0.5, 2 / 3, 0.9, 1.0)) == {
        0.1: 0, 1 / 3: 0, 0.5: 1, 2 / 3: 1, 0.9: 2, 1.0: 2,
    }  # fmt: skip
    assert worked_example.density.tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert worked_example.alive.tolist() == [True, True, False]
    assert worked_example.alive_curve == ((2, 2), (3, 2))


def test_the_curve_of_alive_features_keeps_its_ends_and_grows():
    sums, n = SAESums(300), 200
    for i in range(n):  # feature i fires in batch i alone
        acts = torch.zeros(2, 300)
        acts[0, i] = 1.0
        sums.add_features(acts, torch.tensor([0, 0]), 1)
    shared, one = SequenceSums(), torch.zeros(1, dtype=torch.int64)
    for name in ("n_tokens", "n_predicted", "ce_clean", "variance/here", "layernorm_variance/here"):
        shared.add(name, torch.ones(n), torch.arange(n), n)
    means = RunningMeans()
    means.add({"here": torch.randn(5, 2)})
    for _ in range(n):
        sums.add_layer("here", torch.randn(1, 2), torch.randn(1, 2), means, one, 1)
        sums.add_norms(torch.ones(1, 2), torch.ones(1, 2), one, one, 1)
        for name in ("ce", "kl", "top1_agreement", "statistical_distance"):
            sums.sums.add(name, torch.ones(1), one, 1)
    found = sums.result(
        "many", StandardSAE(StandardSAEConfig(d_in=2, d_sae=300)), hook_name="here", shared=shared, means=means,
        ablations=False, n_resamples=5, confidence=0.95, seed=0,
    )  # fmt: skip
    curve = found.alive_curve
    assert curve[0] == (2, 1)
    assert curve[-1] == (400, 200)
    assert 20 < len(curve) <= CURVE_POINTS + 2
    assert all(tokens == 2 * alive for tokens, alive in curve)
    assert list(curve) == sorted(set(curve))


def test_intervals_are_percentiles_of_ratios_of_resampled_sums():
    model, tokens, seed = tiny_hooked_transformer(), token_batch(9), 3
    sae = sae_at(seqpos_slice=(1, None), exclude_special_tokens=EXCLUDED)
    mask = ~torch.isin(tokens, torch.tensor(EXCLUDED))
    mask[:, 0] = False
    assert len(set(mask.sum(1).tolist())) > 1  # a ratio of sums is not a mean of the sequences' means
    found = evaluate(sae, model, tokens, n_resamples=250, confidence=0.8, seed=seed)
    naive = naive_evaluation(model, sae, tokens, HOOK, [LAST_HOOK], mask).per_token
    # A hundred at a time, each hundred with a seed of its own.
    weights = torch.cat([bootstrap_weights(9, size, seed * 1_000_003 + i) for i, size in enumerate((100, 100, 50))])
    predicted = mask.clone()
    predicted[:, -1] = False
    for name, values, counted in (
        ("kl", naive["kl"], mask),
        ("l0", naive["l0"], mask),
        ("ce_loss_increase", naive["ce_increase"], predicted),
    ):
        resampled = weights @ (values * counted).sum(1) / (weights @ counted.double().sum(1))
        expected = torch.quantile(resampled, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
        estimate = found.metrics[name]
        assert estimate is not None
        assert [estimate.low, estimate.high] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert estimate.low < estimate.value < estimate.high
        if name in found.resamples:
            assert found.resamples[name].tolist() == pytest.approx(resampled.tolist(), rel=1e-3, abs=1e-5)
    again = evaluate(sae, model, tokens, n_resamples=250, confidence=0.8, seed=seed + 1)
    assert again.metrics["kl"] != found.metrics["kl"]
    assert again.value("kl") == found.value("kl")


def test_saes_on_the_same_tokens_are_resampled_alike():
    model, tokens, sae = tiny_hooked_transformer(), token_batch(9), sae_at()
    found = evaluate_many({"a": sae, "b": perfect_sae(), "c": sae}, model, tokens, **FEW)
    assert found["a"].resamples.keys() == {"ce_loss_increase", "l0", f"mse/{LAST_HOOK}"}
    for name, values in found["a"].resamples.items():
        assert torch.equal(values, found["c"].resamples[name])
    alone = evaluate(sae, model, tokens, **FEW)
    assert torch.equal(alone.resamples["l0"], found["a"].resamples["l0"])


# Forms, batches, files.


def numbers(entries: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of `to_dict`, with where it is."""
    if isinstance(entries, dict):
        for name, value in entries.items():
            yield from numbers(value, f"{path}/{name}")
    elif isinstance(entries, list):
        for i, value in enumerate(entries):
            yield from numbers(value, f"{path}/{i}")
    elif isinstance(entries, int | float):
        yield path, float(entries)


def assert_same_numbers(first: Evaluation, second: Evaluation, but_for: Sequence[str] = (), **close: Any) -> None:
    ours, theirs = (dict(numbers(each.to_dict())) for each in (first, second))
    assert ours.keys() - theirs.keys() == theirs.keys() - ours.keys() == set() or but_for
    for path, value in ours.items():
        if not {*path.split("/")} & {*but_for}:
            assert theirs[path] == pytest.approx(value, **close), path


@pytest.mark.parametrize("architecture", BUILT_IN_ARCHITECTURES)
def test_inference_and_training_forms_give_the_same_numbers(architecture: str, tmp_path: Path):
    sae = sae_at(architecture=architecture)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.4)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    inference = inference_form(sae, tmp_path)
    found = evaluate_many({"training": sae, "inference": inference}, tiny_hooked_transformer(), token_batch(12), **FEW)
    # What SAELens folds at the export of TopK SAEs it rounds.
    assert_same_numbers(found["training"], found["inference"], rel=1e-5, abs=1e-6)
    assert type(sae) is not type(inference)
    assert found["training"].architecture == architecture
    assert found["training"].value("kl") > 1e-3
    assert 0 < found["training"].value("l0") < 32
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_sparse_activations_of_a_training_sae_are_those_of_the_dense_form(tmp_path: Path):
    sae = training_sae(runner_config("topk", {"use_sparse_activations": True}))
    sae.cfg.metadata.hook_name = HOOK
    model, tokens = tiny_hooked_transformer(), token_batch(12)
    assert sae.encode(torch.randn(3, D_MODEL)).is_sparse
    found = evaluate(sae, model, tokens, **FEW)
    assert_same_numbers(found, evaluate(inference_form(sae, tmp_path), model, tokens, **FEW), **ROUNDING)


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_normalisations_at_run_time(normalisation: str, tmp_path: Path):
    sae = training_sae(runner_config(sae={"normalize_activations": normalisation}))
    sae.cfg.metadata.hook_name = HOOK
    model, tokens = tiny_hooked_transformer(), token_batch(7)
    found = evaluate_many({"training": sae, "inference": inference_form(sae, tmp_path)}, model, tokens, **FEW)
    assert_same_numbers(found["training"], found["inference"], rel=1e-6, abs=1e-7)
    mask = torch.ones_like(tokens).bool()
    assert_equal(found["training"], naive_evaluation(model, sae, tokens, HOOK, [LAST_HOOK], mask))


def test_a_scale_that_is_not_folded_is_refused_or_told(tmp_path: Path):
    sae = training_sae(runner_config(sae={"normalize_activations": "expected_average_only_in"}))
    sae.cfg.metadata.hook_name = HOOK
    model, tokens = tiny_hooked_transformer(), token_batch(12)
    with pytest.raises(
        ValueError, match=r"sae is a training SAE of normalize_activations='expected_average_only_in' that"
    ):
        evaluate(sae, model, tokens, **FEW)
    told = evaluate(inference_form(sae, tmp_path), model, tokens, **FEW)  # as run_evals and a spliced model run it
    assert "says that the scale is not folded into its weights" in " ".join(told.warnings)
    sae.fold_activation_norm_scaling_factor(1.0)
    folded = evaluate(sae, model, tokens, **FEW)
    assert folded.warnings == ()
    assert folded.metrics == told.metrics


def test_an_inference_sae_that_reshapes_heads_by_itself(tmp_path: Path):
    hook_name = "blocks.1.attn.hook_z"
    sae = training_sae(runner_config(sae={"reshape_activations": "hook_z"}, hook_name=hook_name))
    sae.cfg.metadata.hook_name = hook_name
    inference = inference_form(sae, tmp_path)
    assert inference.hook_z_reshaping_mode
    model, tokens = tiny_hooked_transformer(), token_batch(12)
    found = evaluate_many({"training": sae, "inference": inference}, model, tokens, **FEW)
    assert_same_numbers(found["training"], found["inference"], rel=1e-6, abs=1e-7)
    assert tuple(inference.encode(torch.randn(2, N_HEADS, D_HEAD)).shape) == (2, 32)  # left as it was


@pytest.mark.parametrize("architecture", ["standard", "batchtopk"])
def test_the_batch_size_changes_nothing(architecture: str):
    model, tokens = tiny_hooked_transformer(), token_batch(13)
    tokens[3:5] = EXCLUDED[0]  # sequences without a token to measure: a batch of their own at some sizes
    sae = sae_at(architecture=architecture, exclude_special_tokens=EXCLUDED, seqpos_slice=(1, None))
    sizes = (1, 3, 100)
    found = [evaluate(sae, model, tokens, batch_size_prompts=size, **FEW) for size in sizes]
    # A recovered share divides by a difference of two losses, here small; the losses themselves are compared.
    but_for = ["alive_curve", "ce_loss_recovered_zero", "ce_loss_recovered_mean"]
    for other in found[1:]:
        assert_same_numbers(found[0], other, but_for, **ROUNDING)
        assert other.alive_curve[-1] == found[0].alive_curve[-1]
    assert {each.n_sequences for each in found} == {11}
    assert [len(each.alive_curve) for each in found] == [11, 5, 1]


def test_many_are_measured_as_each_alone_whatever_their_names():
    model, tokens = tiny_hooked_transformer(), token_batch(7)
    names = ("zero", "mean", "", "zero_ablation", "mean_ablation", "ce_clean")
    saes = {name: sae_at(architecture=each) for name, each in zip(names, BUILT_IN_ARCHITECTURES, strict=False)}
    saes["mean"] = perfect_sae()
    together = evaluate_many(saes, model, tokens, **FEW)
    assert list(together) == list(saes)
    for name, sae in saes.items():
        assert together[name].to_dict() == evaluate(sae, model, tokens, name=name, **FEW).to_dict()


def test_without_ablations_there_are_no_numbers_of_them():
    model, tokens, sae = tiny_hooked_transformer(), token_batch(3), sae_at()
    found, full = (evaluate(sae, model, tokens, ablations=ablations, **FEW) for ablations in (False, True))
    left_out = full.metrics.keys() - found.metrics.keys()
    assert left_out == {f"ce_loss_{x}" for x in ("zero_ablation", "mean_ablation", "recovered_zero", "recovered_mean")}
    assert all(full.metrics[name] == value for name, value in found.metrics.items())
    assert math.isnan(found.value("ce_loss_recovered_zero"))


def test_hook_name_says_where_saes_without_metadata_sit():
    model, tokens = tiny_hooked_transformer(), token_batch(3)
    found = evaluate(sae_at(None), model, tokens, hook_name=HOOK, **FEW)
    assert found.to_dict() == evaluate(sae_at(), model, tokens, **FEW).to_dict()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_any_integers_are_token_ids(dtype: torch.dtype):
    model, tokens, sae = tiny_hooked_transformer(), token_batch(3), sae_at()
    assert evaluate(sae, model, tokens.to(dtype), **FEW).to_dict() == evaluate(sae, model, tokens, **FEW).to_dict()


def test_results_survive_json_and_files(tmp_path: Path):
    found = evaluate(sae_at(), tiny_hooked_transformer(), token_batch(3), name="tiny", **FEW)
    found.save(tmp_path / "found.json")
    for back in (
        Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))),
        Evaluation.load(tmp_path / "found.json"),
    ):
        assert back.to_dict() == found.to_dict()
        assert str(back) == str(found)
        assert back.metrics == found.metrics
        assert back.layers == found.layers
        assert torch.equal(back.density, found.density)
        assert torch.equal(back.l0_counts, found.l0_counts)
        assert back.alive_curve == found.alive_curve
        for name, values in found.resamples.items():
            torch.testing.assert_close(back.resamples[name], values, rtol=1e-8, atol=1e-12)


def test_the_table_names_both_explained_variances_and_every_layer():
    text = str(evaluate(sae_at(), tiny_hooked_transformer(), token_batch(3), name="tiny", **FEW))
    for part in (
        "tiny: standard, 16 x 32",
        "ratio of means",
        "mean of ratios",
        HOOK,
        LAST_HOOK,
        "alive features",
        "Warning:",
    ):
        assert part in text


def test_nothing_is_recorded_or_left_behind():
    model, sae, tokens = tiny_hooked_transformer(), sae_at(), token_batch(3)
    kept = tokens.clone()
    evaluate(sae, model, tokens, **FEW)
    assert torch.equal(tokens, kept)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in sae.parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


# The ends of the range.


def all_finite(found: Evaluation) -> bool:
    json.dumps(found.to_dict(), allow_nan=False)
    return all(math.isfinite(value) for _, value in numbers(found.to_dict()))


def test_a_dead_dictionary_gives_numbers_and_a_warning():
    found = evaluate(dead_sae(), tiny_hooked_transformer(), token_batch(12), name="quiet", **FEW)
    assert found.warnings == ("No feature of quiet fires on these 96 tokens.",)
    assert all_finite(found)
    assert all(value is not None for value in found.metrics.values())
    assert (found.n_alive, found.value("l0"), found.l0_counts.tolist()) == (0, 0, [12 * 8])
    assert set(found.l0_quantiles().values()) == {0}
    assert found.value("explained_variance") < 0.1
    assert "0  of 32 (the others fire on fewer than 1 in 33 tokens, 95%)" in str(found)


def test_a_dead_dictionary_without_a_bias_is_the_zero_ablation():
    sae = dead_sae()
    with torch.no_grad():
        sae.b_dec.zero_()
    found = evaluate(sae, tiny_hooked_transformer(), token_batch(12), **FEW)
    assert found.value("ce_loss_recovered_zero") == pytest.approx(0, abs=1e-6)
    assert found.value("l2_ratio_later") == 0
    assert all_finite(found)


def test_a_perfect_sae_costs_nothing():
    found = evaluate(perfect_sae(), tiny_hooked_transformer(), token_batch(12), **FEW)
    assert found.value("ce_loss_increase") == pytest.approx(0, abs=1e-6)
    assert found.value("kl") == pytest.approx(0, abs=1e-6)
    exact = (
        "top1_agreement",
        "ce_loss_recovered_zero",
        "ce_loss_recovered_mean",
        "l2_ratio_position_0",
        "l2_ratio_later",
    )
    for name in exact:
        assert found.value(name) == pytest.approx(1, abs=1e-5)
    for layer in found.layers.values():
        assert layer.mse.value == pytest.approx(0, abs=1e-8)
        assert layer.explained_variance.value == pytest.approx(1)
        assert layer.layernorm_explained_variance_per_token.value == pytest.approx(1)


def test_one_sequence():
    found = evaluate(sae_at(), tiny_hooked_transformer(), token_batch(1), **FEW)
    assert all_finite(found)
    assert found.warnings == ("The intervals come from so few sequences (1) that they mean little.",)
    for estimate in found.metrics.values():
        assert estimate is not None
        assert estimate.low == pytest.approx(estimate.value) == estimate.high


def test_sequences_of_two_tokens():
    model, sae, tokens = tiny_hooked_transformer(), sae_at(), token_batch(12, context_size=2)
    mask = torch.ones_like(tokens).bool()
    found = evaluate(sae, model, tokens, **FEW)
    assert_equal(found, naive_evaluation(model, sae, tokens, HOOK, [LAST_HOOK], mask))


def test_resamples_without_a_predicted_token_are_left_out():
    tokens = token_batch(2)
    tokens[0, :-1] = EXCLUDED[0]  # its one measured token predicts nothing
    tokens[0, -1], tokens[1] = 1, torch.arange(10, 18)
    found = evaluate(sae_at(exclude_special_tokens=EXCLUDED), tiny_hooked_transformer(), tokens, n_resamples=40)
    assert all_finite(found)
    assert found.n_tokens == 9
    lengths = {len(values) for values in found.resamples.values()}
    assert len(lengths) == 1
    assert 20 < lengths.pop() < 40


@pytest.mark.parametrize("hook_name", ["blocks.2.hook_resid_pre", "blocks.2.hook_mlp_out", "blocks.2.hook_resid_post"])
def test_the_last_block_has_no_later_layers(hook_name: str):
    model, sae, tokens = tiny_hooked_transformer(), sae_at(hook_name), token_batch(7)
    found = evaluate(sae, model, tokens, **FEW)
    assert found.downstream_mse() == {}
    mask = torch.ones_like(tokens).bool()
    assert_equal(found, naive_evaluation(model, sae, tokens, hook_name, [], mask))


def test_activations_that_do_not_vary_are_explained_if_they_are_met():
    model, tokens, hook_name = tiny_hooked_transformer(), token_batch(12), "blocks.0.hook_resid_pre"
    with torch.no_grad():
        model.W_E.zero_()  # of the position alone, and one position is measured
    saes = {"perfect": perfect_sae(hook_name=hook_name), "poor": sae_at(hook_name)}
    for sae in saes.values():
        sae.cfg.metadata.seqpos_slice = (2, 3)
    found = evaluate_many(saes, model, tokens, **FEW)
    for name, expected in (("perfect", 1), ("poor", 0)):
        assert all_finite(found[name])
        for layer in found[name].layers.values():
            assert layer.explained_variance.value == layer.explained_variance_per_token.value == expected
    assert found["poor"].metrics["ce_loss_recovered_mean"] is None  # the mean is the activation
    assert found["poor"].metrics["l2_ratio_position_0"] is None
    assert found["poor"].value("mse") > 0.1


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_no_tensor_grows_with_the_number_of_sequences(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kl, "CHUNK_LOGIT_ELEMENTS", 16 * VOCABULARY)
    model, sae, context = tiny_hooked_transformer(), sae_at(), 16
    model(token_batch(1))
    largest: dict[int, int] = {}
    for n_batches in (4, 16):
        tokens = token_batch(4 * n_batches, context)
        with _LargestTensor() as seen:
            evaluate(sae, model, tokens, batch_size_prompts=4, n_resamples=1)
        largest[n_batches] = seen.elements
    assert largest[4] == largest[16]
    batch_tokens = 4 * context
    # Queries, keys and values of a block are one tensor. No whole batch of logits either.
    assert largest[16] <= batch_tokens * max(sae.cfg.d_sae, 3 * D_MODEL) < batch_tokens * VOCABULARY


# What is refused.


def refusal(*args: Any, **settings: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        evaluate_many(*args, **{**FEW, **settings})
    return str(caught.value)


DIFFERENT_PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "hook": ({"hook_name": LAST_HOOK}, f"hook_name: '{HOOK}' and '{LAST_HOOK}'"),
    "head": ({"hook_head_index": 1}, "head_index: None and 1"),
    "positions": ({"seqpos_slice": [1, None]}, "seqpos_slice: (None,) and (1, None)"),
    "excluded": ({"exclude_special_tokens": [3, 1]}, "excluded: () and (1, 3)"),
}


@pytest.mark.parametrize("which", DIFFERENT_PLACES)
def test_saes_of_different_places_are_refused(which: str):
    metadata, what = DIFFERENT_PLACES[which]
    saes = {"first": sae_at(), "second": sae_at(**metadata)}
    text = refusal(saes, tiny_hooked_transformer(), token_batch(2))
    flags = {
        "positions": "Give seqpos_slice (--seqpos-slice) to measure all of them on the same tokens.",
        "excluded": "Give exclude_special_tokens (--exclude-special-tokens) to measure all of them on the same tokens.",
    }
    assert text == (
        f"first and second are not at the same place of the model ({what}), so their numbers cannot be compared as if "
        f"equal. {flags.get(which, 'Evaluate each place by itself, or all in one pass (--joint).')}"
    )


def test_the_order_of_excluded_tokens_is_no_difference():
    saes = {"a": sae_at(exclude_special_tokens=[5, 9]), "b": sae_at(exclude_special_tokens=[9, 5, 5])}
    found = evaluate_many(saes, tiny_hooked_transformer(), token_batch(2), **FEW)
    assert found["a"].metrics == found["b"].metrics


BAD_TOKENS: dict[str, tuple[Any, str]] = {
    "floats": (torch.zeros(2, 8), "tokens must be a tensor of integer token ids, got one of torch.float32."),
    "booleans": (torch.zeros(2, 8).bool(), "tokens must be a tensor of integer token ids, got one of torch.bool."),
    "complex": (torch.zeros(2, 8) * 1j, "tokens must be a tensor of integer token ids, got one of torch.complex64."),
    "none": (torch.zeros(0, 8).long(), "tokens must be [n_prompts, pos] with at least one prompt, got shape (0, 8)"),
    "no position": (torch.zeros(2, 0).long(), "got shape (2, 0): there is nothing to measure on."),
    "one sequence": (torch.zeros(8).long(), "tokens must be [n_prompts, pos] with at least one prompt, got shape (8,)"),
    "negative": (token_batch(2) - 64, "but the model knows 0 to 63. Was it made with another tokenizer?"),
    "too large": (token_batch(2) + 60, "but the model knows 0 to 63. Was it made with another tokenizer?"),
    "of one": (token_batch(3, 1), "No measured token has a next token to predict: sequences need at least two tokens."),
}


@pytest.mark.parametrize("which", BAD_TOKENS)
def test_tokens_that_cannot_be_measured_on_are_refused(which: str):
    tokens, what = BAD_TOKENS[which]
    assert what in refusal({"sae": sae_at()}, tiny_hooked_transformer(), tokens)


def test_a_list_of_tokens_is_refused():
    # Directly: the tests' run-time checks of every annotated function would be first.
    with pytest.raises(ValueError, match=r"tokens must be a tensor of integer token ids, got list\."):
        check_tokens([[1, 2]], VOCABULARY)


def test_tokens_that_are_all_left_out_are_refused():
    model, tokens = tiny_hooked_transformer(), token_batch(2)
    every_id = {"sae": sae_at(exclude_special_tokens=list(range(64)))}
    assert "There is no token to measure: every one is excluded or outside" in refusal(every_id, model, tokens)
    last_position = {"sae": sae_at(seqpos_slice=(-1, None))}
    assert "No measured token has a next token to predict" in refusal(last_position, model, tokens)


def transcoder(**metadata: Any) -> Any:
    sae = Transcoder(TranscoderConfig(d_in=D_MODEL, d_sae=32, d_out=D_MODEL, apply_b_dec_to_input=False))
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    return sae


def temporal() -> Any:
    sae = TemporalSAE(TemporalSAEConfig(d_in=D_MODEL, d_sae=128, n_heads=2))
    sae.cfg.metadata.hook_name = HOOK
    return sae


BAD_SAES: dict[str, tuple[Any, str]] = {
    "no hook": (lambda: sae_at(None), "The SAE's metadata name no hook. Give hook_name."),
    "unknown hook": (
        lambda: sae_at("blocks.1.hook_resid_pree"),
        "The model has no hook_name 'blocks.1.hook_resid_pree'. Near matches: blocks.1.hook_resid_pre",
    ),
    "wrong width": (
        lambda: sae_at(d_in=24),
        f"sae has d_in=24, but the activations at '{HOOK}' have 16 dimensions. Is it of another model, or of another hook?",
    ),
    "wrong width of heads": (
        lambda: sae_at("blocks.1.attn.hook_z", d_in=D_HEAD),
        "sae has d_in=8, but the activations at 'blocks.1.attn.hook_z' have 2 x 8 dimensions.",
    ),
    "no such head": (
        lambda: sae_at("blocks.1.attn.hook_z", d_in=D_HEAD, hook_head_index=2),
        "The SAEs are of head 2, but the activations at 'blocks.1.attn.hook_z' have heads 0 to 1.",
    ),
    "no heads": (
        lambda: sae_at(hook_head_index=0),
        f"The SAEs are of head 0, but the activations at '{HOOK}' have no heads.",
    ),
    "transcoder": (
        lambda: transcoder(hook_name=HOOK, hook_name_out="blocks.1.hook_mlp_out"),
        f"The SAE reads '{HOOK}' and writes 'blocks.1.hook_mlp_out': transcoders cannot be spliced.",
    ),
    "transcoder without metadata": (
        lambda: transcoder(hook_name=HOOK),
        "transcoders cannot be spliced. Expected an SAE",
    ),
    "temporal": (temporal, "A temporal SAE reads whole sequences. Expected an SAE that reads each token by itself."),
    "special tokens unknown": (
        lambda: sae_at(exclude_special_tokens=True),
        "The SAE leaves out special tokens, but the model has no tokenizer that says which these are.",
    ),
}


@pytest.mark.parametrize("which", BAD_SAES)
def test_saes_that_do_not_fit_are_refused(which: str):
    build, what = BAD_SAES[which]
    assert what in refusal({"sae": build()}, tiny_hooked_transformer(), token_batch(2))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"batch_size_prompts": 0}, "batch_size_prompts must be at least 1, got 0."),
        ({"n_resamples": 0}, "n_resamples must be at least 1, got 0."),
        ({"confidence": 95}, "confidence must be between 0 and 1, got 95."),
    ],
)
def test_settings_are_refused_before_anything_runs(settings: dict[str, Any], what: str):
    assert refusal({"sae": sae_at()}, None, token_batch(2), **settings) == what


def test_no_sae_and_no_model_are_refused():
    assert refusal({}, tiny_hooked_transformer(), token_batch(2)) == "There is no SAE to evaluate."
    text = refusal({"sae": sae_at()}, torch.nn.Linear(2, 2), token_batch(2))
    assert "Cannot splice an SAE into a Linear. Expected a HookedTransformer" in text


def test_weights_that_are_not_finite_are_refused():
    sae = sae_at()
    with torch.no_grad():
        sae.W_dec[0, 0] = float("nan")
    text = refusal({"sae": sae}, tiny_hooked_transformer(), token_batch(2))
    assert f"at '{HOOK}' is not finite: the SAE's or the model's output is not." in text
