"""What ablating a feature does: hand-worked models, and naive code that ablates one feature after the other."""

from __future__ import annotations

import asyncio
import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BUILT_IN_ARCHITECTURES,
    D_HEAD,
    D_MODEL,
    N_HEADS,
    VOCABULARY,
    module_names,
    runner_config,
    shared_model,
    tiny_hooked_transformer,
    token_batch,
    training_sae,
)
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from torch import Tensor

from e2e_sae_plugin import splice_into
from e2e_sae_plugin.demo import demo_tokens, load_demo_model
from e2e_sae_plugin.evaluation.importance import FeatureImportance, feature_importance
from e2e_sae_plugin.kernels import kl

HOOK = "blocks.1.hook_resid_pre"
EXCLUDED = torch.tensor([5, 9, 22, 40, 41, 42, 50])


def checked_splice(model: Any, hook_name: str = HOOK) -> Any:
    spliced = splice_into(model, hook_name, needs_downstream=False)
    spliced.check()
    return spliced


def kl_of(reference: Tensor, changed: Tensor) -> Tensor:
    """`[..., vocabulary]` logits of the two, -> `[...]`."""
    a, b = reference.double().log_softmax(-1), changed.double().log_softmax(-1)
    return (a.exp() * (a - b)).sum(-1)


def naive_ablations(model: Any, sae: Any, tokens: Tensor, mask: Tensor, hook_name: str, head: int | None = None) -> Any:
    """(KL, change of the KL to the clean model) of every feature by full forward passes, `[d_sae]` each."""
    with torch.no_grad():
        clean_logits, cache = model.run_with_cache(tokens)
        acts = cache[hook_name] if head is None else cache[hook_name][:, :, head]
        feature_acts = sae.encode(acts.flatten(2))

        def logits_without(feature: int | None) -> Tensor:
            kept = feature_acts.clone()
            if feature is not None:
                kept[..., feature] = 0
            sae.encode(acts.flatten(2))
            sae_out = sae.decode(kept)

            def put(activation: Tensor, hook: Any) -> Tensor:
                spliced = activation.clone()
                target = spliced if head is None else spliced[:, :, head]
                target[mask] = sae_out[mask].reshape(target[mask].shape)
                return spliced

            return model.run_with_hooks(tokens, fwd_hooks=[(hook_name, put)])

        reference = logits_without(None)
        ablated = [logits_without(i) for i in range(feature_acts.shape[-1])]
    to_clean = kl_of(clean_logits, reference)[mask].mean()
    return (
        torch.stack([kl_of(reference, each)[mask].mean() for each in ablated]),
        torch.stack([kl_of(clean_logits, each)[mask].mean() - to_clean for each in ablated]),
    )


def exact_of(found: FeatureImportance) -> Tensor:
    return torch.tensor([found.exact[i] for i in range(len(found.kl))], dtype=torch.float64)


# A KL of 1e-6 is that of logits which differ by 1e-3. They are of size 8, so float32 leaves 8 * EPS / 1e-3 of the
# difference, a thousandth, and two of the KL, its square; times five, for what comes before the logits.
SMALL_KL = 1e-2


def shrunk(sae: Any, factor: float) -> Any:
    """The same features with less effect."""
    with torch.no_grad():
        sae.W_dec *= factor
    return sae


def last_layer_case() -> tuple[Any, StandardSAE]:
    """Logits linear in what the SAE writes: it sits at the end of a model without a final norm.

    Each feature fires with 1.5 on every token, whatever the input, and feature i raises the logit of token i alone.
    """
    model = tiny_hooked_transformer(normalization_type=None)
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=3))
    with torch.no_grad():
        model.unembed.W_U.zero_()
        model.unembed.b_U.zero_()
        model.unembed.W_U[:3, :3] = torch.eye(3)
        sae.W_enc.zero_()
        sae.b_enc.copy_(torch.tensor([1.5, 1.5, -1.0]))
        sae.W_dec.copy_(torch.diag(torch.tensor([2.0, 0.1, 5.0])) @ torch.eye(3, D_MODEL))
    return checked_splice(model, "blocks.2.hook_resid_post"), sae


