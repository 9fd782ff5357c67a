"""Whole configs: the recipe to start with, and the paper's runs on GPT2-small.

Source of the paper's: Braun et al. 2024 (arXiv 2405.12241), tables 2 and 3 for which run and its sparsity coefficient,
section 3 and appendix for the optimizer; the authors' published configs (`scripts/train_tlens_saes` of their library) for
the rest.
"""

from __future__ import annotations

from typing import Any, Literal

from sae_lens import StandardTrainingSAEConfig, TopKTrainingSAEConfig

from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.config_values import plain, plain_as
from e2e_sae_plugin.objective import Objective

QUICK_LR, QUICK_D_SAE = 1e-2, 1024
"""The learning rate that `quick_config` was measured with, and the size of the dictionary that it belongs to."""

PaperKind = Literal["local", "e2e", "e2e+ds"]
PaperMatch = Literal["ce", "l0"]

GPT2_N_LAYERS, GPT2_D_MODEL = 12, 768

# lambda of tables 2 (similar CE loss increase) and 3 (similar L0).
PAPER_LAMBDA: dict[tuple[int, PaperKind, PaperMatch], float] = {
    (2, "local", "ce"): 0.8, (2, "e2e", "ce"): 0.5, (2, "e2e+ds", "ce"): 10,
    (2, "local", "l0"): 4, (2, "e2e", "l0"): 1.5, (2, "e2e+ds", "l0"): 35,
    (6, "local", "ce"): 4, (6, "e2e", "ce"): 3, (6, "e2e+ds", "ce"): 50,
    (6, "local", "l0"): 6, (6, "e2e", "l0"): 1.5, (6, "e2e+ds", "l0"): 50,
    (10, "local", "ce"): 6, (10, "e2e", "ce"): 1.5, (10, "e2e+ds", "ce"): 1.75,
    (10, "local", "l0"): 10, (10, "e2e", "l0"): 1.5, (10, "e2e+ds", "l0"): 1.75,
}  # fmt: skip
# The authors' total coefficient of the downstream terms, spread over all later layers.
PAPER_DOWNSTREAM_TOTAL = {2: 2.5, 6: 2.5, 10: 0.05}


def quick_config(
    hook_name: str,
    d_in: int,
    training_tokens: int,
    *,
    d_sae: int | None = None,
    k: int = 40,
    context_size: int = 128,
    step_sequences: int = 4,
    **overrides: Any,
) -> E2ESAERunnerConfig:
    """The recipe to start with: a good SAE in the shortest time (`docs/performance.md`, "Time to quality").

    A TopK SAE whose `b_dec` starts at the mean activation; the first 90 % of the tokens on the squared error, the rest on
    KL and squared error in equal parts (`Objective.finetune`); few tokens a step at a high rate, because in short runs the
    number of updates is what counts; a cosine to a hundredth. The rate was searched at 1,024 features and becomes smaller
    with the root of their number, as in Gao et al. 2024 (arXiv 2406.04093); it is the one number to search again elsewhere.

    Args:
        hook_name: where the SAE sits.
        d_in: dimensions of the activation there.
        training_tokens: of the whole run: at least ten steps, or no token is left for the end-to-end part.
        d_sae: features; None for 8 x `d_in`.
        k: active features per token.
        context_size: tokens of a sequence, all of which are trained on.
        step_sequences: sequences of one optimizer step, which go through the model at once.
        **overrides: fields of `E2ESAERunnerConfig`: `model_name` and `dataset_path` (SAELens's defaults are a model and a
            dataset of its own choice), or any of the above to change.

    Raises:
        ValueError: a size is no whole number or below 1, `d_sae` contradicts `sae`, or the config refuses a value.
    """
    d_in, training_tokens, k = _size("d_in", d_in), _size("training_tokens", training_tokens), _size("k", k)
    context_size, step_sequences = _size("context_size", context_size), _size("step_sequences", step_sequences)
    d_sae = None if d_sae is None else _size("d_sae", d_sae)
    sae = overrides.get("sae")
    if sae is not None and d_sae not in (None, sae.d_sae):
        raise ValueError(f"d_sae={d_sae} contradicts sae, which has d_sae={sae.d_sae}. Give one of the two.")
    width: int = sae.d_sae if sae is not None else d_sae or 8 * d_in
    step_tokens = step_sequences * context_size
    lr = plain(overrides).get("lr", QUICK_LR * (QUICK_D_SAE / width) ** 0.5)
    settings: dict[str, Any] = {
        "hook_name": hook_name,
        "context_size": context_size,
        "training_tokens": training_tokens,
        "train_batch_size_tokens": step_tokens,
        "store_batch_size_prompts": step_sequences,
        "sae": sae
        or TopKTrainingSAEConfig(d_in=d_in, d_sae=width, k=k, normalize_activations="expected_average_only_in"),
        "objective": Objective.finetune(),
        "local_first": 0.9,
        "n_batches_for_norm_estimate": 10,
        "lr": lr,
        "lr_end": lr / 100,
        "lr_scheduler_name": "cosineannealing",
        "lr_warm_up_steps": min(100, training_tokens // step_tokens // 10),
    }
    return E2ESAERunnerConfig(**{**settings, **overrides})


def _size(name: str, value: Any) -> int:
    """A whole number, which may be written as 1e6."""
    number = plain_as(name, value, int)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}.")
    return number


