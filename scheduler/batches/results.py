"""Writes the files of results of a batch whose lines are all over: what succeeded, and what did not.

Called by keeper.py. Ids and contents are the same whenever they are written: a crash leaves nothing to undo.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

from scheduler.batch import BatchRecord, LineCounts, result_file_id
from scheduler.db.durable import DurableStore, DurableView
from scheduler.db.files import BATCH_FILE_LIFE_MS, FileRecord, FileStore
from scheduler.dialect import Dialect
from scheduler.errors import InternalError, from_code
from scheduler.job import JobState
from scheduler.request import Usage

PAGE_LINES = 100
OUTPUT = "output"
ERROR = "error"
PURPOSE = "batch_output"

_CUT_SHORT = {
    JobState.EXPIRED: ("batch_expired", "This request could not be executed before the completion window expired."),
    JobState.CANCELLED: ("batch_cancelled", "This request was not executed because the batch was cancelled."),
}


@dataclass(frozen=True, slots=True)
class ResultFile:
    """One file of results: its record (None: there was no such line), and what was counted as it was written."""

    record: FileRecord | None
    lines: int
    expired: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class Results:
    output: ResultFile
    errors: ResultFile

    @property
    def records(self) -> list[FileRecord]:
        return [file.record for file in (self.output, self.errors) if file.record is not None]

    @property
    def usage(self) -> Usage:
        return _sum(self.output.usage, self.errors.usage)

    @property
    def any_expired(self) -> bool:
        return self.errors.expired > 0

    @property
    def counts(self) -> LineCounts:
        completed, failed = self.output.lines, self.errors.lines
        return LineCounts(completed + failed, completed, failed)


class ResultWriter:
    """One per scheduler process."""

    def __init__(self, files: FileStore, durable: DurableStore, dialect: Dialect) -> None:
        self._files = files
        self._durable = durable
        self._dialect = dialect

    async def write(self, batch: BatchRecord, made_ms: int) -> Results:
        """Both files, on disk; their rows are the caller's to add. Raises StorageFull."""
        return Results(await self._write(batch, OUTPUT, made_ms), await self._write(batch, ERROR, made_ms))

    async def _write(self, batch: BatchRecord, kind: str, made_ms: int) -> ResultFile:
        lines, expired, usage = 0, 0, Usage()
        async with self._files.drafting() as draft:
            async for line in self._lines(batch, kind):
                await draft.write(self._render(batch, line) + b"\n")
                lines, expired = lines + 1, expired + (line.state is JobState.EXPIRED)
                usage = _sum(usage, line.usage)
            if lines == 0:
                return ResultFile(None, 0, 0, usage)
            record = _record(batch, kind, made_ms, draft.size)
            await draft.keep(record.id)
        return ResultFile(record, lines, expired, usage)

    async def _lines(self, batch: BatchRecord, kind: str) -> AsyncIterator[DurableView]:
        after = 0
        while True:
            page = await self._durable.lines(batch.id, succeeded=kind == OUTPUT, after_line=after, limit=PAGE_LINES)
            for line in page:
                yield line
            if len(page) < PAGE_LINES:
                return
            after = page[-1].line or 0

    def _render(self, batch: BatchRecord, line: DurableView) -> bytes:
        name = line.id.removeprefix("job-")
        entry = {"id": f"batch_req_{name}", "custom_id": line.custom_id, "response": None, "error": None}
        cut_short = self._cut_short(batch, line)
        if cut_short is not None:
            code, message = cut_short
            return msgspec.json.encode(entry | {"error": {"code": code, "message": message}})
        status, body = self._response(batch, line)
        response = {"status_code": status, "request_id": line.id, "body": msgspec.Raw(body)}
        return msgspec.json.encode(entry | {"response": response})

    def _response(self, batch: BatchRecord, line: DurableView) -> tuple[int, bytes]:
        if line.state is JobState.SUCCEEDED and line.answer is not None:
            return 200, line.answer
        if line.error_code is None:
            error = InternalError("The request ended without an answer.")
        else:
            error = from_code(line.error_code, line.error_message or "", line.error_param)
        return self._dialect.render_error(batch.endpoint, error)

    def _cut_short(self, batch: BatchRecord, line: DurableView) -> tuple[str, str] | None:
        """What the batch's own end did to the line. One that its client cancelled by itself is an error of its own."""
        if line.state is JobState.CANCELLED and batch.cancelling_ms is None:
            return None
        return _CUT_SHORT.get(line.state)


def _record(batch: BatchRecord, kind: str, made_ms: int, size: int) -> FileRecord:
    asked_s = batch.output_expires_after_s
    life_ms = BATCH_FILE_LIFE_MS if asked_s is None else asked_s * 1000
    return FileRecord(
        id=result_file_id(batch, kind, made_ms),
        tenant=batch.tenant,
        filename=f"{batch.id}_{kind}.jsonl",
        purpose=PURPOSE,
        bytes=size,
        created_ms=made_ms,
        expires_ms=made_ms + life_ms,
    )


def _sum(left: Usage, right: Usage) -> Usage:
    return Usage(
        prompt_tokens=left.prompt_tokens + right.prompt_tokens,
        completion_tokens=left.completion_tokens + right.completion_tokens,
        cached_tokens=left.cached_tokens + right.cached_tokens,
    )
