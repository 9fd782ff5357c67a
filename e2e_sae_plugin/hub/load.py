"""`load_pretrained`: SAEs of SAELens's releases and of Hub repositories, at a revision, with their files compared."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import DTYPE_MAP, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.loading.pretrained_sae_loaders import (
    get_sae_lens_config_from_disk,
    load_safetensors_weights,
    read_sae_components_from_disk,
)
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_pretrained_saes_directory,
    get_releases_for_repo_id,
)
from safetensors import SafetensorError
from torch import Tensor

from e2e_sae_plugin.hub.calls import HubError, hub_call
from e2e_sae_plugin.hub.download import DamagedDownloadError, check_cached, discard, fetch_folder, list_files
from e2e_sae_plugin.hub.foreign import with_dtype
from e2e_sae_plugin.hub.published import (
    MODEL_SETTINGS,
    PUBLISHED_NAME,
    PublishedSAE,
    choose_published,
    complete_metadata,
    published_at_place,
)
from e2e_sae_plugin.hub.revision import MAIN, Resolved, relative_path, remember, resolve

logger = logging.getLogger(__name__)

N_LISTED = 20
SAELENS_FORMAT = "sae_lens"
Token = str | bool | None


def load_pretrained(
    repo_or_release: str,
    sae_id: str | None = None,
    *,
    revision: str | None = None,
    layer: int | None = None,
    kind: str | None = None,
    matched: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    token: Token = None,
    force_download: bool = False,
) -> SAE[Any]:
    """An SAE of the Hub, as `SAE.from_pretrained` gives it, with a revision and with its files compared.

    ```python
    sae = load_pretrained("me/my-saes", "blocks.6.hook_resid_pre", revision="v2")
    sae = load_pretrained("e2e-sae-gpt2-small", layer=6, kind="e2e+ds", matched="ce")
    ```

    All files come from one commit, which `sae.cfg.metadata.loaded_from` names. They are compared with the Hub's digests and
    with `checksums.sha256` where the repository has one; so are those in the cache. Without a Hub to ask, the cache is
    used, and a warning says so.

    Args:
        repo_or_release: a repository `owner/name` or `owner/name@revision` in SAELens's format; a release of SAELens, in
            whatever format; or `"e2e-sae-gpt2-small"`, the paper's SAEs.
        sae_id: which SAE of it. May be left out where there is one. `"."`: the repository itself is the SAE's folder.
        revision: a branch, a tag, `refs/pr/N` or a commit; default `"main"`.
        layer: of the paper's SAEs: 2, 6 or 10.
        kind: of the paper's SAEs: "local", "e2e" or "e2e+ds".
        matched: of the paper's SAEs: "ce", similar CE loss increase, or "l0", similar L0.
        device: where to put it.
        dtype: of its weights; default `"float32"`, whatever they are saved as, as in SAELens.
        token: of the Hub; default: the one logged in with.
        force_download: fetch it though the cache has it.

    Raises:
        ValueError: no such release, no such SAE of a release, no `sae_id` where there are several (what there is is
            listed), a folder, a dtype that is not known, a revision of a release in another format than SAELens's, or an
            SAE that SAELens cannot load.
        HubError: the repository, revision or SAE is not there; the Hub refuses; or it cannot be reached, and the cache does
            not have the SAE.
        DamagedDownloadError: a file is not what it should be, even when fetched again.
    """
    name, revision = _with_revision(str(repo_or_release), revision)
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPE_MAP:
        names = [name for name in DTYPE_MAP if not name.startswith("torch.")]
        raise ValueError(f"dtype={dtype!r} is not known. Expected one of {', '.join(names)}.")
    _check_device(device)
    asked = {"layer": layer, "kind": kind, "matched": matched}
    settings: dict[str, Any] = {"device": str(device), "dtype": dtype, "token": token, "force_download": force_download}
    if name == PUBLISHED_NAME:
        if sae_id is not None:
            raise ValueError(f"{PUBLISHED_NAME} is asked for by layer, kind and matched, not by sae_id={sae_id!r}.")
        return _load_published(choose_published(layer, kind, matched), revision, settings)
    if given := [key for key, value in asked.items() if value is not None]:
        raise ValueError(
            f"{' and '.join(given)} can only be given for {PUBLISHED_NAME!r}, got {name!r}. Give a sae_id instead."
        )
    return _load(name, sae_id, revision, settings)


def _check_device(device: str | torch.device) -> None:
    """Raise ValueError for one that is not here: SAELens's reader would take that for a damaged file."""
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={str(device)!r} cannot be used here: {reason} Use 'cpu', or one that is here."
        ) from None


