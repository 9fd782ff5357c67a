"""Where checkpoints of the authors' library come from: folders, files, the Hub, Weights & Biases."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Literal
from urllib.parse import unquote

from e2e_sae_plugin.hub.calls import HubError
from e2e_sae_plugin.hub.download import fetch, list_files
from e2e_sae_plugin.hub.revision import Resolved, remember, resolve

logger = logging.getLogger(__name__)

CONFIG_FILENAME = "final_config.yaml"
HUB, WANDB = "hf:", "wandb:"

Samples = int | Literal["all"] | None
"""Which `samples_N.pt` of a run: the one of this N, all, or (None) the one of the largest N."""

_HUB_SOURCE = re.compile(
    r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<name>.+))?"
)


@dataclass(frozen=True)
class Choice:
    """One checkpoint of a source, by the names of its two files there."""

    checkpoint: str
    config: str

    @property
    def stem(self) -> str:
        return PurePosixPath(self.checkpoint).stem

    @property
    def samples(self) -> int | None:
        """Sequences that it was trained on, where its name says so."""
        match = re.fullmatch(r"samples_(\d+)", self.stem)
        return None if match is None else int(match[1])


@dataclass(frozen=True)
class SourceFiles:
    """One checkpoint, on disk. The files may be gone once the next one is asked for."""

    checkpoint: Path
    config: Path
    choice: Choice
    origin: str
    """Where it came from, for the metadata; never an absolute path."""


def source_files(
    source: str | os.PathLike[str], samples: Samples = None, wandb_api: Any = None
) -> Iterator[SourceFiles]:
    """The checkpoints that a source names, fetched one after the other.

    Args:
        source: a run's folder (`samples_*.pt` and `final_config.yaml`); a folder of pairs `<name>.pt` and `<name>.yaml`; one
            `.pt` of either; `hf:OWNER/REPO[@REVISION][/NAME]`; `wandb:ENTITY/PROJECT/RUN`.
        samples: which checkpoints of a run.
        wandb_api: a `wandb.Api`; None for a new one.

    Raises:
        ValueError: there is no such source, or nothing to convert in it.
        OSError: it cannot be read or fetched; a `HubError` where the Hub has not what is named.
        DamagedDownloadError: what the Hub sends is not what it says it is, twice.
    """
    name = os.fspath(source)
    if name.startswith(HUB):
        return _from_hub(name, samples)
    if name.startswith(WANDB):
        return _from_wandb(name, samples, wandb_api)
    return _from_disk(Path(name), samples)


def choose(names: Sequence[str], wanted: str | None, samples: Samples, where: str) -> list[Choice]:
    """Checkpoints among the files of a source.

    Args:
        names: paths of files, relative to the source, with `/`.
        wanted: one file, with or without its `.pt`, or a folder; None for all of the first level.
        samples: which checkpoints of a run.
        where: the source, for messages.

    Raises:
        ValueError: there are none, or a checkpoint has no config beside it.
    """
    files = set(names)
    if wanted is not None:
        file = wanted if wanted.endswith(".pt") else f"{wanted}.pt"
        if file in files:
            if samples is not None:
                raise ValueError(f"{where} names one checkpoint, so samples={samples!r} (--samples) has no meaning.")
            return [Choice(file, _config_of(file, files, where))]
        folder = wanted.rstrip("/") + "/"
        inside = [file.removeprefix(folder) for file in files if file.startswith(folder)]
        if not inside:
            known = sorted(PurePosixPath(file).stem for file in files if file.endswith(".pt") and "/" not in file)
            raise ValueError(f"There is no checkpoint {wanted!r} in {where}. It has {', '.join(known) or 'none'}.")
        return [Choice(folder + c.checkpoint, folder + c.config) for c in choose(inside, None, samples, where)]
    checkpoints = [Choice(file, "") for file in files if file.endswith(".pt") and "/" not in file]
    runs = {choice.samples: choice.checkpoint for choice in checkpoints if choice.samples is not None}
    if runs and CONFIG_FILENAME in files:
        chosen = [max(runs)] if samples is None else sorted(runs) if samples == "all" else [samples]
        if missing := [n for n in chosen if n not in runs]:
            raise ValueError(f"{where} has no samples_{missing[0]}.pt. It has N = {sorted(runs)} (--samples).")
        return [Choice(runs[n], CONFIG_FILENAME) for n in chosen]
    if samples is not None:
        raise ValueError(
            f"samples={samples!r} (--samples) is for runs, but {where} has no samples_<N>.pt with a {CONFIG_FILENAME}."
        )
    if not checkpoints:
        raise ValueError(
            f"There is nothing to convert in {where}: expected samples_<N>.pt and {CONFIG_FILENAME}, or pairs <name>.pt and "
            "<name>.yaml."
        )
    return [
        Choice(file, _config_of(file, files, where)) for file in sorted(choice.checkpoint for choice in checkpoints)
    ]


def _config_of(checkpoint: str, files: set[str], where: str) -> str:
    path = PurePosixPath(checkpoint)
    for config in (str(path.with_suffix(".yaml")), str(path.with_name(CONFIG_FILENAME))):
        if config in files:
            return config
    raise ValueError(
        f"{checkpoint} in {where} has neither {path.stem}.yaml nor {CONFIG_FILENAME} beside it, so its model and loss are "
        "not known."
    )


def _from_disk(path: Path, samples: Samples) -> Iterator[SourceFiles]:
    is_folder = path.is_dir()
    folder, wanted = (path, None) if is_folder else (path.parent, path.name)
    if not is_folder and not path.is_file() and not path.with_name(f"{path.name}.pt").is_file():
        raise ValueError(
            f"There is no {str(path)!r}. Expected a run's folder, a .pt file, hf:OWNER/REPO[@REVISION][/NAME] or "
            "wandb:ENTITY/PROJECT/RUN."
        )
    if path.is_file() and path.suffix != ".pt":
        raise ValueError(f"{str(path)!r} is no .pt file. Name a run's folder, or one checkpoint of it.")
    names = [file.name for file in folder.iterdir() if file.is_file()]
    for choice in choose(names, wanted, samples, repr(str(path))):
        origin = f"{folder.resolve().name}/{choice.checkpoint}"
        yield SourceFiles(folder / choice.checkpoint, folder / choice.config, choice, origin)


def _from_hub(source: str, samples: Samples) -> Iterator[SourceFiles]:
    match = _HUB_SOURCE.fullmatch(source.removeprefix(HUB))
    if match is None:
        raise ValueError(f"{source!r} is not understood. Expected hf:OWNER/REPO[@REVISION][/NAME].")
    revision = match["revision"] and unquote(match["revision"])
    # One commit, whatever is pushed meanwhile.
    resolved, names = _listed(resolve(match["repo"], revision, doing=f"convert {source!r}"))
    where = f"{source} as far as the cache has it" if resolved.is_offline else source
    for choice in choose(names, match["name"], samples, where):
        # The config first: where this is broken off, no checkpoint is left in the cache without one.
        config, checkpoint = (fetch(resolved, name) for name in (choice.config, choice.checkpoint))
        remember(resolved)
        origin = f"{HUB}{resolved.repo_id}@{resolved.commit}/{choice.checkpoint}"
        yield SourceFiles(checkpoint, config, choice, origin)


def _listed(resolved: Resolved) -> tuple[Resolved, list[str]]:
    """The files of a commit. Without a Hub those that the cache has: a commit's never change, but some may be missing."""
    try:
        return resolved, list_files(resolved)
    except HubError as error:
        if not error.may_pass or not resolved.snapshot.is_dir():
            raise
        logger.warning("%s What the cache has of %s is taken.", error, resolved)
    offline = replace(resolved, is_offline=True)
    return offline, list_files(offline)


