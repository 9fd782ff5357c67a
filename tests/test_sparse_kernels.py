"""Sparse SAE arithmetic against dense formulas, and the SAEs that run on it against SAELens's own passes."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from helpers import sae_config
from rounding import assert_equal_sums
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor

from e2e_sae_plugin import kernels
from e2e_sae_plugin.kernels import relu_sae, sparse, sparse_sae, topk_sae
from e2e_sae_plugin.kernels.sparse import ActiveFeatures, FeatureOrder
from e2e_sae_plugin.kernels.sparse_sae import DeadFeatures, Encoder, SparseSAE

N, D, S = 50, 16, 128


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def from_dense(acts: Tensor) -> ActiveFeatures:
    tokens, features = acts.nonzero(as_tuple=True)
    return ActiveFeatures.of(acts[tokens, features], features, tokens, *acts.shape)


def sparse_acts(n_tokens: int = 7, n_features: int = 9) -> Tensor:
    """Float64 activations of both signs, with an empty row, an empty column, and a column that is always active."""
    acts = random(n_tokens, n_features, dtype=torch.float64)
    acts[acts.abs() < 0.7] = 0
    acts[2] = 0
    acts[:, 4] = 0
    acts[:, 5] = torch.arange(1.0, n_tokens + 1)
    return acts


# The primitives.


@pytest.mark.parametrize("acts", [sparse_acts(), torch.zeros(7, 9).double(), torch.ones(1, 9).double()])
def test_sparse_products_equal_the_dense_ones(acts: Tensor):
    active, n = from_dense(acts), len(acts)
    W_dec, d_out = random(9, 4, seed=1, dtype=torch.float64), random(n, 4, seed=2, dtype=torch.float64)
    torch.testing.assert_close(sparse.decode(active, W_dec), acts @ W_dec)
    expected = (d_out @ W_dec.T)[active.tokens, active.features]
    torch.testing.assert_close(sparse.value_gradient(active, W_dec, d_out), expected)
    by_feature = FeatureOrder.of(active.features, 9)
    sorted_entries = active.values[by_feature.order], active.tokens[by_feature.order], by_feature.offsets, d_out
    torch.testing.assert_close(sparse.weighted_sums(*sorted_entries), acts.T @ d_out)
    torch.testing.assert_close(sparse.column_sums(active.values, by_feature), acts.sum(0))
    transposed = sparse.weighted_sums_transposed(*sorted_entries)
    torch.testing.assert_close(transposed, d_out.T @ acts)
    assert transposed.is_contiguous()  # else autograd copies it
    torch.testing.assert_close(active.to_sparse().to_dense(), acts)
    torch.testing.assert_close(active.to_sparse(2 * active.values).to_dense(), 2 * acts)


@pytest.mark.parametrize("width", [1, 2, 4, 9, 100])
def test_the_transposed_sums_do_not_depend_on_how_many_are_written_at_a_time(
    width: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sparse, "TRANSPOSED_FEATURES", width)
    test_sparse_products_equal_the_dense_ones(sparse_acts())


def test_sparse_products_in_bf16_sum_in_more_precision():
    # 1 + 300 x 2^-9: one by one in bf16, each 2^-9 would be lost.
    acts = torch.full((1, 301), 2.0**-9, dtype=torch.bfloat16)
    acts[0, 0] = 1
    out = sparse.decode(from_dense(acts), torch.ones(301, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), torch.full((1, 4), 1 + 300 / 512), rtol=2**-7, atol=0)


def test_sparse_tensors_are_in_order_as_their_flag_says():
    tensor = from_dense(sparse_acts()).to_sparse()
    assert tensor.is_coalesced()
    again = torch.sparse_coo_tensor(tensor.indices(), tensor.values(), tensor.shape, check_invariants=True).coalesce()
    assert torch.equal(again.indices(), tensor.indices())
    assert torch.equal(again.values(), tensor.values())


def test_fired_counts_of_a_hand_worked_example():
    acts = torch.tensor([[0.0, 2.0, -1.0], [0.0, 3.0, 0.0]])
    for tensor in (acts, acts.to_sparse()):
        counts = sparse.fired_counts(tensor)
        assert counts.tolist() == [0, 2, 1]
        assert counts.dtype == torch.int32
    # Uncoalesced: 2 - 2 in one place, and a zero that is written out.
    explicit = torch.sparse_coo_tensor(
        torch.tensor([[0, 0, 1], [1, 1, 2]]), torch.tensor([2.0, -2.0, 0.0]), (2, 3), check_invariants=False
    )
    assert sparse.fired_counts(explicit).tolist() == [0, 0, 0]


def test_fired_counts_of_more_tokens_than_are_compared_at_a_time():
    acts = random(3 * sparse.COUNTED_TOKENS + 1, 5).relu()
    assert torch.equal(sparse.fired_counts(acts), (acts > 0).sum(0).int())
    assert sparse.fired_counts(acts[:0]).tolist() == [0] * 5


def test_activations_of_several_batches_are_joined_whether_sparse_or_not():
    acts = sparse_acts()
    for parts in ([acts, acts], [acts, acts.to_sparse()], [acts.to_sparse(), acts.to_sparse()]):
        joined = sparse.concatenate_acts(parts)
        assert joined.is_sparse == any(part.is_sparse for part in parts)
        torch.testing.assert_close(joined.to_dense() if joined.is_sparse else joined, torch.cat([acts, acts]))
        assert torch.equal(sparse.fired_counts(joined), 2 * (acts != 0).sum(0).int())


# Selections.


def encoder(d_sae: int = S, scale: bool = False, seed: int = 5) -> Encoder:
    factors = random(d_sae, seed=seed + 2).abs() if scale else None
    return Encoder(random(D, d_sae, seed=seed), random(d_sae, seed=seed + 1), factors)


def pre_activations(x: Tensor, enc: Encoder) -> Tensor:
    pre = x @ enc.W_enc + enc.b_enc
    return pre if enc.scale is None else pre * enc.scale


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens, the smallest."""
    monkeypatch.setattr(sparse_sae, "CHUNK_ELEMENTS", 1)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(("d_sae", "k"), [(1024, 3), (1024, 8), (1024, 1024), (129, 1), (129, 129), (S, 40)])