def _load_published(row: PublishedSAE, revision: str | None, settings: dict[str, Any]) -> SAE[Any]:
    try:
        return _load(row.release, row.sae_id, revision, settings)
    except HubError as error:
        if error.missing is None or row.same_run_as is None or revision is not None:
            raise
        logger.info("%s The same run is in %s: that is taken.", error, row.same_run_as)
    return _load(row.same_run_as, row.sae_id, revision, settings)


def _load(name: str, sae_id: str | None, revision: str | None, settings: dict[str, Any]) -> SAE[Any]:
    release = get_pretrained_saes_directory().get(name)
    if release is None:
        _check_repository_name(name)
    if release is not None:
        sae_id = _chosen(sae_id, list(release.saes_map), f"The release {name!r}")
        if release.conversion_func not in (None, SAELENS_FORMAT):
            return _load_other_format(release, sae_id, revision, settings)
    repo_id = name if release is None else release.repo_id
    doing = f"load the SAE {sae_id} of {name}" if sae_id is not None else f"load the SAE of {name}"
    resolved = resolve(repo_id, revision, token=settings["token"], doing=doing)
    if sae_id is None:
        sae_id = _chosen(None, _sae_ids(resolved, settings["token"]), f"The repository {name!r}")
    folder = relative_path(sae_id if release is None else release.saes_map[sae_id])
    published = published_at_place(repo_id, str(folder))
    try:
        sae = SAE.from_pretrained(
            name, sae_id, device=settings["device"], dtype=settings["dtype"],
            force_download=settings["force_download"], converter=_reader(resolved, published, settings["token"]),
        )  # fmt: skip
    except HubError as error:
        if not (error.missing == "file" or resolved.is_offline) or release is not None:
            raise
        problem = f"{error} {_what_there_is(sae_id, _sae_ids(resolved, settings['token']), name)}"
        raise HubError(problem, status=error.status, missing=error.missing) from None
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"SAELens cannot load {sae_id} of {resolved}: {type(error).__name__}: {error}") from error
    remember(resolved)
    _say_where_from(sae, sae_id, resolved, published)
    return sae


