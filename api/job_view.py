"""A job as JSON, the same in every answer that shows one; and when to ask for it again."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from api.job_lookup import KnownJob
from api.protocols.openai_chat_answer import usage_body
from scheduler.db.durable_rows import DurableView
from scheduler.job import JobState, JobView

MAX_RETRY_AFTER_S = 60
AGE_PER_WAIT = 10  # a job that is this many times older than a pause is worth such a pause


def job_body(job: KnownJob) -> dict[str, Any]:
    """Times are Unix ms, durations ms, null where not reached or not asked for."""
    view, durable = job.view, job.durable
    return {
        "id": view.id,
        "object": "job",
        "state": view.state.value,
        "model": view.model,
        "pool": view.pool,
        "priority": view.priority.value,
        "tenant": view.tenant,
        "durable": durable is not None,
        "attempt": view.attempt,
        "attempts": [
            {"attempt": attempt.attempt, "worker": attempt.worker, "started_ms": attempt.started_ms}
            for attempt in view.attempts
        ],
        "created_ms": view.created_ms,
        "started_ms": view.started_ms,
        "first_token_ms": view.first_token_ms,
        "finished_ms": view.finished_ms,
        "deadline_ms": view.deadline_ms,
        "timings": {
            "queued_ms": _between(view.created_ms, view.started_ms),
            "first_token_ms": _between(view.created_ms, view.first_token_ms),
            "total_ms": _between(view.created_ms, view.finished_ms),
        },
        "usage": None if view.usage is None else usage_body(view.usage),
        "error": _error_body(view, durable),
        "batch_id": view.batch_id,
        **_order_body(durable),
        "result_url": f"/v1/jobs/{view.id}/result" if view.state is JobState.SUCCEEDED else None,
    }


def retry_after_s(job: KnownJob) -> int:
    """When a poll may find more: at the start of a job that is not due yet, else by its age."""
    now_ms = time.time() * 1000
    start_ms = None if job.durable is None else job.durable.not_before_ms
    if job.state is JobState.SCHEDULED and start_ms is not None:
        wait_ms = start_ms - now_ms
    else:
        wait_ms = (now_ms - job.view.created_ms) / AGE_PER_WAIT
    return max(1, min(MAX_RETRY_AFTER_S, round(wait_ms / 1000)))


def _order_body(durable: DurableView | None) -> dict[str, Any]:
    """What an asynchronous job was ordered with."""
    return {
        "endpoint": None if durable is None else durable.endpoint,
        "not_before_ms": None if durable is None else durable.not_before_ms,
        "webhook": None if durable is None else durable.webhook_id,
        "schedule_id": None if durable is None else durable.schedule_id,
        "custom_id": None if durable is None else durable.custom_id,
        "metadata": {} if durable is None else msgspec.json.decode(durable.details),
    }


def _error_body(view: JobView, durable: DurableView | None) -> dict[str, Any] | None:
    if view.error_code is None:
        return None
    param = None if durable is None else durable.error_param
    return {"code": view.error_code, "message": view.error_message, "param": param}


def _between(start_ms: int, end_ms: int | None) -> int | None:
    return None if end_ms is None else max(0, end_ms - start_ms)