def test_select_topk_is_torchs(d_sae: int, k: int, scale: bool, monkeypatch: pytest.MonkeyPatch):
    small_chunks(monkeypatch)
    x, enc = random(150, D), encoder(d_sae, scale)
    active = sparse_sae.select_topk(x, enc, k)
    pre = pre_activations(x, enc)
    values, features = pre.topk(k)
    expected = torch.zeros_like(pre).scatter(1, features, values)
    torch.testing.assert_close(active.to_sparse().to_dense(), expected, rtol=1e-5, atol=1e-5)
    assert active.offsets.tolist() == list(range(0, 150 * k + 1, k))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("d_sae", [S, 129])
@pytest.mark.parametrize("n_active", [0, 1, 37, 400, 10_000, 150 * S])
def test_select_batch_topk_is_torchs(d_sae: int, n_active: int, scale: bool, monkeypatch: pytest.MonkeyPatch):
    small_chunks(monkeypatch)
    x, enc = random(150, D), encoder(d_sae, scale)
    x[:64] *= 0.1  # the first chunk's own largest are not the batch's
    active = sparse_sae.select_batch_topk(x, enc, n_active)
    flat = pre_activations(x, enc).relu().flatten()
    values, places = flat.topk(n_active)
    expected = torch.zeros_like(flat).scatter(0, places, values).reshape(150, d_sae)
    torch.testing.assert_close(active.to_sparse().to_dense(), expected, rtol=1e-5, atol=1e-5)
    assert len(active.values) == min(n_active, int((flat > 0).sum()))


