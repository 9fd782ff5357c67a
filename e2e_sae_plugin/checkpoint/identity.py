"""What a run is besides its config: the weights of the language model, and those that a given SAE starts from."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

SAMPLE = 4096
"""Elements of each tensor that the fingerprint looks at, evenly spread."""


@torch.no_grad()
def fingerprint(module: Any) -> str:
    """SHA-256 over the names, shapes, types and evenly spread elements of all parameters and buffers.

    It reads a fraction of a large model; other weights, trained or initialised otherwise, differ in nearly all elements.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_meta:  # accelerate keeps it elsewhere while it does not run: its name and shape have to do
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """SHA-256 over a tokenizer's vocabulary: every token with its id; None for no tokenizer."""
    if tokenizer is None:
        return None
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{index} {token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def run_identity(model: Any, override_sae: Any) -> dict[str, str | None]:
    """Fingerprints by name; None for what is not there (no SAE was given) or not yet known (the model is not loaded)."""
    return {
        "model": None if model is None else fingerprint(getattr(model, "model", model) if _is_proxy(model) else model),
        "override_sae": None if override_sae is None else fingerprint(override_sae),
    }


def _is_proxy(model: Any) -> bool:
    """SAELens wraps Hugging Face models, whose own state is what counts."""
    return type(model).__name__ == "HookedProxyLM"


def identity_differences(saved: dict[str, Any], now: dict[str, str | None]) -> list[str]:
    """What is another than in a checkpoint's manifest, in words; what is not known on both sides is not compared."""
    theirs = saved.get("identity", {})
    differences: list[str] = []
    if theirs.get("model") and now["model"] and theirs["model"] != now["model"]:
        differences.append("the language model has other weights")
    if "override_sae" in theirs and theirs["override_sae"] != now["override_sae"]:
        differences.append("override_sae is another SAE, or was not given then or now")
    return differences
