"""What Redis still has of jobs with a SQL row, many at a time: how they stand, their logs folded to answers.

The recorder and the reconciler read it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from scheduler.job import JobState, JobView
from scheduler.queue.reader import QueueReader
from scheduler.queue.records import job_view
from scheduler.queue.scripts import available
from scheduler.tokens import ChoiceDelta, Delta, EventId, Failed, decode_event, merge_deltas

Entry = tuple[bytes, Mapping[bytes, bytes]]

_PAGE = 500  # events of one log in one round trip


@dataclass(frozen=True, slots=True)
class Standing:
    """A job that Redis knows; `finished_ms` None: it waits or runs."""

    state: JobState
    finished_ms: int | None


@dataclass(slots=True)
class JobLog:
    """One job's log, folded. `whole`: it can be read, to its last event; `failed`: what that said."""

    deltas: list[Delta] = field(default_factory=list[Delta])
    whole: bool = False
    broken: bool = False
    failed: Failed | None = None

    def choices(self) -> tuple[ChoiceDelta, ...]:
        """Everything that was said, by choice."""
        return tuple(sorted(_merged(self.deltas).choices, key=lambda choice: choice.index))


class OutcomeReader(QueueReader):
    """All calls raise QueueUnavailable when Redis cannot be reached."""

    async def standing(self, job_ids: Sequence[str]) -> dict[str, Standing]:
        """How these jobs stand; without those that Redis does not know."""
        rows = await self._pipelined([("HMGET", self.keys.job(job_id), "state", "finished") for job_id in job_ids])
        return {
            job_id: Standing(JobState(state.decode()), None if finished is None else int(finished))
            for job_id, (state, finished) in zip(job_ids, rows, strict=True)
            if state is not None
        }

    async def views(self, job_ids: Sequence[str]) -> list[JobView]:
        """Those of these jobs that Redis knows."""
        rows = await self._pipelined([("HGETALL", self.keys.job(job_id)) for job_id in job_ids])
        return [job_view(job_id, fields) for job_id, fields in zip(job_ids, rows, strict=True) if fields]

    async def logs(self, job_ids: Sequence[str]) -> dict[str, JobLog]:
        """The logs of jobs that ended, page by page, so that a long one needs little memory."""
        logs = {job_id: JobLog() for job_id in job_ids}
        after = dict.fromkeys(logs, "-")
        while after:
            reads = [("XRANGE", self.keys.log(job_id), start, "+", "COUNT", _PAGE) for job_id, start in after.items()]
            pages = dict(zip(after, await self._pipelined(reads), strict=True))
            await asyncio.to_thread(_fold, pages, logs)
            after = {job_id: f"({page[-1][0].decode()}" for job_id, page in pages.items() if len(page) == _PAGE}
        return logs

    async def _pipelined(self, commands: Sequence[tuple[str | int, ...]]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)  # pyright: ignore[reportUnknownMemberType]
            return cast(list[Any], await available(pipe.execute(), "outcomes"))


def _fold(pages: Mapping[str, Sequence[Entry]], logs: Mapping[str, JobLog]) -> None:
    for job_id, page in pages.items():
        log = logs[job_id]
        try:
            log.deltas += _read(page, log)
        except msgspec.MsgspecError:
            log.broken, log.whole = True, False


def _read(page: Sequence[Entry], log: JobLog) -> list[Delta]:
    """What the page says as one Delta, or none; its end, if it has one, goes into the log."""
    said: list[Delta] = []
    for at, fields in page:
        event = decode_event(fields[b"p"])
        log.whole = EventId.parse(at).is_terminal and not log.broken
        if isinstance(event, Delta):
            said.append(event)
        elif isinstance(event, Failed):
            log.failed = event
    return [_merged(said)] if said else []


def _merged(deltas: Sequence[Delta]) -> Delta:
    """All of them as one; by halves, as each merge copies what it merges."""
    while len(deltas) > 1:
        pairs = [merge_deltas(first, second) for first, second in zip(deltas[::2], deltas[1::2], strict=False)]
        deltas = [*pairs, deltas[-1]] if len(deltas) % 2 else pairs
    return deltas[0] if deltas else Delta(choices=())