def test_selections_among_ties_have_the_right_size_and_values(monkeypatch: pytest.MonkeyPatch):
    small_chunks(monkeypatch)
    x = torch.ones(130, D)
    enc = Encoder(torch.zeros(D, 1024), torch.ones(1024))
    batch = sparse_sae.select_batch_topk(x, enc, 400)
    rows = sparse_sae.select_topk(x, enc, 5)
    for active, count in ((batch, 400), (rows, 650)):
        assert active.values.tolist() == [1.0] * count
        assert len(set(zip(active.tokens.tolist(), active.features.tolist(), strict=True))) == count
    assert rows.to_sparse().to_dense().sum(1).tolist() == [5.0] * 130


@pytest.mark.parametrize("d_sae", [S, 129])
@pytest.mark.parametrize(("share", "few"), [(0.0, True), (0.02, True), (0.04, False), (1.0, False)])
def test_the_measured_density_decides_for_sparse_arithmetic(d_sae: int, share: float, few: bool):
    pre = torch.full((100, d_sae), -1.0)
    pre.view(-1)[: round(share * pre.numel())] = 2.0
    x, enc = torch.eye(100), Encoder(pre, torch.zeros(d_sae))
    selected = sparse_sae.select_positive(x, enc)
    if few:
        assert isinstance(selected, ActiveFeatures)
        torch.testing.assert_close(selected.to_sparse().to_dense(), pre.relu())
    else:
        assert isinstance(selected, Tensor)
        assert torch.equal(selected, pre)


def test_tokens_that_turn_out_dense_after_a_sparse_first_chunk_are_computed_densely(monkeypatch: pytest.MonkeyPatch):
    small_chunks(monkeypatch)
    pre = torch.full((200, S), -1.0)
    pre[64:] = 1.0
    selected = sparse_sae.select_positive(torch.eye(200), Encoder(pre, torch.zeros(S)))
    assert isinstance(selected, Tensor)
    assert selected.shape == (0, S)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_selected(bad: float):
    x, enc = random(70, D), encoder(1024)
    x[3, 0] = bad
    topk = sparse_sae.select_topk(x, enc, 3)
    batch = sparse_sae.select_batch_topk(x, enc, 210)
    positive = sparse_sae.select_positive(x, Encoder(enc.W_enc, enc.b_enc - 20))
    assert isinstance(positive, ActiveFeatures)
    for active in (topk, batch, positive):
        assert not active.values[active.tokens == 3].isfinite().any()
        assert (active.tokens == 3).any()
    assert isinstance(sparse_sae.select_positive(x * bad, enc), Tensor)  # not a list of every single entry


# The autograd function.


def test_sparse_sae_passes_the_numerical_gradient_check():
    shapes = ((4, 9), (9,), (9, 4), (4,))
    leaves = [random(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)]
    raw = random(7, 4, seed=9, dtype=torch.float64)
    chosen = sparse_acts() != 0
    dead = torch.tensor([1, 4, 6])

    def differentiable(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, kind: str) -> Any:
        with torch.no_grad():
            x = raw - b_dec
            pre = x @ W_enc + b_enc
            active = from_dense(pre.relu() * chosen)
            others: Any = None
            if kind == "sparse":
                others = from_dense(torch.zeros_like(pre).index_copy(1, dead, pre[:, dead]))
            elif kind == "dense":
                others = DeadFeatures(pre[:, dead], None, dead)
        out = SparseSAE.apply(W_enc, b_enc, W_dec, b_dec, x, active, others, True, kind == "l1")
        return tuple(tensor for tensor in out if tensor is not None)  # pyright: ignore[reportGeneralTypeIssues,reportOptionalIterable]

    for kind in ("l1", "sparse", "dense"):
        assert torch.autograd.gradcheck(functools.partial(differentiable, kind=kind), leaves)


def test_frozen_weights_get_no_gradient_and_cost_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sparse_sae, "weighted_sums", None)
    monkeypatch.setattr(sparse_sae, "weighted_sums_transposed", None)
    sae = tiny_sae("topk")
    sae.W_enc.requires_grad_(False)
    sae.W_dec.requires_grad_(False)
    topk_sae.training_forward_pass(sae, step_input()).loss.backward()
    assert sae.W_enc.grad is sae.W_dec.grad is None
    assert sae.b_enc.grad.abs().max() > 0


# SAELens's SAEs.


