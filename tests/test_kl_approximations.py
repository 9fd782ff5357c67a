"""KL on a subset of the positions, and over the likeliest tokens: what they compute, and where they are refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import (
    build_trainer,
    parameters_of,
    proxy,
    runner_config,
    shared_model,
    tiny_gemma2_model,
    tiny_hooked_transformer,
    token_batch,
    token_dataset,
    training_sae,
)
from torch import Tensor

from e2e_sae_plugin import E2ESAETrainingRunner, Objective, splice_into, spliced_losses
from e2e_sae_plugin.hub.card.entry import CardEntry
from e2e_sae_plugin.hub.card.sections import objectives
from e2e_sae_plugin.kernels import kl_top_k
from e2e_sae_plugin.kernels.head import LinearHead
from e2e_sae_plugin.kernels.kl import fused_kl_sum
from e2e_sae_plugin.kernels.kl_top_k import top_k_kl_sum
from e2e_sae_plugin.spliced_losses import check_kl_top_k, draw_positions, position_draws

N, D, V = 9, 5, 23


def head(bias: bool = True, transposed: bool = False, dtype: torch.dtype = torch.float64) -> LinearHead:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(*((D, V) if transposed else (V, D)), generator=generator, dtype=torch.float64).to(dtype)
    values = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype)
    return LinearHead(weight.T if transposed else weight, values if bias else None)


def hidden_states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    clean = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return clean.to(dtype), (clean + 0.7 * torch.randn(N, D, generator=generator, dtype=torch.float64)).to(dtype)


def naive_top_k_kl_sum(clean: Tensor, spliced: Tensor, unembedding: LinearHead, k: int) -> Tensor:
    clean_logits, logits = unembedding(clean), unembedding(spliced)
    indices = clean_logits.topk(k, dim=1).indices
    log_p, log_q = clean_logits.gather(1, indices).log_softmax(1), logits.gather(1, indices).log_softmax(1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")


@pytest.fixture(params=[True, False], ids=["in pieces", "at once"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Chunks of 4 tokens, whose rows are gathered two tokens at a time; or everything at once."""
    if request.param:
        monkeypatch.setattr(kl_top_k, "chunk_tokens", lambda _: 4)
        monkeypatch.setattr(kl_top_k, "even_chunk", lambda n, most: min(n, most))
        monkeypatch.setattr(kl_top_k, "GATHERED_ELEMENTS", 2 * 6 * D)
    return request.param


# The KL over the likeliest tokens.


def test_top_k_kl_by_hand():
    """Probabilities 1/2, 1/3, 1/6 and 1/4, 1/2, 1/4. Over the first two: p = 3/5, 2/5 and p_hat = 1/3, 2/3."""
    clean = torch.tensor([[1 / 2, 1 / 3, 1 / 6]], dtype=torch.float64).log()
    spliced = torch.tensor([[1 / 4, 1 / 2, 1 / 4]], dtype=torch.float64).log().requires_grad_()
    value = top_k_kl_sum(clean, spliced, LinearHead(torch.eye(3, dtype=torch.float64)), 2)
    value.backward()
    assert float(value.detach()) == pytest.approx(3 / 5 * math.log(9 / 5) + 2 / 5 * math.log(3 / 5), rel=1e-6)
    assert spliced.grad is not None
    torch.testing.assert_close(spliced.grad, torch.tensor([[1 / 3 - 3 / 5, 2 / 3 - 2 / 5, 0]], dtype=torch.float64))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("k", [1, 2, 6, V])
def test_top_k_kl_equals_plain_code(bias: bool, transposed: bool, k: int, pieces: bool):
    unembedding, (clean, spliced) = head(bias, transposed), hidden_states()
    ours, theirs = spliced.clone().requires_grad_(), spliced.clone().requires_grad_()
    value = top_k_kl_sum(clean, ours, unembedding, k)
    expected = naive_top_k_kl_sum(clean, theirs, unembedding, k)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


