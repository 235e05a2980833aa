"""Asynchronous jobs over HTTP: accepted, held, run, answered; `Prefer: respond-async`; what submission refuses."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scheduler.db.keys import KeyStore
from scheduler.db.models import WebhookEndpoint
from scheduler.queue.embedded import EmbeddedRedis
from tests.api_stage import Answer, Stage, running_api, wait_until
from tests.scheduling_stage import running_durable_api, scheduling

CHAT = "/v1/chat/completions"
WORDS = ["one ", "two "]
HELLO = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_durable_api(tmp_path_factory.mktemp("submission"), keepalive_s=0.2) as stage:
        yield stage


def submit(stage: Stage, script: dict[str, Any] | str, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
    chat = stage.chat(script)
    del chat["stream"]
    return stage.request("POST", "/v1/jobs", {"body": chat, **fields}, **(headers or {}))


def result(stage: Stage, job_id: str) -> Answer:
    """The job's result once there is one."""
    found: list[Answer] = []

    def ended() -> bool:
        found[:] = [stage.request("GET", f"/v1/jobs/{job_id}/result")]
        return found[0].status != 202

    wait_until(ended)
    return found[0]


def forget(stage: Stage, job_id: str) -> None:
    """Redis keeps ended jobs for a while; not this one."""

    async def delete() -> None:
        await stage.services.redis.delete(stage.services.queue.keys.job(job_id))

    stage.call(delete())


def test_a_submitted_job_is_accepted_run_and_answered_as_its_endpoint_would(stage: Stage) -> None:
    accepted = submit(stage, {"say": WORDS}, metadata={"run": "7"})
    job = accepted.json
    assert accepted.status == 202
    assert accepted.headers["location"] == f"/v1/jobs/{job['id']}"
    assert accepted.headers["spillway-job"] == job["id"]
    assert int(accepted.headers["retry-after"]) >= 1
    assert (job["object"], job["durable"], job["endpoint"], job["metadata"]) == ("job", True, CHAT, {"run": "7"})
    answer = result(stage, job["id"])
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json["object"] == "chat.completion"
    assert answer.json["choices"][0]["message"]["content"] == "one two "
    assert answer.json["usage"]["completion_tokens"] == 2
    ended = stage.job(job["id"])
    assert (ended["state"], ended["result_url"]) == ("succeeded", f"/v1/jobs/{job['id']}/result")
    assert ended["created_ms"] == job["created_ms"]


def test_the_recorded_answer_is_the_one_that_the_log_gives(stage: Stage) -> None:
    job_id = submit(stage, {"say": WORDS}).json["id"]
    before = result(stage, job_id).json
    wait_until(lambda: (row := stage.call(stage.services.durable.get(job_id))) and row.state.is_terminal)
    forget(stage, job_id)
    assert result(stage, job_id).json == before
    assert stage.job(job_id)["state"] == "succeeded"


def test_a_job_for_later_is_held_shown_listed_and_cancelled(stage: Stage) -> None:
    later = int(time.time()) + 3600
    job = submit(stage, "hi", not_before=later, deadline=later + 60, priority="low").json
    assert (job["state"], job["priority"]) == ("scheduled", "low")
    assert (job["not_before_ms"], job["deadline_ms"]) == (later * 1000, (later + 60) * 1000)
    assert stage.job(job["id"]) == job
    assert job["id"] not in stage.live_jobs()
    listed = stage.request("GET", "/v1/jobs?state=scheduled").json["data"]
    assert [entry["id"] for entry in listed] == [job["id"]]
    poll = stage.request("GET", f"/v1/jobs/{job['id']}/result")
    assert (poll.status, poll.json["id"], poll.headers["retry-after"]) == (202, job["id"], "60")
    cancelled = stage.request("POST", f"/v1/jobs/{job['id']}/cancel")
    assert (cancelled.status, cancelled.json["state"]) == (200, "cancelled")
    refused = stage.request("GET", f"/v1/jobs/{job['id']}/result")
    assert (refused.status, refused.error["code"]) == (409, "cancelled")
    events = stage.request("GET", f"/v1/jobs/{job['id']}/events")
    assert (events.status, events.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    assert events.body.startswith(b"id: 0-4294967295\nevent: failed\ndata: ") and b'"code":"cancelled"' in events.body
    assert stage.request("GET", f"/v1/jobs/{job['id']}/events", Last_Event_ID="0-4294967295").status == 204


def test_a_delayed_job_runs_when_it_is_due(stage: Stage) -> None:
    accepted = submit(stage, {"say": WORDS}, delay_ms=300)
    assert accepted.json["state"] == "scheduled"
    assert result(stage, accepted.json["id"]).status == 200
    job = stage.job(accepted.json["id"])
    assert job["started_ms"] >= job["not_before_ms"] == accepted.json["not_before_ms"]


def test_a_failed_job_answers_with_its_error_and_its_status(stage: Stage) -> None:
    job_id = submit(stage, {"fail": "context_length_exceeded"}).json["id"]
    answer = result(stage, job_id)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "context_length_exceeded", "messages")
    assert stage.job(job_id)["result_url"] is None


