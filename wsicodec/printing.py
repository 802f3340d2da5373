"""Strings that somebody else wrote, for a terminal or a page: they must not act."""

from __future__ import annotations

MAX_SHOWN = 300


def printable(text: str, limit: int | None = MAX_SHOWN, *, escape: bool = False) -> str:
    """One line of at most ``limit`` characters without control characters; None for no limit.

    Escape sequences, line breaks, marks that turn the direction of writing, and halves of surrogate
    pairs become U+FFFD; with ``escape`` they are written out as Python does, by which a file can be
    found.
    """
    start = text if limit is None else text[: limit + 1]
    line = "".join(c if c.isprintable() else _escaped(c) if escape else "\ufffd" for c in start)
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
