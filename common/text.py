"""Bytes -> text, by one rule for captions, prompts and metadata; and durations in words."""

import codecs
import re

NO_TEXT = re.compile("[\x00-\x08\x0e-\x1b\ud800-\udfff]")  # control characters but for spaces; halves of surrogate pairs


def read_text(encoded: bytes) -> str:
    """UTF-8, with or without a byte order mark; UTF-16 with one, or without one where it cannot be mistaken.

    Raises ValueError with the reason for all else: a wrong letter in its place would be learned, or drawn.
    """
    marked = encoded.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    guessed = None if marked else utf16_by_its_zeros(encoded)
    try:
        text = encoded.decode("utf-16" if marked else guessed or "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("neither UTF-8 nor UTF-16: save it as UTF-8") from None
    if NO_TEXT.search(text) or (guessed and not all(c.isprintable() or c.isspace() for c in text)):
        raise ValueError("no text: it holds control characters: save it as UTF-8")
    return text


def utf16_by_its_zeros(encoded: bytes) -> str | None:
    """The byte order of text most of whose 16-bit units have a zero at the same place, and none at the other."""
    for name, high, low in (("utf-16-le", 1, 0), ("utf-16-be", 0, 1)):
        if len(encoded) % 2 == 0 and 4 * encoded[high::2].count(0) > len(encoded) and 0 not in encoded[low::2]:
            return name
    return None


def duration(seconds: float) -> str:
    """'50 seconds', '4 minutes', '2 h 5 min'."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