def objective_from_authors(
    *, kl: float, downstream_total: float, local: float, d_in: int, layers_after: int, n_downstream_hooks: int
) -> Objective:
    """Convert the coefficients of the authors' library into the weights of the paper's formulas.

    Their squared errors are averaged over dimensions as well, and their downstream total is shared among the hooks:
    `mse = local / d_in` and `beta = downstream_total * (L - l) / (n_hooks * d_in)`. Their L1 is divided by `d_in` too, so
    SAELens's `l1_coefficient` is `lambda / d_in`.

    Args:
        kl: coefficient of `logits_kl`.
        downstream_total: `total_coeff` of `in_to_orig`, 0 without it.
        local: coefficient of `out_to_in`.
        d_in: dimension of the SAE's input.
        layers_after: `L - l`.
        n_downstream_hooks: number of hook positions of `in_to_orig`.
    """
    beta = downstream_total * layers_after / (n_downstream_hooks * d_in) if downstream_total else 0.0
    return Objective(kl=kl, beta=beta, mse=local / d_in)


def paper_config(layer: int, kind: PaperKind, matched: PaperMatch = "ce", **overrides: Any) -> E2ESAERunnerConfig:
    """The paper's run on GPT2-small: SAE on `blocks.<layer>.hook_resid_pre`, dictionary 60 x 768, 400k sequences.

    Args:
        layer: 2, 6 or 10.
        kind: `"local"`, `"e2e"` or `"e2e+ds"`.
        matched: `"ce"` for the runs of similar CE loss increase (table 2), `"l0"` for those of similar L0 (table 3).
        **overrides: fields of `E2ESAERunnerConfig` to change, for instance `device="cuda"`.

    Raises:
        ValueError: the paper has no such run.

    Two things follow SAELens rather than the authors' code: the L1 is weighted by the decoder norms instead of
    normalising the decoder (the same optimum), and the encoder starts as the decoder's transpose.
    """
    coefficient = PAPER_LAMBDA.get((layer, kind, matched))
    if coefficient is None:
        raise ValueError(
            f"The paper has no run for layer={layer!r}, kind={kind!r}, matched={matched!r}. Expected layer 2, 6 or 10, "
            "kind 'local', 'e2e' or 'e2e+ds', matched 'ce' or 'l0'."
        )
    objective = objective_from_authors(
        kl={"local": 0.0, "e2e": 1.0, "e2e+ds": 0.5}[kind],
        downstream_total=PAPER_DOWNSTREAM_TOTAL[layer] if kind == "e2e+ds" else 0.0,
        local=1.0 if kind == "local" else 0.0,
        d_in=GPT2_D_MODEL,
        layers_after=GPT2_N_LAYERS - layer,
        n_downstream_hooks=GPT2_N_LAYERS - layer - 1,
    )
    settings: dict[str, Any] = {
        "model_name": "gpt2-small",
        "hook_name": f"blocks.{layer}.hook_resid_pre",
        # The authors load GPT-2 with TransformerLens's processing, which centres what is written to the residual stream.
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
        "dataset_path": "apollo-research/Skylion007-openwebtext-tokenizer-gpt2",
        "prepend_bos": False,  # its rows are tokenised, and cut out of texts one behind the other
        "context_size": 1024,
        "sae": StandardTrainingSAEConfig(
            d_in=GPT2_D_MODEL,
            d_sae=60 * GPT2_D_MODEL,
            l1_coefficient=coefficient / GPT2_D_MODEL,
            apply_b_dec_to_input=False,
            decoder_init_norm=1.0,
        ),
        "objective": objective,
        "b_dec_init_method": "zeros",
        "lr": 5e-4,
        "lr_scheduler_name": "cosineannealing",
        "lr_warm_up_steps": 1250,  # 20k samples of 16 a step
        "lr_end": 5e-5,
        "max_grad_norm": 10.0,
        "train_batch_size_tokens": 16 * 1024,
        "store_batch_size_prompts": 8,
        "training_tokens": 400_000 * 1024,
    }
    return E2ESAERunnerConfig(**{**settings, **overrides})
