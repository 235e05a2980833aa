"""/admin/queues: what waits and runs per pool and class; pause, resume and drain."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from api.auth import require_principal
from api.body import read_body
from api.errors import PoolNotFound
from api.protocols.native_job import read_priority_name
from api.protocols.parameters import BadParameter, check_text, decode_fields, decode_struct
from api.responses import json_response
from api.services import Services
from scheduler.job import Priority
from scheduler.queue.records import QueueView
from scheduler.telemetry import get_logger

MAX_POOL_CHARS = 256
router = APIRouter(dependencies=[Depends(require_principal)])
log = get_logger(__name__)


class WireHold(msgspec.Struct):
    pool: str
    priority: str | None = None


@router.get("/admin/queues")
async def list_queues(request: Request) -> Response:
    """All classes of every pool that is served, holds jobs or is held up."""
    return await _answer(request.app.state.services)


@router.post("/admin/queues/pause")
async def pause(request: Request) -> Response:
    """Nothing more of the pool, or of one of its classes, is started; new jobs are still accepted."""
    services, pool, priority = await _read(request)
    await services.lifecycle.pause(pool, priority)
    log.info("paused a queue", pool=pool, priority=priority)
    return await _answer(services, pool)


@router.post("/admin/queues/resume")
async def resume(request: Request) -> Response:
    """Undo the pause of the pool, or of one of its classes. Resuming a whole pool also ends its draining."""
    services, pool, priority = await _read(request)
    await services.lifecycle.resume(pool, priority)
    if priority is None:
        await services.lifecycle.drain(pool, False)
    log.info("resumed a queue", pool=pool, priority=priority)
    return await _answer(services, pool)


@router.post("/admin/queues/drain")
async def drain(request: Request) -> Response:
    """The pool takes no new jobs and works off those that it has."""
    services, pool, priority = await _read(request)
    if priority is not None:
        raise BadParameter("Only a whole pool can be drained.", param="priority", reason="invalid_value")
    await services.lifecycle.drain(pool, True)
    log.info("drains a pool", pool=pool)
    return await _answer(services, pool)


async def _read(request: Request) -> tuple[Services, str, Priority | None]:
    services: Services = request.app.state.services
    body = await read_body(request, services.settings.max_body_bytes)
    for name in decode_fields(body):
        if name not in WireHold.__struct_fields__:
            raise BadParameter(f"Unknown parameter: '{name[:64]}'.", param=name[:64], reason="unknown_parameter")
    wire = decode_struct(body, WireHold)
    check_text("pool", wire.pool, MAX_POOL_CHARS)
    priority = None if wire.priority is None else read_priority_name(wire.priority)
    known = sorted({queue.pool for queue in await services.queue.queues()})
    if wire.pool not in known:
        served = ", ".join(map(repr, known[:5])) if known else "none"
        raise PoolNotFound(f"No pool {wire.pool!r}; there are: {served}.", param="pool")
    return services, wire.pool, priority


async def _answer(services: Services, pool: str | None = None) -> Response:
    found = await services.queue.queues()
    data = [_queue_body(queue) for queue in found if pool in (None, queue.pool)]
    return json_response({"object": "list", "data": data})


def _queue_body(queue: QueueView) -> dict[str, Any]:
    """Counts of jobs; `oldest_ms` is a duration, null where nothing waits."""
    return {
        "object": "queue",
        "pool": queue.pool,
        "priority": queue.priority.value,
        "waiting": queue.waiting,
        "scheduled": queue.scheduled,
        "running": queue.running,
        "parked": queue.parked,
        "oldest_ms": queue.oldest_ms,
        "claims_per_s": queue.claims_per_s,
        "paused": queue.paused,
        "draining": queue.draining,
        "pool_lanes": {"urgent": queue.urgent, "resume": queue.resume, "solo": queue.solo},
    }
