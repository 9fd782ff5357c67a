"""The model and the text that SAEs are measured with, from their metadata or from flags."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor

from e2e_sae_plugin.build import load_language_model, quiet_override_warning, reading_dataset
from e2e_sae_plugin.data import DataSettings, load_data
from e2e_sae_plugin.data.load import check_tokenized_for
from e2e_sae_plugin.demo.bundled import BUNDLED
from e2e_sae_plugin.demo.data import demo_tokens
from e2e_sae_plugin.finetune.recipe import DTYPES
from e2e_sae_plugin.seekable_store import SeekableActivationsStore
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


def data_settings(sae: SAE[Any], given: Mapping[str, Any]) -> DataSettings | None:
    """The data that is given, and what an SAE's metadata say where nothing is given; None where no dataset is known.

    Args:
        sae: The SAE.
        given: Fields of `DataSettings`; None for what is not given.
    """
    settings = {name: value for name, value in given.items() if value is not None}
    dataset = dataset_of(sae, settings.pop("dataset_path", None))
    return None if not dataset else DataSettings(dataset, **settings)


def evaluation_tokens(
    sae: SAE[Any],
    model: Any,
    n_tokens: int,
    *,
    dataset: str | None = None,
    context_size: int | None = None,
    streaming: bool | None = None,
    **data: Any,
) -> Tensor:
    """Sequences `[n_prompts, context_size]` of about `n_tokens`, from the head of a dataset: what runs of this package hold
    out for evaluation. Of the bundled model's text, files that neither it nor an SAE was trained on.

    Args:
        sae: whose metadata give what is not given.
        dataset: a dataset of the Hub, a file or a folder, of text or tokens; default: the metadata's.
        context_size: default: the metadata's, or 128.
        streaming: stream the dataset instead of fetching it.
        **data: other fields of `DataSettings`: `split`, `text_column`, `shuffle_seed`, `skip_examples`, `max_examples`.

    Raises:
        ValueError: no dataset is known, it has no sequence, or sequences of that size cannot be.
    """
    metadata = sae.cfg.metadata
    settings = data_settings(sae, {"dataset_path": dataset, "streaming": streaming, **data})
    context = (metadata.context_size or DEFAULT_CONTEXT) if context_size is None else context_size
    if context < 2:
        raise ValueError(f"context_size (--context-size) must be at least 2, got {context}.")
    check_context(model, context)
    n_prompts = max(1, n_tokens // context)
    if settings is None:
        raise ValueError("The SAE's metadata name no dataset. Give dataset (--dataset).")
    if settings == DataSettings(BUNDLED, streaming=bool(streaming)):
        return demo_tokens("evaluation", context)[:n_prompts]
    store = token_store(sae, model, settings, context)
    sequences: list[Tensor] = []
    try:
        while len(sequences) < n_prompts:
            sequences.append(store.get_batch_tokens(1, raise_at_epoch_end=True)[0].cpu())
    except (StopIteration, RuntimeError) as stop:
        if isinstance(stop, RuntimeError) and "StopIteration" not in str(stop):
            raise
        logger.warning(
            "%s has only %d of the %d sequences of %d tokens.",
            settings.dataset_path,
            len(sequences),
            n_prompts,
            context,
        )
    if not sequences:
        raise ValueError(
            f"{settings.dataset_path!r} has no sequence of {context} tokens. Use more text, or a smaller context_size."
        )
    return torch.stack(sequences)


def token_store(sae: SAE[Any], model: Any, settings: DataSettings, context_size: int) -> SeekableActivationsStore:
    """SAELens's store over the dataset, for its token sequences.

    Raises:
        ValueError: If the dataset cannot be read, or belongs to another tokenizer.
    """
    metadata = sae.cfg.metadata
    dataset = load_data(settings, context_size)
    with quiet_override_warning(True), reading_dataset(dataset, f"dataset {settings.dataset_path!r}"):
        store = SeekableActivationsStore(
            model=model,
            dataset=dataset,
            streaming=settings.streaming,
            hook_name=metadata.hook_name or "",
            hook_head_index=metadata.hook_head_index,
            context_size=context_size,
            d_in=sae.cfg.d_in,
            n_batches_in_buffer=2,
            total_training_tokens=context_size,
            store_batch_size_prompts=1,
            train_batch_size_tokens=context_size,
            prepend_bos=True if metadata.prepend_bos is None else metadata.prepend_bos,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            disable_concat_sequences=bool(metadata.disable_concat_sequences),
            sequence_separator_token=metadata.sequence_separator_token or "bos",
            use_chat_formatting=settings.use_chat_formatting,
        )
    store.source = repr(settings.dataset_path)
    if store.is_dataset_tokenized:
        check_tokenized_for(settings.dataset_path, getattr(model, "tokenizer", None))
    return store
