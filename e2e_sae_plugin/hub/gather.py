"""What goes up: SAEs from memory or folders, as files that are checked and hashed before the Hub is asked anything."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import TrainingSAE

from e2e_sae_plugin.checkpoint.finished import finished_sae
from e2e_sae_plugin.checkpoint.folder import E2E_CFG_FILENAME, MANIFEST_FILENAME, file_digest
from e2e_sae_plugin.evaluation.result import Evaluation
from e2e_sae_plugin.hub.card.entry import CardEntry
from e2e_sae_plugin.hub.foreign import FORMATS, is_sae_folder, read_sae, sae_folders
from e2e_sae_plugin.hub.sae_folder import (
    CHECKSUMS_FILENAME,
    EVALUATION_FILENAME,
    HELD_OUT_FILENAME,
    UNFOLDED,
    check_evaluation,
    check_sae_folder,
    entry_of,
    last_held_out,
    nearest_sae,
    read_evaluation,
    read_json,
)
from e2e_sae_plugin.hub_names import sae_id_problem
from e2e_sae_plugin.metrics_log import METRICS_FILENAME

logger = logging.getLogger(__name__)

Source = SAE[Any] | str | Path


@dataclass(frozen=True)
class SharedSAE:
    """One SAE as it goes up."""

    sae_id: str
    """Its folder in the repository, which `SAE.from_pretrained` takes as `sae_id`."""
    folder: Path
    """Where its files lie."""
    sums: dict[str, str]
    """Each file's name and SHA-256 sum, `checksums.sha256` included."""
    entry: CardEntry
    """What the model card says of it."""


def gather(
    saes: Source | Mapping[str, Source],
    workspace: Path,
    *,
    sae_id: str | None = None,
    evaluations: Evaluation | Mapping[str, Evaluation] | None = None,
) -> list[SharedSAE]:
    """Check SAEs and copy them into `workspace` in the shared format.

    Args:
        saes: an SAE; a folder of one, of a checkpoint, or of several (such as a sweep's); or a mapping from ids to these.
        workspace: an empty folder.
        sae_id: the id of a single SAE. Default: its hook's name, which is SAELens's custom. Of a folder of several SAEs, the
            names of their folders are the ids.
        evaluations: of the single SAE, or by id. They win over an `evaluation.json` beside an SAE.

    Raises:
        ValueError: there is nothing to share, an id is not legal or there twice, an evaluation is of other weights, or an
            SAE cannot be loaded, is not finite or lacks what its users need to know. All that is wrong is said at once.
    """
    named = _named(saes, sae_id)
    given = _by_id(evaluations, named)
    problems: list[str] = [*_bad_ids(named), *_missing_ids(given, named)]
    gathered: list[SharedSAE] = []
    for number, (name, source) in enumerate(named.items()):
        try:
            gathered.append(_gathered(name, source, workspace / str(number), given.get(name)))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("Nothing was sent to the Hub. " + "\n".join(problems))
    return gathered


def _named(saes: Source | Mapping[str, Source], sae_id: str | None) -> dict[str, Source]:
    if isinstance(saes, Mapping):
        if sae_id is not None:
            raise ValueError(
                f"sae_id={sae_id!r} has no meaning beside a mapping, whose keys are the ids: leave it out."
            )
        if not saes:
            raise ValueError("There is no SAE to share: the mapping is empty.")
        return dict(saes)
    if isinstance(saes, SAE):
        return {sae_id or _hook_name(saes.cfg.metadata.to_dict()): saes}
    if not isinstance(saes, str | Path):
        raise ValueError(f"An SAE, a folder, or a mapping from ids to these is shared; got {saes!r}.")
    folder = Path(saes)
    several = {path.name: path for path in sae_folders(folder)}
    if not several and folder.is_dir():
        raise ValueError(
            f"{str(saes)!r} holds no SAE, nor does a folder in it.{nearest_sae(folder)} Supported formats: {FORMATS}."
        )
    if not several:
        raise ValueError(f"{str(saes)!r} holds no SAE: there is no such folder.")
    if folder in several.values():
        return {sae_id or _hook_name(_metadata(folder)): folder}
    if sae_id is not None:
        raise ValueError(
            f"sae_id={sae_id!r} has no meaning for {str(saes)!r}, a folder of {len(several)} SAEs: leave it out."
        )
    return dict(several)


def _metadata(folder: Path) -> dict[str, Any]:
    if _can_be_shared(folder):
        return read_json(folder / SAE_CFG_FILENAME)["metadata"]
    return read_sae(folder).cfg.metadata.to_dict()


def _can_be_shared(folder: Path) -> bool:
    """Return whether the files have SAELens's present format, so that they can be linked as they are."""
    if not (folder / SAE_CFG_FILENAME).is_file():
        return False
    cfg = read_json(folder / SAE_CFG_FILENAME)
    return "metadata" in cfg and "dtype" in cfg


