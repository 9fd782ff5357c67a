"""Calls to the Hub: bounded waits, second tries, and errors that say what to do without saying the token."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from e2e_sae_plugin.cache_folders import cache_problem

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

SILENCE_SECONDS = 120.0
"""How long a connection may stay silent. The Hub's client waits for ever by default."""
PAUSES_SECONDS = (1.0, 2.0, 4.0)
"""Before the second, third and fourth try of what failed for a reason that may pass."""
LONGEST_PAUSE_SECONDS = 300.0
"""A Hub that asks for a longer one (Retry-After) is believed, and the call fails."""
PASSING_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
MADE_UP_TOKEN = re.compile(r"hf_[A-Za-z0-9]{4,}")


class HubError(OSError):
    """The Hub refused, failed or could not be reached; the message says at what, and what to do.

    Attributes:
        status: the HTTP status, where there was an answer.
        may_pass: whether the same call may succeed later: no connection, too many requests, a fault of the server.
        missing: "repository", "revision" or "file", where the Hub says that it has none.
        pause: seconds that the Hub asks to wait.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        may_pass: bool = False,
        missing: str | None = None,
        pause: float | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.may_pass = may_pass
        self.missing = missing
        self.pause = pause


def hub_call(doing: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the Hub's client once.

    Args:
        doing: what is being done, for the error: "create the repository me/saes".
        function: of `huggingface_hub`, with its arguments; a `token` among these is kept out of the error.

    Raises:
        HubError: what the client raised, in words. It does not hold the client's exception, whose request and text may
            hold the token.
        ValueError: a name that the Hub does not allow.
    """
    try:
        with bounded_waits():
            return function(*args, **kwargs)
    except Exception as error:
        problem = _explained(doing, error, kwargs.get("token"))
    # Outside the except clause, or the client's exception would hang on to this one as its context.
    raise problem


def persistent_hub_call(doing: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`hub_call`, tried again while what went wrong may pass. For calls that do no harm when they are done twice."""
    for n_tries in range(1, len(PAUSES_SECONDS) + 1):
        try:
            return hub_call(doing, function, *args, **kwargs)
        except HubError as error:
            if not pause_before_next_try(error, n_tries):
                raise
    return hub_call(doing, function, *args, **kwargs)


def pause_before_next_try(error: HubError, n_tries: int) -> bool:
    """Wait, if another try makes sense; False if none does."""
    if not error.may_pass or n_tries > len(PAUSES_SECONDS):
        return False
    pause = max(PAUSES_SECONDS[n_tries - 1], error.pause or 0.0)
    if pause > LONGEST_PAUSE_SECONDS:
        return False
    logger.warning("%s Trying again in %.0f s (%d of %d).", error, pause, n_tries, len(PAUSES_SECONDS))
    time.sleep(pause)
    return True


@contextmanager
def bounded_waits() -> Iterator[None]:
    """Give the client's connections a timeout, unless whoever made the client has given them one."""
    client = get_session()
    before = client.timeout
    if before.read is None:
        client.timeout = SILENCE_SECONDS
    try:
        yield
    finally:
        client.timeout = before


def without_token(text: str, token: str | bool | None = None) -> str:
    """`text` without any token in it: the one given, the one logged in with, or what looks like one."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "<token>")
    return MADE_UP_TOKEN.sub("<token>", text)


def _explained(doing: str, error: Exception, token: Any) -> Exception:
    """The error that a user gets for what the client raised."""
    if isinstance(error, HubError):
        return error
    if isinstance(error, HFValidationError):
        return ValueError(f"Could not {doing}: {without_token(str(error), token)}")
    status = _status_of(error)
    said = without_token(_what_was_said(error), token)
    reason, missing = _reason(error, status)
    return HubError(
        f"Could not {doing}: {reason}" + (f" ({'' if status is None else 'The Hub: '}{said})" if said else ""),
        status=status,
        may_pass=status in PASSING_STATUSES if status is not None else _is_of_the_connection(error),
        missing=missing,
        pause=_pause_asked_for(error),
    )


def _reason(error: Exception, status: int | None) -> tuple[str, str | None]:
    """What went wrong and what to do; and what is missing."""
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Log in with `hf auth login`, or set HF_TOKEN.", None
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it.", None
    if isinstance(error, GatedRepoError):
        return "the repository is gated. Accept its conditions on its page, and log in with `hf auth login`.", None
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision. Check its branches, tags and commits.", "revision"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return "there is no such file.", "file"
    if isinstance(error, RepositoryNotFoundError):
        advice = "Check the name; for a private one, log in with `hf auth login` or set HF_TOKEN."
        return f"there is no such repository, or this token may not see it. {advice}", "repository"
    if status == 401:
        return (
            "the Hub does not accept the token. Log in again (`hf auth login`), or set HF_TOKEN to a valid one.",
            None,
        )
    if status == 403:
        return "this token may not do that. Use one with write access to the repository's owner.", None
    if status == 412:
        return "somebody else has committed to it meanwhile.", None
    if status == 413:
        return "the Hub finds it too large.", None
    if status == 429:
        return "the Hub is asked too often. Wait a while and repeat it.", None
    if status is not None and status >= 500:
        return f"the Hub failed (HTTP {status}). Repeat it later.", None
    if status is not None:
        return f"the Hub refused (HTTP {status}).", None
    if _is_of_the_connection(error):
        return (
            f"no answer from {constants.ENDPOINT} ({type(error).__name__}). Check the connection and repeat it.",
            None,
        )
    if isinstance(error, OSError):
        return cache_problem(error) or f"{error.strerror or type(error).__name__}.", None
    return f"something failed on this side, or the Hub's answer was not understood ({type(error).__name__}).", None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it came from: the client wraps some in a RuntimeError or a LocalEntryNotFoundError."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _status_of(error: Exception) -> int | None:
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code
    return None


def _pause_asked_for(error: Exception) -> float | None:
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            asked = cause.response.headers.get("Retry-After", "")
            return float(asked) if asked.isdigit() else None
    return None


def _what_was_said(error: Exception) -> str:
    """The server's own words, where there are any; of other errors their text."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return " ".join((cause.server_message or "").split())
    return " ".join(str(error).split())


def _is_of_the_connection(error: Exception) -> bool:
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error)):
        return False
    # The client's transport errors have no common class that holds from one of its major versions to the next.
    return any(
        isinstance(cause, ConnectionError | TimeoutError | LocalEntryNotFoundError)
        or (base.__name__ == "TransportError" and base.__module__.partition(".")[0].startswith("httpx"))
        for cause in _causes(error)
        for base in type(cause).__mro__
    )
