"""The working set that decode attention reads: per group and layer, keys and values [rows, kv_heads, capacity, dim].

Rows are left-aligned, each with its own length; a step writes one column per row at that row's own place. Groups have
their own capacity, and shapes come in few sizes (slot_plan), so a compiled step is used again. A join copies the new
row only; a leave copies nothing. Who sits where is slot_layout's business. Engine thread only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from workers.engine.slot_layout import Change, Source
from workers.engine.slot_plan import Shape


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps per token: [kv_heads, key_dim] and [kv_heads, value_dim]."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype

    @property
    def token_bytes(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.size


def zeros(shapes: Items[LayerShape], rows: int, tokens: int) -> list[mx.array]:
    """Keys and values of all layers, alternating."""
    arrays: list[mx.array] = []
    for shape in shapes:
        for dim in (shape.key_dim, shape.value_dim):
            arrays.append(mx.zeros((rows, shape.kv_heads, tokens, dim), shape.dtype))
    return arrays


class StagedLayer:
    """One layer of a row under prefill: fixed capacity, all rows at the same offset."""

    def __init__(self, keys: mx.array, values: mx.array, offset: int) -> None:
        self.keys = keys
        self.values = values
        self.offset = offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        end = self.offset + keys.shape[2]
        self.keys[:, :, self.offset : end] = keys
        self.values[:, :, self.offset : end] = values
        self.offset = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        if window_size is not None or (return_array and N > 1):
            return create_causal_mask(N, self.offset, window_size=window_size)
        return None if N == 1 else "causal"


class SlotCache:
    """The arrays of the working set: `groups[i]` holds keys and values of all layers of group i, alternating."""

    def __init__(self, shapes: Items[LayerShape]) -> None:
        self._shapes = shapes
        self.groups: list[list[mx.array]] = []

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for group in self.groups for array in group)

    def clear(self) -> None:
        """Drop all arrays: nobody sits in a row, or a failed step left them in doubt."""
        self.groups = []

    def rearrange(self, change: Change) -> None:
        """Bring the arrays into a new layout; a group whose shape and rows stay is not touched."""
        pairs = zip(change.shapes, change.sources, strict=True)
        self.groups = [self._assembled(shape, sources) for shape, sources in pairs]

    def put_row(self, group: int, row: int, staged: Items[mx.array]) -> None:
        """Copy staged keys and values [1, kv_heads, tokens, head_dim] into a row; the columns behind become zero."""
        self.groups[group] = _with_row(self.groups[group], row, staged)

    def row_tokens(self, group: int, row: int, start: int, stop: int) -> list[mx.array]:
        """Keys and values [1, kv_heads, stop - start, head_dim] of one row's tokens."""
        return [array[row : row + 1, :, start:stop] for array in self.groups[group]]

    def _assembled(self, shape: Shape, sources: Items[Source | None]) -> list[mx.array]:
        """One group of the new layout: most rows from one old group in one go, the others one by one."""
        known = [(row, source) for row, source in enumerate(sources) if source is not None]
        if not known:
            return zeros(self._shapes, *shape)
        ((main, _),) = Counter(group for _, (group, _) in known).most_common(1)
        old_rows = self.groups[main][0].shape[0]
        mine = {row: old_row for row, (group, old_row) in known if group == main}
        order = None
        if any(row != old_row for row, old_row in mine.items()):
            order = mx.array([mine.get(row, min(row, old_rows - 1)) for row in range(shape.rows)])
        arrays = [_reshaped(array, shape, order) for array in self.groups[main]]
        for row, (group, old_row) in known:
            if group != main:
                arrays = _with_row(arrays, row, [array[old_row : old_row + 1] for array in self.groups[group]])
        return arrays


def _with_row(arrays: Items[mx.array], row: int, new: Items[mx.array]) -> list[mx.array]:
    start, capacity = mx.array([row]), arrays[0].shape[2]
    pairs = zip(arrays, new, strict=True)
    return [mx.slice_update(array, _fit_columns(part, capacity), start, axes=(0,)) for array, part in pairs]


def _fit_columns(array: mx.array, columns: int) -> mx.array:
    have = array.shape[2]
    if have >= columns:
        return array[:, :, :columns]
    return mx.pad(array, [(0, 0), (0, 0), (0, columns - have), (0, 0)])


def _reshaped(array: mx.array, shape: Shape, order: mx.array | None) -> mx.array:
    """The array with the group's new shape, row i being old row order[i]; memory that is no longer used is freed."""
    if order is None and array.shape[0] == shape.rows and array.shape[2] == shape.capacity:
        return array
    picked = array if order is None else array[order]
    picked = _fit_columns(picked, shape.capacity)
    missing = shape.rows - picked.shape[0]
    if missing > 0:
        return mx.pad(picked, [(0, missing), (0, 0), (0, 0), (0, 0)])
    return mx.contiguous(picked[: shape.rows])
