"""What is launched on the device and not yet waited for: at most one per engine."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from workers.engine.batch_scheduler import Chunk
from workers.engine.logprobs import LogprobFlight
from workers.engine.sequence import Phase, Sequence


@dataclass(frozen=True, slots=True)
class DecodeFlight:
    """A decode step that the device works on: who sits in which row, and the arrays to wait for."""

    rows: tuple[tuple[int, Sequence], ...]
    tokens: mx.array
    logprobs: LogprobFlight | None
    others: tuple[mx.array, ...] = ()

    def land(self) -> list[int]:
        """Wait for the step; the drawn token of every row."""
        logprobs = [] if self.logprobs is None else self.logprobs.arrays
        mx.eval(self.tokens, *logprobs, *self.others)
        return self.tokens.tolist()  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True)
class PrefillFlight:
    """Prefill chunks that the device works on."""

    chunks: tuple[Chunk, ...]
    arrays: list[mx.array]
    launched_s: float

    @property
    def sequences(self) -> list[Sequence]:
        return [chunk.sequence for chunk in self.chunks]


def suspects_of(flight: DecodeFlight | PrefillFlight | None) -> list[Sequence]:
    """Whom a failure of this launch may be due to."""
    match flight:
        case None:
            return []
        case DecodeFlight():
            return [s for _, s in flight.rows if s.phase is Phase.RUNNING and not s.is_finished]
        case PrefillFlight():
            return [s for s in flight.sequences if s.phase is Phase.PREFILL]
