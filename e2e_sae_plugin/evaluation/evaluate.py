"""`evaluate`: everything that the paper measures of an SAE, on as many tokens as there are, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import SAE, TrainingSAE
from torch import Tensor
from tqdm.auto import tqdm

from e2e_sae_plugin.checkpoint.finished import exported
from e2e_sae_plugin.evaluation.metrics import Reconstruct, reconstruct_with
from e2e_sae_plugin.evaluation.place import (
    Place,
    SpecialTokens,
    check_recorded_model,
    common_place,
    model_name_of,
    splice_at,
)
from e2e_sae_plugin.evaluation.result import Evaluation, weights_sha256
from e2e_sae_plugin.evaluation.running import ESTIMATED_NORMALISATIONS, RunningMeans, SAESums, layer_norm
from e2e_sae_plugin.evaluation.sums import SequenceSums, check_confidence
from e2e_sae_plugin.evaluation.tokens import MeasuredTokens
from e2e_sae_plugin.kernels.kl import chunk_tokens
from e2e_sae_plugin.splice import SplicedModel
from e2e_sae_plugin.splice.activations import select_tokens
from e2e_sae_plugin.spliced_losses import MicroBatch, clean_micro_batch, sequence_of, splice
from e2e_sae_plugin.torch_state import own_torch_state

TOKEN_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NO_TARGET = -100  # nll_loss's "ignore": the last position predicts nothing


def evaluate(sae: SAE[Any], model: Any, tokens: Tensor, **settings: Any) -> Evaluation:
    """Measure one SAE; see `evaluate_many`, which takes the same settings.

    ```python
    print(evaluate(sae, model, tokens))
    ```
    """
    name = settings.pop("name", "sae")
    return evaluate_many({name: sae}, model, tokens, **settings)[name]


@own_torch_state()
@torch.no_grad()
def evaluate_many(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Tensor,
    *,
    hook_name: str | None = None,
    text: str | None = None,
    source: MeasuredTokens | None = None,
    exclude_special_tokens: SpecialTokens = None,
    seqpos_slice: Sequence[int | None] | None = None,
    batch_size_prompts: int = 8,
    ablations: bool = True,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Evaluation]:
    """Measure SAEs of one hook on the same tokens, with one clean pass per batch for all of them.

    The data is read twice: the means of the activations come first, which mean ablation and explained variance need.
    Memory: one batch's activations, a chunk of logits, and a few numbers per sequence, whatever the number of tokens.

    A training SAE is measured as the inference SAE that SAELens exports of it. For BatchTopK and Matryoshka, whose training
    form picks features across a batch, that is the JumpReLU SAE of its running threshold (made here, in memory).

    Args:
        saes: any SAEs of SAELens that read tokens one by one, in inference or training form, by the names that results
            will have. An inference SAE whose config says that an estimated `normalize_activations` is not folded into
            its weights is measured as SAELens runs it, without that scale, and its result says so.
        model: a `HookedTransformer`, a `TransformerBridge` or a `HookedProxyLM`.
        tokens: token ids `[n_prompts, pos]`. Use text that neither model nor SAE was trained on.
        hook_name: where to splice SAEs whose metadata name no hook, or another one than they name.
        text: what the tokens are of, such as the name of a dataset; results and model cards say it.
        source: where the tokens come from, as `evaluation_tokens` says; recorded with the results.
        exclude_special_tokens: which special tokens stay clean and are not measured: True for all, False for none, or ids.
            Default: as the SAEs' records say; all, if they say nothing and the model has a tokenizer.
        seqpos_slice: positions that are measured, for instance `(4, 128)`. Default: as the SAEs' records say.
        batch_size_prompts: sequences that go through the model at once.
        ablations: also run the model with the activations replaced by zeros and by their mean, for the CE loss recovered.
        n_resamples: of the bootstrap over sequences.
        confidence: of the intervals.
        seed: of the bootstrap.
        progress: show a bar.

    Raises:
        ValueError: no SAE, no tokens or ids that the model does not know; SAEs of different hooks, heads, positions or
            excluded tokens, which cannot be compared as if equal; a `d_in` that does not fit the hook; a transcoder or a
            temporal SAE; a training SAE whose estimated `normalize_activations` is not folded yet, as its scale is not
            known here.
    """
    if not isinstance(saes, Mapping):
        raise ValueError(f"saes must be a mapping of names to SAEs, got {type(saes).__name__}.")
    check_confidence(confidence)
    for setting, value in (("batch_size_prompts", batch_size_prompts), ("n_resamples", n_resamples)):
        if value < 1:
            raise ValueError(f"{setting} must be at least 1, got {value}.")
    place = common_place(
        saes, model, hook_name, exclude_special_tokens=exclude_special_tokens, seqpos_slice=seqpos_slice
    )
    measured = {name: measured_form(name, sae) for name, sae in saes.items()}
    spliced_model = splice_at(model, place, list(saes.values()), list(saes))
    check_tokens(tokens, spliced_model.vocabulary)
    pieces = tokens.split(batch_size_prompts)
    hidden: dict[str, Any] = {} if progress else {"disable": True}  # or TQDM_DISABLE would not be heard
    bar = tqdm(total=2 * len(tokens), unit="seq", desc="Evaluating", **hidden)
    means, n_predicted = RunningMeans(), 0
    for piece in pieces:
        micro = _clean(spliced_model, piece, place, hidden=False)
        if micro.n_tokens:
            means.add(_clean_by_hook(micro, spliced_model, place))
            n_predicted += int((_targets(micro) != NO_TARGET).sum())
        bar.update(len(piece))
    if not means.n_tokens:
        raise ValueError("There is no token to measure: every one is excluded or outside the SAEs' seqpos_slice.")
    if not n_predicted:
        raise ValueError("No measured token has a next token to predict: sequences need at least two tokens.")
    shape = tuple(spliced_model.check().shape[2:])
    reconstruct = {name: reconstruct_with(sae, shape) for name, sae in measured.items()}
    sums = {name: SAESums(sae.cfg.d_sae) for name, sae in saes.items()}
    shared = SequenceSums()
    for piece in pieces:
        micro = _clean(spliced_model, piece, place)
        if micro.n_tokens:
            _measure_batch(spliced_model, micro, place, reconstruct, means, sums, shared, ablations)
        bar.update(len(piece))
    bar.close()
    common = {"hook_name": place.hook_name, "shared": shared, "means": means, "ablations": ablations}
    common |= {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    found = {name: sums[name].result(name, sae, **common) for name, sae in saes.items()}
    source = source or MeasuredTokens(n_sequences=len(tokens), context_size=tokens.shape[1])
    return _recorded(found, saes, model, source.of(tokens, place), text)


def _recorded(
    found: Mapping[str, Evaluation], saes: Mapping[str, SAE[Any]], model: Any, tokens: MeasuredTokens, text: str | None
) -> dict[str, Evaluation]:
    """The results with what they are of: weights, model, tokens, text."""
    text = tokens.dataset if text is None else text
    results: dict[str, Evaluation] = {}
    for name, each in found.items():
        another_model = check_recorded_model(saes[name], model)
        results[name] = replace(
            each,
            weights_sha256=weights_sha256(saes[name]),
            text=text,
            model=model_name_of(model),
            measured_on=tokens,
            warnings=each.warnings if another_model is None else (*each.warnings, f"{name}: {another_model}"),
        )
    return results


def check_tokens(tokens: object, vocabulary: int) -> None:
    """Refuse what cannot be measured on.

    Raises:
        ValueError: not integers `[n_prompts, pos]`, none of them, or ids that the model does not know.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in TOKEN_DTYPES:
        kind = f"one of {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be a tensor of integer token ids, got {kind}.")
    if tokens.ndim != 2 or not tokens.numel():
        raise ValueError(
            f"tokens must be [n_prompts, pos] with at least one prompt, got shape {tuple(tokens.shape)}: there is nothing "
            "to measure on."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"tokens holds ids {low} to {high}, but the model knows 0 to {vocabulary - 1}. Was it made with another "
            "tokenizer?"
        )