def test_a_hand_worked_model():
    model, sae = last_layer_case()
    found = feature_importance(sae, model, token_batch(40), exact=[0, 1, 2], n_samples=32)
    # Logits: 3 for token 0, 0.15 for token 1, 0 for the 62 others.
    weights = torch.tensor([math.exp(3), math.exp(0.15), *[1.0] * (VOCABULARY - 2)], dtype=torch.float64)
    p = weights / weights.sum()
    for feature, logit in ((0, 3.0), (1, 0.15)):
        without = weights.clone()
        without[feature] = 1
        expected = float((p * (p.log() - (without / without.sum()).log())).sum())
        assert found.exact[feature] == pytest.approx(expected, rel=1e-4)
        # 1/2 of the variance of the one logit that changes.
        second_order = 0.5 * logit**2 * float(p[feature] * (1 - p[feature]))
        assert float(found.kl[feature]) == pytest.approx(second_order, rel=0.1)
    assert found.exact[2] == found.kl[2] == found.attribution[2] == 0
    assert found.density.tolist() == [1, 1, 0]
    assert found.ranked() == [0, 1, 2]
    assert found.n_tokens == 40 * 8


@pytest.mark.parametrize("batch_size_prompts", [1, 3, 100])
def test_exact_values_are_those_of_naive_ablations_whatever_the_batches(
    batch_size_prompts: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kl, "CHUNK_LOGIT_ELEMENTS", 300)
    model, sae, tokens = tiny_hooked_transformer(), training_sae(runner_config()), token_batch(5)
    expected, _ = naive_ablations(model, sae, tokens, torch.ones_like(tokens).bool(), HOOK)
    found = feature_importance(
        sae, checked_splice(model), tokens, exact=range(32), n_samples=1, batch_size_prompts=batch_size_prompts
    )
    torch.testing.assert_close(exact_of(found), expected, rtol=1e-4, atol=1e-10)
    assert float(expected.max()) > 1e-3


@pytest.mark.parametrize(
    ("hook_name", "head"), [(HOOK, None), ("blocks.1.hook_mlp_out", None), ("blocks.0.attn.hook_z", 1)]
)
def test_only_the_tokens_that_the_sae_is_applied_to_are_changed_and_counted(hook_name: str, head: int | None):
    config = runner_config(sae={"d_in": D_MODEL if head is None else D_HEAD}, hook_name=hook_name)
    model, sae, tokens = tiny_hooked_transformer(), shrunk(training_sae(config), 0.1), token_batch(7)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 1:-2] = True
    mask &= ~torch.isin(tokens, EXCLUDED)
    expected, _ = naive_ablations(model, sae, tokens, mask, hook_name, head)
    found = feature_importance(
        sae, checked_splice(model, hook_name), tokens, exact=range(32), n_samples=64, batch_size_prompts=2,
        seqpos_slice=(1, -2), excluded=EXCLUDED, head_index=head,
    )  # fmt: skip
    torch.testing.assert_close(exact_of(found), expected, rtol=SMALL_KL, atol=1e-10)
    assert float(found.kl.sum() / expected.sum()) == pytest.approx(1, abs=0.15)
    assert found.n_tokens == int(mask.sum())


def test_chunks_do_not_change_the_estimate_but_the_seed_does(monkeypatch: pytest.MonkeyPatch):
    model, sae, tokens = checked_splice(tiny_hooked_transformer()), training_sae(runner_config()), token_batch(7)
    whole = feature_importance(sae, model, tokens)
    monkeypatch.setattr(kl, "CHUNK_LOGIT_ELEMENTS", 200)
    for size in (1, 3):
        found = feature_importance(sae, model, tokens, batch_size_prompts=size)
        torch.testing.assert_close(found.kl, whole.kl, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found.attribution, whole.attribution, rtol=1e-3, atol=1e-7)
        assert torch.equal(found.density, whole.density)
    other = feature_importance(sae, model, tokens, seed=1)
    assert not torch.allclose(other.kl, whole.kl, rtol=1e-2)
    assert torch.equal(feature_importance(sae, model, tokens, seed=1).kl, other.kl)


def test_the_estimate_becomes_exact_as_effects_become_small():
    model, tokens = tiny_hooked_transformer(), token_batch(8)
    spliced, deviations = checked_splice(model), []
    for factor in (0.5, 0.05):
        sae = shrunk(training_sae(runner_config()), factor)
        found = feature_importance(sae, spliced, tokens, exact=range(32), n_samples=400)
        exact = exact_of(found)
        alive = exact > 0.01 * exact.max()
        assert int(alive.sum()) > 20
        deviations.append(float((found.kl / exact - 1)[alive].abs().mean()))
        assert deviations[-1] < factor
    assert deviations[1] < 0.05  # what 400 draws on 8 sequences leave


