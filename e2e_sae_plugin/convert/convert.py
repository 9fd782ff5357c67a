"""Checkpoints of the authors' library as SAELens SAEs, with the config of the run that made them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.saes.sae import SAEMetadata

from e2e_sae_plugin._version import __version__
from e2e_sae_plugin.checkpoint.folder import atomic_folder, file_digest, recover
from e2e_sae_plugin.config import E2ESAERunnerConfig
from e2e_sae_plugin.convert.authors import AuthorsConfig, NoCounterpartError, number, read_config
from e2e_sae_plugin.convert.checkpoint import Weights, read_checkpoint
from e2e_sae_plugin.convert.config import has_bos, model_kwargs, run_config
from e2e_sae_plugin.convert.objective import (
    LossTerms,
    authors_objective,
    loss_terms,
    n_layers_of,
    plain_kind,
)
from e2e_sae_plugin.convert.sources import Samples, SourceFiles, source_files
from e2e_sae_plugin.finetune.start import load_quietly, same_weights
from e2e_sae_plugin.objective import Objective
from e2e_sae_plugin.output_folder import write_configs


@dataclass
class Converted:
    """One SAE of the authors, converted."""

    name: str
    """Of its folder: `<hook>-samples_<N>` for a run's, the file's for one of a pair."""
    sae: StandardSAE
    config: E2ESAERunnerConfig | None
    """The run that trained it; None where it has no counterpart (`notes` say why)."""
    notes: list[str] = field(default_factory=list)
    """What is not the same here, in sentences."""
    folder: Path | None = None
    """Where it was saved."""


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    samples: Samples = None,
    positions: Sequence[str] | None = None,
    n_layers: int | None = None,
    wandb_api: Any = None,
) -> list[Converted]:
    """Convert checkpoints of the authors' library (Braun et al. 2024) to SAELens's `StandardSAE`, with equal outputs.

    Args:
        source: a run's folder, a folder of pairs `<name>.pt` and `<name>.yaml`, one `.pt` or one of the pairs,
            `hf:OWNER/REPO[@REVISION][/NAME]` or `wandb:ENTITY/PROJECT/RUN`.
        output: a folder that gets one folder for each SAE; None to save nothing.
        samples: which `samples_N.pt` of a run: this N, "all", or (None) the one of the largest N.
        positions: hooks to convert; None for all.
        n_layers: blocks of the model, needed for downstream terms of models that are not among the authors' own.
        wandb_api: a `wandb.Api` for `wandb:` sources; None for a new one.

    Raises:
        ValueError: the source is none, a checkpoint or its config is refused (the message names what), a position is in no
            checkpoint, or `output` holds another SAE of that name.
        OSError: something cannot be read, fetched or written.
    """
    return list(
        convert_each(
            source, output, samples=samples, positions=positions, n_layers=n_layers, wandb_api=wandb_api
        )
    )  # fmt: skip


def convert_each(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    samples: Samples = None,
    positions: Sequence[str] | None = None,
    n_layers: int | None = None,
    wandb_api: Any = None,
) -> Iterator[Converted]:
    """`convert`, one SAE at a time, for more of them than fit into memory."""
    if samples not in (None, "all") and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise ValueError(f"samples (--samples) must be a number of samples, 'all' or None, got {samples!r}.")
    if isinstance(positions, str):
        raise ValueError(f"positions must be a list of hooks, got {positions!r}.")
    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"output {os.fspath(output)!r} is a file. Name a folder.")
    if output is not None:
        recover(Path(output))  # what a killed conversion left half written
    found: set[str] = set()
    seen: set[str] = set()
    for files in source_files(source, samples, wandb_api):
        config = read_config(files.config)
        weights = _at_hooks(read_checkpoint(files.checkpoint), config, files)
        sha256 = file_digest(files.checkpoint)
        seen |= weights.keys()
        for hook_name in [hook for hook in weights if positions is None or hook in positions]:
            found.add(hook_name)
            converted = _converted(config, files, hook_name, weights, n_layers, sha256)
            if output is not None:
                converted.folder = Path(output) / converted.name
                _save(converted, converted.folder)
            yield converted
    if missing := [hook for hook in positions or () if hook not in found]:
        raise ValueError(f"No checkpoint has an SAE at {', '.join(missing)} (--position). There are {sorted(seen)}.")


def _at_hooks(read: dict[str | None, Weights], config: AuthorsConfig, files: SourceFiles) -> dict[str, Weights]:
    """The SAEs by hook, after a check that the config is the checkpoint's."""
    if None in read:
        if len(config.positions) != 1 or "." not in config.positions[0]:
            raise ValueError(
                f"{files.checkpoint.name} holds one SAE and does not say at which hook; {files.config.name} names "
                f"{list(config.positions)} instead of one whole hook name."
            )
        weights = {config.positions[0]: read[None]}
    else:
        weights = {hook: tensors for hook, tensors in read.items() if hook is not None}
        strangers = [hook for hook in weights if not any(part in hook for part in config.positions)]
        if strangers:
            raise ValueError(
                f"{files.checkpoint.name} has SAEs at {', '.join(strangers)}, but {files.config.name} is of a run with SAEs "
                f"at {list(config.positions)}. Is it another run's config?"
            )
    saes = config.content["saes"]
    if saes.get("dict_size_to_input_ratio") is not None:
        ratio = number(saes, "dict_size_to_input_ratio")
        for hook, tensors in weights.items():
            if int(ratio * tensors.d_in) != tensors.d_sae:
                raise ValueError(
                    f"{files.checkpoint.name} has {tensors.d_sae} features at {hook}, but {files.config.name} has "
                    f"dict_size_to_input_ratio={ratio:g} for {tensors.d_in} dimensions, {int(ratio * tensors.d_in)} "
                    "features. Is it another run's config?"
                )
    return weights