def measured_form(name: str, sae: SAE[Any]) -> SAE[Any]:
    """The SAE itself, or what SAELens would export of it where a training form picks features across a batch.

    Raises:
        ValueError: a training SAE that expects activations of a scale that is not folded into its weights.
    """
    normalisation = sae.cfg.normalize_activations
    if isinstance(sae, TrainingSAE) and normalisation in ESTIMATED_NORMALISATIONS:
        raise ValueError(
            f"{name} is a training SAE of normalize_activations={normalisation!r} that is not folded into its weights, so "
            "it expects activations of a scale that only its trainer knows. Load its checkpoint with load_sae(folder), "
            "which folds the scale in, or call sae.fold_activation_norm_scaling_factor(factor)."
        )
    if not isinstance(sae, BatchTopKTrainingSAE):
        return sae
    return exported(sae)


def _clean(model: SplicedModel, tokens: Tensor, place: Place, *, hidden: bool = True) -> MicroBatch:
    return clean_micro_batch(
        model, tokens.long(), hidden=hidden, seqpos_slice=place.seqpos_slice, excluded=place.excluded_tensor()
    )


def _clean_by_hook(micro: MicroBatch, model: SplicedModel, place: Place) -> dict[str, Tensor]:
    """`[n_tokens, d]` in fp32 at the SAE's hook and at each later one."""
    later = {hook: _at(micro, micro.clean.downstream[hook]) for hook in model.downstream_hooks}
    return {place.hook_name: micro.sae_in(place.head_index).float(), **later}


def _at(micro: MicroBatch, activation: Tensor) -> Tensor:
    mask = None if micro.mask is None else micro.mask.to(activation.device)
    return select_tokens(activation, mask).float()


