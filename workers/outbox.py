"""What a worker holds and still has to say: numbers each job's deltas, merges those that wait, orders the end last.

Pure state of one worker incarnation, fed by the backend's events and emptied by the deliver loop. A batch stays the
same, ids and payloads, until it is confirmed, so that an emit whose reply got lost can be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.job import ClaimedJob
from scheduler.tokens import ChoiceDelta, Delta, EventId, encode_event, merge_deltas
from workers.backend import BackendEvent, ChoiceProgress, JobDone, JobError, JobProgress

_FIRST_SEQ = 1  # 0 is Started, written by the claim


@dataclass(slots=True)
class HeldJob:
    """One claimed job: what waits to be emitted, and how it ended if it has."""

    job: ClaimedJob
    next_seq: int = _FIRST_SEQ
    waiting: Delta | None = None
    end: JobDone | JobError | None = None


class Outbox:
    """The jobs of one incarnation, by id."""

    def __init__(self) -> None:
        self._held: dict[str, HeldJob] = {}
        self._batch: list[tuple[str, EventId, bytes]] = []

    def __len__(self) -> int:
        return len(self._held)

    @property
    def jobs(self) -> list[ClaimedJob]:
        return [held.job for held in self._held.values()]

    @property
    def has_news(self) -> bool:
        """Whether a batch or an end waits to be delivered."""
        return bool(self._batch) or any(held.waiting is not None or held.end for held in self._held.values())

    def get(self, job_id: str) -> ClaimedJob | None:
        held = self._held.get(job_id)
        return None if held is None else held.job

    def hold(self, job: ClaimedJob) -> None:
        """A job was claimed; an older attempt of it is forgotten."""
        self.drop(job.id)
        self._held[job.id] = HeldJob(job)

    def drop(self, job_id: str) -> None:
        """Forget a job that ended, was handed back or is no longer ours, with all it had to say."""
        if self._held.pop(job_id, None) is not None:
            self._batch = [event for event in self._batch if event[0] != job_id]

    def take_in(self, event: BackendEvent) -> None:
        """An event of the backend; those of jobs that are not held (any more) are of no interest."""
        held = self._held.get(event.job_id)
        if held is None or held.job.attempt != event.attempt:
            return
        if isinstance(event, JobProgress):
            delta = Delta(choices=event.choices)
            held.waiting = delta if held.waiting is None else merge_deltas(held.waiting, delta)
        else:
            held.end = event

    def batch(self) -> list[tuple[str, EventId, bytes]]:
        """At most one event per job, in order; the same again until `confirm`."""
        if not self._batch:
            self._batch = [self._next(held) for held in self._held.values() if held.waiting is not None]
        return self._batch

    def confirm(self) -> None:
        """The batch is in the log (or its jobs were dropped since)."""
        self._batch = []

    def last_seq(self, job_id: str) -> int:
        """The number of the last event that this attempt has; 0, its Started, where there was no other."""
        return self._held[job_id].next_seq - 1

    def ended(self) -> list[tuple[ClaimedJob, JobDone | JobError]]:
        """Jobs whose every delta is confirmed and whose end is known; call after `confirm`."""
        assert not self._batch, "a batch is under way"
        return [(held.job, held.end) for held in self._held.values() if held.end is not None and held.waiting is None]

    def _next(self, held: HeldJob) -> tuple[str, EventId, bytes]:
        assert held.waiting is not None
        event = (held.job.id, EventId(held.job.attempt, held.next_seq), encode_event(held.waiting))
        held.next_seq += 1
        held.waiting = None
        return event


def as_progress(visible: tuple[ChoiceDelta, ...]) -> tuple[ChoiceProgress, ...]:
    """What earlier attempts made visible, as a backend takes it."""
    return tuple(
        ChoiceProgress(choice.index, choice.token_ids, choice.text, choice.finish_reason) for choice in visible
    )
