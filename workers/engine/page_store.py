"""KV pages: fixed-size blocks of tokens in a few slab arrays per layer kind, never one array per page or per layer.

All keys and values of equal [kv_heads, head_dim] and dtype share a slab
[pages, arrays, kv_heads, page_tokens, head_dim], so what one page holds of them is one block of memory. Slabs come in
segments, each as large as all before it, so the store grows without copying. Page numbers come from the page table.
Engine thread only.

Rows are given and taken as lists of keys and values of all layers, alternating: [1, kv_heads, tokens, head_dim].
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from workers.engine.slot_cache import LayerShape

_FIRST_PAGES = 32


@dataclass(frozen=True, slots=True)
class SlabKind:
    """One slab's arrays: their places among all layers' keys and values, and what they have in common."""

    arrays: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: mx.Dtype

    def shape(self, pages: int, page_tokens: int) -> tuple[int, ...]:
        return (pages, len(self.arrays), self.kv_heads, page_tokens, self.head_dim)

    def page_bytes(self, page_tokens: int) -> int:
        return len(self.arrays) * self.kv_heads * page_tokens * self.head_dim * self.dtype.size


def slab_kinds(shapes: Items[LayerShape]) -> tuple[SlabKind, ...]:
    """The slabs that layers of these shapes need."""
    kinds: dict[tuple[int, int, mx.Dtype], list[int]] = {}
    for at, shape in enumerate(shapes):
        for offset, dim in enumerate((shape.key_dim, shape.value_dim)):
            kinds.setdefault((shape.kv_heads, dim, shape.dtype), []).append(2 * at + offset)
    return tuple(SlabKind(tuple(arrays), *kind) for kind, arrays in kinds.items())


@dataclass(frozen=True, slots=True)
class _Run:
    """Pages that follow one another in one segment: `first` of `count`, from place `at` of the asked pages."""

    segment: int
    first: int
    count: int
    at: int


class PageStore:
    """Slabs that grow by doubling up to `pages`, so that memory follows use."""

    def __init__(self, shapes: Items[LayerShape], pages: int, page_tokens: int) -> None:
        self.kinds = slab_kinds(shapes)
        self._arrays = 2 * len(shapes)
        self._pages = pages
        self._page_tokens = page_tokens
        self._segments: list[list[mx.array]] = []  # one array per kind

    @property
    def slabs(self) -> list[mx.array]:
        """All slab arrays; evaluate them after writes and before a step, or the step would make them be copied."""
        return [slab for segment in self._segments for slab in segment]

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)

    @property
    def page_bytes(self) -> int:
        return sum(kind.page_bytes(self._page_tokens) for kind in self.kinds)

    def clear(self) -> None:
        """Drop the slabs; every page must have been given up before."""
        self._segments = []

    def write(self, pages: Items[int], rows: Items[mx.array]) -> None:
        """Fill pages from keys and values [1, kv_heads, len(pages) * page_tokens, head_dim] of all layers."""
        blocks = [self._blocks(kind, rows, len(pages)) for kind in self.kinds]
        self._put(pages, blocks)

    def gather(self, pages: Items[int]) -> list[mx.array]:
        """Keys and values [1, kv_heads, len(pages) * page_tokens, head_dim] of all layers, evaluated.

        A gather still in flight would make the next write copy its slab.
        """
        rows: list[mx.array] = [mx.zeros(0)] * self._arrays
        for kind, blocks in zip(self.kinds, self._take(pages), strict=True):
            shape = (len(kind.arrays), 1, kind.kv_heads, len(pages) * self._page_tokens, kind.head_dim)
            joined = blocks.transpose(1, 2, 0, 3, 4).reshape(shape)
            for at, place in enumerate(kind.arrays):
                rows[place] = joined[at]
        mx.eval(rows)
        return rows

    def copy_out(self, pages: Items[int]) -> list[list[np.ndarray]]:
        """Per page, the bytes [u8] of each kind's block, on the host and nobody else's."""
        taken = [mx.contiguous(blocks).view(mx.uint8) for blocks in self._take(pages)]
        mx.eval(taken)
        hosts = [np.array(blocks).reshape(len(pages), -1) for blocks in taken]
        return [[host[at] for host in hosts] for at in range(len(pages))]

    def copy_in(self, pages: Items[int], contents: Items[Items[np.ndarray]]) -> None:
        """Fill pages with what `copy_out` gave, of this or an earlier process."""
        blocks: list[mx.array] = []
        for at, kind in enumerate(self.kinds):
            host = np.concatenate([content[at] for content in contents])
            blocks.append(mx.array(host).view(kind.dtype).reshape(kind.shape(len(pages), self._page_tokens)))
        self._put(pages, blocks)

    def _blocks(self, kind: SlabKind, rows: Items[mx.array], pages: int) -> mx.array:
        together = mx.concatenate([rows[place] for place in kind.arrays])
        shape = (len(kind.arrays), kind.kv_heads, pages, self._page_tokens, kind.head_dim)
        return together.reshape(shape).transpose(2, 0, 1, 3, 4)

    def _put(self, pages: Items[int], blocks: Items[mx.array]) -> None:
        """Runs of pages, not an index array: MLX scatters element by element on a CPU, 6 to 15 times slower."""
        self._grow(max(pages) + 1)
        for run in _runs(pages):
            segment = self._segments[run.segment]
            for at, block in enumerate(blocks):
                segment[at][run.first : run.first + run.count] = block[run.at : run.at + run.count]

    def _take(self, pages: Items[int]) -> list[mx.array]:
        """Per kind, [len(pages), arrays, kv_heads, page_tokens, head_dim]."""
        runs = list(_runs(pages))
        parts = [
            [self._segments[run.segment][at][run.first : run.first + run.count] for run in runs]
            for at in range(len(self.kinds))
        ]
        return [part[0] if len(part) == 1 else mx.concatenate(part) for part in parts]

    def _grow(self, needed: int) -> None:
        while (size := _segment_start(len(self._segments))) < needed:
            pages = min(_segment_start(len(self._segments) + 1), max(self._pages, needed)) - size
            fresh = [mx.zeros(kind.shape(pages, self._page_tokens), kind.dtype) for kind in self.kinds]
            self._segments.append(fresh)


def _segment_start(segment: int) -> int:
    """The first page of a segment: 0, 32, 64, 128, 256, …"""
    return 0 if segment == 0 else _FIRST_PAGES << (segment - 1)


def _segment_of(page: int) -> int:
    return (page // _FIRST_PAGES).bit_length()


def _runs(pages: Items[int]) -> Iterator[_Run]:
    at = 0
    while at < len(pages):
        segment = _segment_of(pages[at])
        count = 1
        while (
            at + count < len(pages)
            and pages[at + count] == pages[at] + count
            and _segment_of(pages[at + count]) == segment
        ):
            count += 1
        yield _Run(segment, pages[at] - _segment_start(segment), count, at)
        at += count
