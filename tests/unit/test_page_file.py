"""A page's file: whatever is not byte for byte the page that was asked for is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.page_chain import PageName, chain, chain_root
from workers.engine.page_file import (
    CorruptPage,
    PageIdentity,
    TensorLayout,
    belongs,
    decode_page,
    encode_page,
    file_bytes,
    read_header,
)

LAYOUT = (TensorLayout("F32", (2, 1, 4, 2), 64), TensorLayout("BF16", (1, 1, 4, 3), 24))
ROOT = chain_root("model", 4, "tenant")
CONTENT = [bytes(range(64)), bytes(range(100, 124))]


def _identity(tokens: list[int] | None = None) -> PageIdentity:
    names = list(chain(ROOT, tokens or [1, 2, 3, 4, 5, 6, 7, 8], 4))
    return PageIdentity("model", ROOT, names[-1], LAYOUT)


def test_a_page_comes_back() -> None:
    blob = encode_page(_identity(), CONTENT)
    assert [bytes(part) for part in decode_page(_identity(), blob)] == CONTENT


def test_the_file_is_safetensors() -> None:
    blob = encode_page(_identity(), CONTENT)
    (length,) = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8 : 8 + length])
    assert header["kind.0"] == {"dtype": "F32", "shape": [2, 1, 4, 2], "data_offsets": [0, 64]}
    assert header["kind.1"] == {"dtype": "BF16", "shape": [1, 1, 4, 3], "data_offsets": [64, 88]}
    assert len(blob) == 8 + length + 88 and (8 + length) % 8 == 0


def test_any_flipped_byte_is_refused() -> None:
    blob, rng = encode_page(_identity(), CONTENT), random.Random(1)
    for at in range(len(blob)):
        for mask in (1, 0x20, rng.randrange(1, 256)):
            broken = bytearray(blob)
            broken[at] ^= mask
            with pytest.raises(CorruptPage):
                decode_page(_identity(), bytes(broken))


def test_any_truncation_and_any_appendix_is_refused() -> None:
    blob = encode_page(_identity(), CONTENT)
    for length in range(len(blob)):
        with pytest.raises(CorruptPage):
            decode_page(_identity(), blob[:length])
    with pytest.raises(CorruptPage):
        decode_page(_identity(), blob + b"\0")


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(blob: bytes) -> None:
    with pytest.raises(CorruptPage):
        decode_page(_identity(), blob)


@given(st.binary(max_size=200))
def test_an_arbitrary_header_is_refused(text: bytes) -> None:
    with pytest.raises(CorruptPage):
        decode_page(_identity(), struct.pack("<Q", len(text)) + text + b"".join(CONTENT))


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(_identity(), salt="another model"),
        dataclasses.replace(_identity(), root=chain_root("model", 4, "another tenant")),
        dataclasses.replace(_identity(), layout=(dataclasses.replace(LAYOUT[0], dtype="F16"), LAYOUT[1])),
        dataclasses.replace(_identity(), layout=(LAYOUT[0], dataclasses.replace(LAYOUT[1], shape=(1, 3, 4, 1)))),
        _identity([1, 2, 3, 4, 5, 6, 7, 9]),
        _identity([9, 2, 3, 4, 5, 6, 7, 8]),
        _identity([5, 6, 7, 8]),
    ],
)
def test_another_page_is_refused_and_so_is_a_page_in_its_place(other: PageIdentity) -> None:
    with pytest.raises(CorruptPage):
        decode_page(other, encode_page(_identity(), CONTENT))
    same_key = dataclasses.replace(other.name, key=_identity().name.key)
    with pytest.raises(CorruptPage):
        decode_page(_identity(), encode_page(dataclasses.replace(other, name=same_key), CONTENT))


def test_the_header_alone_tells_whose_page_it_is() -> None:
    identity = _identity()
    blob = encode_page(identity, CONTENT)
    header, metadata = read_header(blob[: len(blob) - 88])
    assert file_bytes(header, LAYOUT) == len(blob)
    assert belongs(metadata, "model", identity.name.key, LAYOUT)
    assert not belongs(metadata, "other", identity.name.key, LAYOUT)
    assert not belongs(metadata, "model", b"another", LAYOUT)
    assert not belongs(metadata, "model", identity.name.key, LAYOUT[:1])


@given(st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4), st.binary(min_size=64, max_size=64))
def test_any_page_comes_back(tokens: list[int], data: bytes) -> None:
    identity = PageIdentity("model", ROOT, PageName(b"k" * 16, ROOT, 0, tuple(tokens)), LAYOUT)
    content = [data, data[:24]]
    assert [bytes(part) for part in decode_page(identity, encode_page(identity, content))] == content
