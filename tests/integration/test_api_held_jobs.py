"""Durable jobs that Redis does not have: held, lost, of another shard; their events, their cancels, their class."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlmodel import col, update

from scheduler.db.durable import Stage as At
from scheduler.db.models import DurableJob
from scheduler.db.outbox_rows import OutboxRows
from scheduler.job import JobState, Priority
from scheduler.outbox import Outbox
from tests.api_stage import Answer, Stage, running_api_alone, wait_until
from tests.scheduling_stage import scheduling

HOLD = {"say": ["a "], "hold": True}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Without stager and recorder, which tests start where they want them."""
    with running_api_alone(tmp_path_factory.mktemp("held"), keepalive_s=0.2) as stage:
        yield stage


def submit(stage: Stage, script: Any = "hi", **fields: Any) -> str:
    body = {"model": fields.pop("model", "demo"), "messages": stage.chat(script)["messages"]}
    answer = stage.request("POST", "/v1/jobs", {"body": body, **fields})
    assert answer.status == 202, answer.body
    return answer.json["id"]


def row(stage: Stage, job_id: str) -> tuple[At, JobState]:
    found = stage.call(stage.services.durable.get(job_id))
    assert found is not None
    return found.stage, found.state


def change(service: Stage, job_id: str, **values: Any) -> None:
    async def write() -> None:
        async with service.services.database.session() as session:
            await session.exec(update(DurableJob).where(col(DurableJob.id) == job_id).values(values))
            await session.commit()

    service.call(write())


def lose(stage: Stage, job_id: str) -> None:
    """Redis knows nothing of this job any more."""
    keys = stage.services.queue.keys

    async def delete() -> None:
        await stage.services.redis.delete(keys.job(job_id), keys.log(job_id), keys.of("body", job_id))

    stage.call(delete())


def events_of(stage: Stage, job_id: str, **headers: str) -> Answer:
    return stage.request("GET", f"/v1/jobs/{job_id}/events", **headers)


@contextmanager
def reading(stage: Stage, job_id: str, header: str = "") -> Iterator[Callable[[], str]]:
    """A reader of the job's events that waits; called, it reads them to their end."""
    with stage.connect() as reader:
        start = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        reader.sendall(f"{start}{header}\r\n".encode())
        seen = b""
        while b": keep-alive" not in seen:
            piece = reader.recv(1000)
            assert piece, seen
            seen += piece

        def rest() -> str:
            found = seen
            while piece := reader.recv(1000):
                found += piece
            return found.decode()

        yield rest


def test_the_events_of_a_held_job_wait_and_tell_of_its_cancel(stage: Stage) -> None:
    job_id = submit(stage, delay_ms=3_600_000)
    with reading(stage, job_id) as rest:
        assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").status == 200
        seen = rest()
    assert "id: 0-4294967295\nevent: failed\n" in seen and '"code":"cancelled"' in seen


def test_the_events_of_a_held_job_tell_of_its_deadline(stage: Stage) -> None:
    job_id = submit(stage, delay_ms=3_600_000, deadline_ms=3_600_001)
    with reading(stage, job_id) as rest:
        change(stage, job_id, deadline_ms=int(time.time() * 1000) - 1)
        with scheduling(stage):
            seen = rest()
    assert "event: failed\n" in seen and '"code":"deadline_exceeded"' in seen


def test_the_events_of_a_held_job_go_on_when_it_runs(stage: Stage) -> None:
    job_id = submit(stage, {"say": ["a ", "b "]}, delay_ms=3_600_000)
    with reading(stage, job_id) as rest:
        change(stage, job_id, not_before_ms=0)
        with scheduling(stage):
            seen = rest()
    assert seen.count("event: delta") == 2 and "event: finished\n" in seen


def test_the_events_of_a_job_that_was_tried_again_wait_for_its_next_attempt(stage: Stage) -> None:
    job_id = submit(stage, HOLD)
    wait_until(lambda: stage.claimed(job_id))
    stage.request("POST", f"/v1/jobs/{job_id}/cancel")
    wait_until(lambda: stage.job(job_id)["state"] == "cancelled")
    stage.call(stage.services.lifecycle.pause("demo"))
    assert stage.request("POST", f"/v1/jobs/{job_id}/retry").status == 202
    with reading(stage, job_id, "Last-Event-ID: 1-4294967295\r\n") as rest:
        assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").status == 200
        seen = rest()
    stage.call(stage.services.lifecycle.resume("demo"))
    assert "HTTP/1.1 200" in seen and '"code":"cancelled"' in seen


