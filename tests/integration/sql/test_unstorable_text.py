"""Text that PostgreSQL refuses (NUL, half surrogates) is told as the client's fault, alike on both databases."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from sqlmodel import select

from api.main import create_app
from scheduler.db.models import Batch
from scheduler.db.schema import migrate
from scheduler.db.session import Database
from scheduler.settings import Settings
from tests.api_stage import Answer, Stage, running_api

NUL = "a\0b"
CHAT_BODY = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
JOB = {"body": CHAT_BODY}
BATCH = {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
SCHEDULE = {"cron": "0 0 * * *", "body": CHAT_BODY}
ENDPOINT = {"url": "https://example.com/hook"}
BODIES: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/jobs", JOB | {"webhook": NUL}, "webhook"),
    ("/v1/jobs", JOB | {"metadata": {NUL: "v"}}, "metadata"),
    ("/v1/jobs", JOB | {"metadata": {"k": NUL}}, "metadata.k"),
    ("/v1/jobs", JOB | {"endpoint": NUL}, "endpoint"),
    ("/v1/jobs", JOB | {"priority": NUL}, "priority"),
    ("/v1/jobs", JOB | {"not_before": NUL}, "not_before"),
    ("/v1/jobs", {"body": CHAT_BODY | {"model": NUL}}, "body.model"),
    ("/v1/batches", BATCH | {"input_file_id": NUL}, "input_file_id"),
    ("/v1/batches", BATCH | {"webhook": NUL}, "webhook"),
    ("/v1/batches", BATCH | {"endpoint": NUL}, "endpoint"),
    ("/v1/batches", BATCH | {"completion_window": NUL}, "completion_window"),
    ("/v1/batches", BATCH | {"metadata": {"k": NUL}}, "metadata.k"),
    ("/v1/schedules", SCHEDULE | {"name": NUL}, "name"),
    ("/v1/schedules", SCHEDULE | {"cron": NUL}, "cron"),
    ("/v1/schedules", SCHEDULE | {"timezone": NUL}, "timezone"),
    ("/v1/schedules", SCHEDULE | {"endpoint": NUL}, "endpoint"),
    ("/v1/schedules", SCHEDULE | {"webhook": NUL}, "webhook"),
    ("/v1/schedules", SCHEDULE | {"metadata": {"k": NUL}}, "metadata.k"),
    ("/v1/schedules", SCHEDULE | {"body": CHAT_BODY | {"model": NUL}}, "body.model"),
    ("/v1/webhook_endpoints", ENDPOINT | {"url": f"https://example.com/{NUL}"}, "url"),
    ("/v1/webhook_endpoints", ENDPOINT | {"name": NUL}, "name"),
    ("/v1/webhook_endpoints", ENDPOINT | {"event_types": [NUL]}, "event_types"),
    ("/v1/chat/completions", CHAT_BODY | {"model": NUL}, "model"),
    ("/admin/dead/replay", {"pool": NUL}, "pool"),
    ("/admin/dead/replay", {"code": NUL}, "code"),
    ("/admin/queues/pause", {"pool": NUL}, "pool"),
]
URLS: list[tuple[str, str, str]] = [
    ("GET", "/v1/jobs/{}", "job_id"),
    ("GET", "/v1/jobs/{}/result", "job_id"),
    ("GET", "/v1/jobs/{}/events", "job_id"),
    ("POST", "/v1/jobs/{}/cancel", "job_id"),
    ("POST", "/v1/jobs/{}/retry", "job_id"),
    ("PATCH", "/v1/jobs/{}", "job_id"),
    ("GET", "/v1/jobs?after={}", "after"),
    ("GET", "/v1/jobs?model={}", "model"),
    ("GET", "/v1/jobs?batch_id={}", "batch_id"),
    ("GET", "/v1/jobs?schedule_id={}", "schedule_id"),
    ("GET", "/v1/batches/{}", "batch_id"),
    ("POST", "/v1/batches/{}/cancel", "batch_id"),
    ("GET", "/v1/batches?after={}", "after"),
    ("GET", "/v1/files/{}", "file_id"),
    ("GET", "/v1/files/{}/content", "file_id"),
    ("DELETE", "/v1/files/{}", "file_id"),
    ("GET", "/v1/files?purpose={}", "purpose"),
    ("GET", "/v1/files?after={}", "after"),
    ("GET", "/v1/schedules/{}", "schedule_id"),
    ("DELETE", "/v1/schedules/{}", "schedule_id"),
    ("GET", "/v1/webhook_endpoints/{}", "endpoint_id"),
    ("GET", "/v1/webhook_endpoints/{}/deliveries", "endpoint_id"),
    ("POST", "/v1/webhook_deliveries/{}/retry", "delivery_id"),
    ("GET", "/v1/models/{}", "model"),
    ("GET", "/admin/dead?code={}", "code"),
    ("POST", "/admin/dead/{}/replay", "job_id"),
    ("DELETE", "/admin/dead/{}", "job_id"),
]


@pytest.fixture
def stage(settings: Settings, redis_url: str) -> Iterator[Stage]:
    with running_api(redis_url, settings.home, workers=0, database_url=settings.database_url) as stage:
        yield stage


def told(answer: Answer) -> tuple[int, str, str | None]:
    return answer.status, answer.error["type"], answer.error["param"]


def test_a_nul_in_a_body_is_the_client_s_fault(stage: Stage) -> None:
    """No worker runs, so that no unknown model hides what the stores would say."""
    found = [(path, told(stage.request("POST", path, body))) for path, body, _ in BODIES]
    assert found == [(path, (400, "invalid_request_error", param)) for path, _, param in BODIES]


def test_a_nul_in_a_url_is_the_client_s_fault(stage: Stage) -> None:
    for nul in ("%00", "job-t-%00x"):
        found = [(path, told(stage.request(method, path.format(nul), {}))) for method, path, _ in URLS]
        assert found == [(path, (400, "invalid_request_error", param)) for _, path, param in URLS]


def test_half_a_surrogate_and_bytes_that_are_no_text_are_told(stage: Stage) -> None:
    half = json.dumps(JOB | {"metadata": {"k": "\ud800"}}).encode()
    assert told(stage.request("POST", "/v1/jobs", half))[:2] == (400, "invalid_request_error")
    keyed = stage.request("POST", "/v1/jobs", half, Idempotency_Key="k")
    assert told(keyed)[:2] == (400, "invalid_request_error")
    for path in ("/v1/jobs/%ff", "/v1/batches/%ed%a0%80", "/v1/files/%ff"):
        assert told(stage.request("GET", path))[:2] == (404, "invalid_request_error")


def test_a_file_s_name_loses_what_no_name_has(stage: Stage) -> None:
    with httpx2.Client(base_url=stage.url) as client:
        name = ("file", ("in\0.jsonl", b"{}"))
        answer = client.post("/v1/files", data={"purpose": "batch"}, files=[name])
        assert (answer.status_code, answer.json()["filename"]) == (200, "in%00.jsonl")
        answer = client.post("/v1/files", data={"purpose": NUL}, files=[name])
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "purpose")


def test_a_value_that_only_the_database_refuses_is_no_outage(postgres_settings: Settings) -> None:
    migrate(postgres_settings)
    status, headers, error = asyncio.run(_through_a_hole(postgres_settings))
    assert (status, error["type"], "retry-after" in headers) == (400, "invalid_request_error", False)


async def _through_a_hole(settings: Settings) -> tuple[int, httpx2.Headers, dict[str, Any]]:
    """What a route answers that forgot to look at its text."""
    app, database = create_app(settings), Database(settings)

    @app.get("/hole")
    async def hole() -> None:  # pyright: ignore[reportUnusedFunction]
        async with database.session() as session:
            await session.exec(select(Batch.id).where(Batch.id == NUL))

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1") as client:
        answer = await client.get("/hole")
    await database.close()
    return answer.status_code, answer.headers, answer.json()["error"]
