"""`measure` against naive code on all the logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import D_HEAD, N_HEADS, runner_config, tiny_hooked_transformer, token_batch, training_sae
from sae_lens import SAE
from torch import Tensor

from e2e_sae_plugin import splice_into
from e2e_sae_plugin.evaluation import SpliceMetrics, measure, reconstruct_with
from e2e_sae_plugin.evaluation.sums import SequenceSums, bootstrap_weights, interval
from e2e_sae_plugin.kernels import kl

HOOK = "blocks.1.hook_resid_pre"
EXCLUDED = torch.tensor([5, 9, 22, 40, 41, 42, 50])


def checked_splice(model: Any, hook_name: str = HOOK) -> Any:
    spliced = splice_into(model, hook_name)
    spliced.check()
    return spliced


def naive_metrics(model: Any, sae: Any, tokens: Tensor, mask: Tensor, hook_name: str, head: int | None = None) -> dict:
    """One ordinary forward pass over everything; means over the tokens of the mask."""
    start = int(hook_name.split(".")[1])
    later = [f"blocks.{k}.hook_resid_pre" for k in range(start + 1, 3)]
    found: dict[str, Any] = {}
    caught: dict[str, Tensor] = {}
    with torch.no_grad():
        clean_logits, clean = model.run_with_cache(tokens)
        acts = clean[hook_name] if head is None else clean[hook_name][:, :, head]
        acts = acts.flatten(2)
        feature_acts = sae.encode(acts)
        sae_out = sae.decode(feature_acts)

        def splice(activation: Tensor, hook: Any) -> Tensor:
            spliced = activation.clone()
            target = spliced if head is None else spliced[:, :, head]
            target[mask] = sae_out[mask].reshape(target[mask].shape)
            return spliced

        hooks: list[Any] = [(hook_name, splice)]
        hooks += [(name, lambda activation, hook: caught.update({hook.name: activation})) for name in later]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    predicted = mask[:, :-1]
    for name, of in (("ce_clean", clean_logits), ("ce_spliced", logits)):
        per_token = F.cross_entropy(of[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        found[name] = float(per_token.view(len(tokens), -1)[predicted].mean())
    log_y, log_y_hat = clean_logits.log_softmax(-1), logits.log_softmax(-1)
    found["kl"] = float((log_y.exp() * (log_y - log_y_hat)).sum(-1)[mask].mean())
    error = (sae_out - acts)[mask].pow(2).sum(-1)
    found["mse"] = float(error.mean())
    found["ev"] = float(1 - error.mean() / (acts[mask] - acts[mask].mean(0)).pow(2).sum(-1).mean())
    found["l0"] = float((feature_acts[mask] != 0).sum(-1).float().mean())
    found["alive"] = int((feature_acts[mask] != 0).any(0).sum())
    found["downstream"] = {n: float((caught[n] - clean[n])[mask].pow(2).sum(-1).mean()) for n in later}
    return found


def assert_equal_metrics(found: SpliceMetrics, naive: dict[str, Any]) -> None:
    close: Any = {"rel": 2e-5, "abs": 1e-6}
    assert found.ce_loss_without_sae == pytest.approx(naive["ce_clean"], **close)
    assert found.ce_loss_with_sae == pytest.approx(naive["ce_spliced"], **close)
    assert found.ce_loss_increase == pytest.approx(naive["ce_spliced"] - naive["ce_clean"], rel=1e-4, abs=1e-5)
    assert found.kl == pytest.approx(naive["kl"], **close)
    assert found.mse == pytest.approx(naive["mse"], **close)
    assert found.explained_variance == pytest.approx(naive["ev"], **close)
    assert found.l0 == pytest.approx(naive["l0"])
    assert found.n_alive == naive["alive"]
    assert found.downstream_mse == pytest.approx(naive["downstream"], **close)
    assert abs(found.ce_loss_increase) > 1e-3
    assert found.kl > 1e-3
    assert 0 < found.l0 < 32


@pytest.mark.parametrize("batch_size_prompts", [1, 4, 100])
@pytest.mark.parametrize("chunk", [1, 200, 2**23])
def test_metrics_equal_naive_code_whatever_the_chunks(
    batch_size_prompts: int, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kl, "CHUNK_LOGIT_ELEMENTS", chunk)
    model, sae, tokens = tiny_hooked_transformer(), training_sae(runner_config()), token_batch(7)
    found = measure(reconstruct_with(sae), checked_splice(model), tokens, batch_size_prompts=batch_size_prompts)
    assert_equal_metrics(found, naive_metrics(model, sae, tokens, torch.ones_like(tokens).bool(), HOOK))
    assert found.n_tokens == tokens.numel()


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.1.hook_mlp_out", "blocks.0.attn.hook_z"])
def test_metrics_are_means_over_the_tokens_that_the_sae_is_applied_to(hook_name: str):
    model, sae, tokens = tiny_hooked_transformer(), training_sae(runner_config()), token_batch(7)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 1:-2] = True
    mask &= ~torch.isin(tokens, EXCLUDED)
    found = measure(
        reconstruct_with(sae), checked_splice(model, hook_name), tokens, batch_size_prompts=2, seqpos_slice=(1, -2),
        excluded=EXCLUDED,
    )  # fmt: skip
    assert_equal_metrics(found, naive_metrics(model, sae, tokens, mask, hook_name))
    assert found.n_tokens == int(mask.sum()) < 7 * 5


def test_metrics_of_one_head_splice_that_head_alone():
    hook_name = "blocks.1.attn.hook_z"
    config = runner_config(sae={"d_in": D_HEAD}, hook_name=hook_name)
    model, sae, tokens = tiny_hooked_transformer(), training_sae(config), token_batch(7)
    found = measure(reconstruct_with(sae), checked_splice(model, hook_name), tokens, head_index=1)
    assert_equal_metrics(found, naive_metrics(model, sae, tokens, torch.ones_like(tokens).bool(), hook_name, head=1))


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit"])
def test_inference_and_training_forms_agree(architecture: str, tmp_path: Any):
    training = training_sae(runner_config(architecture))
    training.save_inference_model(tmp_path)
    inference = SAE.load_from_disk(tmp_path)
    spliced, tokens = checked_splice(tiny_hooked_transformer()), token_batch(7)
    of_training = measure(reconstruct_with(training), spliced, tokens)
    of_inference = measure(reconstruct_with(inference), spliced, tokens)
    assert type(inference) is not type(training)
    assert of_inference.kl == pytest.approx(of_training.kl, rel=1e-4)
    assert of_inference.l0 == pytest.approx(of_training.l0)
    assert of_inference.mse == pytest.approx(of_training.mse, rel=1e-4)
    assert of_training.kl > 1e-3


def test_an_inference_sae_that_reshapes_heads_by_itself_is_measured_alike(tmp_path: Any):
    hook_name = "blocks.1.attn.hook_z"
    sae = training_sae(runner_config(sae={"reshape_activations": "hook_z"}, hook_name=hook_name))
    sae.save_inference_model(tmp_path)
    inference = SAE.load_from_disk(tmp_path)
    spliced, tokens = checked_splice(tiny_hooked_transformer(), hook_name), token_batch(4)
    assert inference.hook_z_reshaping_mode
    found = measure(reconstruct_with(inference, [N_HEADS, D_HEAD]), spliced, tokens)
    assert found.kl == pytest.approx(measure(reconstruct_with(sae), spliced, tokens).kl, rel=1e-4)


def hand_worked_sums() -> SequenceSums:
    """Two sequences, of two tokens and of one, in two chunks."""
    sums = SequenceSums()
    first, second = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[4.0, 6.0]])
    errors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    one, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    sums.add_sae(first, torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), first + errors[:2], two, 1)
    sums.add_sae(second, torch.tensor([[0.0, 0.0, 0.0]]), second + errors[2:], one, 1)
    for name, values in {"ce_clean": [1.0, 3.0, 4.0], "ce_spliced": [2.0, 3.0, 7.0], "kl": [1.0, 1.0, 4.0]}.items():
        sums.add(name, torch.tensor(values[:2]), two, 1)
        sums.add(name, torch.tensor(values[2:]), one, 1)
    sums.add("n_predicted", torch.tensor([True, False]), two, 1)
    sums.add("n_predicted", torch.tensor([True]), one, 1)
    return sums


def test_explained_variance_is_the_hand_worked_ratio_of_means():
    sums = hand_worked_sums()
    means = sums.means()
    # Mean activation (2, 2): squared distances 8, 4, 20; squared errors 1, 1, 4.
    assert float(means["explained_variance"]) == pytest.approx(1 - 6 / 32)
    assert float(means["mse"]) == pytest.approx(2)
    assert float(means["l0"]) == 1
    assert float(means["ce_loss_increase"]) == pytest.approx(4 / 2)  # two tokens predict something
    assert float(means["kl"]) == pytest.approx(2)
    assert sums.fired is not None
    assert sums.fired.tolist() == [True, True, False]


def test_resampled_means_are_those_of_the_sequences_drawn():
    weights = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    means = hand_worked_sums().means(weights)
    assert means["kl"].tolist() == pytest.approx([1, 4, 2])
    assert means["l0"].tolist() == pytest.approx([1.5, 0, 1])
    # Of the first sequence alone: mean (1, 0), squared distances 1 and 1, squared errors 1 and 1. The second has one token.
    assert means["explained_variance"][0] == pytest.approx(0)
    assert means["explained_variance"][1].isnan()
    assert means["explained_variance"][2] == pytest.approx(1 - 6 / 32)


def test_bootstrap_intervals_cover_the_mean_of_a_known_population():
    weights = bootstrap_weights(50, n_resamples=400, seed=3)
    assert torch.equal(weights.sum(1), torch.full((400,), 50.0, dtype=torch.float64))
    assert torch.equal(weights, bootstrap_weights(50, n_resamples=400, seed=3))
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        sample = torch.randn(50, generator=generator, dtype=torch.float64)
        low, high = interval(weights @ sample / 50)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99  # 95 %, less what the percentile interval is too narrow by
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        interval(torch.zeros(3), confidence=95)


def test_a_perfect_sae_costs_nothing_and_an_empty_one_costs_the_variance():
    spliced, tokens = checked_splice(tiny_hooked_transformer()), token_batch(7)
    perfect = measure(lambda acts: (torch.ones(len(acts), 32), acts), spliced, tokens)
    assert perfect.ce_loss_increase == 0
    assert perfect.kl == 0
    assert (perfect.mse, perfect.explained_variance, perfect.l0, perfect.n_alive) == (0, 1, 32, 32)
    assert all(value == 0 for value in perfect.downstream_mse.values())
    acts = spliced.clean_pass(tokens).activation.flatten(0, 1)
    mean = measure(lambda x: (torch.zeros(len(x), 32), acts.mean(0).expand_as(x)), spliced, tokens)
    assert mean.explained_variance == pytest.approx(0, abs=1e-5)
    assert mean.kl > 0.01
    assert (mean.l0, mean.n_alive) == (0, 0)


def test_no_gradient_is_recorded():
    sae = training_sae(runner_config())
    measure(reconstruct_with(sae), checked_splice(tiny_hooked_transformer()), token_batch(2))
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_nothing_to_measure_is_refused():
    spliced, tokens = checked_splice(tiny_hooked_transformer()), token_batch(2)
    with pytest.raises(ValueError, match="no token to measure: every one is excluded or outside seqpos_slice"):
        measure(lambda acts: (acts, acts), spliced, tokens, excluded=torch.arange(64))


def test_names_in_the_log_carry_every_downstream_hook():
    spliced = checked_splice(tiny_hooked_transformer(), "blocks.0.hook_resid_pre")
    found = measure(reconstruct_with(training_sae(runner_config())), spliced, token_batch(4))
    log = found.to_log()
    assert log["metrics/ce_loss_increase"] == found.ce_loss_increase
    for hook in ("blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"):
        assert log[f"metrics/held_out_downstream_mse/{hook}"] == found.downstream_mse[hook] > 0