def _converted(
    config: AuthorsConfig,
    files: SourceFiles,
    hook_name: str,
    weights: dict[str, Weights],
    n_layers: int | None,
    sha256: str,
) -> Converted:
    tensors = weights[hook_name]
    notes = _notes(config)
    terms, objective, run = None, None, None
    layers = n_layers_of(config, n_layers)
    try:
        terms = loss_terms(config)
        objective = authors_objective(
            terms, hook_name, tensors.d_in, n_positions=len(weights), n_layers=layers, model_name=config.model_name
        )
        run = run_config(
            config, terms, objective, hook_name,
            d_in=tensors.d_in, d_sae=tensors.d_sae, samples=files.choice.samples, notes=notes,
        )  # fmt: skip
    except NoCounterpartError as error:
        notes.append(f"The run has no config here: {str(error).rstrip('.')}.")
    metadata = _metadata(config, files, hook_name, terms, objective, len(weights), sha256, notes)
    cfg = StandardSAEConfig(
        d_in=tensors.d_in,
        d_sae=tensors.d_sae,
        dtype="float32",
        device="cpu",
        apply_b_dec_to_input=False,
        normalize_activations="none",
        metadata=metadata,
    )
    sae = StandardSAE(cfg)
    sae.load_state_dict(tensors.state_dict())
    if files.choice.samples is not None:
        name = f"{hook_name}-{files.choice.stem}"
    else:
        name = files.choice.stem + (f"-{hook_name}" if len(weights) > 1 else "")
    return Converted(name, sae, run, notes)


def _notes(config: AuthorsConfig) -> list[str]:
    saes = config.section("saes")
    notes: list[str] = []
    if config.model_name is None:
        notes.append(
            "The language model is the run's own (tlens_model_path), so the metadata name none: give it where one is needed."
        )
    if saes.get("pretrained_sae_paths"):
        went_on = "trained on" if saes.get("retrain_saes") else "as they were, beside new ones"
        notes.append(f"The run started from other SAEs (saes.pretrained_sae_paths), {went_on}; a config starts anew.")
    if unknown := config.unknown_keys():
        notes.append(f"Not known, and kept in the metadata: {', '.join(unknown)}.")
    return notes


def _metadata(
    config: AuthorsConfig,
    files: SourceFiles,
    hook_name: str,
    terms: LossTerms | None,
    objective: Objective | None,
    n_positions: int,
    sha256: str,
    notes: list[str],
) -> SAEMetadata:
    data = config.section("train_data")
    converted_from = {"source": files.origin, "samples": files.choice.samples, "sha256": sha256}
    said: dict[str, Any] = {
        "model_name": config.model_name,
        "hook_name": hook_name,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": model_kwargs(hook_name),
        "context_size": data.get("n_ctx"),
        "dataset_path": data.get("dataset_name"),
        "prepend_bos": has_bos(config),
        "objective": None if objective is None else objective.to_dict(),
        "sparsity": None if terms is None else terms.sparsity,
        "seed": config.content.get("seed"),
        # Without a kind, an SAE that has no objective passes for a local one.
        "kind": "unknown" if terms is None else plain_kind(terms, n_positions),
        "converted_from": {name: value for name, value in converted_from.items() if value is not None},
        "conversion_notes": notes or None,
        "authors_config": config.json_ready(),
        "e2e_sae_plugin_version": __version__,
    }
    return SAEMetadata(**{name: value for name, value in said.items() if value is not None})


def _save(converted: Converted, folder: Path) -> None:
    """SAELens's two files and, where there is one, the run's config beside them, whole or not at all.

    To a run with this config and this `output_path` the folder is a finished one, so it is not trained over.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if _is_saved(converted.sae, folder):
            return
        raise ValueError(
            f"{str(folder)!r} holds something else, which would be overwritten. Choose another output, or move it away."
        )
    with atomic_folder(folder) as temporary:
        converted.sae.save_model(temporary)
        if converted.config is not None:
            write_configs(converted.config, temporary)


@torch.no_grad()
def _is_saved(sae: SAE[Any], folder: Path) -> bool:
    if not (folder / SAE_CFG_FILENAME).is_file():
        return False
    saved = load_quietly(folder)
    ours, theirs = sae.cfg.metadata, saved.cfg.metadata
    return same_weights(sae, saved) and ours.converted_from == theirs.converted_from
