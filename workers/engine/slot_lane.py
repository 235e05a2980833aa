"""The batching lane: slots for the running rows, pages for everything worth keeping, a prefix cache over the pages.

A sequence's prompt is staged in arrays of its own, copied into a row when it is complete, and written to pages; its
answer is written to pages when it leaves. So the next turn of a conversation, a taken over or preempted sequence and
the other choices of the same job find most of their KV. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from workers.engine.batch_scheduler import Chunk
from workers.engine.flight import DecodeFlight
from workers.engine.kv_pages import KvPages
from workers.engine.logprobs import LogprobFlight, launch_logprobs
from workers.engine.model_runner import ModelRunner
from workers.engine.sampler import Sampling, build_sampling
from workers.engine.sequence import Sequence
from workers.engine.slot_cache import LayerShape, SlotCache, zeros
from workers.engine.slot_layout import Change, SlotLayout
from workers.engine.slot_plan import SMALLEST_CAPACITY, Shape, capacity_bucket, power_bucket, row_bucket

_PREFILL_GROUP_ROWS = 8
_WARM_CAPACITY, _WARM_SLOT_TOKENS = 256, 4096


@dataclass(frozen=True, slots=True)
class LaneSizes:
    """Sizes fixed at start-up; pages and slot_tokens share the KV budget. `most_groups` is 1 where the model's
    attention cannot run group by group.
    """

    max_rows: int
    most_groups: int
    slot_tokens: int
    vocab_size: int


@dataclass(slots=True)
class _DeviceRows:
    """Inputs of the next step for the present composition of the batch; fed by each step's outputs."""

    tokens: mx.array
    offsets: mx.array
    live: mx.array
    sampling: Sampling


