"""JSON from files that anyone may have written: whatever is wrong with it is one kind of error."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Return the value of JSON text.

    Raises:
        ValueError: not JSON (a `json.JSONDecodeError`, which knows the place), nested too deeply,
            a number of thousands of digits, or text with half a character, which no file can hold.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:
        # Escapes can spell one half of a pair; UnicodeEncodeError is a ValueError.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value