def test_over_the_whole_vocabulary_it_is_the_exact_kl():
    unembedding, (clean, spliced) = head(), hidden_states()
    results: list[tuple[Tensor, Tensor]] = []
    for k in (None, V, V - 1):
        leaf = spliced.clone().requires_grad_()
        value = fused_kl_sum(clean, leaf, unembedding, V) if k is None else top_k_kl_sum(clean, leaf, unembedding, k)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    exact, whole, nearly = results
    torch.testing.assert_close(whole, exact, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(nearly[1], exact[1])


def test_top_k_kl_without_a_gradient_and_without_tokens():
    unembedding, (clean, spliced) = head(), hidden_states()
    leaf = spliced.clone().requires_grad_()
    with torch.no_grad():
        value = top_k_kl_sum(clean, leaf, unembedding, 6)
    torch.testing.assert_close(value, top_k_kl_sum(clean, leaf, unembedding, 6).detach())
    empty = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    value = top_k_kl_sum(clean[:0], empty, unembedding, 6)
    assert float(value.detach()) == 0
    assert torch.autograd.grad(value, empty)[0].shape == (0, D)
    assert float(top_k_kl_sum(clean, clean, unembedding, 6)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_top_k_kl_in_bfloat16_is_near_the_exact_one_and_sums_in_fp32(autocast: bool):
    clean, spliced = hidden_states(torch.float32 if autocast else torch.bfloat16)
    unembedding = head(dtype=clean.dtype)
    leaf = spliced.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = top_k_kl_sum(clean, leaf, unembedding, V)  # at k < V another rounding may choose another token
    (gradient,) = torch.autograd.grad(value, leaf)
    exact_leaf = spliced.float().requires_grad_()
    exact = top_k_kl_sum(clean.float(), exact_leaf, head(dtype=torch.float32), V)
    assert (value.dtype, gradient.dtype) == (torch.float32, leaf.dtype)
    torch.testing.assert_close(value, exact.detach(), rtol=0.03, atol=0.03)
    assert not torch.equal(value, exact.detach())
    torch.testing.assert_close(gradient.float(), torch.autograd.grad(exact, exact_leaf)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("k", [0, -1, V + 1])
def test_the_kernel_refuses_a_k_out_of_range(k: int):
    clean, spliced = hidden_states()
    with pytest.raises(ValueError, match=f"k must be from 1 to the vocabulary of 23 tokens, got {k}"):
        top_k_kl_sum(clean, spliced, head(), k)


# The positions.


def test_positions_are_drawn_without_replacement_in_order_and_at_least_one():
    draws = position_draws(0, 0)
    for share, n in ((0.25, 8), (0.5, 16), (0.01, 1)):
        drawn = draw_positions(32, share, draws)
        assert drawn is not None
        assert len(drawn) == n
        assert (drawn.diff() > 0).all()
        assert 0 <= int(drawn.min()) <= int(drawn.max()) < 32
    assert draw_positions(32, 0.99, draws) is None  # 32 of 32
    assert draw_positions(1, 0.01, draws) is None
    assert draw_positions(0, 0.5, draws) is None


def test_every_position_is_drawn_equally_often_anew_at_each_step():
    drawn = [draw_positions(8, 0.25, position_draws(-1, step)) for step in range(2000)]
    counts = torch.stack([each for each in drawn if each is not None]).flatten().bincount(minlength=8)
    assert int(counts.sum()) == 4000
    assert (counts - 500).abs().max() < 100  # 5 standard deviations
    again = draw_positions(8, 0.25, position_draws(-1, 7))
    assert torch.equal(again, drawn[7])  # pyright: ignore[reportArgumentType]
    assert len({tuple(each.tolist()) for each in drawn[:50] if each is not None}) > 10


def step_gradients(objective: Objective, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    trainer = build_trainer(
        runner_config("topk", objective=objective, max_grad_norm=None, **settings), shared_model("hooked_transformer")
    )
    trainer._update = lambda: None  # the gradients stay
    output = trainer.step(token_batch(4))
    gradients = {name: p.grad.clone() for name, p in trainer.sae.named_parameters() if p.grad is not None}
    return gradients, {name: float(value) for name, value in output.losses.items()}


def test_the_mean_over_all_subsets_is_the_exact_kl_and_gradient(monkeypatch: pytest.MonkeyPatch):
    """Two of six trained tokens of one micro-batch: 15 subsets, each as likely."""
    objective, mask = Objective(kl_positions=1 / 3, kl=0.7), slice(1, 4)
    settings: dict[str, Any] = {
        "context_size": 8, "seqpos_slice": (mask.start, mask.stop), "train_batch_size_tokens": 6,
        "store_batch_size_prompts": 2, "training_tokens": 60,
    }  # fmt: skip

    def gradients_of(which: Objective) -> tuple[Tensor, Tensor]:
        config = runner_config("topk", objective=which, max_grad_norm=None, **settings)
        trainer = build_trainer(config, shared_model("hooked_transformer"), training_sae(config))
        trainer._update = lambda: None
        output = trainer.step(token_batch(2))
        assert trainer.sae.W_dec.grad is not None
        return torch.as_tensor(output.losses["kl_loss"]), trainer.sae.W_dec.grad.clone()

    exact = gradients_of(Objective(kl=0.7))
    results: list[tuple[Tensor, Tensor]] = []
    for subset in itertools.combinations(range(6), 2):
        drawn = torch.tensor(subset)
        monkeypatch.setattr(spliced_losses, "draw_positions", lambda *_, drawn=drawn: drawn)
        results.append(gradients_of(objective))
    assert len(results) == 15
    assert len({round(float(value), 5) for value, _ in results}) == 15
    torch.testing.assert_close(torch.stack([value for value, _ in results]).mean(), exact[0])
    torch.testing.assert_close(torch.stack([g for _, g in results]).mean(0), exact[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_many_steps_draws_average_to_the_exact_kl(architecture: str):
    """As drawn, through two micro-batches: with TopK the SAE runs on each by itself, with BatchTopK on both at once."""

    def losses(objective: Objective, n_steps: int) -> Tensor:
        config = runner_config(architecture, objective=objective, max_grad_norm=None, store_batch_size_prompts=2)
        trainer = build_trainer(config, shared_model("hooked_transformer"))
        trainer._update = lambda: None
        trainer._advance_schedules = lambda: None
        values: list[float] = []
        for step in range(n_steps):
            trainer.n_training_steps = step
            values.append(float(trainer.step(token_batch(4)).losses["kl_loss"]))
        return torch.tensor(values)

    exact, drawn = losses(Objective(), 1), losses(Objective(kl_positions=0.5), 60)
    assert float(drawn.std()) > 0
    assert float((drawn.mean() - exact).abs()) < 4 * float(drawn.std()) / 60**0.5


def test_micro_batches_of_a_step_draw_different_positions(monkeypatch: pytest.MonkeyPatch):
    drawn: list[list[int]] = []

    def recorded(*args: Any) -> Tensor | None:
        positions = draw_positions(*args)
        drawn.append([] if positions is None else positions.tolist())
        return positions

    monkeypatch.setattr(spliced_losses, "draw_positions", recorded)
    step_gradients(Objective(kl_positions=0.5), store_batch_size_prompts=2)
    assert [len(each) for each in drawn] == [8, 8]
    assert drawn[0] != drawn[1]


def test_all_matryoshka_levels_are_compared_at_the_same_positions(monkeypatch: pytest.MonkeyPatch):
    seen: list[list[int]] = []
    exact = spliced_losses.kl_sum

    def recorded(*args: Any, positions: Tensor, **kwargs: Any) -> Tensor:
        seen.append(positions.tolist())
        return exact(*args, positions=positions, **kwargs)

    monkeypatch.setattr(spliced_losses, "kl_sum", recorded)
    config = runner_config("matryoshka_batchtopk", objective=Objective(kl_positions=0.5))
    build_trainer(config, shared_model("hooked_transformer")).step(token_batch(4))
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]


def test_the_whole_share_is_the_exact_path_to_the_bit(monkeypatch: pytest.MonkeyPatch):
    def never(*args: Any) -> None:
        raise AssertionError("positions were drawn")

    monkeypatch.setattr(spliced_losses, "draw_positions", never)
    exact, share = step_gradients(Objective()), step_gradients(Objective(kl_positions=1))
    assert exact[1] == share[1]
    assert exact[0].keys() == share[0].keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert all(torch.equal(exact[0][name], share[0][name]) for name in exact[0])


def test_the_whole_vocabulary_is_the_exact_step():
    exact, approximate, coarse = (step_gradients(Objective(kl_top_k=k)) for k in (None, 64, 4))
    assert approximate[1] == pytest.approx(exact[1], rel=1e-4)
    for name, gradient in exact[0].items():
        torch.testing.assert_close(approximate[0][name], gradient, rtol=1e-3, atol=1e-5)
    assert coarse[1]["kl_loss"] < 0.9 * exact[1]["kl_loss"]


def test_a_balanced_kl_weighs_as_much_as_the_squared_error_of_all_positions():
    config = runner_config("topk", objective=Objective.finetune(kl_positions=0.5, kl_top_k=8), local_first=0.0)
    trainer = build_trainer(config, shared_model("hooked_transformer"))
    losses = {name: torch.as_tensor(value) for name, value in trainer.step(token_batch(4)).losses.items()}
    assert trainer.kl_scale is not None
    torch.testing.assert_close(trainer.kl_scale * losses["kl_loss"], losses["mse_loss"])


def test_a_resumed_run_draws_what_the_run_would_have_drawn(tmp_path: Any):
    def run(name: str, **settings: Any) -> dict[str, Tensor]:
        config = runner_config(
            "matryoshka_batchtopk", output_path=str(tmp_path / name), checkpoint_path=str(tmp_path / "checkpoints"),
            checkpoint_every_minutes=1e-9, keep_checkpoints=100, training_tokens=32 * 5, lr=1e-2,
            store_batch_size_prompts=2,
            objective=Objective(kl_positions=0.25, kl_top_k=8, matryoshka_levels="sampled"), **settings,
        )  # fmt: skip
        model = tiny_hooked_transformer()
        runner = E2ESAETrainingRunner(config, override_dataset=token_dataset(), override_model=model)
        sae = runner.run()
        return parameters_of(sae)

    whole = run("whole")
    checkpoint = next((tmp_path / "checkpoints").glob("**/64"))
    resumed = run("resumed", resume_from_checkpoint=str(checkpoint))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# What is refused, and what is said.


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kl_positions": 0}, "kl_positions must be a share .* got 0"),
        ({"kl_positions": -0.5}, "kl_positions must be a share"),
        ({"kl_positions": 1.5}, "kl_positions must be a share"),
        ({"kl_positions": float("nan")}, "kl_positions must be a share .* got nan"),
        ({"kl_positions": float("inf")}, "kl_positions must be a share"),
        ({"kl_positions": True}, "kl_positions must be a number, got True"),
        ({"kl_positions": "half"}, "kl_positions must be a number, got 'half'"),
        ({"kl_top_k": 1}, "kl_top_k must be a whole number .* got 1"),
        ({"kl_top_k": 0}, "kl_top_k must be a whole number"),
        ({"kl_top_k": 64.5}, "kl_top_k must be a whole number .* got 64.5"),
        ({"kl_top_k": True}, "kl_top_k must be a whole number .* got True"),
        ({"kl": 0, "mse": 1, "kl_positions": 0.5}, "kl_positions is set to 0.5 but kl is 0"),
        ({"kl": 0, "mse": 1, "kl_top_k": 8}, "kl_top_k is set to 8 but kl is 0"),
    ],
    ids=str,
)
def test_what_is_out_of_range_or_without_effect_is_refused(settings: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=f"Objective.{match}"):
        Objective(**settings)


def test_approximations_survive_the_way_through_a_file_and_are_off_by_default():
    objective = Objective.e2e_downstream(0.1, kl_positions=0.25, kl_top_k=64)
    assert Objective.from_dict(objective.to_dict()) == objective
    older = {key: value for key, value in Objective().to_dict().items() if not key.startswith("kl_")}
    assert Objective.from_dict(older) == Objective()
    assert (Objective().kl_positions, Objective().kl_top_k, Objective().approximations) == (1.0, None, ())


def test_the_card_states_them():
    metadata = {"hook_name": "blocks.1.hook_resid_pre", "model_name": "tiny", "training_architecture": "topk"}
    texts: list[str] = []
    for objective in (Objective(), Objective(kl_positions=0.25, kl_top_k=64)):
        cfg = {"architecture": "topk", "d_in": 16, "d_sae": 32, "k": 4}
        cfg["metadata"] = {**metadata, "objective": objective.to_dict()}
        texts.append(objectives([CardEntry("sae", cfg)]))
    assert "pproximated" not in texts[0]
    assert "Approximated in training: KL on 25 % of the positions, drawn at each step." in texts[1]
    assert "Approximated in training: KL over the clean model's 64 likeliest tokens" in texts[1]


def test_a_head_that_is_no_product_is_refused_before_training_but_for_the_positions():
    def runner(objective: Objective, bends_its_logits: bool) -> E2ESAETrainingRunner:
        config = runner_config(objective=objective, model_class_name="AutoModelForCausalLM", hook_name="model.layers.0")
        transformer = tiny_gemma2_model()
        if bends_its_logits:
            transformer.lm_head.register_forward_hook(lambda _, __, output: 2 * output.sin())
        return E2ESAETrainingRunner(config, override_dataset=token_dataset(), override_model=proxy(transformer))

    with pytest.raises(
        ValueError, match=r"objective.kl_top_k=8 needs logits that are products .* this model's are not"
    ):
        runner(Objective(kl_top_k=8), bends_its_logits=True).run()
    runner(Objective(kl_positions=0.5), bends_its_logits=True).run()
    runner(Objective(kl_top_k=8), bends_its_logits=False).run()  # a soft cap is no hindrance


def test_more_tokens_than_the_vocabulary_are_refused():
    spliced = splice_into(shared_model("hooked_transformer"), "blocks.1.hook_resid_pre", needs_downstream=False)
    spliced.check()
    assert check_kl_top_k(spliced, 64) is spliced.unembed
    with pytest.raises(ValueError, match="kl_top_k=65 is more than the model's vocabulary of 64 tokens"):
        check_kl_top_k(spliced, 65)
