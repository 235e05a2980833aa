"""What the engine counted since it started; names are those of `Step.stats` and `Step.histograms`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from scheduler.histogram import Histogram
from workers.backend import PRIORITY_RANKS
from workers.engine.sequence import Sequence

_GAP_BOUNDS_S = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
_STALL_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
_ROW_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_PRIORITIES = {rank: priority.value for priority, rank in PRIORITY_RANKS.items()}


@dataclass(slots=True)
class _Counters:
    decode_steps: int = 0
    decode_tokens: int = 0
    prefill_steps: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    jobs_done: int = 0
    jobs_failed: int = 0


@dataclass(slots=True)
class EngineStats(_Counters):
    """`token_gaps` [s] between tokens of a row, `prefill_stalls` [s] of running rows, `batch_rows` of a step."""

    token_gaps: Histogram = field(default_factory=lambda: Histogram.of(*_GAP_BOUNDS_S))
    prefill_stalls: Histogram = field(default_factory=lambda: Histogram.of(*_STALL_BOUNDS_S))
    batch_rows: Histogram = field(default_factory=lambda: Histogram.of(*_ROW_BOUNDS))
    _last_step_s: float = -1.0

    def decoded(self, sequences: list[Sequence], now_s: float) -> None:
        """A step drew a token for each of these. Nearly all took part in the step before, too: one gap for them."""
        self.decode_steps += 1
        self.decode_tokens += len(sequences)
        self.batch_rows.observe(len(sequences))
        together = 0
        for sequence in sequences:
            if sequence.drawn_at_s == self._last_step_s:
                together += 1
            elif sequence.drawn_at_s:
                self.token_gaps.observe(now_s - sequence.drawn_at_s)
            sequence.drawn_at_s = now_s
        if together:
            self.token_gaps.observe(now_s - self._last_step_s, together)
        self._last_step_s = now_s

    def prefilled(self, tokens: int, seconds: float, *, held_up: bool) -> None:
        """A prefill launch landed; `held_up`: rows were waiting for it to go on decoding."""
        self.prefill_steps += 1
        self.prefill_tokens += tokens
        if held_up:
            self.prefill_stalls.observe(seconds)

    def counters(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in _COUNTERS}

    def histograms(self) -> dict[str, Histogram]:
        """Copies, for the thread that writes frames."""
        return {name: getattr(self, name).copy() for name in _HISTOGRAMS}


_COUNTERS = tuple(counter.name for counter in fields(_Counters))
_HISTOGRAMS = ("token_gaps", "prefill_stalls", "batch_rows")


def waiting_ages(waiting: Iterable[Sequence], now_s: float) -> dict[str, float]:
    """By class, for how long its longest waiting sequence has been waiting in the engine; 0 where none is."""
    ages = dict.fromkeys(_PRIORITIES, 0.0)
    for sequence in waiting:
        rank = min(sequence.priority_rank, len(_PRIORITIES) - 1)
        ages[rank] = max(ages[rank], now_s - sequence.waiting_since_s)
    return {f"waiting_age_s_{_PRIORITIES[rank]}": age for rank, age in ages.items()}
