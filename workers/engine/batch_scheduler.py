"""Who runs next: admission from the waiting list, prefill chunks within a time budget, decode in between. Pure.

    add ─► waiting ──admit──► prefilling ──promote──► running ──remove
              ▲                                          │
              └────────────── preempt / suspect ─────────┘

The engine asks `schedule` once per step and reports back what a prefill cost. Nothing here touches arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workers.engine.sequence import Phase, Sequence, in_service_order
from workers.engine.slot_plan import planned_tokens

MIN_CHUNK_TOKENS = 16
MIN_IDLE_CHUNK_TOKENS = 128
MAX_CHUNK_TOKENS = 2048
TELLING_CHUNK_TOKENS = 64  # a shorter chunk is mostly overhead and says little about a long one's speed
LONGEST_IDLE_CHUNK_S = 5.0  # a slow machine takes a smaller one: cancels wait for it, and the watchdog's patience ends
IDLE_STALL_FACTOR = 4  # with no stream running, a chunk may take this many stalls: only cancels wait for it
SHARED_TOKENS_WORTH_WAITING = 128


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`slot_tokens` bounds rows x capacity over the working set's groups, of which there are `most_groups` at most;
    `stall_s` is how long prefill may hold up streams.
    """

    max_rows: int
    slot_tokens: int
    stall_s: float
    most_groups: int = 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prefill `count` tokens of the sequence from position `start`."""

    sequence: Sequence
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Prefill:
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Decode:
    """One decode step over all running sequences."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing to do."""


Decision = Prefill | Decode | Idle


