"""The name of a page: a hash over its tokens and the page before it, from a root that says whose KV it is. Pure.

The root covers the model's salt (see page_salt), the page size and an isolation tag, so that equal tokens of another
model, page size or tenant have other names. Names are kept on disk: what goes into them must not depend on the machine.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class PageName:
    """One full page of a chain; `position` counts pages from the chain's start."""

    key: bytes
    parent: bytes
    position: int
    tokens: tuple[int, ...]


def chain_root(salt: str, page_tokens: int, isolation: str) -> bytes:
    """What the first page of a chain follows."""
    parts = "\0".join((salt, str(page_tokens), isolation))
    return hashlib.blake2b(parts.encode(), digest_size=_DIGEST_BYTES).digest()


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of the page with these tokens behind the page `parent`."""
    return hashlib.blake2b(token_bytes(tokens), key=parent, digest_size=_DIGEST_BYTES).digest()


def token_bytes(tokens: Sequence[int]) -> bytes:
    """The tokens as little-endian u32."""
    words = array("I", tokens)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def chain(root: bytes, tokens: Sequence[int], page_tokens: int) -> Iterator[PageName]:
    """Each full page of `tokens`, in order."""
    parent = root
    for position in range(len(tokens) // page_tokens):
        block = tuple(tokens[position * page_tokens : (position + 1) * page_tokens])
        name = PageName(page_key(parent, block), parent, position, block)
        yield name
        parent = name.key
