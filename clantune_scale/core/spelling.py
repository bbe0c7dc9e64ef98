"""Finds the known word nearest to a misspelt one, for errors that ask "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word most like ``word``, or None if none is like it.

    Args:
        word: what the user wrote; case and the kind of separator do not count.
        known: what the user could have written.
        cutoff: least similarity, 0 to 1, by :class:`difflib.SequenceMatcher`.
    """
    by_plain = {_plain(candidate): candidate for candidate in known}
    found = difflib.get_close_matches(_plain(word), by_plain, n=1, cutoff=cutoff)
    return by_plain[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """``" Did you mean 'x'?"`` for the known word most like ``word``, or an empty string."""
    found = nearest(word, known, cutoff=cutoff)
    return f" Did you mean {found!r}?" if found else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_")
