"""Turns a batch's input file into durable jobs, one per line. Called by keeper.py for a batch that is validating.

First the whole file is read and judged; one bad line fails the batch before any line has run. Then the lines are added
in steps. Both may be cut off anywhere and begun again: a total says that the file was judged, a line's job has the same
id each time, and adding goes on behind the last line that is there.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scheduler.batch import MAX_ERRORS, BatchRecord, BatchStatus, LineError, line_job_id
from scheduler.batches.ends import BatchEnds
from scheduler.batches.input_lines import (
    ENVELOPE_BYTES,
    InputLine,
    RawLine,
    custom_id_digest,
    parse_line,
    read_lines,
)
from scheduler.db.batches import BatchStore, encode_errors
from scheduler.db.durable import DurableStore, NewDurable
from scheduler.db.durable_ends import CANCELLED
from scheduler.db.files import FileStore
from scheduler.dialect import Dialect
from scheduler.errors import UnknownModel
from scheduler.job import Priority
from scheduler.model_card import ModelCard
from scheduler.request import encode_request
from scheduler.routing import DEFAULT, plan
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

STEP_LINES = 500
STEP_BYTES = 4 * 2**20

log = get_logger(__name__)


@dataclass(slots=True)
class Verdict:
    """What reading the file showed. `models`: each model with the first line that asks for it."""

    total: int = 0
    models: dict[str, int] = field(default_factory=dict[str, int])
    errors: list[LineError] = field(default_factory=list[LineError])
    custom_ids: set[bytes] = field(default_factory=set[bytes])

    def add(self, line: InputLine | LineError) -> None:
        self.total += 1
        if isinstance(line, LineError):
            self.errors.append(line)
            return
        digest = custom_id_digest(line.custom_id)
        if digest in self.custom_ids:
            message = f"The custom_id '{line.custom_id[:80]}' is used by an earlier line as well; each has its own."
            self.errors.append(LineError("duplicate_custom_id", message, line.number, "custom_id"))
        self.custom_ids.add(digest)
        self.models.setdefault(line.request.model, line.number)


class Expander:
    """One per scheduler process."""

    def __init__(
        self,
        batches: BatchStore,
        ends: BatchEnds,
        files: FileStore,
        durable: DurableStore,
        models: Callable[[], Awaitable[Sequence[ModelCard]]],
        dialect: Dialect,
        settings: Settings,
    ) -> None:
        self._batches = batches
        self._ends = ends
        self._files = files
        self._durable = durable
        self._models = models
        self._dialect = dialect
        self.max_lines = settings.max_batch_lines
        self._shard = settings.shard
        self._max_line_bytes = settings.max_body_bytes + ENVELOPE_BYTES

    async def expand(self, batch: BatchRecord) -> None:
        """Bring a validating batch to in_progress, or to failed. Raises NoModelYet while no worker serves anything."""
        if await self._files.get(batch.input_file_id, _now_ms()) is None:
            await self.fail(batch, LineError("file_not_found", f"The file {batch.input_file_id} was deleted."))
            return
        try:
            await self._expand(batch, self._files.path(batch.input_file_id))
        except FileNotFoundError:  # deleted in the midst, or by hand: a row has its bytes as long as it is there
            message = f"The content of {batch.input_file_id} is not on this server any more."
            await self.fail(batch, LineError("file_not_found", message))

    async def _expand(self, batch: BatchRecord, path: Path) -> None:
        total = batch.counts.total
        if total == 0:
            verdict = await self._judge(batch, path)
            if verdict.errors:
                await self._fail(batch, verdict.errors[:MAX_ERRORS])
                return
            total = verdict.total
            only_model = next(iter(verdict.models)) if len(verdict.models) == 1 else None
            if not await self._batches.note(batch, total=total, model=only_model):
                return
        if await self._add_lines(batch, path, total):
            await self._batches.move(batch, BatchStatus.IN_PROGRESS, _now_ms())
            log.info("batch runs", batch=batch.id, lines=total)

    async def fail(self, batch: BatchRecord, error: LineError) -> None:
        """End a batch that cannot be expanded at all."""
        await self._fail(batch, [error])

    async def _judge(self, batch: BatchRecord, path: Path) -> Verdict:
        cards = await self._served()
        verdict = Verdict()
        async for lines in self._steps(batch, path):
            for line in lines:
                verdict.add(line)
            if verdict.total > self.max_lines:
                message = f"The file has more than the {self.max_lines} requests that a batch may have."
                verdict.errors = [LineError("too_many_requests", message)]
                return verdict
            if len(verdict.errors) >= MAX_ERRORS:
                return verdict
        if verdict.total == 0:
            verdict.errors = [LineError("empty_file", "The input file is empty; a batch has at least one request.")]
        if not verdict.errors:
            verdict.errors = _unknown_models(verdict, cards)
        return verdict

    async def _served(self) -> Sequence[ModelCard]:
        """Asked before the file is read: while nothing is served, it would be read anew each second."""
        cards = await self._models()
        plan(DEFAULT, cards)
        return cards

    async def _add_lines(self, batch: BatchRecord, path: Path, total: int) -> bool:
        """False: the batch was cancelled meanwhile."""
        after = await self._durable.last_line(batch.id)
        async for lines in self._steps(batch, path, after):
            # all of them are good: the file was judged
            rows = [_row(batch, self._shard, line) for line in lines if isinstance(line, InputLine)]
            add = functools.partial(self._durable.add_lines, lines=rows)
            # The guarded write before it, in one transaction: no line is added behind the back of a cancel.
            if not await self._batches.note(batch, add, total=total):
                return False
        return True

    async def _steps(
        self, batch: BatchRecord, path: Path, after: int = 0
    ) -> AsyncGenerator[list[InputLine | LineError]]:
        """The lines behind `after`, read and parsed in a thread, a bounded step at a time."""
        steps = _steps(read_lines(path, self._max_line_bytes, after))
        while lines := await asyncio.to_thread(self._parse_next, batch.endpoint, steps):
            yield lines

    def _parse_next(self, endpoint: str, steps: Iterator[Sequence[RawLine]]) -> list[InputLine | LineError]:
        return [parse_line(raw, endpoint, self._dialect, secrets.randbits(63)) for raw in next(steps, ())]

    async def _fail(self, batch: BatchRecord, errors: Sequence[LineError]) -> None:
        # Lines that were added already wait for a batch in progress, which this one never becomes.
        await self._durable.end_held_lines(batch.id, CANCELLED.state, CANCELLED.code, CANCELLED.message)
        await self._ends.end(batch, BatchStatus.FAILED, errors=encode_errors(errors))
        log.info("batch failed its validation", batch=batch.id, errors=len(errors), first=errors[0].message)


def _unknown_models(verdict: Verdict, cards: Sequence[ModelCard]) -> list[LineError]:
    errors: list[LineError] = []
    for model, number in verdict.models.items():
        try:
            plan(model, cards)
        except UnknownModel as error:
            errors.append(LineError(error.code, error.message, number, "body.model"))
        if len(errors) == MAX_ERRORS:
            break
    return errors


def _row(batch: BatchRecord, shard: str, line: InputLine) -> NewDurable:
    return NewDurable(
        id=line_job_id(shard, batch, line.number),
        tenant=batch.tenant,
        endpoint=batch.endpoint,
        model=line.request.model,
        priority=Priority.BATCH,
        request=encode_request(line.request),
        created_ms=batch.created_ms,
        deadline_ms=batch.expires_ms,
        batch_id=batch.id,
        line=line.number,
        custom_id=line.custom_id,
    )


def _steps(lines: Iterator[RawLine]) -> Iterator[list[RawLine]]:
    """Lines in steps that are bounded in number and in bytes."""
    step: list[RawLine] = []
    size = 0
    for line in lines:
        step.append(line)
        size += 0 if line.data is None else len(line.data)
        if len(step) >= STEP_LINES or size >= STEP_BYTES:
            yield step
            step, size = [], 0
    if step:
        yield step


def _now_ms() -> int:
    return int(time.time() * 1000)
