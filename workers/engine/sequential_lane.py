"""The lane for models whose caches cannot be batched: mlx_lm's own caches, a forward pass of its own for every row.

Rows take turns token by token within each step, so a long answer does not hold up the others; all are still queued,
prioritised, chunked and cancellable. No prefix reuse.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import mlx.core as mx
import mlx.nn as nn

from workers.engine.batch_scheduler import Chunk
from workers.engine.decode_rows import DecodeRows, RowSizes
from workers.engine.flight import DecodeFlight
from workers.engine.lane import MemoryOnly
from workers.engine.prompt_caches import PromptCaches, cache_arrays
from workers.engine.sequence import Sequence
from workers.engine.snapshots import Snapshots


class SequentialLane(MemoryOnly):
    most_groups = 1

    def __init__(self, model: nn.Module, sizes: RowSizes, snapshots: Snapshots | None) -> None:
        self._model = model
        self._sizes = sizes
        self._snapshots = snapshots
        self.max_rows = sizes.max_rows
        self.slot_tokens = sizes.slot_tokens
        self.traits: dict[str, str | int] = {"lane": "turns", "groups": 1, "compiled": 0}
        self.reset()

    def warm_up(self) -> None:
        """Nothing is compiled here."""

    def begin(self, sequence: Sequence) -> None:
        self._caches.begin(sequence)

    def prefill(self, chunks: Items[Chunk]) -> list[mx.array]:
        return self._caches.prefill(chunks)

    def seat(self, sequences: Items[Sequence]) -> None:
        self._rows.arrange(len(self._rows.seated) + len(sequences))
        for sequence in sequences:
            self._caches.complete(sequence)
            self._rows.seat(sequence)

    def decode(self) -> DecodeFlight:
        if len(self._rows.seated) < len(self._rows):
            self._rows.arrange(len(self._rows.seated))
        tokens = self._rows.inputs().tokens
        logits: list[mx.array] = []
        states: list[mx.array] = []
        for row, sequence in self._rows.seated:
            caches = self._caches[sequence]
            self._read[sequence] = sequence.length
            logits.append(self._model(tokens[row : row + 1, None], cache=caches)[:, -1, :])
            states.extend(cache_arrays(caches))
        return self._rows.draw(mx.concatenate(logits), states)

    def vacate(self, sequence: Sequence) -> None:
        if sequence in self._rows:
            tokens = self._read.pop(sequence, sequence.prefill_target)
            if self._snapshots is not None:
                self._snapshots.keep(sequence, self._caches[sequence], tokens)
            self._rows.leave(sequence)
        self._caches.drop(sequence)

    def reset(self) -> None:
        if self._snapshots is not None:
            self._snapshots.reset()
        self._caches = PromptCaches(self._model, self._snapshots)
        self._read: dict[Sequence, int] = {}  # tokens that the caches have read, a step in flight included
        self._rows = DecodeRows(self._sizes.vocab_size)

    def close(self) -> None:
        """There are no threads."""

    def stats(self) -> dict[str, float]:
        kept = {} if self._snapshots is None else self._snapshots.stats()
        held = self._caches.nbytes + (0 if self._snapshots is None else self._snapshots.nbytes)
        return {**kept, "slot_rows": len(self._rows.seated), "row_bytes": self._caches.nbytes, "kv_bytes": held}

    def check_integrity(self) -> None:
        if self._snapshots is not None:
            self._snapshots.check_integrity()
        assert all(sequence in self._caches for _, sequence in self._rows.seated), "a row has no caches"
