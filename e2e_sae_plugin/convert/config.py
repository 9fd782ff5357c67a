"""From a config of the authors to an `E2ESAERunnerConfig` with the same loss and the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_lens import LoggingConfig, StandardTrainingSAEConfig

from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.convert.authors import AuthorsConfig, NoCounterpartError, number, text, whole
from e2e_sae_plugin.convert.objective import LossTerms
from e2e_sae_plugin.objective import Objective

# Columns of token ids that SAELens finds by itself.
_TOKEN_COLUMNS = ("input_ids", "tokens")


def model_kwargs(hook_name: str) -> dict[str, bool]:
    """Arguments that give SAELens's model the activations of the authors', who load it with TransformerLens's defaults.

    SAELens loads it without processing. Of what the defaults do, centring the weights that write to the residual stream
    changes that stream. Centring the unembedding adds one number to all logits of a token, which a softmax does not see.
    Folding LayerNorms and the values' biases changes, within blocks, activations at these hooks alone.
    """
    kwargs = {"center_writing_weights": True}
    with_value_biases = hook_name.endswith(("attn.hook_v", "attn.hook_z", "hook_result"))
    if with_value_biases or hook_name.endswith("hook_normalized"):
        kwargs["fold_ln"] = True
    if with_value_biases:  # of which a LayerNorm's bias becomes a part
        kwargs["fold_value_biases"] = True
    return kwargs


def has_bos(config: AuthorsConfig) -> bool:
    """Whether each of their sequences begins with a BOS token: the ones they tokenise themselves do; the rows of their
    tokenised datasets are cut out of texts one behind the other, wherever that falls."""
    return not config.section("train_data").get("is_tokenized", True)


def run_config(
    config: AuthorsConfig,
    terms: LossTerms,
    objective: Objective,
    hook_name: str,
    *,
    d_in: int,
    d_sae: int,
    samples: int | None,
    notes: list[str],
) -> E2ESAERunnerConfig:
    """The run as a config of this package.

    Args:
        config: the authors'.
        terms: its loss.
        objective: the same loss, from `authors_objective`.
        hook_name: where the SAE sits.
        d_in: its width.
        d_sae: the size of its dictionary.
        samples: sequences that the checkpoint was trained on; the length of a run that has no other.
        notes: gets what is not quite the same.

    Raises:
        NoCounterpartError: the run has something that this package has not; the message names it.
    """
    if config.model_name is None:
        raise NoCounterpartError("tlens_model_path names a model of their own, which SAELens cannot load by name")
    if terms.p_norm < 0:
        raise NoCounterpartError(f"loss.sparsity.p_norm={terms.p_norm:g} is negative, which is no norm")
    content = config.content
    batch = whole(content, "batch_size")
    step = whole(content, "effective_batch_size", batch)
    context = whole(config.section("train_data"), "n_ctx")
    if min(batch, step, context) < 1:
        raise NoCounterpartError("batch_size, effective_batch_size and train_data.n_ctx must be at least 1")
    n_samples = content.get("n_samples") and whole(content, "n_samples")
    if not n_samples:
        if samples is None:
            raise NoCounterpartError(
                "n_samples is null (the run took what data there was), and the checkpoint's is not known"
            )
        n_samples = samples
        notes.append(f"n_samples is null; the config trains on the {samples:,} samples that the checkpoint has seen.")
    try:
        return E2ESAERunnerConfig(
            model_name=config.model_name,
            hook_name=hook_name,
            model_from_pretrained_kwargs=model_kwargs(hook_name),
            sae=StandardTrainingSAEConfig(
                d_in=d_in,
                d_sae=d_sae,
                l1_coefficient=terms.sparsity / d_in,  # they divide the norm by the width
                lp_norm=terms.p_norm,
                apply_b_dec_to_input=False,
                decoder_init_norm=1.0,
            ),
            objective=objective,
            b_dec_init_method="zeros",
            context_size=context,
            training_tokens=n_samples * context,
            train_batch_size_tokens=step * context,
            store_batch_size_prompts=batch,
            lr=number(content, "lr"),
            adam_beta1=number(content, "adam_beta1", 0.9),
            max_grad_norm=None if content.get("max_grad_norm") is None else number(content, "max_grad_norm"),
            seed=whole(content, "seed", 0),
            exclude_special_tokens=False,
            # A recipe; whoever runs it says where it is logged.
            logger=LoggingConfig(log_to_wandb=False),
            **_schedule(content, step, notes),
            **_data(config, notes),
        )
    except NoCounterpartError:
        raise
    except ValueError as error:
        raise NoCounterpartError(str(error)) from error


def _schedule(content: Mapping[str, Any], step: int, notes: list[str]) -> dict[str, Any]:
    """SAELens's schedule. The authors' first warm-up step has a learning rate of 0 (cosine), SAELens's one share of it."""
    name = content.get("lr_schedule")
    if name is None:  # their first versions had one schedule and a beta1; later ones write out the default
        name = "linear" if "adam_beta1" in content else "cosine"
        notes.append(f"The config names no lr_schedule; read as {name}.")
    warm_up = whole(content, "warmup_samples", 0) // step
    if name == "cosine":
        lr_end = number(content, "lr") * number(content, "min_lr_factor", 0.1)
        return {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": warm_up, "lr_end": lr_end}
    if name != "linear":
        raise NoCounterpartError(f"lr_schedule={name!r} is not known in their library")
    decay = whole(content, "cooldown_samples", 0) // step
    lowest = number(content, "min_lr_factor", 0.0)
    if decay and lowest:
        notes.append(
            f"Their learning rate falls to {lowest:g} of itself in the cooldown and stays there; the config's falls to 0, "
            "as SAELens's does."
        )
    return {"lr_scheduler_name": "constant", "lr_warm_up_steps": warm_up, "lr_decay_steps": decay}


def _data(config: AuthorsConfig, notes: list[str]) -> dict[str, Any]:
    data = config.section("train_data")
    tokenised, streaming = data.get("is_tokenized", True), data.get("streaming", True)
    for name, value in (("is_tokenized", tokenised), ("streaming", streaming)):
        if not isinstance(value, bool):
            raise NoCounterpartError(f"train_data.{name} must be true or false, got {value!r}")
    column = data.get("column_name") or _TOKEN_COLUMNS[0]
    if tokenised and column not in _TOKEN_COLUMNS:
        raise NoCounterpartError(f"train_data.column_name={column!r}; SAELens reads tokens from {list(_TOKEN_COLUMNS)}")
    if (split := data.get("split") or "train") != "train":
        notes.append(f"They trained on the split {split!r} of the dataset; SAELens reads 'train'.")
    return {
        "dataset_path": text(data, "dataset_name"),
        "is_dataset_tokenized": tokenised,
        "streaming": streaming,
        "prepend_bos": has_bos(config),
        # They put an end-of-text token between texts. What is tokenised already has it.
        **({} if tokenised else {"sequence_separator_token": "eos"}),
    }
