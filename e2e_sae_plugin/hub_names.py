"""Names that the Hub and SAELens can have."""

from __future__ import annotations

import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_LEGAL_PART = re.compile(r"[\w+=][\w.+=-]*", re.ASCII)


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
    if isinstance(sae_id, str) and all(_LEGAL_PART.fullmatch(part) for part in sae_id.split("/")):
        return None
    return (
        f"{sae_id!r} cannot be an SAE's id, which is a folder in the repository: use letters, digits and _ . - + =, with / "
        "between folders, and no leading dot."
    )
