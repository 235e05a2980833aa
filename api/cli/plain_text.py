"""What others wrote, made safe to print: a model or a client must not drive the terminal."""

from __future__ import annotations

import re

# All control characters but line ends and tabs; \r would let a line overwrite itself.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """The text with control characters shown as U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
