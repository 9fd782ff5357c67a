"""Names that the Hub and SAELens can have."""

from __future__ import annotations

import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_LEGAL_PART = re.compile(r"[\w+=][\w.+=-]*", re.ASCII)
_LONGEST_PART, _LONGEST_ID = 200, 500
_OWN_PLACES = ("readme.md", "figures")
"""What a repository of SAEs has besides them, at its root."""
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
# What git allows in the name of a branch, less what nobody means.
_BRANCH = re.compile(r"(?!.*(\.\.|//|/\.|@\{|\.lock(/|$)|[/.]$))[A-Za-z0-9_][A-Za-z0-9_./+=@-]*")


def check_repo_id(repo_id: str, name: str = "repo_id") -> None:
    """Check the name of a repository.

    Args:
        name: what the setting is called, for the error.

    Raises:
        ValueError: it is not `owner/name` as the Hub spells it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{name}={repo_id!r} is no repository's name: {error}") from error
    if "/" not in repo_id:  # the Hub would take the user's own, but SAELens loads none without an owner
        raise ValueError(f"{name}={repo_id!r} must be OWNER/NAME.")


def sae_id_problem(sae_id: str) -> str | None:
    """What is wrong with an SAE's id, which is a folder in the repository; None for nothing."""
    if not isinstance(sae_id, str) or not all(_LEGAL_PART.fullmatch(part) for part in sae_id.split("/")):
        return (
            f"{sae_id!r} cannot be an SAE's id, which is a folder in the repository: use letters, digits and _ . - + =, "
            "with / between folders, and no leading dot."
        )
    if len(sae_id) > _LONGEST_ID or any(len(part) > _LONGEST_PART for part in sae_id.split("/")):
        return f"{sae_id[:30]!r}... is too long for an SAE's id: use {_LONGEST_PART} characters or less in a folder's name."
    first, *_, last = sae_id.casefold().split("/") * 2
    if first in _OWN_PLACES or last.endswith((".json", ".safetensors", ".sha256")):
        return f"{sae_id!r} cannot be an SAE's id: it is the name of a file or folder that the repository has besides."
    return None


def check_revision(revision: str, name: str = "revision") -> None:
    """Check the name of a branch that may have to be made.

    Args:
        name: what the setting is called, for the error.

    Raises:
        ValueError: git has no such names, or it looks like a commit's.
    """
    if not isinstance(revision, str) or not _BRANCH.fullmatch(revision):
        raise ValueError(
            f"{name}={revision!r} is no name for a branch: use letters, digits and _ . - / without spaces."
        )
    if _COMMIT.fullmatch(revision):
        raise ValueError(f"{name}={revision!r} looks like a commit, and only branches can be added to. Name a branch.")


def check_license(license: str) -> None:
    """Check the form of a licence's identifier; the Hub knows which there are.

    Raises:
        ValueError: it cannot be one.
    """
    if not isinstance(license, str) or not _LICENSE.fullmatch(license):
        raise ValueError(
            f"license={license!r} is no identifier as the Hub spells them, in lower case: for instance 'mit', "
            "'apache-2.0' or 'other'."
        )