class SlotLane:
    def __init__(self, runner: ModelRunner, shapes: Items[LayerShape], sizes: LaneSizes, pages: KvPages) -> None:
        self._runner = runner
        self._shapes = tuple(shapes)
        self._sizes = sizes
        self.pages = pages
        self.max_rows = sizes.max_rows
        self.slot_tokens = sizes.slot_tokens
        self.most_groups = sizes.most_groups
        self.traits: dict[str, str | int] = {
            "lane": "slots",
            "groups": sizes.most_groups,
            "compiled": int(runner.compiles),
        }
        self._layout = SlotLayout(sizes.most_groups, sizes.slot_tokens)
        self._slots = SlotCache(self._shapes)
        self._cold: list[Shape] = []
        self._new_books()

    def _new_books(self) -> None:
        self._staged: dict[Sequence, list[mx.array]] = {}
        self._layout.clear()
        self._slots.clear()
        self._device: _DeviceRows | None = None
        self._written = False

    def warm_up(self) -> None:
        """What one row needs, and the kernels of several rows: building those is what takes long."""
        several = Shape(min(2, self.max_rows), SMALLEST_CAPACITY)
        self._warm_step((several,))
        if self.most_groups > 1:
            self._warm_step((Shape(1, SMALLEST_CAPACITY), several))
        self._cold = self._usual_shapes()
        while self._cold and self._cold[-1].rows == 1:
            self.warm_next()

    def warm_next(self) -> bool:
        if not self._cold:
            return self.pages.spill()
        self._warm_step((self._cold.pop(),))
        return True

    def _usual_shapes(self) -> list[Shape]:
        """The usual working sets of one group, the most usual last."""
        most = min(_WARM_SLOT_TOKENS, self.slot_tokens)
        rows = {row_bucket(count) for count in range(1, self.max_rows + 1)}
        capacities = {capacity_bucket(tokens) for tokens in range(1, _WARM_CAPACITY + 1)}
        shapes = [Shape(r, c) for r in sorted(rows, reverse=True) for c in sorted(capacities, reverse=True)]
        return [shape for shape in shapes if shape.tokens <= most]

    def expect(self, sequence: Sequence) -> None:
        self.pages.expect(sequence, sequence.tokens[: sequence.prefill_target], sequence.isolation)

    def is_ready(self, sequence: Sequence) -> bool:
        return self.pages.is_ready(sequence)

    def await_pages(self, timeout_s: float) -> None:
        self.pages.await_pages(timeout_s)

    def begin(self, sequence: Sequence) -> None:
        # The last token is never taken from the cache: its logits are what the next step is about.
        pages = self.pages.find(sequence, sequence.tokens[: sequence.prefill_target], sequence.isolation)
        sequence.block_table = pages
        sequence.prefilled = len(pages) * self.pages.page_tokens
        sequence.cached_tokens = max(sequence.cached_tokens, sequence.prefilled)
        staged = zeros(self._shapes, 1, max(SMALLEST_CAPACITY, power_bucket(sequence.length)))
        self._staged[sequence] = staged  # first: where the rest fails, `reset` finds it
        if pages:
            for at, known in enumerate(self.pages.gather(pages)):
                staged[at][:, :, : sequence.prefilled] = known

    def prefill(self, chunks: Items[Chunk]) -> list[mx.array]:
        groups: dict[tuple[int, int, int], list[Chunk]] = {}
        for chunk in chunks:
            capacity = self._staged[chunk.sequence][0].shape[2]
            groups.setdefault((chunk.start, capacity, power_bucket(chunk.count)), []).append(chunk)
        arrays: list[mx.array] = []
        for group in groups.values():
            for at in range(0, len(group), _PREFILL_GROUP_ROWS):
                arrays.extend(self._prefill_together(group[at : at + _PREFILL_GROUP_ROWS]))
        mx.async_eval(arrays)
        return arrays

    def seat(self, sequences: Items[Sequence]) -> None:
        for sequence in sequences:
            self._write_pages(sequence, self._staged[sequence], 0, sequence.prefill_target)
        self._rearrange(self._layout.join(sequences))
        for sequence in sequences:
            self._slots.put_row(*self._layout.place(sequence), self._staged.pop(sequence))
        self._device = None

    def decode(self) -> DecodeFlight:
        self._rearrange(self._layout.step())
        if self._written:
            # Nothing may still read the slots when the step begins, or it would have to copy them all.
            mx.eval(self.pages.store.slabs)
            self._written = False
        device = self._device_rows()
        out = self._runner.decode(device.tokens, device.offsets, device.live, self._slots.groups, device.sampling)
        self._slots.groups = out.groups
        device.tokens, device.offsets, device.sampling.edit = out.tokens, out.offsets, out.edit
        rows = tuple((row, sequence) for row, sequence in enumerate(self._layout.rows) if sequence is not None)
        logprobs = _ask_logprobs(rows, out.logits, out.tokens)
        mx.async_eval(out.tokens, out.offsets, out.groups, out.edit, [] if logprobs is None else logprobs.arrays)
        return DecodeFlight(rows, out.tokens, logprobs)

    def vacate(self, sequence: Sequence) -> None:
        self.pages.forget(sequence)
        self._staged.pop(sequence, None)
        if sequence in self._layout.rows:
            known = len(sequence.block_table) * self.pages.page_tokens
            valid = sequence.length - 1
            rows = self._slots.row_tokens(*self._layout.place(sequence), known, valid)
            self._write_pages(sequence, rows, known, valid)
            self._layout.leave(sequence)
            self._device = None
            if not self._layout.seated:
                self._layout.clear()
                self._slots.clear()
        self.pages.release(sequence.block_table)

    def reset(self) -> None:
        for sequence in [*self._staged, *self._layout.seated]:
            sequence.block_table = []
        self.pages.reset()
        self._new_books()

    def close(self) -> None:
        self.pages.close()

    def stats(self) -> dict[str, float]:
        return {
            **self.pages.stats(),
            "slot_rows": sum(shape.rows for shape in self._layout.shapes),
            "slot_capacity": max((shape.capacity for shape in self._layout.shapes), default=0),
            "slot_groups": len(self._layout.groups),
            "slot_tokens": sum(shape.tokens for shape in self._layout.shapes),
            "slot_bytes": self._slots.nbytes,
            "kv_bytes": self._slots.nbytes
            + self.pages.store.nbytes
            + sum(array.nbytes for staged in self._staged.values() for array in staged),
        }

    def check_integrity(self) -> None:
        seated = [sequence.block_table for sequence in self._layout.seated]
        staged = [sequence.block_table for sequence in self._staged]
        self.pages.check_integrity([*seated, *staged])

    def _prefill_together(self, group: list[Chunk]) -> list[mx.array]:
        """One forward pass for chunks that start at the same column of equally long staging arrays."""
        staged = [self._staged[chunk.sequence] for chunk in group]
        arrays = staged[0] if len(group) == 1 else [mx.concatenate(list(parts)) for parts in zip(*staged, strict=True)]
        tokens = [chunk.sequence.tokens[chunk.start : chunk.start + chunk.count] for chunk in group]
        arrays = self._runner.prefill(arrays, tokens, group[0].start)
        for row, chunk in enumerate(group):
            self._staged[chunk.sequence] = [array[row : row + 1] for array in arrays]
        return arrays

    def _write_pages(self, sequence: Sequence, rows: Items[mx.array], first: int, valid: int) -> None:
        """Write the full pages that the block table lacks from `rows`, which start at token `first`."""
        table = sequence.block_table
        if self.pages.keep(sequence.tokens, table, rows, first, valid, sequence.isolation):
            mx.async_eval(self.pages.store.slabs)
            self._written = True

    def _rearrange(self, change: Change | None) -> None:
        if change is not None:
            self._slots.rearrange(change)
            self._device = None

    def _device_rows(self) -> _DeviceRows:
        if self._device is None:
            rows = self._layout.rows
            inputs = np.zeros((3, len(rows)), np.int32)
            for row, sequence in enumerate(rows):
                if sequence is not None:
                    last = sequence.emitted[-1] if sequence.emitted else sequence.prompt_ids[-1]
                    inputs[:, row] = (last, sequence.length - 1, 1)
            tokens, offsets, live = (mx.array(values) for values in inputs)
            self._device = _DeviceRows(tokens, offsets, live, build_sampling(rows, self._sizes.vocab_size))
        return self._device

    def _warm_step(self, shapes: tuple[Shape, ...]) -> None:
        blank = mx.zeros(sum(shape.rows for shape in shapes), mx.int32)
        sampling = build_sampling([None] * blank.size, self._sizes.vocab_size)
        out = self._runner.decode(blank, blank, blank, [zeros(self._shapes, *shape) for shape in shapes], sampling)
        mx.eval(out.tokens, out.groups)


def _ask_logprobs(rows: Items[tuple[int, Sequence]], logits: mx.array, tokens: mx.array) -> LogprobFlight | None:
    asking = [(row, sequence.params.top_logprobs) for row, sequence in rows if sequence.params.logprobs]
    if not asking:
        return None
    return launch_logprobs(logits, tokens, [row for row, _ in asking], max(top for _, top in asking))