def _reader(
    resolved: Resolved, published: PublishedSAE | None, token: Token
) -> Callable[..., tuple[dict[str, Any], dict[str, Tensor], Tensor | None]]:
    """What SAELens calls to read an SAE of its own format: its own reader, of files of one commit that were compared."""

    def read(
        repo_id: str, folder_name: str, device: str, force_download: bool, cfg_overrides: dict[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
        del repo_id  # known
        required, optional = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME), (SPARSITY_FILENAME,)
        files = fetch_folder(resolved, folder_name, required, optional, token=token, force=force_download)
        overrides = {**(cfg_overrides or {})}
        if published is not None:
            overrides["model_from_pretrained_kwargs"] = dict(MODEL_SETTINGS)
        try:
            cfg = get_sae_lens_config_from_disk(files[SAE_CFG_FILENAME].parent, device, overrides)
            cfg = with_dtype(cfg, files[SAE_WEIGHTS_FILENAME])
            cfg, weights = read_sae_components_from_disk(cfg, files[SAE_WEIGHTS_FILENAME], device)
            sparsity = files.get(SPARSITY_FILENAME)
            return cfg, weights, None if sparsity is None else load_safetensors_weights(sparsity, device)["sparsity"]
        except (SafetensorError, UnicodeDecodeError, JSONDecodeError) as error:
            for path in files.values():
                discard(path)
            raise DamagedDownloadError(
                f"{folder_name} of {resolved} cannot be read: {error}. It was removed from the cache. Load it again; if it "
                "stays so, tell the repository's owner."
            ) from error

    return read


def _load_other_format(
    release: PretrainedSAELookup, sae_id: str, revision: str | None, settings: dict[str, Any]
) -> SAE[Any]:
    """With SAELens's reader of that format, which fetches what it needs by itself; compared afterwards."""
    if revision not in (None, MAIN):
        raise ValueError(
            f"revision={revision!r}: the release {release.release!r} is in the format {release.conversion_func!r}, of which "
            "SAELens reads the branch main only. Leave the revision out."
        )
    if settings["token"] is not None:
        raise ValueError(
            f"The release {release.release!r} is in the format {release.conversion_func!r}, whose reader takes the token "
            "that one is logged in with. Use `hf auth login` or HF_TOKEN instead of token."
        )
    doing = f"load the SAE {sae_id} of {release.release}"
    resolved = resolve(release.repo_id, doing=doing)
    for last_try in (False, True):
        sae, problem = None, None
        try:
            sae = hub_call(
                doing, SAE.from_pretrained, release.release, sae_id,
                device=settings["device"], dtype=settings["dtype"], force_download=settings["force_download"],
            )  # fmt: skip
        except HubError as error:  # or of the reader, at a damaged file
            problem = error
        try:
            check_cached(resolved, release.saes_map[sae_id])
        except DamagedDownloadError as error:
            if last_try or resolved.is_offline:
                raise
            logger.warning("%s It is fetched once more.", error)
            continue
        if sae is None:
            assert problem is not None
            raise problem
        _say_where_from(sae, sae_id, resolved, None)
        return sae
    raise AssertionError("the last try returns or raises")


def _say_where_from(sae: SAE[Any], sae_id: str, resolved: Resolved, published: PublishedSAE | None) -> None:
    sae.cfg.metadata.loaded_from = {
        "repo_id": resolved.repo_id, "sae_id": sae_id.rstrip("/"), "revision": resolved.revision, "commit": resolved.commit,
    }  # fmt: skip
    if published is not None:
        complete_metadata(sae.cfg.metadata, published)


def _with_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """`owner/name@revision` taken apart."""
    name, sign, own = name.partition("@")
    if not sign:
        return name, revision
    if ":" in own:
        raise ValueError(f"{name}@{own} names an SAE too. Give it as sae_id={own.partition(':')[2]!r}.")
    if not own or (revision is not None and revision != own):
        raise ValueError(f"{name}@{own} and revision={revision!r} do not agree: give the revision once.")
    return name, own


def _check_repository_name(name: str) -> None:
    if Path(name).is_dir():
        raise ValueError(f"{name!r} is a folder. Use load_sae({name!r}), which loads SAEs from folders.")
    if "/" not in name:
        known = [*get_pretrained_saes_directory(), PUBLISHED_NAME]
        raise ValueError(
            f"SAELens has no release {name!r}, and it is no repository (owner/name).{_close_to(name, known)}"
        )


def pretrained_ids(repo_id: str, revision: str | None = None, token: Token = None) -> list[str]:
    """The ids of a repository's SAEs in SAELens's format.

    Raises:
        ValueError: no repository's name.
        HubError: the repository or revision is not there, or the Hub cannot be reached.
    """
    name, revision = _with_revision(repo_id, revision)
    _check_repository_name(name)
    return _sae_ids(resolve(name, revision, token=token, doing=f"list the SAEs of {name}"), token)


def _sae_ids(resolved: Resolved, token: Token) -> list[str]:
    """The folders of a repository that hold an SAE in SAELens's format; `"."` is the repository itself."""
    files = set(list_files(resolved, token=token))
    folders = {name.removesuffix(SAE_CFG_FILENAME) for name in files if f"/{name}".endswith(f"/{SAE_CFG_FILENAME}")}
    return sorted(folder.rstrip("/") or "." for folder in folders if folder + SAE_WEIGHTS_FILENAME in files)


def _chosen(sae_id: str | None, there: list[str], whose: str) -> str:
    """`sae_id`, or the only one there is.

    Raises:
        ValueError: lists what there is.
    """
    if sae_id is None and len(there) == 1:
        return there[0]
    if sae_id is None:
        raise ValueError(f"{whose} needs a sae_id. {_listed(there)}")
    if sae_id not in there:
        raise ValueError(f"{whose} has no SAE {sae_id!r}.{_close_to(sae_id, there)} {_listed(there)}")
    return sae_id


def _what_there_is(sae_id: str, there: list[str], repo_id: str) -> str:
    if not there and (releases := get_releases_for_repo_id(repo_id)):
        names = ", ".join(map(repr, releases[:N_LISTED]))
        return f"It is not in SAELens's own format. SAELens reads it as the release {names}: give that name."
    return f"{_close_to(sae_id, there).lstrip()} {_listed(there)}".lstrip()


def _close_to(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _listed(there: list[str]) -> str:
    if not there:
        return f"It holds no SAE in SAELens's format ({SAE_CFG_FILENAME} beside {SAE_WEIGHTS_FILENAME})."
    more = f", and {len(there) - N_LISTED} more" if len(there) > N_LISTED else ""
    return f"It has {len(there)}: {', '.join(there[:N_LISTED])}{more}."
