"""Text that came from outside: names of files and classes, and what may be shown of them."""

import re
import unicodedata
from typing import Any

__all__ = ["duration", "in_order", "is_plain_text", "same_name"]

# What could break a line or show text in another order than it is in; and what stands for bytes that are no text.
_REFUSED = {"Cc", "Cs", "Zl", "Zp"}
_REORDERING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def is_plain_text(value: Any) -> bool:
    """Whether it is text of one line that shows what it is; spaces and emoji of every kind are part of a name."""
    return isinstance(value, str) and not any(
        char in _REORDERING or unicodedata.category(char) in _REFUSED for char in value
    )


def same_name(name: str) -> str:
    """The one form of a name that can be written in several: é as one character or as an e with an accent (NFC)."""
    return unicodedata.normalize("NFC", name)


def in_order(name: str) -> tuple[list[int | str], str]:
    """A key to sort names by: numbers by their value, as in timm; names that differ in case alone by that."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def duration(seconds: float) -> str:
    """Seconds as people read them: 4.2 s, 42 s, 3 min 5 s, 2 h 7 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
