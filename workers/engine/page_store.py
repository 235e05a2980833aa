"""KV pages: fixed-size blocks of tokens in two slab arrays per layer, [pages, kv_heads, page_tokens, head_dim].

The truth about KV that outlives a row: prompts and answers are written here page by page and gathered back when a
sequence with the same beginning joins. Page numbers come from the page table. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import mlx.core as mx

from workers.engine.slot_cache import LayerShape, zeros

_FIRST_PAGES = 32


class PageStore:
    """Slabs that grow by doubling up to `pages`, so that memory follows use."""

    def __init__(self, shapes: Items[LayerShape], pages: int, page_tokens: int) -> None:
        self._shapes = shapes
        self._pages = pages
        self._page_tokens = page_tokens
        self._size = 0
        self.slabs: list[mx.array] = []

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)

    def clear(self) -> None:
        """Drop the slabs; every page must have been given up before."""
        self._size = 0
        self.slabs = []

    def write(self, pages: Items[int], rows: Items[mx.array]) -> None:
        """Fill pages from keys and values [1, kv_heads, len(pages) * page_tokens, head_dim] of all layers."""
        self._grow(max(pages) + 1)
        index = mx.array(list(pages))
        for at, row in enumerate(rows):
            _, heads, _, dim = row.shape
            blocks = row.reshape(heads, len(pages), self._page_tokens, dim).transpose(1, 0, 2, 3)
            self.slabs[at][index] = blocks

    def gather(self, pages: Items[int]) -> list[mx.array]:
        """Keys and values [1, kv_heads, len(pages) * page_tokens, head_dim] of all layers."""
        index = mx.array(list(pages))
        return [_joined(slab[index]) for slab in self.slabs]

    def _grow(self, needed: int) -> None:
        if needed <= self._size:
            return
        size = max(self._size, _FIRST_PAGES)
        while size < needed:
            size *= 2
        size = min(size, self._pages)
        fresh = zeros(self._shapes, size - self._size, self._page_tokens)
        self.slabs = (
            [mx.concatenate(list(pair)) for pair in zip(self.slabs, fresh, strict=True)] if self.slabs else fresh
        )
        self._size = size


def _joined(blocks: mx.array) -> mx.array:
    pages, heads, tokens, dim = blocks.shape
    return blocks.transpose(1, 0, 2, 3).reshape(1, heads, pages * tokens, dim)