def test_the_same_key_and_body_are_the_same_job_and_another_body_is_refused(stage: Stage) -> None:
    key = {"Idempotency_Key": "order-1"}
    first = submit(stage, {"say": WORDS}, key)
    again = submit(stage, {"say": WORDS}, key)
    assert (first.status, again.status) == (202, 200)
    assert again.json["id"] == first.json["id"]
    other = submit(stage, {"say": WORDS}, key, metadata={"a": "b"})
    assert (other.status, other.error["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
        ({"body": {"messages": []}}, 400, "body.model"),
        (
            {"body": {"model": "demo", "messages": HELLO, "stream": True}},
            400,
            "body.stream",
        ),
        ({"body": {"model": "demo", "messages": [{"role": "user", "content": 1}]}}, 400, "body.messages[0].content"),
        ({"body": {"model": "demo", "messages": HELLO, "tools": [1]}}, 400, "body.tools"),
        ({"body": {"model": "nope", "messages": HELLO}}, 404, "body.model"),
        ({"webhook": "whe_nope"}, 400, "webhook"),
        ({"not_before": "soon"}, 400, "not_before"),
        ({"colour": "red"}, 400, "colour"),
    ],
)
def test_a_bad_submission_is_refused_by_name_and_accepts_nothing(
    stage: Stage, fields: dict[str, Any], status: int, param: str
) -> None:
    newest = stage.request("GET", "/v1/jobs?limit=1").json["first_id"]
    answer = submit(stage, "hi", **fields)
    assert (answer.status, answer.error["param"]) == (status, param)
    assert stage.request("GET", "/v1/jobs?limit=1").json["first_id"] == newest


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"body": 7}'])
def test_what_is_no_submission_is_400(stage: Stage, body: bytes) -> None:
    assert stage.request("POST", "/v1/jobs", body).status == 400


def test_the_body_s_priority_goes_before_the_header_s(stage: Stage) -> None:
    header = {"Spillway_Priority": "high"}
    later = {"delay_ms": 3_600_000}
    assert submit(stage, "hi", header, **later).json["priority"] == "high"
    assert submit(stage, "hi", header, priority="batch", **later).json["priority"] == "batch"


def test_a_registered_webhook_is_chosen_by_id_or_url(stage: Stage) -> None:
    async def register() -> None:
        async with stage.services.database.session() as session:
            fields: Any = {"tenant": "default", "secret": b"", "created_ms": 1}
            session.add(WebhookEndpoint(id="whe_1", url="https://a.example/hook", **fields))
            session.add(WebhookEndpoint(id="whe_2", url="https://b.example/", disabled_ms=1, **fields))
            session.add(WebhookEndpoint(id="whe_3", url="https://c.example/", **(fields | {"tenant": "bob"})))
            await session.commit()

    stage.call(register())
    for chosen in ("whe_1", "https://a.example/hook"):
        assert submit(stage, "hi", webhook=chosen, delay_ms=3_600_000).json["webhook"] == "whe_1"
    for refused in ("whe_2", "https://b.example/", "whe_3"):
        assert submit(stage, "hi", webhook=refused).error["param"] == "webhook"


def test_events_of_a_durable_job_can_be_followed_from_its_submission(stage: Stage) -> None:
    job_id = submit(stage, {"say": WORDS}, delay_ms=400).json["id"]
    seen = stage.request("GET", f"/v1/jobs/{job_id}/events").body.decode()
    assert seen.count("event: delta") == 2
    assert "event: finished" in seen


def test_without_the_header_a_chat_is_answered_as_ever(stage: Stage) -> None:
    answer = stage.request("POST", CHAT, stage.chat({"say": WORDS}), Prefer="return=minimal, wait=5")
    assert (answer.status, "preference-applied" in answer.headers) == (200, False)
    assert stage.job(answer.headers["spillway-job"])["durable"] is False


def test_a_chat_that_prefers_an_asynchronous_answer_is_a_durable_job(stage: Stage) -> None:
    answer = stage.request("POST", CHAT, stage.chat({"say": WORDS}), Prefer="respond-async")
    assert (answer.status, answer.headers["preference-applied"]) == (202, "respond-async")
    assert answer.headers["location"] == f"/v1/jobs/{answer.json['id']}"
    assert "retry-after" in answer.headers
    assert answer.json["durable"] is True
    assert result(stage, answer.json["id"]).json["choices"][0]["message"]["content"] == "one two "


def test_a_short_wait_gives_the_answer_itself(stage: Stage) -> None:
    answer = stage.request("POST", CHAT, stage.chat({"say": WORDS}), Prefer="respond-async, wait=20")
    assert (answer.status, answer.headers["preference-applied"]) == (200, "respond-async, wait=20")
    assert answer.json["choices"][0]["message"]["content"] == "one two "
    failed = stage.request("POST", CHAT, stage.chat({"fail": "engine_failure_x"}), Prefer="respond-async, wait=20")
    assert failed.status == 500


