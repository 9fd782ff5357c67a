"""Loss terms and masks: hand-worked numbers, and the fused KL against naive code."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from e2e_sae_plugin.kernels import kl
from e2e_sae_plugin.kernels.kl import fused_kl_sum
from e2e_sae_plugin.losses import kl_per_token, squared_error_sum
from e2e_sae_plugin.splice.activations import insert_sae_out, select_sae_in, select_tokens, trained_tokens

D, V, N = 6, 11, 13


def unembeddings() -> dict[str, Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(D, V, generator=generator), torch.randn(V, generator=generator)
    return {
        "linear": lambda hidden: hidden @ weight,
        "biased": lambda hidden: hidden @ weight + bias,
        "soft_capped": lambda hidden: 2 * torch.tanh((hidden @ weight + bias) / 2),
    }


def hidden_states(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    clean = torch.randn(N, D, generator=generator)
    return clean.to(dtype), (clean + 0.7 * torch.randn(N, D, generator=generator)).to(dtype)


def naive_kl_sum(clean: Tensor, spliced: Tensor, unembed: Callable[[Tensor], Tensor]) -> Tensor:
    y, log_y_hat = unembed(clean).softmax(-1), unembed(spliced).log_softmax(-1)
    return (y * (y.log() - log_y_hat)).sum()


def test_kl_is_the_hand_worked_number_clean_model_first():
    # y = (1/2, 1/2), y_hat = (1/4, 3/4): D(y||y_hat) = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3).
    clean, spliced = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    torch.testing.assert_close(kl_per_token(clean, spliced), torch.tensor([0.5 * math.log(4 / 3)]))
    # The other way round: 1/4 ln(1/2) + 3/4 ln(3/2).
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    torch.testing.assert_close(kl_per_token(spliced, clean), torch.tensor([reverse]))
    assert abs(reverse - 0.5 * math.log(4 / 3)) > 0.01


def test_fused_kl_has_the_same_direction_and_hand_worked_number():
    # Three tokens, an identity unembedding: hidden states are logits.
    clean = torch.tensor([[0.0, 0.0]] * 3)
    spliced = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [math.log(3), 0.0]])
    fused = fused_kl_sum(clean, spliced, lambda hidden: hidden, 2)
    torch.testing.assert_close(fused, torch.tensor(math.log(4 / 3)))


def test_fused_kl_gradient_is_the_hand_worked_y_hat_minus_y():
    clean = torch.tensor([[0.0, 0.0]])
    spliced = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    fused_kl_sum(clean, spliced, lambda hidden: hidden, 2).backward()
    torch.testing.assert_close(spliced.grad, torch.tensor([[0.25 - 0.5, 0.75 - 0.5]]))


@pytest.mark.parametrize("head", ["linear", "biased", "soft_capped"])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, N, 1000])
def test_fused_kl_value_and_gradient_equal_naive_code(head: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kl, "CHUNK_LOGIT_ELEMENTS", chunk_tokens * V)
    seen: list[int] = []
    inner = unembeddings()[head]

    def unembed(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return inner(hidden)

    clean, spliced = hidden_states()
    fused_in = spliced.clone().requires_grad_()
    fused = fused_kl_sum(clean, fused_in, unembed, V)
    (3.0 * fused).backward()  # a factor, so that the gradient that comes in is used
    naive_in = spliced.clone().requires_grad_()
    naive = naive_kl_sum(clean, naive_in, inner)
    (3.0 * naive).backward()
    assert naive > 1
    torch.testing.assert_close(fused, naive)
    torch.testing.assert_close(fused_in.grad, naive_in.grad, rtol=1e-4, atol=1e-5)
    assert max(seen) == min(chunk_tokens, N)  # never more logits at once


def test_vocabulary_larger_than_a_chunk_still_runs_one_token_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kl, "CHUNK_LOGIT_ELEMENTS", 1)
    clean, spliced = hidden_states()
    unembed = unembeddings()["linear"]
    torch.testing.assert_close(fused_kl_sum(clean, spliced, unembed, V), naive_kl_sum(clean, spliced, unembed))


def test_fused_kl_without_gradient_has_the_same_value():
    clean, spliced = hidden_states()
    unembed = unembeddings()["biased"]
    with torch.no_grad():
        value = fused_kl_sum(clean, spliced, unembed, V)
    assert not value.requires_grad
    torch.testing.assert_close(value, fused_kl_sum(clean, spliced.requires_grad_(), unembed, V).detach())


def test_fused_kl_sends_no_gradient_to_the_clean_side_or_to_the_unembedding():
    clean, spliced = hidden_states()
    clean.requires_grad_()
    spliced.requires_grad_()
    weight = torch.randn(D, V, requires_grad=True)
    fused_kl_sum(clean, spliced, lambda hidden: hidden @ weight, V).backward()
    assert clean.grad is None
    assert weight.grad is None
    assert spliced.grad is not None
    assert spliced.grad.abs().max() > 0


def test_identical_hidden_states_have_no_kl_and_no_gradient():
    clean, _ = hidden_states()
    spliced = clean.clone().requires_grad_()
    value = fused_kl_sum(clean, spliced, unembeddings()["soft_capped"], V)
    value.backward()
    assert value.item() == 0.0
    assert spliced.grad is not None
    assert spliced.grad.abs().max() == 0
    assert kl_per_token(clean, clean).abs().max() == 0


def test_no_tokens_have_no_kl():
    empty = torch.zeros(0, D, requires_grad=True)
    value = fused_kl_sum(torch.zeros(0, D), empty, unembeddings()["linear"], V)
    value.backward()
    assert value.item() == 0.0
    assert empty.grad is not None
    assert empty.grad.shape == (0, D)


def test_bf16_hidden_states_are_summed_in_fp32():
    clean, spliced = hidden_states(torch.bfloat16)
    weight = torch.randn(D, V, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    # Many equal tokens: in bf16 the running sum would stop growing at 256 times a token's value.
    clean, spliced = clean[:1].repeat(2000, 1), spliced[:1].repeat(2000, 1).requires_grad_()
    value = fused_kl_sum(clean, spliced, lambda hidden: hidden @ weight, V)
    one = kl_per_token((clean[:1] @ weight), (spliced[:1] @ weight).detach())
    assert value.dtype == torch.float32
    assert one.dtype == torch.float32
    torch.testing.assert_close(value, 2000 * one[0], rtol=1e-5, atol=0)
    value.backward()
    assert spliced.grad is not None
    assert spliced.grad.dtype == torch.bfloat16
    reference = spliced[:1].detach().clone().requires_grad_()
    log_y = (clean[:1] @ weight).float().log_softmax(-1)
    F.kl_div((reference @ weight).float().log_softmax(-1), log_y, log_target=True, reduction="sum").backward()
    torch.testing.assert_close(spliced.grad[:1], reference.grad, rtol=2e-2, atol=1e-2)


def test_squared_error_is_the_hand_worked_sum_and_its_gradient_goes_one_way():
    spliced = torch.tensor([[1.0, 2.0], [0.0, -1.0]], requires_grad=True)
    clean = torch.tensor([[0.0, 4.0], [0.0, 2.0]], requires_grad=True)
    value = squared_error_sum(spliced, clean)
    assert value.item() == 1 + 4 + 0 + 9
    value.backward()
    torch.testing.assert_close(spliced.grad, torch.tensor([[2.0, -4.0], [0.0, -6.0]]))
    assert clean.grad is None


def test_squared_error_of_bf16_activations_is_summed_in_fp32():
    spliced = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    value = squared_error_sum(spliced, torch.zeros_like(spliced))
    assert value.dtype == torch.float32
    assert value.item() == 4096  # bf16 would stop at 256


def test_every_token_is_trained_on_unless_something_excludes_it():
    tokens = torch.tensor([[5, 1, 7, 1], [2, 3, 1, 4]])
    assert trained_tokens(tokens) is None
    assert trained_tokens(tokens, (0, None)) is None
    assert trained_tokens(tokens, (None, None, 1)) is None


def test_mask_of_positions_and_excluded_tokens_is_the_hand_worked_one():
    tokens = torch.tensor([[5, 1, 7, 1], [2, 3, 1, 4]])
    yes, no = True, False
    assert trained_tokens(tokens, (1, -1)).tolist() == [[no, yes, yes, no], [no, yes, yes, no]]  # pyright: ignore[reportOptionalMemberAccess]
    assert trained_tokens(tokens, (None, None, 2)).tolist() == [[yes, no, yes, no]] * 2  # pyright: ignore[reportOptionalMemberAccess]
    without = trained_tokens(tokens, (None,), torch.tensor([1, 2]))
    assert without is not None
    assert without.tolist() == [[yes, no, yes, no], [no, yes, no, yes]]
    both = trained_tokens(tokens, (1, None), torch.tensor([1, 2]))
    assert both is not None
    assert both.tolist() == [[no, no, yes, no], [no, yes, no, yes]]


def test_select_takes_the_masked_tokens_in_order_and_flattens_heads():
    activation = torch.arange(24.0).reshape(2, 3, 2, 2)  # [batch, pos, head, d_head]
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert select_tokens(activation, mask).tolist() == [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]]
    assert select_tokens(activation, None).tolist() == activation.reshape(6, 4).tolist()
    assert select_sae_in(activation, mask, 1).tolist() == [[2, 3], [10, 11], [18, 19]]
    assert select_sae_in(activation, mask, None).tolist() == select_tokens(activation, mask).tolist()


def test_insert_replaces_the_masked_tokens_and_leaves_the_rest_clean():
    activation = torch.arange(2 * 3 * 2).reshape(2, 3, 2).float()
    mask = torch.tensor([[True, False, True], [False, True, False]])
    sae_out = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]], requires_grad=True)
    inserted = insert_sae_out(activation, sae_out, mask, None)
    assert inserted.tolist() == [[[-1, -2], [2, 3], [-3, -4]], [[6, 7], [-5, -6], [10, 11]]]
    assert activation.tolist() == torch.arange(12).reshape(2, 3, 2).tolist()  # not in place
    (inserted * torch.arange(12.0).reshape(2, 3, 2)).sum().backward()
    assert sae_out.grad is not None
    assert sae_out.grad.tolist() == [[0, 1], [4, 5], [8, 9]]


def test_insert_without_a_mask_replaces_everything_and_restores_heads():
    activation = torch.zeros(2, 3, 2, 2)
    sae_out = torch.arange(24.0).reshape(6, 4)
    assert insert_sae_out(activation, sae_out, None, None).tolist() == sae_out.reshape(2, 3, 2, 2).tolist()


@pytest.mark.parametrize("head", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_insert_into_one_head_leaves_the_other_heads_clean(head: int, masked: bool):
    activation = torch.randn(2, 3, 3, 2)
    mask = torch.tensor([[True, False, True], [False, True, False]]) if masked else None
    sae_out = torch.randn(3 if masked else 6, 2, requires_grad=True)
    inserted = insert_sae_out(activation, sae_out, mask, head)
    others = [h for h in range(3) if h != head]
    assert torch.equal(inserted[:, :, others], activation[:, :, others])
    chosen = torch.ones(2, 3, dtype=torch.bool) if mask is None else mask
    assert torch.equal(inserted[:, :, head][chosen], sae_out)
    assert torch.equal(inserted[:, :, head][~chosen], activation[:, :, head][~chosen])
    inserted.sum().backward()
    assert torch.equal(sae_out.grad, torch.ones_like(sae_out))  # pyright: ignore[reportArgumentType]


def test_what_select_reads_and_insert_writes_is_the_same_place():
    activation = torch.randn(2, 5, 3, 2)
    mask = torch.rand(2, 5) > 0.5
    for head in (None, 0, 2):
        sae_in = select_sae_in(activation, mask, head)
        assert torch.equal(insert_sae_out(activation, sae_in, mask, head), activation)
