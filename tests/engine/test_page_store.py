"""The page store: what is written comes back, in few arrays, through growth, other kinds of layers and the host."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.page_store import PageStore
from workers.engine.slot_cache import LayerShape

PAGE = 4
MIXED = (
    LayerShape(2, 8, 8, mx.float32),
    LayerShape(1, 6, 4, mx.bfloat16),
    LayerShape(2, 8, 8, mx.float32),
    LayerShape(2, 8, 8, mx.float16),
)


def _rows(shapes: tuple[LayerShape, ...], tokens: int, seed: int) -> list[mx.array]:
    key = mx.random.key(seed)
    rows: list[mx.array] = []
    for at, shape in enumerate(shapes):
        for dim in (shape.key_dim, shape.value_dim):
            drawn = mx.random.normal((1, shape.kv_heads, tokens, dim), key=mx.random.split(key, at + 2)[at])
            rows.append(drawn.astype(shape.dtype))
    return rows


def _same(left: list[mx.array], right: list[mx.array]) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and bool(mx.all(a == b)) for a, b in zip(left, right, strict=True)
    )


def test_pages_come_back_as_written_in_any_order() -> None:
    store = PageStore(MIXED, 100, PAGE)
    pages = [70, 3, 4, 5, 33, 31, 32, 99]
    rows = _rows(MIXED, len(pages) * PAGE, 1)
    store.write(pages, rows)
    assert _same(store.gather(pages), rows)
    assert _same(store.gather(pages[2:5]), [row[:, :, 2 * PAGE : 5 * PAGE] for row in rows])


def test_what_is_copied_out_can_be_copied_in_elsewhere() -> None:
    store, other = PageStore(MIXED, 64, PAGE), PageStore(MIXED, 64, PAGE)
    rows = _rows(MIXED, 3 * PAGE, 2)
    store.write([1, 2, 9], rows)
    contents = store.copy_out([1, 2, 9])
    assert all(sum(block.nbytes for block in content) == store.page_bytes for content in contents)
    other.copy_in([40, 0, 7], contents)
    assert _same(other.gather([40, 0, 7]), rows)


def test_layers_of_one_kind_share_their_slabs_and_growth_copies_nothing() -> None:
    shapes = (LayerShape(2, 8, 8, mx.float32),) * 30
    store = PageStore(shapes, 1000, PAGE)
    store.write([0], _rows(shapes, PAGE, 3))
    assert len(store.slabs) == 1
    first = store.slabs[0]
    store.write([999], _rows(shapes, PAGE, 4))
    assert len(store.slabs) == 6
    assert store.slabs[0] is first
    assert store.nbytes == 1000 * store.page_bytes


def test_no_layers_need_no_slabs() -> None:
    store = PageStore((), 10, PAGE)
    store.write([0, 1], [])
    assert store.gather([0, 1]) == [] and store.nbytes == 0


def test_a_host_copy_does_not_follow_later_writes() -> None:
    store = PageStore(MIXED, 8, PAGE)
    store.write([2], _rows(MIXED, PAGE, 5))
    (content,) = store.copy_out([2])
    before = [block.copy() for block in content]
    store.write([2], _rows(MIXED, PAGE, 6))
    mx.eval(store.slabs)
    assert all(np.array_equal(a, b) for a, b in zip(content, before, strict=True))


@pytest.mark.parametrize("shapes", [MIXED[:1], MIXED])
@settings(max_examples=30, deadline=None)
@given(writes=st.lists(st.lists(st.integers(0, 79), min_size=1, max_size=6, unique=True), max_size=8))
def test_any_order_of_writes_reads_like_a_dictionary(shapes: tuple[LayerShape, ...], writes: list[list[int]]) -> None:
    store, expected = PageStore(shapes, 80, PAGE), dict[int, list[mx.array]]()
    for seed, pages in enumerate(writes):
        rows = _rows(shapes, len(pages) * PAGE, seed)
        store.write(pages, rows)
        for at, page in enumerate(pages):
            expected[page] = [row[:, :, at * PAGE : (at + 1) * PAGE] for row in rows]
    for page, rows in expected.items():
        assert _same(store.gather([page]), rows)
