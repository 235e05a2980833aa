"""Who runs next: admission from the waiting list, prefill chunks within a time budget, decode in between. Pure.

    add ─► waiting ──admit──► prefilling ──promote──► running ──remove
              ▲                                          │
              └─────────── victim, send_back ────────────┘

Order: class, then what resumes, then arrival. Who is overtaken by later arrivals, or preempted, rises by one class for
every OVERTAKINGS_PER_CLASS times, so everything has its turn however much higher work keeps coming. The engine asks
`schedule` once per step and reports back what a prefill cost. Nothing here touches arrays or clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from scheduler.job import Priority
from workers.backend import PRIORITY_RANKS
from workers.engine.prefill_budget import PrefillBudget
from workers.engine.sequence import Phase, Sequence, in_service_order
from workers.engine.slot_plan import planned_tokens
from workers.engine.trials import Trials

IDLE_STALL_FACTOR = 4  # with no stream running, a chunk may take this many stalls: only cancels wait for it
SHARED_TOKENS_WORTH_WAITING = 128
_BATCH_RANK = PRIORITY_RANKS[Priority.BATCH]


Readiness = Callable[[Sequence], bool]


def _always(_: Sequence) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`slot_tokens` bounds rows x capacity over the working set's groups, of which there are `most_groups` at most;
    `stall_s` is how long prefill may hold up streams, `batch_stall_s` how long where all of them are batch work.
    """

    max_rows: int
    slot_tokens: int
    stall_s: float
    most_groups: int = 1
    batch_stall_s: float = 0.5


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
        self._budget = PrefillBudget(limits.stall_s * IDLE_STALL_FACTOR)
        self._trials = Trials()
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
    def on_trial(self) -> bool:
        """Whether it is being found out who made a step fail."""
        return bool(self._trials)

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
        self._trials.acquit(sequence)
        for members in (self.waiting, self.prefilling, self.running):
            if sequence in members:
                members.remove(sequence)

    def promote(self, sequence: Sequence) -> None:
        """Its prefill is done: it takes part in the next decode step."""
        self.prefilling.remove(sequence)
        self.running.append(sequence)
        sequence.phase = Phase.RUNNING

    def send_back(self, sequence: Sequence) -> None:
        """Its row is gone: it waits again, before those of its class that have not begun."""
        for members in (self.prefilling, self.running):
            if sequence in members:
                members.remove(sequence)
        sequence.prefilled = 0
        sequence.overtaken += 1
        self.add(sequence)

    def accuse(self, suspects: Items[Sequence]) -> None:
        """One of these, all of which were sent back, made a step fail: they run in halves until it is found."""
        self._trials.accuse(suspects)

    def acquit(self, sequence: Sequence) -> None:
        """It took part in a step that succeeded."""
        self._trials.acquit(sequence)

    def admit(self, is_ready: Readiness = _always) -> list[Sequence]:
        """Move what fits now from waiting to prefilling, in order; the first that does not fit holds the rest.

        What is not ready, its pages being on their way or being computed by another, is passed over.
        """
        admitted: list[Sequence] = []
        for sequence in self._candidates():
            if not self._fits(sequence, [*self.prefilling, *self.running]):
                break
            if not self._may_begin(sequence, is_ready):
                continue
            self.waiting.remove(sequence)
            self.prefilling.append(sequence)
            sequence.phase = Phase.PREFILL
            admitted.append(sequence)
        for sequence in admitted:
            self._count_overtaken_by(sequence)
        return admitted

    def schedule(self) -> Decision:
        """The next thing to launch; after a prefill the running streams always get a step."""
        pending = [sequence for sequence in self.prefilling if sequence.prefilled < sequence.prefill_target]
        if pending and not (self.running and self._prefilled_last):
            self._prefilled_last = True
            return Prefill(self._chunks(in_service_order(pending)))
        self._prefilled_last = False
        return Decode() if self.running else Idle()

    @property
    def stall_s(self) -> float | None:
        """How long the next prefill launch may take for the running streams' sake; None where there are none."""
        if not self.running:
            return None
        only_batch = all(sequence.priority_rank >= _BATCH_RANK for sequence in self.running)
        return self._limits.batch_stall_s if only_batch else self._limits.stall_s

    def observe_prefill(self, chunks: Items[Chunk], seconds: float) -> None:
        """Learn what prefill takes, and carry what was overdrawn into the next budget."""
        self._budget.observe([(chunk.start, chunk.count) for chunk in chunks], seconds, self.stall_s)

    def victim(self, is_ready: Readiness = _always) -> Sequence | None:
        """Whom to send back next: while suspects are tried whoever is not on trial; else the newest of the lowest class
        where the running rows outgrew the budget, or where it is lower than the first that waits for its room.
        """
        if self._trials:
            return _least([sequence for sequence in self.running if sequence not in self._trials.current])
        if len(self.running) > 1 and self._slot_tokens(self.running) > self._limits.slot_tokens:
            return _least(self.running)
        if self.waiting and self._may_begin(self.waiting[0], is_ready):
            return self._in_the_way_of(self.waiting[0])
        return None

    def _in_the_way_of(self, first: Sequence) -> Sequence | None:
        """A row below the class of the first in line, if it gets in once all such rows are gone."""
        lower = [sequence for sequence in self.running if sequence.service_rank > first.priority_rank]
        if not lower or self._fits(first, [*self.prefilling, *self.running]):
            return None
        others = [*self.prefilling, *(sequence for sequence in self.running if sequence not in lower)]
        return _least(lower) if self._fits(first, others) else None

    def _may_begin(self, sequence: Sequence, is_ready: Readiness) -> bool:
        """Not before what another prefills now, or what is being read, can be found in the prefix cache."""
        return is_ready(sequence) and not any(_worth_waiting_for(other, sequence) for other in self.prefilling)

    def _candidates(self) -> list[Sequence]:
        """Who may be admitted, in order: all that wait, or those on trial once they are among themselves."""
        if not self._trials:
            return list(self.waiting)
        current = self._trials.current
        if any(sequence not in current for sequence in (*self.prefilling, *self.running)):
            return []
        return [sequence for sequence in self.waiting if sequence in current]

    def _count_overtaken_by(self, admitted: Sequence) -> None:
        overtaken = [s for s in (*self.waiting, *self.prefilling) if s.arrival < admitted.arrival]
        for sequence in overtaken:
            sequence.overtaken += 1
        if overtaken:
            self.waiting = in_service_order(self.waiting)

    def _fits(self, sequence: Sequence, active: list[Sequence]) -> bool:
        if not active:
            return True
        if len(active) >= self._limits.max_rows:
            return False
        return self._slot_tokens([*active, sequence]) <= self._limits.slot_tokens

    def _slot_tokens(self, sequences: list[Sequence]) -> int:
        """Rows x capacity of a working set that holds these sequences, each one token longer."""
        return planned_tokens([sequence.length + 1 for sequence in sequences], self._limits.most_groups)

    def _chunks(self, pending: list[Sequence]) -> tuple[Chunk, ...]:
        """Half of the time to the first in service order, the rest to the shortest of its class."""
        others = sorted(pending[1:], key=lambda s: (s.service_rank, s.prefill_target - s.prefilled))
        ordered = [pending[0], *others]
        shares = self._budget.shares([(s.prefilled, s.prefill_target - s.prefilled) for s in ordered], self.stall_s)
        pairs = zip(ordered, shares, strict=True)
        return tuple(Chunk(sequence, sequence.prefilled, count) for sequence, count in pairs if count > 0)


def _worth_waiting_for(other: Sequence, sequence: Sequence) -> bool:
    """Whether `other` is prefilling enough of the same beginning that doing it twice would take longer."""
    if other.job_id == sequence.job_id:
        return True
    if other.service_rank > sequence.service_rank or other.isolation != sequence.isolation:
        return False
    needed = other.cached_tokens + SHARED_TOKENS_WORTH_WAITING
    return len(sequence.prompt_ids) > needed and other.prompt_ids[:needed] == sequence.prompt_ids[:needed]


def _least(sequences: Iterable[Sequence]) -> Sequence | None:
    """The newest of the lowest class."""
    return max(sequences, key=lambda s: (s.service_rank, s.arrival, s.index), default=None)
