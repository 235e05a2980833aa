"""The batching lane for models that keep more than plain KV: sliding windows, recurrent states, lists of caches.

Prompts are prefilled one by one in mlx_lm's own caches and copied into a row when complete; all rows then decode in
one forward pass. What a row has read is kept at the ends of its turns, see snapshots. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from workers.engine.batch_scheduler import Chunk
from workers.engine.decode_rows import DecodeRows, RowSizes
from workers.engine.flight import DecodeFlight
from workers.engine.lane import MemoryOnly
from workers.engine.prompt_caches import PromptCaches
from workers.engine.row_layers import RowLayers, UnbatchableCache
from workers.engine.sequence import Sequence
from workers.engine.slot_plan import capacity_bucket, row_bucket
from workers.engine.snapshots import Snapshots

_PROBE_IDS = (1, 2, 3, 5, 7)
_PROBE_ROWS = (0, 2, 4)  # how many of them each row has read before the step
_PROBE_TOLERANCE = 0.05  # of the spread of the logits; a cache that is misread is off by far more
_SHRINK_BELOW = 0.5


class RowLane(MemoryOnly):
    most_groups = 1  # all rows have the same columns

    def __init__(self, model: nn.Module, layers: RowLayers, sizes: RowSizes, snapshots: Snapshots | None) -> None:
        self._model = model
        self._layers = layers
        self._sizes = sizes
        self._snapshots = snapshots
        self.max_rows = sizes.max_rows
        self.slot_tokens = sizes.slot_tokens
        self.traits: dict[str, str | int] = {"lane": "rows", "groups": 1, "compiled": 0}
        self.reset()

    def warm_up(self) -> None:
        """One step of one row and one of two: where kernels are built, they are built now."""
        for rows in (1, min(2, self.max_rows)):
            blank = mx.zeros(rows, mx.int32)
            arrays = self._layers.blank(rows, capacity_bucket(1))
            logits, arrays = _step(self._model, self._layers, blank, blank, arrays)
            mx.eval(logits, arrays)

    def begin(self, sequence: Sequence) -> None:
        self._prompts.begin(sequence)

    def prefill(self, chunks: Items[Chunk]) -> list[mx.array]:
        return self._prompts.prefill(chunks)

    def seat(self, sequences: Items[Sequence]) -> None:
        self._fit_shape(sequences)
        for sequence in sequences:
            self._prompts.complete(sequence)
            new = self._layers.row_of(self._prompts.take(sequence), self._capacity)
            start = mx.array([self._rows.seat(sequence)])
            pairs = zip(self._arrays, new, strict=True)
            self._arrays = [mx.slice_update(array, row, start, axes=(0,)) for array, row in pairs]

    def decode(self) -> DecodeFlight:
        self._fit_shape(())
        inputs = self._rows.inputs()
        for _, sequence in self._rows.seated:
            self._read[sequence] = sequence.length
        logits, self._arrays = _step(self._model, self._layers, inputs.tokens, inputs.offsets, self._arrays)
        return self._rows.draw(logits, self._arrays)

    def vacate(self, sequence: Sequence) -> None:
        self._prompts.drop(sequence)
        if sequence in self._rows:
            self._keep(sequence, self._read.pop(sequence, sequence.prefill_target))
            self._rows.leave(sequence)

    def reset(self) -> None:
        if self._snapshots is not None:
            self._snapshots.reset()
        self._prompts = PromptCaches(self._model, self._snapshots)
        self._read: dict[Sequence, int] = {}  # tokens that the rows have read, a step in flight included
        self._rows = DecodeRows(self._sizes.vocab_size)
        self._capacity = 0
        self._arrays: list[mx.array] = []

    def close(self) -> None:
        """There are no threads."""

    def stats(self) -> dict[str, float]:
        held = sum(array.nbytes for array in self._arrays) + self._prompts.nbytes
        kept = {} if self._snapshots is None else self._snapshots.stats()
        held += 0 if self._snapshots is None else self._snapshots.nbytes
        return {**kept, "slot_rows": len(self._rows), "slot_capacity": self._capacity, "kv_bytes": held}

    def check_integrity(self) -> None:
        if self._snapshots is not None:
            self._snapshots.check_integrity()
        for row, sequence in self._rows.seated:
            assert sequence not in self._prompts, "a sequence is in a row and under prefill"
            assert sequence.length <= self._capacity + 1 and row < self._arrays[0].shape[0], "a row is too short"

    def _keep(self, sequence: Sequence, tokens: int) -> None:
        """The end of an answer: the next turn begins with what this row has read."""
        if self._snapshots is None:
            return
        row = next(row for row, seated in self._rows.seated if seated is sequence)
        caches = make_prompt_cache(self._model)
        self._layers.fill(caches, [array[row : row + 1] for array in self._arrays], tokens)
        self._snapshots.keep(sequence, caches, tokens)

    def _fit_shape(self, joining: Items[Sequence]) -> None:
        """Grow when rows or columns are short; shrink when half of either would do."""
        everyone = [*(sequence for _, sequence in self._rows.seated), *joining]
        rows = row_bucket(len(everyone))
        capacity = capacity_bucket(max(sequence.length for sequence in everyone))
        if not _misfits(rows, len(self._rows)) and not _misfits(capacity, self._capacity):
            return
        keep = self._rows.arrange(rows)
        if keep:
            self._arrays = self._layers.fitted(self._arrays, rows, capacity, keep)
        else:
            self._arrays = self._layers.blank(rows, capacity)
        self._capacity = capacity


def _misfits(needed: int, have: int) -> bool:
    return needed > have or needed < have * _SHRINK_BELOW


def _step(
    model: nn.Module, layers: RowLayers, tokens: mx.array, offsets: mx.array, arrays: list[mx.array]
) -> tuple[mx.array, list[mx.array]]:
    """Logits [rows, vocab] after one token per row at `offsets`, and the arrays as the step leaves them."""
    views = layers.views(arrays, offsets)
    logits = model(tokens[:, None], cache=views)[:, -1, :]
    return logits, layers.read(views)


def probe_rows(model: nn.Module) -> RowLayers | None:
    """The layers if the model computes the same in rows as in mlx_lm's own caches, else None."""
    for mask_rank in (4, 5):
        try:
            layers = RowLayers(_read(model, 2)[1], mask_rank)
            if _rows_agree(model, layers):
                return layers
        except (UnbatchableCache, AttributeError, TypeError, ValueError, IndexError, RuntimeError, AssertionError):
            continue
    return None