def tiny_sae(architecture: str, d_sae: int = S, **settings: Any) -> Any:
    """All parameters matter; a standard SAE has about one feature in 50 active."""
    settings = {"l1_coefficient": 0.1} | settings if architecture == "standard" else settings
    sae: Any = TrainingSAE.from_dict(sae_config(architecture, d_sae=d_sae, **settings).to_dict())
    with torch.no_grad():
        for i, parameter in enumerate(sae.parameters()):
            parameter.copy_(random(*parameter.shape, seed=i) * 0.5)
        if architecture == "standard":
            sae.b_enc -= 4.5
    return sae


def step_input(n_tokens: int = N, dead: list[int] | None = None, d_sae: int = S) -> TrainStepInput:
    mask = None
    if dead is not None:
        mask = torch.zeros(d_sae, dtype=torch.bool)
        mask[dead] = True
    return TrainStepInput(random(n_tokens, D, seed=2), {"l1": 0.7}, mask, 0, False)


def values_and_gradients(sae: Any, forward: Any, data: TrainStepInput, upstream: bool, own: bool) -> Any:
    """Gradients of `<probe, sae_out>` (what the spliced pass sends), of the SAE's own losses, or of both."""
    output = forward(data)
    total = torch.zeros(())
    if upstream:
        total = total + (output.sae_out * random(*output.sae_out.shape, seed=3)).sum()
    if own:
        for weight, value in zip((0.2, 1.3), output.losses.values(), strict=True):
            total = total + weight * value
    total.backward()
    return output, {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}


def assert_equal_to_host(sae: Any, data: TrainStepInput, upstream: bool = True, own: bool = True) -> TrainStepOutput:
    """Our output, once it and its gradients are the host's."""
    host_sae = copy.deepcopy(sae)
    ours, gradients = values_and_gradients(
        sae, lambda data: kernels.training_forward_pass(sae, data), data, upstream, own
    )
    host, expected = values_and_gradients(host_sae, host_sae.training_forward_pass, data, upstream, own)
    n_terms = D + sae.cfg.d_sae + len(data.sae_in)  # of a pre-activation, a reconstruction and a mean over the tokens
    for name in ("sae_in", "sae_out", "loss"):
        assert_equal_sums(getattr(ours, name), getattr(host, name), n_terms, name)
    acts = ours.feature_acts
    assert_equal_sums(acts.to_dense() if acts.is_sparse else acts, host.feature_acts, n_terms)
    assert not acts.requires_grad
    assert list(ours.losses) == list(host.losses)
    for name, value in host.losses.items():
        assert_equal_sums(ours.losses[name], value, n_terms, name)
    assert ours.metrics.keys() == host.metrics.keys()
    for name, value in expected.items():
        gradient = gradients.get(name, torch.zeros_like(value))
        assert_equal_sums(gradient, value, 2 * n_terms, name)
        assert gradient.stride() == sae.get_parameter(name).stride()
    assert gradients.keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    return ours


NORMALISATIONS = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"]


@pytest.mark.parametrize("normalize", NORMALISATIONS)
@pytest.mark.parametrize("b_dec_on_input", [False, True])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("standard", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("topk", {"rescale_acts_by_decoder_norm": False}),
        ("batchtopk", {"k": 3.7, "rescale_acts_by_decoder_norm": True}),
        ("batchtopk", {"k": 3.7, "rescale_acts_by_decoder_norm": False}),
    ],
)
def test_sparse_saes_equal_the_hosts_forward_and_backward(
    architecture: str, settings: dict[str, Any], b_dec_on_input: bool, normalize: str, monkeypatch: pytest.MonkeyPatch
):
    small_chunks(monkeypatch)
    options: dict[str, Any] = {"normalize_activations": normalize, "apply_b_dec_to_input": b_dec_on_input, **settings}
    for upstream, own in ((True, True), (True, False), (False, True)):
        sae = tiny_sae(architecture, **options)
        output = assert_equal_to_host(sae, step_input(150), upstream, own)
        assert output.feature_acts.is_sparse
        assert 0 < sparse.fired_counts(output.feature_acts).sum() < 150 * S


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("n_dead", [0, 1, 7, 8, 9, 40, S])
@pytest.mark.parametrize("sparse_dead", [False, True])
def test_the_auxiliary_loss_of_dead_features_is_the_hosts(
    architecture: str, n_dead: int, rescale: bool, sparse_dead: bool, monkeypatch: pytest.MonkeyPatch
):
    if sparse_dead:
        monkeypatch.setattr(sparse_sae, "SPARSE_DENSITY", 2.0)
    sae = tiny_sae(architecture, rescale_acts_by_decoder_norm=rescale, aux_loss_coefficient=0.7)
    dead = random(S).argsort()[:n_dead].tolist()
    output = assert_equal_to_host(sae, step_input(dead=dead))
    assert (output.losses["auxiliary_reconstruction_loss"] > 0) == (n_dead > 0)


