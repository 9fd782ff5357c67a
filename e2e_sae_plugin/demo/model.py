"""The bundled language model: a small transformer that this project trained on Python source."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

MODEL_DIRECTORY = Path(__file__).parent / "model"
BOS_TOKEN = "<|endoftext|>"


def load_demo_tokenizer(directory: Path = MODEL_DIRECTORY) -> PreTrainedTokenizerFast:
    """The byte-level BPE of the bundled model; its only special token, `<|endoftext|>`, starts every encoding."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        bos_token=BOS_TOKEN,
        eos_token=BOS_TOKEN,
        pad_token=BOS_TOKEN,
        unk_token=BOS_TOKEN,
        # TransformerLens asks for these two: without them it would reload the tokenizer to make it prepend BOS.
        name_or_path=str(directory),
        add_bos_token=True,
    )


def load_demo_model(directory: Path = MODEL_DIRECTORY, device: str = "cpu") -> HookedTransformer:
    """The bundled model as a `HookedTransformer` in fp32, in evaluation mode, with its tokenizer attached."""
    config = json.loads((directory / "config.json").read_text())
    cfg = HookedTransformerConfig(
        **config, model_name="e2e-sae-demo", device=device, default_prepend_bos=True, init_weights=False
    )
    model = HookedTransformer(cfg, tokenizer=load_demo_tokenizer(directory))
    state = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
    model.load_state_dict(state, strict=False)
    return model.to(device).eval()


@torch.no_grad()
def bits_per_byte(
    model: HookedTransformer,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    context_size: int | None = None,
    batch_size: int = 32,
) -> float:
    """Cross-entropy in bits per UTF-8 byte over texts joined by `<|endoftext|>`, in non-overlapping windows.

    Each window is `<|endoftext|>` followed by `context_size - 1` (default: the model's context less one) tokens that
    are all predicted; separators between the texts are predicted but count no bytes. A last short window is dropped
    with its bytes.
    """
    bos, window = tokenizer.bos_token_id, (context_size or model.cfg.n_ctx) - 1
    assert isinstance(bos, int)
    ids = [i for text in texts for i in [*tokenizer.encode(text, add_special_tokens=False), bos]]
    ids = ids[: len(ids) - len(ids) % window]
    windows = F.pad(torch.tensor(ids).view(-1, window), (1, 0), value=bos)
    nats = 0.0
    for batch in windows.split(batch_size):
        logits = model(batch, return_type="logits")
        nats += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum").item()
    n_bytes = len(str(tokenizer.decode(ids, skip_special_tokens=True)).encode())
    return nats / math.log(2) / n_bytes