def _rows_agree(model: nn.Module, layers: RowLayers) -> bool:
    """One step of three rows that have read nothing, a little and more, against each of them alone."""
    capacity = capacity_bucket(len(_PROBE_IDS))
    rows = [layers.row_of(_read(model, count)[1], capacity) for count in _PROBE_ROWS]
    arrays = [mx.concatenate(list(parts)) for parts in zip(*rows, strict=True)]
    tokens = mx.array([_PROBE_IDS[count] for count in _PROBE_ROWS])
    logits, _ = _step(model, layers, tokens, mx.array(_PROBE_ROWS, dtype=mx.int32), arrays)
    alone = mx.concatenate([_read(model, count, 1)[0] for count in _PROBE_ROWS])
    spread = mx.max(alone) - mx.min(alone)
    return bool(mx.all(mx.abs(alone - logits) <= _PROBE_TOLERANCE * spread).item())


def _read(model: nn.Module, *counts: int) -> tuple[mx.array, list[Any]]:
    """The last logits and mlx_lm's caches after passes over so many probe tokens each."""
    caches = make_prompt_cache(model)
    logits = mx.zeros((1, 0))
    start = 0
    for count in counts:
        if count:
            logits = model(mx.array([_PROBE_IDS[start : start + count]]), cache=caches)[:, -1, :]
        start += count
    return logits, caches