def test_dead_features_cost_no_backward_where_their_loss_has_no_weight(monkeypatch: pytest.MonkeyPatch):
    sae = tiny_sae("topk")
    other = copy.deepcopy(sae)
    for each, dead in ((sae, [1, 2, 3]), (other, None)):
        topk_sae.training_forward_pass(each, step_input(dead=dead)).losses["mse_loss"].backward()
    for ours, plain in zip(sae.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, plain.grad)


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_dead_features_under_a_normalisation_that_the_host_refuses_are_refused(normalize: str):
    sae = tiny_sae("topk", normalize_activations=normalize)
    assert kernels.training_forward_pass(sae, step_input(dead=[])) is not None
    with pytest.raises(ValueError, match=f"dead features.*{normalize}.*Use 'none'"):
        topk_sae.training_forward_pass(sae, step_input(dead=[4]))


@pytest.mark.parametrize("n_tokens", [1, N])
@pytest.mark.parametrize(("architecture", "k"), [("topk", 1), ("topk", S), ("batchtopk", 0.01), ("batchtopk", S)])
def test_the_smallest_and_largest_numbers_of_tokens_and_active_features(architecture: str, k: float, n_tokens: int):
    assert_equal_to_host(tiny_sae(architecture, k=k), step_input(n_tokens))


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk"])
@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_features_that_are_never_and_always_active(architecture: str, bias: float):
    sae = tiny_sae(architecture)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
        sae.b_enc[[3, 77]] = bias
    output = assert_equal_to_host(sae, step_input())
    assert output.feature_acts.is_sparse
    assert sparse.fired_counts(output.feature_acts)[[3, 77]].tolist() == [N if bias > 0 else 0] * 2


def test_a_width_that_is_no_multiple_of_the_group():
    for architecture in ("standard", "topk", "batchtopk"):
        sae = tiny_sae(architecture, d_sae=129)
        assert assert_equal_to_host(sae, step_input(d_sae=129)).feature_acts.is_sparse


def test_relu_sparse_and_dense_are_the_same(monkeypatch: pytest.MonkeyPatch):
    results = []
    for density in (0.0, 1.0):
        monkeypatch.setattr(sparse_sae, "SPARSE_DENSITY", density)
        output = assert_equal_to_host(sae := tiny_sae("standard", apply_b_dec_to_input=True), step_input())
        results.append([p.grad for p in sae.parameters()])
        assert output.feature_acts.is_sparse == bool(density)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first_chunk_sparse", [False, True])
def test_the_dense_relu_sae_of_several_chunks(first_chunk_sparse: bool, monkeypatch: pytest.MonkeyPatch):
    small_chunks(monkeypatch)
    sae = tiny_sae("standard")
    with torch.no_grad():
        sae.b_enc += 4.5
    data = step_input(150)
    if first_chunk_sparse:
        with torch.no_grad():
            sae.b_enc -= 10
            sae.W_enc[0] = 1
            data.sae_in[:64, 0], data.sae_in[64:, 0] = -2, 14
    output = assert_equal_to_host(sae, data)
    assert not output.feature_acts.is_sparse