def test_the_attribution_is_the_first_order_change_of_the_kl_to_the_clean_model():
    model, sae, tokens = tiny_hooked_transformer(), shrunk(training_sae(runner_config()), 0.01), token_batch(6)
    _, expected = naive_ablations(model, sae, tokens, torch.ones_like(tokens).bool(), HOOK)
    found = feature_importance(sae, checked_splice(model), tokens, n_samples=1)
    torch.testing.assert_close(found.attribution, expected, rtol=0.1, atol=0.03 * float(expected.abs().max()))
    assert bool((expected < 0).any() and (expected > 0).any())


def hook_of(family: str) -> str:
    return f"{module_names(family)['layers']}.0" if family not in ("hooked_transformer", "bridge") else HOOK


@pytest.mark.parametrize("family", ["hooked_transformer", "bridge", "gpt2", "llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("inside", [False, True])
def test_every_family_of_models(family: str, inside: bool):
    hook_name = hook_of(family)
    if inside:
        hook_name = HOOK.replace("resid_pre", "mlp_out") if hook_name == HOOK else f"{hook_name}.mlp"
    model, sae, tokens = checked_splice(shared_model(family), hook_name), training_sae(runner_config()), token_batch(5)
    found = feature_importance(sae, model, tokens, exact=range(0, 32, 4), batch_size_prompts=3)
    clean = model.clean_pass(tokens)

    @torch.no_grad()
    def logits(without: int | None) -> Tensor:
        acts = sae.encode(clean.activation)
        if without is not None:
            acts[..., without] = 0
        hidden = model.spliced_pass(clean, sae.decode(acts)).hidden
        return model.logits(hidden.flatten(0, 1))

    for feature, value in found.exact.items():
        assert value == pytest.approx(float(kl_of(logits(None), logits(feature)).mean()), rel=1e-3, abs=1e-10)
    assert max(found.exact.values()) > 1e-5
    assert found.kl.isfinite().all()


@pytest.mark.parametrize("architecture", [name for name in BUILT_IN_ARCHITECTURES if "batchtopk" not in name])
def test_inference_and_training_forms_agree(architecture: str, tmp_path: Path):
    training: Any = training_sae(runner_config(architecture))
    training.save_inference_model(tmp_path)
    inference: Any = SAE.load_from_disk(tmp_path)
    model, tokens = checked_splice(tiny_hooked_transformer()), token_batch(4)
    first, second = (feature_importance(sae, model, tokens, exact=8) for sae in (training, inference))
    torch.testing.assert_close(first.kl, second.kl, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(first.attribution, second.attribution, rtol=1e-3, atol=1e-6)
    assert first.exact == pytest.approx(second.exact, rel=1e-3)
    assert list(first.exact) == first.kl.argsort(descending=True)[:8].tolist()


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_activations_are_denormalised_as_the_sae_does(normalisation: str):
    model, tokens = tiny_hooked_transformer(), token_batch(4)
    sae = shrunk(training_sae(runner_config(sae={"normalize_activations": normalisation})), 0.05)
    mask = ~torch.isin(tokens, EXCLUDED)
    expected, _ = naive_ablations(model, sae, tokens, mask, HOOK)
    found = feature_importance(
        sae, checked_splice(model), tokens, exact=range(32), n_samples=100, batch_size_prompts=3, excluded=EXCLUDED
    )
    torch.testing.assert_close(exact_of(found), expected, rtol=SMALL_KL, atol=1e-10)
    assert float(found.kl.sum() / expected.sum()) == pytest.approx(1, abs=0.15)


def test_an_sae_that_reshapes_heads_by_itself(tmp_path: Path):
    hook_name = "blocks.1.attn.hook_z"
    sae = training_sae(runner_config(sae={"reshape_activations": "hook_z"}, hook_name=hook_name))
    sae.save_inference_model(tmp_path)
    inference: Any = SAE.load_from_disk(tmp_path)
    model, tokens = checked_splice(tiny_hooked_transformer(), hook_name), token_batch(4)
    assert inference.hook_z_reshaping_mode
    assert model.clean_pass(tokens).activation.shape[2:] == (N_HEADS, D_HEAD)
    first, second = (feature_importance(one, model, tokens, exact=[1, 5, 9]) for one in (sae, inference))
    torch.testing.assert_close(first.kl, second.kl, rtol=1e-3, atol=1e-9)
    assert first.exact == pytest.approx(second.exact, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_activations_are_those_of_the_dense_form():
    model, tokens = checked_splice(tiny_hooked_transformer()), token_batch(4)
    dense, sparse = (training_sae(runner_config("topk", sae={"use_sparse_activations": on})) for on in (False, True))
    found = feature_importance(sparse, model, tokens, exact=4)
    expected = feature_importance(dense, model, tokens, exact=4)
    torch.testing.assert_close(found.kl, expected.kl)
    assert found.exact == pytest.approx(expected.exact, rel=1e-4)


def spearman(first: Tensor, second: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_the_estimate_ranks_the_features_of_the_bundled_model():
    """A dictionary of activations of the model: not trained, but its features mean something to the model."""
    model = checked_splice(load_demo_model(), "blocks.3.hook_resid_pre")
    tokens = demo_tokens("train", 64, root=Path(asyncio.__file__).parent)
    acts, tokens = model.clean_pass(tokens[12:20]).activation.flatten(0, 1), tokens[:12]
    sae = TopKSAE(TopKSAEConfig(d_in=128, d_sae=512, k=16))
    with torch.no_grad():
        sae.b_dec.copy_(acts.mean(0))
        sae.W_dec.copy_(torch.nn.functional.normalize((acts - acts.mean(0)), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    found = feature_importance(sae, model, tokens, exact=range(0, 512, 16))
    features = [i for i in found.exact if found.density[i] > 0]
    assert len(features) >= 25
    assert spearman(found.kl[features], torch.tensor([found.exact[i] for i in features])) > 0.9


def test_exact_values_take_the_estimates_place_in_ranks_and_files(tmp_path: Path):
    kl_values, zeros = torch.tensor([0.3, 0.2, 0.0, 0.1], dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    found = FeatureImportance(kl_values, zeros, zeros, {0: 0.15, 3: 0.5}, 10)
    assert found.importance.tolist() == [0.15, 0.2, 0, 0.5]
    assert found.ranked() == [3, 1, 0, 2]
    assert found.ranked(2) == [3, 1]
    assert found.kl.tolist() == [0.3, 0.2, 0, 0.1]
    found.write_csv(tmp_path / "importance.csv")
    with (tmp_path / "importance.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["importance"] for line in lines] == ["0.15", "0.2", "0", "0.5"]
    assert [line["kl_exact"] for line in lines] == ["0.15", "", "", "0.5"]
    assert lines[3]["kl_estimate"] == "0.1"


def test_the_most_important_by_the_estimate_are_ablated_but_none_that_never_fires():
    model, sae = last_layer_case()
    assert list(feature_importance(sae, model, token_batch(4), exact=1).exact) == [0]
    assert list(feature_importance(sae, model, token_batch(4), exact=3).exact) == [0, 1]
    assert feature_importance(sae, model, token_batch(4), exact=[2]).exact == {2: 0}
    assert feature_importance(sae, model, token_batch(4)).exact == {}


def test_no_gradient_is_left_behind():
    sae = training_sae(runner_config())
    with torch.no_grad():
        feature_importance(sae, checked_splice(tiny_hooked_transformer()), token_batch(2), exact=2)
    assert all(parameter.grad is None for parameter in sae.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exact": [3, 32]}, "the SAE has no feature 32. Name features from 0 to 31"),
        ({"exact": -1}, "exact must be 0 or more"),
        ({"n_samples": 0}, "n_samples must be 1 or more, got 0"),
        ({"excluded": torch.arange(64)}, "no token to measure: every one is excluded or outside seqpos_slice"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        feature_importance(
            training_sae(runner_config()), checked_splice(tiny_hooked_transformer()), token_batch(2), **settings
        )


def test_a_plain_model_is_spliced_where_the_metadata_say_and_a_wrong_width_is_refused():
    model = shared_model("hooked_transformer")
    sae = training_sae(runner_config("standard"))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    tokens = token_batch(4, 8)
    plain = feature_importance(sae, model, tokens, exact=2)
    spliced = feature_importance(sae, splice_into(model, "blocks.1.hook_resid_pre"), tokens, exact=2)  # not checked yet
    assert torch.equal(plain.kl, spliced.kl)
    assert plain.exact == spliced.exact
    other = training_sae(runner_config("standard", sae={"d_in": 8}))
    with pytest.raises(
        ValueError, match=r"d_in=8, but the activations at 'blocks\.1\.hook_resid_pre' have 16 dimensions"
    ):
        feature_importance(other, splice_into(model, "blocks.1.hook_resid_pre"), tokens)
