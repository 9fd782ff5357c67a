"""Near matches of what was typed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(typed: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known words that may have been meant, likeliest first.

    A word that differs in case, hyphens and underscores alone is the only answer. Then come similar spellings; where there
    are none, words that hold what was typed, which finds `--train_batch_size_tokens` from `--batch_size`.
    """
    spelled: dict[str, list[str]] = {}
    for word in known:
        spelled.setdefault(_plain(word), []).append(word)
    key = _plain(typed)
    if key in spelled:
        return spelled[key][:n]
    score = {each: difflib.SequenceMatcher(None, each, key).ratio() for each in spelled}
    # Of a clear favourite's distant relatives nothing is said; of two letters, one is a good part.
    least = max(0.6 if len(key) <= 3 else 0.7, max(score.values(), default=0) - 0.1)
    close = sorted((each for each in spelled if score[each] >= least), key=lambda each: -score[each])
    if not close and len(key) > 2:
        close = sorted((each for each in spelled if key in each), key=len)[:n]
    return [word for each in close for word in spelled[each]][:n]


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """A sentence with the near matches, after a space; empty where there are none."""
    found = near(typed, known)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _plain(word: str) -> str:
    return word.lstrip("-").replace("-", "_").lower()
