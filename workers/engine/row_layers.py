"""What a model's layers keep per row, for every kind of cache that can be batched, in arrays with one row per sequence.

    KVCache           keys and values [rows, kv_heads, columns, dim], position p in column p
    RotatingKVCache   the same with at most `window` columns, position p in column p mod columns
    ArraysCache       the state of a recurrent layer, arrays [rows, ...]
    CacheList         several of these in one layer

Rows never touch each other: a join writes one row, a leave none. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache


class UnbatchableCache(Exception):
    """This kind of cache has no place in rows; the message names it."""


class RowKV:
    """One attention layer as mlx_lm's models see a cache, for a step of one token per row.

    `mask_rank` is 5 for models that split the heads into groups before they apply the mask.
    """

    def __init__(self, keys: mx.array, values: mx.array, offsets: mx.array, mask_rank: int) -> None:
        self.keys = keys
        self.values = values
        self.offset = offsets
        self._mask_rank = mask_rank

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        column = (self.offset % self.keys.shape[2])[:, None, None, None]
        self.keys = mx.put_along_axis(self.keys, mx.broadcast_to(column, keys.shape), keys, axis=2)
        self.values = mx.put_along_axis(self.values, mx.broadcast_to(column, values.shape), values, axis=2)
        return self.keys, self.values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Which columns hold a token that this row's newest one may look at."""
        assert N == 1
        columns = self.keys.shape[2]
        places = mx.arange(columns)[None]
        newest = self.offset[:, None]
        mask = places <= newest
        if window_size is not None and window_size < columns:
            mask = mask & ((newest - places) % columns < window_size)
        return mask.reshape(mask.shape[0], *[1] * (self._mask_rank - 2), columns)


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Per token and row: [kv_heads, key_dim] and [kv_heads, value_dim]; `window` bounds the tokens that are kept."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    window: int | None

    @property
    def array_count(self) -> int:
        return 2

    def blank(self, rows: int, capacity: int) -> list[mx.array]:
        columns = self._columns(capacity)
        shapes = [(rows, self.kv_heads, columns, dim) for dim in (self.key_dim, self.value_dim)]
        return [mx.zeros(shape, self.dtype) for shape in shapes]

    def row_of(self, cache: Any, capacity: int) -> list[mx.array]:
        """The prefilled cache of one sequence as arrays of one row."""
        if cache.keys is None:
            return self.blank(1, capacity)
        return [self._in_columns(array, cache, capacity) for array in (cache.keys, cache.values)]

    def fill(self, cache: Any, arrays: Iterator[mx.array], tokens: int) -> None:
        """Let a fresh cache hold what one row holds after `tokens` tokens: the inverse of `row_of`."""
        keys, values = (self._in_order(next(arrays), tokens) for _ in range(2))
        if isinstance(cache, RotatingKVCache):
            cache.state = (keys, values, tokens, cache.keep, cache.max_size, keys.shape[2])
        else:
            cache.state = (keys, values, tokens)

    def with_capacity(self, array: mx.array, capacity: int) -> mx.array:
        return _with_columns(array, self._columns(capacity))

    def view(self, arrays: Iterator[mx.array], offsets: mx.array, mask_rank: int) -> RowKV:
        return RowKV(next(arrays), next(arrays), offsets, mask_rank)

    def _columns(self, capacity: int) -> int:
        return capacity if self.window is None else min(capacity, self.window)

    def _in_columns(self, array: mx.array, cache: Any, capacity: int) -> mx.array:
        columns = self._columns(capacity)
        if isinstance(cache, RotatingKVCache):
            array = cache._temporal_order(array)[:, :, -columns:]
        else:
            array = array[:, :, : cache.offset]
        array = _with_columns(array, columns)
        oldest = max(0, cache.offset - columns)
        return mx.roll(array, oldest % columns, 2) if oldest else array

    def _in_order(self, array: mx.array, tokens: int) -> mx.array:
        columns = array.shape[2]
        return array[:, :, :tokens] if tokens <= columns else mx.roll(array, -(tokens % columns), 2)