def _measure_batch(
    model: SplicedModel,
    micro: MicroBatch,
    place: Place,
    reconstruct: Mapping[str, Reconstruct],
    means: RunningMeans,
    sums: Mapping[str, SAESums],
    shared: SequenceSums,
    ablations: bool,
) -> None:
    sequence, n = sequence_of(micro), len(micro.tokens)
    clean = _clean_by_hook(micro, model, place)
    for hook, value in clean.items():
        for kind, x, mean in (("", value, means[hook]), ("layernorm_", layer_norm(value), means.normalised[hook])):
            shared.add(f"{kind}variance/{hook}", (x - mean).pow(2).sum(1), sequence, n)
    sae_in = micro.sae_in(place.head_index)
    changed: dict[str, Tensor] = {}
    ablated: dict[str, Tensor] = {}
    position = _positions(micro)
    for name, each in reconstruct.items():
        feature_acts, sae_out = each(sae_in)
        sums[name].add_features(feature_acts, sequence, n)
        sums[name].add_norms(sae_in, sae_out, position, sequence, n)
        spliced = splice(model, micro, sae_out, head_index=place.head_index, hidden=True)
        values = {hook: _at(micro, spliced.downstream[hook]) for hook in model.downstream_hooks}
        values = {place.hook_name: sae_out.to(sae_in.device).float(), **values}
        for hook, value in values.items():
            sums[name].add_layer(hook, clean[hook], value, means, sequence, n)
        assert spliced.hidden is not None
        changed[name] = spliced.hidden
    if ablations:
        mean = means[place.hook_name].to(sae_in)
        for name, value in (("zero", torch.zeros_like(sae_in)), ("mean", mean.expand_as(sae_in))):
            hidden = splice(model, micro, value, head_index=place.head_index, hidden=True).hidden
            assert hidden is not None
            ablated[name] = hidden
    _add_outputs(model, micro, changed, ablated, sums, shared, sequence)


def _positions(micro: MicroBatch) -> Tensor:
    """Position in its sequence of each measured token, `[n_tokens]`."""
    positions = torch.arange(micro.tokens.shape[1], device=micro.tokens.device).expand_as(micro.tokens)
    return positions.flatten() if micro.mask is None else positions[micro.mask.to(positions.device)]


def _targets(micro: MicroBatch) -> Tensor:
    """The token after each measured one, `[n_tokens]`, or `NO_TARGET`."""
    following = torch.full_like(micro.tokens, NO_TARGET)
    following[:, :-1] = micro.tokens[:, 1:]
    mask = None if micro.mask is None else micro.mask.to(following.device)
    return select_tokens(following[..., None], mask)[:, 0]


def _add_outputs(
    model: SplicedModel,
    micro: MicroBatch,
    changed: Mapping[str, Tensor],
    ablated: Mapping[str, Tensor],
    sums: Mapping[str, SAESums],
    shared: SequenceSums,
    sequence: Tensor,
) -> None:
    """What depends on the logits, a chunk of tokens at a time; the clean model's are computed once for all."""
    assert micro.clean.hidden is not None
    device, n = micro.clean.hidden.device, len(micro.tokens)
    mask = None if micro.mask is None else micro.mask.to(device)
    targets = _targets(micro).to(device)
    clean_hidden = select_tokens(micro.clean.hidden, mask)
    hidden = {name: select_tokens(value, mask) for name, value in changed.items()}
    hidden_ablated = {name: select_tokens(value, mask) for name, value in ablated.items()}
    terms: dict[str, dict[str, list[Tensor]]] = {name: {} for name in changed}
    shared_terms: dict[str, list[Tensor]] = {}
    size = chunk_tokens(model.vocabulary)
    for i in range(0, len(targets), size):
        target = targets[i : i + size]
        log_y = model.unembed(clean_hidden[i : i + size]).float().log_softmax(-1)
        y, best = log_y.exp(), log_y.argmax(-1)
        _put(shared_terms, "ce_clean", F.nll_loss(log_y, target, reduction="none"))
        for name, value in hidden_ablated.items():
            log_y_hat = model.unembed(value[i : i + size]).float().log_softmax(-1)
            _put(shared_terms, f"ce_{name}_ablation", F.nll_loss(log_y_hat, target, reduction="none"))
        for name, value in hidden.items():
            log_y_hat = model.unembed(value[i : i + size]).float().log_softmax(-1)
            _put(terms[name], "ce", F.nll_loss(log_y_hat, target, reduction="none"))
            _put(terms[name], "kl", (y * (log_y - log_y_hat)).sum(-1))
            _put(terms[name], "top1_agreement", log_y_hat.argmax(-1) == best)
            _put(terms[name], "statistical_distance", 0.5 * (y - log_y_hat.exp()).abs().sum(-1))
    shared.add("n_predicted", targets != NO_TARGET, sequence, n)
    shared.add("n_tokens", torch.ones_like(targets), sequence, n)
    for into, by_term in ((shared, shared_terms), *((sums[name].sums, terms[name]) for name in terms)):
        for term, parts in by_term.items():
            into.add(term, torch.cat(parts), sequence, n)


def _put(terms: dict[str, list[Tensor]], name: str, value: Tensor) -> None:
    terms.setdefault(name, []).append(value)