class BatchScheduler:
    """Owns the waiting, prefilling and running lists."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self.waiting: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self._tokens_per_s = 0.0
        self._debt_s = 0.0
        self._prefilled_last = False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    @property
    def busy_rows(self) -> int:
        return len(self.prefilling) + len(self.running)

    @property
    def free_rows(self) -> int:
        """Rows that a new sequence could take now; what waits here is ahead of it."""
        return max(0, self._limits.max_rows - self.busy_rows - len(self.waiting))

    @property
    def free_slot_tokens(self) -> int:
        """KV tokens that are not spoken for, what waits included."""
        everyone = [*self.prefilling, *self.running, *self.waiting]
        return max(0, self._limits.slot_tokens - self._slot_tokens(everyone))

    def add(self, sequence: Sequence) -> None:
        sequence.phase = Phase.WAITING
        self.waiting = in_service_order([*self.waiting, sequence])

    def remove(self, sequence: Sequence) -> None:
        """Forget the sequence, wherever it is."""
        for members in (self.waiting, self.prefilling, self.running):
            if sequence in members:
                members.remove(sequence)

    def promote(self, sequence: Sequence) -> None:
        """Its prefill is done: it takes part in the next decode step."""
        self.prefilling.remove(sequence)
        self.running.append(sequence)
        sequence.phase = Phase.RUNNING

    def send_back(self, sequence: Sequence) -> None:
        """Its KV is gone: it waits again, at its old place in the order."""
        self.remove(sequence)
        sequence.prefilled = 0
        self.add(sequence)

    def admit(self, is_ready: Callable[[Sequence], bool] = lambda _: True) -> list[Sequence]:
        """Move what fits now from waiting to prefilling, in order; the first that does not fit holds the rest.

        What is not ready, its pages being on their way, is passed over.
        """
        admitted: list[Sequence] = []
        for sequence in list(self.waiting):
            if not self._fits(sequence):
                break
            if any(_worth_waiting_for(other, sequence) for other in self.prefilling):
                continue  # what it prefills now will be found in the prefix cache
            if not is_ready(sequence):
                continue
            self.waiting.remove(sequence)
            self.prefilling.append(sequence)
            sequence.phase = Phase.PREFILL
            admitted.append(sequence)
        return admitted

    def schedule(self) -> Decision:
        """The next thing to launch; after a prefill the running streams always get a step."""
        pending = [sequence for sequence in self.prefilling if sequence.prefilled < sequence.prefill_target]
        if pending and not (self.running and self._prefilled_last):
            self._prefilled_last = True
            return Prefill(self._chunks(in_service_order(pending)))
        self._prefilled_last = False
        return Decode() if self.running else Idle()

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Learn the prefill speed, and carry what was overdrawn into the next budget."""
        if tokens <= 0 or seconds <= 0:
            return
        speed = tokens / seconds
        if self._tokens_per_s == 0:
            self._tokens_per_s = speed
        elif tokens >= TELLING_CHUNK_TOKENS or speed > self._tokens_per_s:
            self._tokens_per_s = 0.6 * self._tokens_per_s + 0.4 * speed
        self._debt_s = min(max(0.0, self._debt_s + seconds - self._limits.stall_s), self._limits.stall_s)

    def victim(self) -> Sequence | None:
        """Whom to preempt so that the running rows fit the budget; None when they do, or one row is left."""
        if len(self.running) < 2 or self._slot_tokens(self.running) <= self._limits.slot_tokens:
            return None
        return in_service_order(self.running)[-1]

    def _fits(self, sequence: Sequence) -> bool:
        active = [*self.prefilling, *self.running]
        if not active:
            return True
        if sequence.suspect or any(other.suspect for other in active):
            return False
        if len(active) >= self._limits.max_rows:
            return False
        return self._slot_tokens([*active, sequence]) <= self._limits.slot_tokens

    def _slot_tokens(self, sequences: list[Sequence]) -> int:
        """Rows x capacity of a working set that holds these sequences, each one token longer."""
        return planned_tokens([sequence.length + 1 for sequence in sequences], self._limits.most_groups)

    def _chunks(self, pending: list[Sequence]) -> tuple[Chunk, ...]:
        """Share the budget: half to the first in service order, the rest to the shortest of its class."""
        budget = self._budget_tokens()
        first = pending[0]
        others = sorted(pending[1:], key=lambda s: (s.priority_rank, s.prefill_target - s.prefilled))
        share = {first: min(_remaining(first), budget if not others else (budget + 1) // 2)}
        left = budget - share[first]
        for sequence in others:
            share[sequence] = min(_remaining(sequence), left)
            left -= share[sequence]
        share[first] += min(_remaining(first) - share[first], left)
        return tuple(Chunk(s, s.prefilled, count) for s, count in share.items() if count > 0)

    def _budget_tokens(self) -> int:
        if self.running:
            least, stall_s = MIN_CHUNK_TOKENS, max(self._limits.stall_s - self._debt_s, 0.0)
        else:
            least, stall_s = self._least_idle_tokens(), self._limits.stall_s * IDLE_STALL_FACTOR
        return min(MAX_CHUNK_TOKENS, max(least, int(self._tokens_per_s * stall_s)))

    def _least_idle_tokens(self) -> int:
        if self._tokens_per_s == 0:
            return MIN_IDLE_CHUNK_TOKENS
        in_time = int(self._tokens_per_s * LONGEST_IDLE_CHUNK_S)
        return min(MIN_IDLE_CHUNK_TOKENS, max(MIN_CHUNK_TOKENS, in_time))


def _worth_waiting_for(other: Sequence, sequence: Sequence) -> bool:
    """Whether `other` is prefilling enough of the same beginning that doing it twice would take longer."""
    if other.job_id == sequence.job_id:
        return True
    if other.priority_rank > sequence.priority_rank or other.isolation != sequence.isolation:
        return False
    needed = other.cached_tokens + SHARED_TOKENS_WORTH_WAITING
    return len(sequence.prompt_ids) > needed and other.prompt_ids[:needed] == sequence.prompt_ids[:needed]


def _remaining(sequence: Sequence) -> int:
    return sequence.prefill_target - sequence.prefilled
