"""SAEs of models with centred weights are refused on models without, where numbers would be silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import (
    D_MODEL,
    N_LAYERS,
    proxy,
    runner_config,
    tiny_bridge,
    tiny_gpt2_model,
    tiny_hooked_transformer,
    tiny_tokenizer,
    training_sae,
)
from rounding import sum_bound
from sae_lens import SAE

from e2e_sae_plugin.evaluation import evaluate, feature_importance
from e2e_sae_plugin.evaluation.place import CENTRED_TOLERANCE, check_centred
from e2e_sae_plugin.finetune import FinetuneRunner, finetune_config
from e2e_sae_plugin.splice import splice_into

HOOK = "blocks.1.hook_resid_pre"
MESSAGE = r"from_pretrained_no_processing\('tiny', center_writing_weights=True\)"


def model_with(centred: bool, **settings: Any) -> Any:
    model = tiny_hooked_transformer(**settings)
    if centred:
        model.process_weights_(fold_ln=False, center_writing_weights=True, center_unembed=False)
    model.tokenizer = tiny_tokenizer()
    return model


def sae_with(tmp_path: Any, needs_centred: bool | None = True, hook: str = HOOK) -> SAE[Any]:
    training_sae(runner_config("topk")).save_inference_model(str(tmp_path / "sae"))
    sae = SAE.load_from_disk(tmp_path / "sae")
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "tiny", hook
    if needs_centred is not None:
        sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": needs_centred}
    return sae


TOKENS = torch.arange(32).reshape(4, 8)


def test_centring_is_all_that_differs():
    """The two models compute the same, which is why nothing else would notice."""
    raw, centred = model_with(False), model_with(True)
    logits, same, values = raw(TOKENS), centred(TOKENS), {}
    torch.testing.assert_close(logits, same, rtol=1e-3, atol=1e-3)
    for name, model in (("raw", raw), ("centred", centred)):
        values[name] = model.run_with_cache(TOKENS, names_filter=HOOK)[1][HOOK]
    error = sum_bound(N_LAYERS * D_MODEL, float(values["raw"].abs().max()))
    torch.testing.assert_close(
        values["raw"] - values["raw"].mean(-1, keepdim=True), values["centred"], rtol=0, atol=error
    )
    assert values["raw"].mean(-1).abs().min() > CENTRED_TOLERANCE


@pytest.mark.parametrize("needs", [True, False, None])
@pytest.mark.parametrize("is_centred", [True, False])
def test_evaluation_refuses_a_model_that_is_not_centred(needs: bool | None, is_centred: bool, tmp_path: Any):
    sae, model = sae_with(tmp_path, needs), model_with(is_centred)
    if needs and not is_centred:
        with pytest.raises(ValueError, match=MESSAGE):
            evaluate(sae, model, TOKENS, n_resamples=2, name="mine")
        with pytest.raises(ValueError, match=MESSAGE):
            feature_importance(sae, model, TOKENS)
    else:
        evaluate(sae, model, TOKENS, n_resamples=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_mean(dtype: torch.dtype, tmp_path: Any):
    model = model_with(True, d_model=64, d_head=32).to(dtype)
    spliced = splice_into(model, HOOK)
    _, cached = model.run_with_cache(TOKENS, names_filter=HOOK)
    check_centred(sae_with(tmp_path), spliced, cached[HOOK])


def test_hooks_that_centring_does_not_touch_are_not_looked_at(tmp_path: Any):
    model = model_with(False)
    hook = "blocks.1.ln1.hook_normalized"
    spliced = splice_into(model, HOOK)
    spliced.position = splice_into(model, "blocks.1.hook_attn_out").position
    check_centred(sae_with(tmp_path, hook=hook), spliced, torch.ones(1, 2, 16))
    with pytest.raises(ValueError, match=MESSAGE):
        check_centred(sae_with(tmp_path), spliced, torch.ones(1, 2, 16))


@pytest.mark.parametrize("family", ["hugging_face", "bridge"])
def test_models_of_other_families(family: str, tmp_path: Any):
    """GPT-2 as Hugging Face has it is not centred; a bridge can be."""
    sae = sae_with(tmp_path)
    if family == "hugging_face":
        with pytest.raises(ValueError, match=MESSAGE):
            evaluate(sae, proxy(tiny_gpt2_model()), TOKENS, n_resamples=2, hook_name="transformer.h.0")
        return
    bridge = tiny_bridge()
    with pytest.raises(ValueError, match=r"TransformerBridge by enable_compatibility_mode\(\)"):
        evaluate(sae, bridge, TOKENS, n_resamples=2)
    bridge.enable_compatibility_mode()
    evaluate(sae, bridge, TOKENS, n_resamples=2)


def test_a_model_that_cannot_be_centred_is_not_asked_to_be(tmp_path: Any):
    """Before an RMSNorm the mean counts, and TransformerLens leaves it where it is."""
    evaluate(sae_with(tmp_path), model_with(False, normalization_type="RMS"), TOKENS, n_resamples=2)


def test_the_worst_number_by_hand(tmp_path: Any):
    """Mean 1 and root mean square sqrt(2) on one token, nothing on the other: 0.35 of the size."""
    spliced = splice_into(model_with(False), HOOK)
    values = torch.tensor([[[2.0, 0.0, 2.0, 0.0], [1.0, -1.0, 1.0, -1.0]]])
    with pytest.raises(ValueError, match=r"'blocks\.1\.hook_resid_pre' is 0\.35 of their size"):
        check_centred(sae_with(tmp_path), spliced, values)
    check_centred(sae_with(tmp_path), spliced, torch.zeros(1, 2, 4))


@pytest.mark.parametrize("is_centred", [True, False])
def test_fine_tuning_refuses_it_too(is_centred: bool, tmp_path: Any):
    sae, model = sae_with(tmp_path), model_with(is_centred)
    data = Dataset.from_dict({"tokens": [list(range(8))] * 64})
    cfg = finetune_config(
        sae, dataset_path="unused", training_tokens=64, context_size=8, train_batch_size_tokens=16,
        store_batch_size_prompts=2, n_eval_batches=1, device="cpu", output_path=None,
    )  # fmt: skip
    settings: Any = {"override_model": model, "override_dataset": data}
    if is_centred:
        FinetuneRunner(cfg, sae, **settings)
        return
    with pytest.raises(ValueError, match=MESSAGE):
        FinetuneRunner(cfg, sae, **settings)
    FinetuneRunner(cfg, sae, force=True, **settings)