@dataclass(frozen=True, slots=True)
class StateLayer:
    """A recurrent layer: arrays of fixed size per row, given as shapes without the rows."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]

    @property
    def array_count(self) -> int:
        return len(self.shapes)

    def blank(self, rows: int, capacity: int) -> list[mx.array]:
        del capacity
        return [mx.zeros((rows, *shape), dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]

    def row_of(self, cache: Any, capacity: int) -> list[mx.array]:
        return self.blank(1, capacity) if cache.cache[0] is None else list(cache.cache)

    def fill(self, cache: Any, arrays: Iterator[mx.array], tokens: int) -> None:
        del tokens
        cache.state = ([next(arrays) for _ in self.shapes], None, None)

    def with_capacity(self, array: mx.array, capacity: int) -> mx.array:
        del capacity
        return array

    def view(self, arrays: Iterator[mx.array], offsets: mx.array, mask_rank: int) -> ArraysCache:
        del offsets, mask_rank
        cache = ArraysCache(len(self.shapes))
        cache.cache = [next(arrays) for _ in self.shapes]
        return cache


Leaf = KVLayer | StateLayer


class RowLayers:
    """All layers of a model in order, and the arrays of a batch in the same order."""

    def __init__(self, caches: Items[Any], mask_rank: int) -> None:
        """From caches that have read at least one token; raises UnbatchableCache."""
        self._leaves: list[Leaf] = []
        self._list_sizes: list[int | None] = []
        self._mask_rank = mask_rank
        for cache in caches:
            parts = _parts(cache)
            self._leaves += [_leaf_of(part) for part in parts]
            self._list_sizes.append(len(parts) if type(cache) is CacheList else None)

    def blank(self, rows: int, capacity: int) -> list[mx.array]:
        return [array for leaf in self._leaves for array in leaf.blank(rows, capacity)]

    def row_of(self, caches: Items[Any], capacity: int) -> list[mx.array]:
        """One sequence's prefilled caches as the arrays of one row."""
        parts = [part for cache in caches for part in _parts(cache)]
        pairs = zip(self._leaves, parts, strict=True)
        return [array for leaf, part in pairs for array in leaf.row_of(part, capacity)]

    def fill(self, caches: Items[Any], row: Iterable[mx.array], tokens: int) -> None:
        """Let fresh caches hold what the arrays of one row hold after `tokens` tokens."""
        each = iter(row)
        parts = [part for cache in caches for part in _parts(cache)]
        for leaf, part in zip(self._leaves, parts, strict=True):
            leaf.fill(part, each, tokens)

    def fitted(self, arrays: Iterable[mx.array], rows: int, capacity: int, keep: Items[int]) -> list[mx.array]:
        """Another shape: old row keep[i] becomes row i. All kept rows must fit the capacity."""
        each = iter(arrays)
        kept = mx.array(list(keep))
        fitted: list[mx.array] = []
        for leaf in self._leaves:
            for _ in range(leaf.array_count):
                fitted.append(_with_rows(leaf.with_capacity(next(each)[kept], capacity), rows))
        return fitted

    def views(self, arrays: Iterable[mx.array], offsets: mx.array) -> list[Any]:
        """Caches for a step of one token per row at `offsets` [rows]."""
        each = iter(arrays)
        leaves = iter(self._leaves)
        views: list[Any] = []
        for size in self._list_sizes:
            parts = [next(leaves).view(each, offsets, self._mask_rank) for _ in range(1 if size is None else size)]
            views.append(parts[0] if size is None else CacheList(*parts))
        return views

    def read(self, views: Items[Any]) -> list[mx.array]:
        """The arrays that a step left in its views."""
        return [array for view in views for part in _parts(view) for array in _arrays_in(part)]


def cache_bytes(caches: Items[Any]) -> tuple[int, int]:
    """(bytes per token, bytes per row at most however long it is), from caches that have read something."""
    token_bytes = row_bytes = 0
    for part in (part for cache in caches for part in _parts(cache)):
        keys, values = getattr(part, "keys", None), getattr(part, "values", None)
        window = getattr(part, "max_size", getattr(part, "chunk_size", None))
        if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
            row_bytes += part.nbytes
        elif window is None:
            token_bytes += _bytes_per_token(keys) + _bytes_per_token(values)
        else:
            row_bytes += window * (_bytes_per_token(keys) + _bytes_per_token(values))
    return token_bytes, row_bytes


def _bytes_per_token(array: mx.array) -> int:
    return array.shape[1] * array.shape[3] * array.itemsize


def _parts(cache: Any) -> list[Any]:
    return list(cache.caches) if type(cache) is CacheList else [cache]


def _arrays_in(view: RowKV | ArraysCache) -> list[mx.array]:
    return [view.keys, view.values] if isinstance(view, RowKV) else _state_arrays(view)


def _state_arrays(cache: ArraysCache) -> list[mx.array]:
    arrays = [array for array in cache.cache if array is not None]
    if len(arrays) < len(cache.cache):
        raise UnbatchableCache("ArraysCache with empty places has no place in rows")
    return arrays


def _leaf_of(cache: Any) -> Leaf:
    if type(cache) is ArraysCache:
        arrays = _state_arrays(cache)
        return StateLayer(tuple(array.shape[1:] for array in arrays), tuple(array.dtype for array in arrays))
    if type(cache) is KVCache or (type(cache) is RotatingKVCache and cache.keep == 0):
        keys, values = cache.keys, cache.values
        if keys is not None and values is not None:
            window = cache.max_size if isinstance(cache, RotatingKVCache) else None
            return KVLayer(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, window)
    raise UnbatchableCache(f"{type(cache).__name__} has no place in rows")


def _with_columns(array: mx.array, columns: int) -> mx.array:
    have = array.shape[2]
    if have >= columns:
        return array[:, :, :columns]
    return mx.pad(array, [(0, 0), (0, 0), (0, columns - have), (0, 0)])


def _with_rows(array: mx.array, rows: int) -> mx.array:
    missing = rows - array.shape[0]
    return array if missing <= 0 else mx.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)])
