"""What the engine asks of a lane, the thing that holds KV and runs forward passes for its sequences.

    expect → begin → prefill* → seat → decode* → vacate        reset: after a failed step, everything is given up

Three lanes: slot_lane batches models whose caches are plain KV, row_lane others that can be batched; in sequential_lane
rows take turns.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

import mlx.core as mx

from workers.engine.batch_scheduler import Chunk
from workers.engine.flight import DecodeFlight
from workers.engine.sequence import Sequence


class Lane(Protocol):
    """Engine thread only."""

    max_rows: int
    slot_tokens: int
    most_groups: int
    traits: dict[str, str | int]  # what the probes at load found, for the model's card

    def warm_up(self) -> None:
        """Build what takes long before traffic."""
        ...

    def warm_next(self) -> bool:
        """Prepare one more usual shape, in milliseconds; False when all are."""
        ...

    def expect(self, sequence: Sequence) -> None:
        """The sequence waits: begin to fetch what is known of it from where that takes time."""
        ...

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether `begin` would find all that was fetched for it, or has waited long enough."""
        ...

    def await_pages(self, timeout_s: float) -> None:
        """Nothing can run: wait for what is being fetched, if anything is."""
        ...

    def begin(self, sequence: Sequence) -> None:
        """Get ready to prefill; sets `prefilled` and `cached_tokens` from what is already known."""
        ...

    def prefill(self, chunks: Items[Chunk]) -> list[mx.array]:
        """Launch the chunks; returns the arrays to wait for."""
        ...

    def seat(self, sequences: Items[Sequence]) -> None:
        """Give rows to sequences whose prefill is done."""
        ...

    def decode(self) -> DecodeFlight:
        """Launch one step for all seated sequences."""
        ...

    def vacate(self, sequence: Sequence) -> None:
        """Give up all that the sequence holds; what others can use of its KV is kept."""
        ...

    def reset(self) -> None:
        """Give up all sequences and everything cached."""
        ...

    def close(self) -> None:
        """End the threads of the lane."""
        ...

    def stats(self) -> dict[str, float]: ...

    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not balance."""
        ...


class MemoryOnly:
    """The part of a lane that fetches nothing from where that takes time, and has no shapes to prepare."""

    def warm_next(self) -> bool:
        return False

    def expect(self, sequence: Sequence) -> None:
        """Nothing is kept anywhere else."""

    def is_ready(self, sequence: Sequence) -> bool:
        return True

    def await_pages(self, timeout_s: float) -> None:
        """Nothing is fetched."""
