"""/admin/dead: jobs that ran out of attempts; replay them, one or many, or give them up."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from api.auth import Principal
from api.body import read_body
from api.job_lookup import Caller, check_query
from api.job_retry import retry_job
from api.protocols.parameters import BadParameter, check_range, check_text, decode_fields, decode_struct
from api.responses import json_response
from api.routes.models import read_limit
from api.services import Services
from scheduler.errors import ClientError, JobNotFound
from scheduler.queue.records import DeadLetter

MAX_LIMIT = 1000
PAGE = 500
MOST_SCANNED = 10_000  # as many as are kept
_ENTRY = re.compile(r"[0-9]{1,15}-[0-9]{1,10}")
router = APIRouter()


class WireReplay(msgspec.Struct):
    pool: str | None = None
    code: str | None = None
    limit: int = 100


@router.get("/admin/dead")
async def list_dead(
    request: Request,
    caller: Caller,
    limit: str | None = None,
    after: str | None = None,
    pool: str | None = None,
    code: str | None = None,
) -> Response:
    """Dead letters, newest first; `after` is the `entry_id` of the last one seen."""
    check_query(request, ("limit", "after", "pool", "code"))
    if after is not None and _ENTRY.fullmatch(after) is None:
        raise BadParameter("'after' is the entry_id of a dead letter.", param="after", reason="invalid_value")
    count = read_limit(limit, 20, MAX_LIMIT)
    services: Services = request.app.state.services
    found: list[DeadLetter] = []
    async for letter in _letters(services, caller, after, pool, code):
        found.append(letter)
        if len(found) > count:
            break
    page = found[:count]
    return json_response(
        {
            "object": "list",
            "data": [_letter_body(letter) for letter in page],
            "has_more": len(found) > count,
            "first_id": page[0].entry_id if page else None,
            "last_id": page[-1].entry_id if page else None,
        }
    )


@router.post("/admin/dead/replay")
async def replay_many(request: Request, caller: Caller) -> Response:
    """Replay up to `limit` dead letters of a pool, of an error code, or of any; the oldest of the newest go first."""
    services: Services = request.app.state.services
    wanted = await _read_replay(request)
    letters: list[DeadLetter] = []
    async for letter in _letters(services, caller, None, wanted.pool, wanted.code):
        if letter.replayable and len(letters) < wanted.limit:
            letters.append(letter)
    replayed: list[str] = []
    failed: list[dict[str, Any]] = []
    for letter in reversed(letters):
        try:
            await retry_job(services, caller, letter.job_id)
        except ClientError as error:
            failed.append({"job_id": letter.job_id, "error": {"code": error.code, "message": error.message}})
        else:
            replayed.append(letter.job_id)
    return json_response({"object": "replay", "replayed": replayed, "failed": failed})


@router.post("/admin/dead/{job_id}/replay")
async def replay_one(request: Request, caller: Caller, job_id: str) -> Response:
    """Accept the job once more: same id, next attempt, all tries."""
    services: Services = request.app.state.services
    job = await retry_job(services, caller, job_id)
    request.state.job_id = job.id
    return json_response({"id": job.id, "object": "job", "state": job.state.value})


@router.delete("/admin/dead/{job_id}")
async def discard(request: Request, caller: Caller, job_id: str) -> Response:
    """Give a dead letter up: its body goes, its record stays."""
    services: Services = request.app.state.services
    view = await services.queue.view(job_id)
    if view is None or not caller.may_see(view.tenant) or not await services.lifecycle.discard(job_id):
        raise JobNotFound(f"No dead letter {job_id[:80]!r}.", param="job_id")
    request.state.job_id = job_id
    return json_response({"id": job_id, "object": "dead_letter", "deleted": True})


async def _letters(
    services: Services, caller: Principal, before: str | None, pool: str | None, code: str | None
) -> AsyncIterator[DeadLetter]:
    for _ in range(MOST_SCANNED // PAGE):
        page = await services.queue.dead_letters(PAGE, before, pool)
        lines = await services.durable.lines_among([letter.job_id for letter in page])
        for letter in page:
            if caller.may_see(letter.tenant) and code in (None, letter.code):
                # The batch has counted it, or will: its line is not tried again (see job_retry).
                yield replace(letter, replayable=letter.replayable and letter.job_id not in lines)
        if len(page) < PAGE:
            return
        before = page[-1].entry_id


async def _read_replay(request: Request) -> WireReplay:
    services: Services = request.app.state.services
    body = await read_body(request, services.settings.max_body_bytes)
    if not body:
        return WireReplay()
    for name in decode_fields(body):
        if name not in WireReplay.__struct_fields__:
            raise BadParameter(f"Unknown parameter: '{name[:64]}'.", param=name[:64], reason="unknown_parameter")
    wire = decode_struct(body, WireReplay)
    check_range("limit", wire.limit, 1, MAX_LIMIT)
    for name, text in (("pool", wire.pool), ("code", wire.code)):
        check_text(name, text or "", 256)
    return wire


def _letter_body(letter: DeadLetter) -> dict[str, Any]:
    return {
        "object": "dead_letter",
        "entry_id": letter.entry_id,
        "job_id": letter.job_id,
        "pool": letter.pool,
        "priority": letter.priority.value,
        "tenant": letter.tenant,
        "attempt": letter.attempt,
        "died_ms": letter.at_ms,
        "reason": {"code": letter.code, "message": letter.message},
        "replayable": letter.replayable,
    }
