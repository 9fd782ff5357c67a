"""One SAE's folder in the shared format: its files, and what has to be in them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from safetensors import SafetensorError
from safetensors.torch import load_file

from e2e_sae_plugin.checkpoint.folder import E2E_CFG_FILENAME
from e2e_sae_plugin.evaluation.result import Evaluation, weights_sha256
from e2e_sae_plugin.hub.card.entry import CardEntry
from e2e_sae_plugin.hub.foreign import DICTIONARY_WEIGHTS, WEIGHTS_FILENAMES
from e2e_sae_plugin.output_folder import CHECKSUMS_FILENAME, EVALUATION_FILENAME, HELD_OUT_FILENAME

SHARED_FILES = (
    SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME, E2E_CFG_FILENAME, EVALUATION_FILENAME,
    HELD_OUT_FILENAME, CHECKSUMS_FILENAME,
)  # fmt: skip
"""SAELens's four, of which it needs the first two, and this package's."""
SMALL_FILES = (SAE_CFG_FILENAME, E2E_CFG_FILENAME, EVALUATION_FILENAME, HELD_OUT_FILENAME)
"""Those that a model card is made from."""
REQUIRED_METADATA = ("model_name", "hook_name")
UNFOLDED = ("expected_average_only_in", "covariance_whitening")
"""Normalisations that SAELens folds into a finished SAE's weights, and leaves out of one where they are not."""


def nearest_sae(folder: Path) -> str:
    """`" Did you mean ...?"` with an SAE that lies deeper in a folder, such as the checkpoints of a run; else empty.

    Of several, the newest folder's with the highest number, as checkpoints are called.
    """
    written: dict[Path, float] = {}
    for depth in ("*/*", "*/*/*"):
        for mark in (*folder.glob(f"{depth}/{SAE_CFG_FILENAME}"), *folder.glob(f"{depth}/{DICTIONARY_WEIGHTS}")):
            if any((mark.parent / name).is_file() for name in WEIGHTS_FILENAMES):
                written[mark.parent] = mark.stat().st_mtime
    if not written:
        return ""
    newest = max(written, key=lambda path: written[path]).parent
    beside = [path for path in written if path.parent == newest]
    number = {path: int(path.name) if path.name.isdecimal() else -1 for path in beside}
    return f" Did you mean {max(beside, key=lambda path: (number[path], written[path], path.name))}?"


def check_sae_folder(folder: Path) -> dict[str, Any]:
    """Load it as its users will; returns its metadata, with `d_in`, `d_sae` and `weights_sha256` of what was loaded.

    Raises:
        ValueError: it cannot be loaded, is not finite, or its metadata are incomplete.
    """
    cfg = read_json(folder / SAE_CFG_FILENAME)
    if cfg.get("normalize_activations") in UNFOLDED:
        raise ValueError(
            f"its cfg.json has normalize_activations={cfg['normalize_activations']!r}, which is not folded into the "
            "weights: SAELens would load it without. Fold it first: sae.fold_activation_norm_scaling_factor(...)."
        )
    try:
        with warnings.catch_warnings():
            # SAELens's advice on how to load the model, for who is about to.
            warnings.filterwarnings("ignore", message="\nThis SAE has non-empty model_from_pretrained_kwargs")
            sae = SAE.load_from_disk(folder, device="cpu")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"SAELens cannot load it ({type(error).__name__}: {error}). Save it again.") from error
    for name, value in sae.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"its {name} is not finite. Train it again.")
    metadata = sae.cfg.metadata.to_dict()
    missing = [name for name in REQUIRED_METADATA if not metadata.get(name)]
    if missing:
        raise ValueError(
            f"its metadata lack {' and '.join(missing)}, without which nobody can use it. Set "
            + " and ".join(f"sae.cfg.metadata.{name}" for name in missing)
            + "."
        )
    if (folder / SPARSITY_FILENAME).exists():
        _check_sparsity(folder / SPARSITY_FILENAME, sae.cfg.d_sae)
    for name in (RUNNER_CFG_FILENAME, E2E_CFG_FILENAME):
        if (folder / name).exists():
            read_json(folder / name)
    return {**metadata, "d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae, "weights_sha256": weights_sha256(sae)}


def _check_sparsity(path: Path, d_sae: int) -> None:
    try:
        sparsity = load_file(path).get("sparsity")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"its {path.name} is damaged ({error}). Remove it or save it again.") from error
    if sparsity is None or tuple(sparsity.shape) != (d_sae,):
        raise ValueError(f"its {path.name} has no tensor 'sparsity' of {d_sae} numbers. Remove it or save it again.")


def check_evaluation(evaluation: Evaluation | None, metadata: Mapping[str, Any], given: SAE[Any] | None = None) -> None:
    """Refuse the evaluation of another SAE.

    Args:
        evaluation: None for none.
        metadata: what `check_sae_folder` says of the SAE as it goes up.
        given: the SAE in memory that was saved for that, if any: loaded again it has the dtype that
            its config says, which may round it.

    Raises:
        ValueError: it says that it is of another size, hook or weights.
    """
    if evaluation is None:
        return
    for name in ("d_in", "d_sae", "hook_name"):
        if getattr(evaluation, name) != metadata[name]:
            raise ValueError(
                f"its evaluation is of another SAE: {name}={getattr(evaluation, name)!r}, not {metadata[name]!r}. Evaluate "
                f"this one (e2e-sae evaluate FOLDER --output FOLDER/{EVALUATION_FILENAME})."
            )
    measured = evaluation.weights_sha256
    if measured in (None, metadata["weights_sha256"]) or (given is not None and measured == weights_sha256(given)):
        return
    raise ValueError(
        f"its evaluation is of other weights (SHA-256 {measured}, not {metadata['weights_sha256']}), so its numbers are not "
        f"this SAE's. Evaluate this one (e2e-sae evaluate FOLDER --output FOLDER/{EVALUATION_FILENAME}), or remove "
        f"{EVALUATION_FILENAME}."
    )


def entry_of(sae_id: str, folder: Path) -> CardEntry:
    """What a model card says of the SAE whose small files lie in `folder`.

    Raises:
        ValueError: one of them is not what it should be.
    """
    held_out = folder / HELD_OUT_FILENAME
    evaluation, run = folder / EVALUATION_FILENAME, folder / E2E_CFG_FILENAME
    return CardEntry(
        sae_id=sae_id,
        cfg=read_json(folder / SAE_CFG_FILENAME),
        run=read_json(run) if run.exists() else None,
        evaluation=read_evaluation(evaluation) if evaluation.exists() else None,
        held_out=read_json(held_out) if held_out.exists() else None,
    )


def last_held_out(metrics: Path) -> dict[str, float] | None:
    """The last held-out evaluation in a run's `metrics.jsonl`; None without one."""
    if not metrics.is_file():
        return None
    for line in reversed(metrics.read_text().splitlines()):
        try:
            entries = json.loads(line)
        except ValueError:  # a line that a killed run has left half written
            continue
        if "metrics/ce_loss_increase" in entries:
            return {k: v for k, v in entries.items() if isinstance(v, int | float) and math.isfinite(v)}
    return None


def read_evaluation(path: Path) -> Evaluation:
    try:
        return Evaluation.load(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"its {path.name} is no evaluation ({type(error).__name__}: {error}). Write it again (e2e-sae evaluate FOLDER "
            f"--output FOLDER/{EVALUATION_FILENAME}), or remove it."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"its {path.name} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"its {path.name} holds no JSON object.")
    return content
