"""What benchmarks/queue asks of each queue it compares: a worker process that runs no-op jobs, and a producer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

CALLS_AT_ONCE = 64  # of one producer
ROWS = 32  # jobs at once in one worker, the same for everybody who can be told


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """One job on an idle queue, in seconds from its enqueue: until its function ran, until its result was here."""

    start_s: float
    result_s: float


class Producer(Protocol):
    """The client's side, in a process of its own: open → (round_trip | enqueue…)* → close."""

    async def open(self) -> None: ...

    async def enqueue(self, count: int) -> None:
        """Accept `count` no-op jobs as fast as this queue can with 64 calls at once, or in the batches it offers."""
        ...

    async def unfinished(self) -> int:
        """Accepted jobs without an outcome in Redis."""
        ...

    async def round_trip(self) -> RoundTrip:
        """One job, its result awaited; the job says when it ran by the machine's monotonic clock."""
        ...

    async def close(self) -> None: ...


class System(Protocol):
    """One queue under test. `share` of the run's jobs: the slow ones get fewer."""

    name: str
    share: float
    guarantees: str
    is_foreign: bool  # needs the peers' environment

    def producer(self, url: str) -> Producer: ...

    def command(self, python: str, url: str) -> list[str] | None:
        """The queue's own command line of its worker, by that interpreter; None: `work` is the worker."""
        ...

    async def work(self, url: str) -> None:
        """Run jobs until SIGTERM."""
        ...


def shares(count: int) -> list[int]:
    """`count` jobs split over the producer's callers."""
    return [count // CALLS_AT_ONCE + (number < count % CALLS_AT_ONCE) for number in range(CALLS_AT_ONCE)]
