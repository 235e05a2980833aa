"""/v1/schedules: jobs that recur. Each turn is a durable job; /v1/jobs?schedule_id= lists them."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from api.auth import Principal
from api.body import read_body
from api.job_lookup import Caller
from api.job_order import accepted_job, parse_inference
from api.job_result import accepted_response
from api.named_webhook import named_webhook
from api.protocols.native_job import JobCall
from api.protocols.native_schedule import ScheduleCall, first_turn, parse_schedule, parse_schedule_change
from api.responses import json_response
from api.services import Services
from scheduler.db.schedules import ScheduleSpec, ScheduleView
from scheduler.errors import ScheduleNotFound
from scheduler.job import new_job_id
from scheduler.schedules import job_of

router = APIRouter()


@router.post("/v1/schedules")
async def create_schedule(request: Request, caller: Caller) -> Response:
    """A new schedule; its first turn is the next one that its cron expression has."""
    services: Services = request.app.state.services
    call = parse_schedule(await read_body(request, services.settings.max_body_bytes), _now_ms())
    spec = await _spec(services, caller, call)
    made = await services.schedules.create(caller.tenant, spec, call.next_ms, paused=call.paused)
    return json_response(schedule_body(made), status=201)


@router.get("/v1/schedules")
async def list_schedules(request: Request, caller: Caller) -> Response:
    """All schedules that the caller may see, the newest first."""
    services: Services = request.app.state.services
    found = await services.schedules.list(None if caller.key_id is None else caller.tenant)
    return json_response({"object": "list", "data": [schedule_body(view) for view in found], "has_more": False})


@router.get("/v1/schedules/{schedule_id}")
async def get_schedule(request: Request, caller: Caller, schedule_id: str) -> Response:
    """One schedule."""
    return json_response(schedule_body(await _find(request, caller, schedule_id)))


@router.patch("/v1/schedules/{schedule_id}")
async def change_schedule(request: Request, caller: Caller, schedule_id: str) -> Response:
    """Change the members that are given; the next turn is counted from now."""
    services: Services = request.app.state.services
    view = await _find(request, caller, schedule_id)
    body = await read_body(request, services.settings.max_body_bytes)
    call = parse_schedule_change(body, _wire(view), _now_ms())
    spec = await _spec(services, _of_tenant(caller, view), call)
    return await _changed(services, view, spec, call.next_ms, paused=view.paused)


@router.delete("/v1/schedules/{schedule_id}")
async def delete_schedule(request: Request, caller: Caller, schedule_id: str) -> Response:
    """Remove a schedule; the jobs that it made stay."""
    services: Services = request.app.state.services
    view = await _find(request, caller, schedule_id)
    deleted = await services.schedules.delete(view.id)
    return json_response({"id": view.id, "object": "schedule.deleted", "deleted": deleted})


@router.post("/v1/schedules/{schedule_id}/pause")
async def pause_schedule(request: Request, caller: Caller, schedule_id: str) -> Response:
    """No more turns until it is resumed."""
    view = await _find(request, caller, schedule_id)
    return await _changed(request.app.state.services, view, view.spec, None, paused=True)


@router.post("/v1/schedules/{schedule_id}/resume")
async def resume_schedule(request: Request, caller: Caller, schedule_id: str) -> Response:
    """Turns again, from now on; those of the pause are not made up for."""
    view = await _find(request, caller, schedule_id)
    next_ms = first_turn(view.spec.cron, view.spec.timezone, _now_ms()) if view.paused else view.next_ms
    return await _changed(request.app.state.services, view, view.spec, next_ms, paused=False)


@router.post("/v1/schedules/{schedule_id}/run")
async def run_schedule(request: Request, caller: Caller, schedule_id: str) -> Response:
    """One job now, paused or not, beside the turns: 202 and the job."""
    services: Services = request.app.state.services
    view = await _find(request, caller, schedule_id)
    job = job_of(view, services.dialect, new_job_id(services.settings.shard), _now_ms())
    accepted = await services.acceptance.accept(job)
    request.state.job_id = accepted.job_id
    return accepted_response(await accepted_job(services, accepted), status=202)


def schedule_body(view: ScheduleView) -> dict[str, Any]:
    """A schedule as JSON; times are Unix ms."""
    return {
        "id": view.id,
        "object": "schedule",
        "tenant": view.tenant,
        **_wire(view),
        "paused": view.paused,
        "created_ms": view.created_ms,
        "next_ms": view.next_ms,
        "last_ms": view.last_ms,
        "last_job_id": view.last_job_id,
        "last_error": view.last_error,
    }


def _wire(view: ScheduleView) -> dict[str, Any]:
    """The schedule as its owner would write it."""
    spec = view.spec
    return {
        "name": spec.name,
        "cron": spec.cron,
        "timezone": spec.timezone,
        "endpoint": spec.endpoint,
        "body": msgspec.Raw(spec.body),
        "priority": spec.priority.value,
        "deadline_after_ms": spec.deadline_after_ms,
        "webhook": spec.webhook_id,
        "metadata": json.loads(spec.details),
    }


def _of_tenant(caller: Principal, view: ScheduleView) -> Principal:
    """Whoever changes a schedule, its webhook is one of its own tenant's."""
    return replace(caller, tenant=view.tenant)


async def _spec(services: Services, caller: Principal, call: ScheduleCall) -> ScheduleSpec:
    parsed = parse_inference(services, JobCall(call.endpoint, call.body))
    return ScheduleSpec(
        name=call.name,
        cron=call.cron,
        timezone=call.timezone,
        endpoint=call.endpoint,
        body=call.body,
        priority=parsed.priority if call.priority is None else call.priority,
        deadline_after_ms=call.deadline_after_ms,
        details=msgspec.json.encode(call.metadata).decode(),
        webhook_id=await named_webhook(services, caller, call.webhook),
    )


async def _changed(
    services: Services, view: ScheduleView, spec: ScheduleSpec, next_ms: int | None, *, paused: bool
) -> Response:
    changed = await services.schedules.change(view.id, spec, next_ms, paused=paused)
    if changed is None:
        raise _no_schedule(view.id)
    return json_response(schedule_body(changed))


async def _find(request: Request, caller: Caller, schedule_id: str) -> ScheduleView:
    services: Services = request.app.state.services
    view = await services.schedules.get(schedule_id)
    if view is None or not caller.may_see(view.tenant):
        raise _no_schedule(schedule_id)
    return view


def _no_schedule(schedule_id: str) -> ScheduleNotFound:
    return ScheduleNotFound(f"No schedule {schedule_id[:80]!r}.", param="schedule_id")


def _now_ms() -> int:
    return int(time.time() * 1000)