def test_the_relu_saes_zero_decoder_rows_have_no_gradient_from_the_l1():
    sae = tiny_sae("standard")
    with torch.no_grad():
        sae.b_enc[5] = 10.0
        sae.W_dec[5] = 0
    assert_equal_to_host(sae, step_input(), upstream=False)


def test_a_decoder_row_of_zero_length_does_not_spoil_the_others():
    sae = tiny_sae("topk", rescale_acts_by_decoder_norm=True)
    with torch.no_grad():
        sae.W_dec[5] = 0  # the host divides by its norm
    output = topk_sae.training_forward_pass(sae, step_input())
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())


def test_batch_topks_threshold_follows_the_host():
    sae = tiny_sae("batchtopk", k=3.0)
    other = copy.deepcopy(sae)
    for seed in range(3):
        data = TrainStepInput(random(N, D, seed=seed), {}, None, 0, False)
        ours = topk_sae.training_forward_pass(sae, data).metrics["topk_threshold"]
        host = other.training_forward_pass(data).metrics["topk_threshold"]
        torch.testing.assert_close(ours, host, rtol=1e-6, atol=0)
    assert sae.topk_threshold > 0


def test_a_step_that_is_not_finite_is_seen_in_the_loss():
    for architecture in ("standard", "topk", "batchtopk"):
        sae, data = tiny_sae(architecture), step_input()
        data.sae_in[7, 0] = float("nan")
        output = kernels.training_forward_pass(sae, data)
        assert output is not None
        assert output.loss.isnan()


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk"])
def test_sparse_saes_in_bf16_are_close_to_fp32(architecture: str):
    sae, data = tiny_sae(architecture), step_input(dead=[3, 4] if architecture != "standard" else None)
    exact = copy.deepcopy(sae)
    with torch.no_grad():
        for low, high in zip(sae.to(torch.bfloat16).parameters(), exact.parameters(), strict=True):
            high.copy_(low.float())
    data.sae_in = data.sae_in.bfloat16().float()
    outputs = [kernels.training_forward_pass(each, data) for each in (sae, exact)]
    for output in outputs:
        assert output is not None
        output.loss.backward()
    torch.testing.assert_close(outputs[0].loss.float(), outputs[1].loss, rtol=0.02, atol=0)  # pyright: ignore[reportOptionalMemberAccess]
    for low, high in zip(sae.parameters(), exact.parameters(), strict=True):
        assert low.grad.dtype == torch.bfloat16
        assert (low.grad.float() - high.grad).norm() < 0.2 * high.grad.norm()  # rounding changes who is selected


def test_kernels_leave_to_the_host_what_is_another_computation():
    def hooked(sae: Any) -> Any:
        sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts)  # noqa: ARG005
        return sae

    def compiled(sae: Any) -> Any:
        sae.training_forward_pass = functools.partial(sae.training_forward_pass)  # where compile_sae puts its own
        return sae

    def of_a_subclass(sae: Any) -> Any:
        sae.__class__ = type("Sub", (type(sae),), {})
        return sae

    for architecture in ("topk", "batchtopk", "standard"):
        assert kernels.training_forward_pass(tiny_sae(architecture), step_input()) is not None
        for change in (hooked, compiled, of_a_subclass):
            assert kernels.training_forward_pass(change(tiny_sae(architecture)), step_input()) is None
        three_dimensional = step_input()
        three_dimensional.sae_in = three_dimensional.sae_in[None]
        assert kernels.training_forward_pass(tiny_sae(architecture), three_dimensional) is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert kernels.training_forward_pass(tiny_sae(architecture), step_input()) is None
    for architecture in ("gated", "jumprelu", "abstopk", "matryoshka_batchtopk"):
        settings: dict[str, Any] = {"matryoshka_widths": [8, S]} if "matryoshka" in architecture else {}
        assert kernels.training_forward_pass(tiny_sae(architecture, **settings), step_input()) is None
    assert not relu_sae.can_train(tiny_sae("standard", lp_norm=2.0))
    for architecture in ("topk", "batchtopk"):  # the host raises
        assert not topk_sae.can_train(tiny_sae(architecture, k=S + 1))