@pytest.mark.parametrize("lost", [False, True])
def test_the_webhook_of_a_job_that_ends_in_sql_alone_waits_for_no_sweep(stage: Stage, lost: bool) -> None:
    """No scheduler runs here: the kick lies there until one does."""
    stage.call(stage.services.webhooks.create("default", f"https://example.com/{lost}", "", ["job.cancelled"]))
    job_id = submit(stage, HOLD, delay_ms=0 if lost else 3_600_000)
    if lost:
        wait_until(lambda: stage.claimed(job_id))
        lose(stage, job_id)
    before = kicked(stage)
    assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").json["state"] == "cancelled"
    new = kicked(stage) - before
    assert new and all(name.startswith("deliver_webhook:") for name in new)


def kicked(stage: Stage) -> set[str]:
    """What waits for a scheduler, by job id of the control plane."""

    async def names() -> set[str]:
        found = [key async for key in stage.services.redis.scan_iter("arq:job:deliver_webhook:*")]
        return {key.decode().removeprefix("arq:job:") for key in found}

    return stage.call(names())


def test_a_job_that_redis_lost_is_cancelled_at_once(stage: Stage) -> None:
    job_id = submit(stage, model="org/other-model")
    assert row(stage, job_id) == (At.SENT, JobState.QUEUED)
    lose(stage, job_id)
    with reading(stage, job_id) as rest:
        cancelled = stage.request("POST", f"/v1/jobs/{job_id}/cancel")
        seen = rest()
    assert (cancelled.status, cancelled.json["state"]) == (200, "cancelled")
    assert row(stage, job_id) == (At.DONE, JobState.CANCELLED)
    assert '"code":"cancelled"' in seen
    assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").status == 200


def test_a_cancel_that_comes_too_late_is_a_conflict(stage: Stage) -> None:
    job_id = submit(stage, model="org/other-model")
    lose(stage, job_id)
    change(stage, job_id, stage="done", state="succeeded", finished_ms=1)
    answer = stage.request("POST", f"/v1/jobs/{job_id}/cancel")
    assert (answer.status, answer.error["code"]) == (409, "job_conflict")


@pytest.mark.parametrize("marked_by_another", [False, True])
def test_a_class_that_changes_while_a_job_is_brought_is_its_class_in_redis(
    stage: Stage, marked_by_another: bool
) -> None:
    job_id = submit(stage, delay_ms=3_600_000, model="org/other-model")
    rows = OutboxRows(stage.services.database, stage.settings.shard)
    change(stage, job_id, not_before_ms=0)
    (held,) = [job for job in stage.call(rows.due(1, [], 100)) if job.id == job_id]
    assert stage.request("PATCH", f"/v1/jobs/{job_id}", {"priority": "low"}).json["priority"] == "low"
    if marked_by_another:
        stage.call(rows.mark_sent([job_id]))
    stage.call(Outbox(rows, stage.services.lifecycle).send([held]))
    view = stage.call(stage.services.queue.view(job_id))
    assert view is not None and view.priority is Priority.LOW
    assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").status == 200


def test_a_job_of_another_shard_is_shown_and_is_changed_there_only(stage: Stage) -> None:
    held, sent = submit(stage, delay_ms=3_600_000), submit(stage, model="org/other-model")
    for job_id in (held, sent):
        change(stage, job_id, id=f"job-other-{job_id.rpartition('-')[2]}")
    held, sent = (f"job-other-{job_id.rpartition('-')[2]}" for job_id in (held, sent))
    assert stage.job(sent)["state"] == "queued"
    calls = [("POST", "/cancel"), ("PATCH", ""), ("GET", "/events")]
    for method, suffix in calls:
        answer = stage.request(method, f"/v1/jobs/{sent}{suffix}", {"priority": "low"} if method == "PATCH" else None)
        assert (answer.status, answer.error["code"]) == (409, "job_conflict"), suffix
    assert row(stage, sent) == (At.SENT, JobState.QUEUED)
    assert stage.request("POST", f"/v1/jobs/{held}/cancel").json["state"] == "cancelled"
