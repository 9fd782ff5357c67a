"""The model and the text that SAEs are measured with, from their metadata or from flags."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from e2e_sae_plugin.build import load_language_model, quiet_override_warning
from e2e_sae_plugin.demo.bundled import BUNDLED
from e2e_sae_plugin.demo.data import demo_tokens
from e2e_sae_plugin.finetune.recipe import DTYPES
from e2e_sae_plugin.splice.given_model import check_context

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT = 128


def load_model_of(
    sae: SAE[Any],
    *,
    model_name: str | None = None,
    model_class_name: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> Any:
    """The language model that an SAE's metadata name, or the one that is given.

    Raises:
        ValueError: no model is known, or a setting that it has no use for.
    """
    metadata = sae.cfg.metadata
    name = model_name or metadata.model_name
    if not name:
        raise ValueError("The SAE's metadata name no model. Give model_name (--model).")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"The model's dtype (--model-dtype) must be one of {list(DTYPES)}, got {dtype!r}.")
    model_class = model_class_name or metadata.model_class_name or "HookedTransformer"
    kwargs = metadata.model_from_pretrained_kwargs
    if kwargs is None:  # SAELens's own default
        kwargs = {"center_writing_weights": False} if model_class == "HookedTransformer" else {}
    return load_language_model(model_class, name, device, {**kwargs, **({} if dtype is None else {"dtype": dtype})})


def dataset_of(sae: SAE[Any], dataset: str | None = None) -> str | None:
    """The dataset that is given, else the one that an SAE's metadata name; the bundled model has its own."""
    metadata = sae.cfg.metadata
    return dataset or (BUNDLED if metadata.model_name == BUNDLED else metadata.dataset_path)


def text_name(dataset: str | None) -> str | None:
    """What a dataset is called where results are read: of a place on this machine, the last component."""
    if not dataset:
        return None
    path = Path(dataset)
    return path.absolute().name or None if path.is_absolute() or path.exists() else dataset


def evaluation_tokens(
    sae: SAE[Any],
    model: Any,
    n_tokens: int,
    *,
    dataset: str | None = None,
    context_size: int | None = None,
    streaming: bool = False,
) -> Tensor:
    """Sequences `[n_prompts, context_size]` of about `n_tokens`, from the head of a dataset: what runs of this package hold
    out for evaluation. Of the bundled model's text, files that neither it nor an SAE was trained on.

    Args:
        sae: whose metadata give what is not given.
        dataset: a dataset of the Hub or a folder, of text or tokens; default: the metadata's.
        context_size: default: the metadata's, or 128.
        streaming: stream the dataset instead of fetching it.

    Raises:
        ValueError: no dataset is known, it has no sequence, or sequences of that size cannot be.
    """
    metadata = sae.cfg.metadata
    dataset = dataset_of(sae, dataset)
    context = (metadata.context_size or DEFAULT_CONTEXT) if context_size is None else context_size
    if context < 2:
        raise ValueError(f"context_size (--context-size) must be at least 2, got {context}.")
    check_context(model, context)
    n_prompts = max(1, n_tokens // context)
    if not dataset:
        raise ValueError("The SAE's metadata name no dataset. Give dataset (--dataset).")
    if dataset == BUNDLED:
        return demo_tokens("evaluation", context)[:n_prompts]
    with quiet_override_warning(True):
        store = ActivationsStore(
            model=model,
            dataset=str(Path(dataset).absolute()) if Path(dataset).is_dir() else dataset,  # or "text" is a kind of file
            streaming=streaming,
            hook_name=metadata.hook_name or "",
            hook_head_index=metadata.hook_head_index,
            context_size=context,
            d_in=sae.cfg.d_in,
            n_batches_in_buffer=2,
            total_training_tokens=n_tokens,
            store_batch_size_prompts=1,
            train_batch_size_tokens=context,
            prepend_bos=True if metadata.prepend_bos is None else metadata.prepend_bos,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            disable_concat_sequences=bool(metadata.disable_concat_sequences),
            sequence_separator_token=metadata.sequence_separator_token or "bos",
        )
    sequences: list[Tensor] = []
    try:
        while len(sequences) < n_prompts:
            sequences.append(store.get_batch_tokens(1, raise_at_epoch_end=True)[0].cpu())
    except (StopIteration, RuntimeError) as stop:
        if isinstance(stop, RuntimeError) and "StopIteration" not in str(stop):
            raise
        logger.warning("%s has only %d of the %d sequences of %d tokens.", dataset, len(sequences), n_prompts, context)
    if not sequences:
        raise ValueError(f"{dataset!r} has no sequence of {context} tokens. Use more text, or a smaller context_size.")
    return torch.stack(sequences)
