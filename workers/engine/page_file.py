"""A KV page as a file: safetensors with one tensor per slab kind, its identity in the metadata, a checksum over all.

The checksum covers every byte of the file, its own place read as zeros. A file is believed only if the checksum fits
and the identity is the one that was asked for: the whole chain, and with it model, dtype, page size and isolation tag,
is in `key`, `parent` and `root`; the tokens are compared as well. Pure: bytes in, bytes out.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from workers.engine.page_chain import PageName

FORMAT = "spillway-page-1"
MAX_HEADER_BYTES = 1 << 20
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_NO_CHECKSUM = "0" * 64


class CorruptPage(Exception):
    """The file is not the page it should be; the message says why."""


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor of every page of a model: its safetensors dtype (F32, BF16, …) and its shape."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class PageIdentity:
    """What a file must be: the model's salt, the page's name and root, and how its tensors are laid out."""

    salt: str
    root: bytes
    name: PageName
    layout: tuple[TensorLayout, ...]


def encode_page(identity: PageIdentity, content: Sequence[bytes]) -> bytes:
    """The file's bytes; `content` holds the bytes of each tensor of the layout."""
    assert [len(part) for part in content] == [tensor.nbytes for tensor in identity.layout]
    blank = _header(identity, _NO_CHECKSUM)
    checksum = _digest([blank, *content])
    return b"".join((_header(identity, checksum), *content))


def decode_page(identity: PageIdentity, blob: bytes) -> list[memoryview]:
    """The bytes of each tensor; raises CorruptPage unless every byte is what `encode_page` wrote for this identity."""
    header, metadata = read_header(blob)
    stated = metadata.get("checksum", "")
    if header != _header(identity, stated):
        raise CorruptPage("another page, model, layout or format")
    data = memoryview(blob)[len(header) :]
    if _digest([_header(identity, _NO_CHECKSUM), data]) != stated:
        raise CorruptPage("the checksum does not fit")
    parts: list[memoryview] = []
    at = 0
    for tensor in identity.layout:
        parts.append(data[at : at + tensor.nbytes])
        at += tensor.nbytes
    if at != len(data):
        raise CorruptPage("the data has another length")
    return parts


def read_header(start: bytes) -> tuple[bytes, dict[str, str]]:
    """The header's bytes, length field included, and its metadata; raises CorruptPage."""
    if len(start) < _LENGTH.size:
        raise CorruptPage("too short for a header")
    (length,) = _LENGTH.unpack_from(start)
    if length > MAX_HEADER_BYTES or len(start) < _LENGTH.size + length:
        raise CorruptPage("the header is cut off")
    header = bytes(start[: _LENGTH.size + length])
    try:
        metadata: Any = json.loads(header[_LENGTH.size :])["__metadata__"]
        return header, {str(key): str(value) for key, value in cast("dict[Any, Any]", metadata).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptPage("the header cannot be read") from error


def belongs(metadata: dict[str, str], salt: str, key: bytes, layout: Sequence[TensorLayout]) -> bool:
    """Whether a header names this salt, key and layout; what else it must be is checked when it is read."""
    return (
        metadata.get("format") == FORMAT
        and metadata.get("salt") == _salt_digest(salt)
        and metadata.get("key") == key.hex()
        and metadata.get("layout") == _layout_text(layout)
    )


def file_bytes(header: bytes, layout: Sequence[TensorLayout]) -> int:
    """How long the whole file must be."""
    return len(header) + sum(tensor.nbytes for tensor in layout)


def _header(identity: PageIdentity, checksum: str) -> bytes:
    tensors: dict[str, Any] = {}
    at = 0
    for number, tensor in enumerate(identity.layout):
        span = [at, at + tensor.nbytes]
        tensors[f"kind.{number}"] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": span}
        at += tensor.nbytes
    name = identity.name
    metadata = {
        "format": FORMAT,
        "salt": _salt_digest(identity.salt),
        "root": identity.root.hex(),
        "parent": name.parent.hex(),
        "key": name.key.hex(),
        "position": str(name.position),
        "tokens": ",".join(map(str, name.tokens)),
        "layout": _layout_text(identity.layout),
        "checksum": checksum,
    }
    text = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


def _layout_text(layout: Sequence[TensorLayout]) -> str:
    return ";".join(f"{tensor.dtype}{list(tensor.shape)}" for tensor in layout)


def _salt_digest(salt: str) -> str:
    return hashlib.blake2b(salt.encode(), digest_size=16).hexdigest()


def _digest(parts: Sequence[bytes | memoryview]) -> str:
    total = hashlib.blake2b(digest_size=32)
    for part in parts:
        total.update(part)
    return total.hexdigest()