def _hook_name(metadata: Mapping[str, Any]) -> str:
    hook = metadata.get("hook_name")
    if not hook:
        raise ValueError(
            "The SAE's metadata name no hook, so it has no id. Set sae.cfg.metadata.hook_name, which its users need."
        )
    return str(hook)


def _by_id(
    evaluations: Evaluation | Mapping[str, Evaluation] | None, named: Mapping[str, Source]
) -> dict[str, Evaluation]:
    if evaluations is None:
        return {}
    if isinstance(evaluations, Evaluation):
        if len(named) > 1:
            raise ValueError(f"One evaluation was given for {len(named)} SAEs: give a mapping from their ids.")
        return {next(iter(named)): evaluations}
    return dict(evaluations)


def _missing_ids(given: Mapping[str, Evaluation], named: Mapping[str, Source]) -> list[str]:
    return [
        f"There is an evaluation of {name!r}, but no such SAE among {list(named)}."
        for name in given.keys() - named.keys()
    ]


def _bad_ids(named: Mapping[str, Source]) -> list[str]:
    problems = [problem for name in named if (problem := sae_id_problem(name)) is not None]
    # Folders of one name are one folder on some disks.
    folded = [str(name).casefold() for name in named]
    problems += [
        f"There are two SAEs with the id {name!r}, upper and lower case taken as one, as some disks do."
        for name in sorted(set(folded))
        if folded.count(name) > 1
    ]
    return problems


def _gathered(sae_id: str, source: Source, folder: Path, evaluation: Evaluation | None) -> SharedSAE:
    given = _copy(source, folder)
    metadata = check_sae_folder(folder)
    for name in ("model_name", "dataset_path"):
        if isinstance(metadata.get(name), str) and Path(metadata[name]).exists():
            logger.warning(
                "%s: its metadata say %s=%r, a place on this machine, where no one else finds it. Set sae.cfg.metadata.%s "
                "to what it is called on the Hub.",
                sae_id, name, metadata[name], name,
            )  # fmt: skip
    beside = None if isinstance(source, SAE) else Path(source)
    if evaluation is not None:
        evaluation.save(folder / EVALUATION_FILENAME)
    elif beside is not None and (beside / EVALUATION_FILENAME).is_file():
        evaluation = read_evaluation(beside / EVALUATION_FILENAME)
        evaluation.save(folder / EVALUATION_FILENAME)
    check_evaluation(evaluation, metadata, given)
    held_out = None if beside is None else last_held_out(beside / METRICS_FILENAME)
    if held_out:
        (folder / HELD_OUT_FILENAME).write_text(json.dumps(held_out, indent=2) + "\n")
    sums = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    (folder / CHECKSUMS_FILENAME).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    sums[CHECKSUMS_FILENAME] = file_digest(folder / CHECKSUMS_FILENAME)
    return SharedSAE(sae_id, folder, sums, entry_of(sae_id, folder))


def _copy(source: Source, folder: Path) -> SAE[Any] | None:
    """The files of the shared format; what an SAE in training form has to become first.

    Returns:
        The SAE that had to be saved for that; None where its files were there.
    """
    if isinstance(source, SAE):
        _save(source, folder)
        return source
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"there is no folder {str(source)!r}.")
    given: SAE[Any] | None = None
    if (source / MANIFEST_FILENAME).exists():
        given = finished_sae(source)
        _save(given, folder)
    elif is_sae_folder(source) and not _can_be_shared(source):
        given = read_sae(source)
        _save(given, folder)
    else:
        folder.mkdir()
        for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
            if not (source / name).is_file():
                raise ValueError(f"the folder {str(source)!r} holds no SAE: it has no {name}.")
            _link(source / name, folder / name)
    for name in (SPARSITY_FILENAME, RUNNER_CFG_FILENAME, E2E_CFG_FILENAME):
        if (source / name).is_file():
            _link(source / name, folder / name)
    return given


def _link(source: Path, target: Path) -> None:
    # A copy would take as much room as all the weights; what the link leads to is hashed, so a change would be noticed.
    target.symlink_to(source.resolve())


def _save(sae: SAE[Any], folder: Path) -> None:
    if sae.cfg.normalize_activations in UNFOLDED:
        raise ValueError(
            f"its normalize_activations={sae.cfg.normalize_activations!r} is not folded into its weights, and SAELens would "
            "load it without. Share what the finished run saved, or fold it: sae.fold_activation_norm_scaling_factor(...)."
        )
    if isinstance(sae, TrainingSAE):
        copy.deepcopy(sae).save_inference_model(folder)  # an architecture's export may change its weights in place
    else:
        sae.save_model(folder)
