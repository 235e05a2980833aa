"""The working set that decode attention reads: per layer, [rows, kv_heads, capacity, head_dim] keys and values.

Rows are left-aligned, each with its own length; a step writes one column per row at that row's own place. Shapes
come in few sizes (see batch_scheduler), so a compiled step is used again. A join copies the new row only; a leave
copies nothing until a smaller shape is worth one compaction. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask


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


class SlotLayer:
    """One layer of the working set as mlx_lm's models see a cache, for a step of one token per row.

    Nothing here may hold a number that changes with the shape: on Linux CPU mx.compile writes constants into C++
    source, so each would cost a g++ run per shape.
    """

    def __init__(self, keys: mx.array, values: mx.array, offsets: mx.array) -> None:
        self.keys = keys
        self.values = values
        self.offset = offsets

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        column = self.offset[:, None, None, None]
        self.keys = mx.put_along_axis(self.keys, mx.broadcast_to(column, keys.shape), keys, axis=2)
        self.values = mx.put_along_axis(self.values, mx.broadcast_to(column, values.shape), values, axis=2)
        return self.keys, self.values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        assert N == 1
        columns = mx.arange(self.keys.shape[2])[None, None, None, :]
        last = self.offset[:, None, None, None]
        mask = columns <= last
        return mask if window_size is None else mask & (columns > last - window_size)


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
    """The arrays of the working set and their present shape; who sits in which row is the lane's business."""

    def __init__(self, shapes: Items[LayerShape]) -> None:
        self._shapes = shapes
        self.rows = 0
        self.capacity = 0
        self.arrays: list[mx.array] = []

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def clear(self) -> None:
        """Drop all arrays: nobody sits in a row, or a failed step left them in doubt."""
        self.rows = self.capacity = 0
        self.arrays = []

    def reshape(self, rows: int, capacity: int, keep: Items[int]) -> None:
        """Change the shape; old row keep[i] becomes row i. All rows are copied once."""
        if not keep or not self.arrays:
            self.arrays = zeros(self._shapes, rows, capacity)
        else:
            order = None if list(keep) == list(range(self.rows)) else mx.array(list(keep))
            self.arrays = [_reshaped(array, rows, capacity, order) for array in self.arrays]
        self.rows, self.capacity = rows, capacity

    def put_row(self, row: int, staged: Items[mx.array]) -> None:
        """Copy staged keys and values [1, kv_heads, tokens, head_dim] into a row; the columns behind become zero."""
        start = mx.array([row])
        self.arrays = [
            mx.slice_update(array, _fit_columns(new, self.capacity), start, axes=(0,))
            for array, new in zip(self.arrays, staged, strict=True)
        ]

    def row_tokens(self, row: int, start: int, stop: int) -> list[mx.array]:
        """Keys and values [1, kv_heads, stop - start, head_dim] of one row's tokens."""
        return [array[row : row + 1, :, start:stop] for array in self.arrays]


def _fit_columns(array: mx.array, columns: int) -> mx.array:
    have = array.shape[2]
    if have >= columns:
        return array[:, :, :columns]
    return mx.pad(array, [(0, 0), (0, 0), (0, columns - have), (0, 0)])


def _reshaped(array: mx.array, rows: int, capacity: int, order: mx.array | None) -> mx.array:
    picked = array if order is None else array[order]
    picked = _fit_columns(picked, capacity)
    missing = rows - picked.shape[0]
    if missing <= 0:
        return picked[:rows]
    return mx.pad(picked, [(0, missing), (0, 0), (0, 0), (0, 0)])