def test_a_wait_that_is_too_short_gives_the_job(stage: Stage) -> None:
    answer = stage.request("POST", CHAT, stage.chat({"say": ["a "], "hold": True}), Prefer="respond-async, wait=1")
    assert (answer.status, answer.headers["preference-applied"]) == (202, "respond-async, wait=1")
    assert stage.request("POST", f"/v1/jobs/{answer.json['id']}/cancel").status == 200
    assert result(stage, answer.json["id"]).status == 409


def test_a_client_that_leaves_during_the_wait_changes_nothing(stage: Stage) -> None:
    data = json.dumps(stage.chat({"say": WORDS, "start_after_s": 0.3})).encode()
    before = set(stage.live_jobs())
    with stage.connect() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nPrefer: respond-async, wait=30\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        wait_until(lambda: set(stage.live_jobs()) - before)
        (job_id,) = set(stage.live_jobs()) - before
    assert result(stage, job_id).status == 200


@pytest.mark.parametrize(
    ("prefer", "fields", "param"),
    [("respond-async", {"stream": True}, "stream"), ("respond-async, wait=x", {}, "Prefer")],
)
def test_a_contradictory_wish_is_refused(stage: Stage, prefer: str, fields: dict[str, Any], param: str) -> None:
    answer = stage.request("POST", CHAT, stage.chat("hi", **fields), Prefer=prefer)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_jobs_are_accepted_while_redis_is_away(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    try:
        with running_api(server.url, tmp_path / "home", workers=0) as stage:
            server.stop()
            order = {"Idempotency_Key": "order-2"}
            accepted = [submit(stage, "hi", order), submit(stage, "hi", order), submit(stage, "hi", delay_ms=9000)]
            asynchronous = stage.request("POST", CHAT, stage.chat("hi"), Prefer="respond-async, wait=1")
            assert [answer.status for answer in (*accepted, asynchronous)] == [202, 200, 202, 202]
            first, again, later, waited = (answer.json for answer in (*accepted, asynchronous))
            assert (first["id"], first["state"], later["state"]) == (again["id"], "queued", "scheduled")
            assert stage.job(first["id"])["state"] == "queued"
            assert stage.request("POST", f"/v1/jobs/{later['id']}/cancel").json["state"] == "cancelled"
            server.start()
            listed = stage.request("GET", "/v1/jobs").json["data"]
            assert [job["id"] for job in listed] == [waited["id"], later["id"], first["id"]]
    finally:
        server.stop()


def test_a_key_submits_for_its_tenant_and_sees_nobody_else_s_jobs(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_durable_api(tmp_path_factory.mktemp("keys")) as stage:
        store = KeyStore(stage.services.database)
        ann, bob = (stage.call(store.create(name, tenant=name))[1] for name in ("ann", "bob"))
        held = submit(stage, "hi", {"X_Api_Key": ann}, delay_ms=3_600_000).json
        done = submit(stage, {"say": WORDS}, {"X_Api_Key": ann}).json
        assert (held["tenant"], done["tenant"]) == ("ann", "ann")
        wait_until(lambda: stage.request("GET", f"/v1/jobs/{done['id']}", X_Api_Key=ann).json["finished_ms"])
        for job in (held, done):
            for method, suffix in (("GET", ""), ("GET", "/result"), ("POST", "/cancel"), ("POST", "/retry")):
                assert stage.request(method, f"/v1/jobs/{job['id']}{suffix}", X_Api_Key=bob).status == 404
            patched = stage.request("PATCH", f"/v1/jobs/{job['id']}", {"priority": "high"}, X_Api_Key=bob)
            assert patched.status == 404
        assert stage.request("GET", "/v1/jobs", X_Api_Key=bob).json["data"] == []
        listed = stage.request("GET", "/v1/jobs", X_Api_Key=ann).json["data"]
        assert [job["id"] for job in listed] == [done["id"], held["id"]]
        assert stage.request("GET", "/v1/jobs").status == 401


def test_many_submissions_at_once_with_one_key_are_one_job(stage: Stage) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(submit, stage, {"say": WORDS}, {"Idempotency_Key": "same"}) for _ in range(8)]
        found = [answer.result() for answer in answers]
    assert {answer.status for answer in found} == {200, 202}
    assert len({answer.json["id"] for answer in found}) == 1


def test_events_of_a_recorded_job_are_not_called_expired_while_redis_is_away(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    try:
        with running_api(server.url, tmp_path / "home") as stage, scheduling(stage):
            job_id = submit(stage, {"say": WORDS}).json["id"]
            answer = result(stage, job_id).json
            wait_until(lambda: (row := stage.call(stage.services.durable.get(job_id))) and row.state.is_terminal)
            server.stop()
            away = stage.request("GET", f"/v1/jobs/{job_id}/events")
            assert (away.status, away.error["code"]) == (503, "queue_unavailable")
            assert result(stage, job_id).json == answer
            server.start()
            events = stage.request("GET", f"/v1/jobs/{job_id}/events")
            assert events.status == 200 and b"event: finished" in events.body
    finally:
        server.stop()