def _from_wandb(source: str, samples: Samples, api: Any) -> Iterator[SourceFiles]:
    path = source.removeprefix(WANDB)
    if not re.fullmatch(r"[^/\s]+/[^/\s]+/[^/\s]+", path):
        raise ValueError(f"{source!r} is not understood. Expected wandb:ENTITY/PROJECT/RUN, with the run's id.")
    with _wandb_errors(source):
        remote: dict[str, Any] = {}
        for file in (_wandb_api() if api is None else api).run(path).files():
            name = PurePosixPath(file.name).name
            # Their script saves from a temporary folder too, whose path some versions of wandb keep.
            if name not in remote or len(file.name) < len(remote[name].name):
                remote[name] = file
    for choice in choose(list(remote), None, samples, source):
        with TemporaryDirectory() as folder:
            with _wandb_errors(source):
                checkpoint, config = (_download(remote[name], folder) for name in (choice.checkpoint, choice.config))
            yield SourceFiles(checkpoint, config, choice, f"{source}/{choice.checkpoint}")


def _download(file: Any, folder: str) -> Path:
    with file.download(root=folder, replace=True) as opened:
        return Path(opened.name)


def _wandb_api() -> Any:
    import wandb  # only this source needs it

    if not wandb.login(prompt=False, verify=False):
        raise ValueError("there is no Weights & Biases login. Run `wandb login`, or set WANDB_API_KEY.")
    return wandb.Api()


@contextmanager
def _wandb_errors(source: str) -> Iterator[None]:
    from wandb import errors

    try:
        yield
    except (errors.AuthenticationError, errors.UsageError) as error:
        raise ValueError(f"{source!r}: Weights & Biases refuses the login: {error}") from error
    except errors.Error as error:
        missing = re.search(r"not find|not found|404|does not exist", str(error), re.IGNORECASE)
        if missing:
            raise ValueError(f"{source!r}: there is no such run or file, or no access to it: {error}") from error
        raise OSError(f"{source!r} cannot be fetched: {error}") from error
    except OSError as error:
        raise OSError(f"{source!r} cannot be fetched: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source!r}: {error}") from error
