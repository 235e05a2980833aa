"""/v1/jobs: what a job shows, its events and how they resume, cancel, and who may see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from scheduler.db.keys import KeyStore
from tests.api_stage import Stage, running_api_alone, wait_until
from tests.integration.test_api_chat import forget_everything

CHAT = "/v1/chat/completions"
WORDS = [f"w{number} " for number in range(8)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_api_alone(tmp_path_factory.mktemp("jobs"), keepalive_s=0.2) as stage:
        yield stage


@dataclass(frozen=True)
class Event:
    id: str
    name: str
    data: Any


def events(body: bytes) -> list[Event]:
    """The events of a native stream, comments left out."""
    blocks = [block for block in body.decode().split("\n\n") if block and not block.startswith(":")]
    fields = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]
    return [Event(block["id"], block["event"], json.loads(block["data"])) for block in fields]


def text_of(seen: list[Event]) -> str:
    return "".join(choice["text"] for event in seen if event.name == "delta" for choice in event.data["choices"])


def finished_job(stage: Stage, **script: Any) -> str:
    answer = stage.request("POST", CHAT, stage.chat({"say": WORDS, **script}))
    return answer.headers["spillway-job"]


def test_a_finished_job_shows_state_attempts_timings_and_usage(stage: Stage) -> None:
    job = stage.job(job_id := finished_job(stage))
    assert (job["id"], job["object"], job["state"], job["model"]) == (job_id, "job", "succeeded", "demo")
    assert (job["attempt"], [attempt["worker"] for attempt in job["attempts"]]) == (1, ["scripted-0"])
    assert job["created_ms"] <= job["started_ms"] <= job["first_token_ms"] <= job["finished_ms"]
    assert job["timings"]["total_ms"] == job["finished_ms"] - job["created_ms"]
    assert job["usage"]["completion_tokens"] == len(WORDS)
    assert job["error"] is None


def test_a_failed_job_shows_why(stage: Stage) -> None:
    answer = stage.request("POST", CHAT, stage.chat({"fail": "context_length_exceeded"}))
    job = stage.job(answer.headers["spillway-job"])
    assert (job["state"], job["error"]["code"]) == ("failed", "context_length_exceeded")


def test_a_job_that_left_redis_is_shown_from_sql(stage: Stage) -> None:
    job_id = finished_job(stage)

    async def move() -> None:
        view = await stage.services.queue.view(job_id)
        assert view is not None
        await stage.services.jobs.record([view])
        await stage.services.redis.delete(stage.services.queue.keys.job(job_id))

    stage.call(move())
    job = stage.job(job_id)
    assert (job["state"], job["usage"]["completion_tokens"]) == ("succeeded", len(WORDS))
    listed = stage.request("GET", "/v1/jobs").json["data"]
    assert job_id in [entry["id"] for entry in listed]
    gone = stage.request("GET", f"/v1/jobs/{job_id}/events")
    assert (gone.status, gone.error["code"]) == (410, "job_events_expired")


@pytest.mark.parametrize("job_id", ["nope", "job-x-y", "job-other-01", "job-0-" + "0" * 31, "%F0%9F%A6%86"])
@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("GET", "/events"), ("POST", "/cancel")])
def test_an_unknown_job_is_404(stage: Stage, job_id: str, method: str, suffix: str) -> None:
    answer = stage.request(method, f"/v1/jobs/{job_id}{suffix}")
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "job_not_found", "job_id")


def test_events_are_numbered_named_and_complete(stage: Stage) -> None:
    answer = stage.request("GET", f"/v1/jobs/{finished_job(stage)}/events")
    seen = events(answer.body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [event.id for event in seen] == [*(f"1-{seq}" for seq in range(len(WORDS) + 1)), "1-4294967295"]
    assert [event.name for event in seen] == ["started", *["delta"] * len(WORDS), "finished"]
    assert text_of(seen) == "".join(WORDS)
    assert seen[0].data["worker"] == "scripted-0"
    assert seen[-1].data["usage"]["completion_tokens"] == len(WORDS)


def test_last_event_id_resumes_exactly_at_every_place(stage: Stage) -> None:
    path = f"/v1/jobs/{finished_job(stage)}/events"
    whole = events(stage.request("GET", path).body)
    for position, event in enumerate(whole[:-1]):
        rest = events(stage.request("GET", path, Last_Event_ID=event.id).body)
        assert rest == whole[position + 1 :]
    assert events(stage.request("GET", f"{path}?after={whole[3].id}").body) == whole[4:]
    assert stage.request("GET", path, Last_Event_ID=whole[-1].id).status == 204


def test_events_can_be_followed_and_resumed_while_the_job_runs_and_is_taken_over(stage: Stage) -> None:
    script = {"say": [f"v{number} " for number in range(20)], "pause_s": 0.02, "die_after": 7}
    with ThreadPoolExecutor(2) as pool:
        asking = pool.submit(stage.request, "POST", CHAT, stage.chat(script))
        wait_until(stage.live_jobs)
        (job_id,) = stage.live_jobs()
        path = f"/v1/jobs/{job_id}/events"
        with stage.connect() as connection:  # reads a little and breaks off
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            seen = b""
            while b"v2 " not in seen:
                seen += connection.recv(4096)
        blocks = seen.partition(b"\r\n\r\n")[2].decode().replace("\r\n", "\n")
        last = [line.removeprefix("id: ") for line in blocks.split("\n") if line.startswith("id: ")][-1]
        rest = events(stage.request("GET", path, Last_Event_ID=last).body)
        assert asking.result().status == 200
    whole = events(stage.request("GET", path).body)
    assert text_of(whole) == "".join(script["say"])
    assert next(event.id for event in whole if event.id.startswith("2-")) == "2-0"
    assert rest == whole[[event.id for event in whole].index(last) + 1 :]


def test_silent_event_streams_get_comments(stage: Stage) -> None:
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(stage.request, "POST", CHAT, stage.chat({"start_after_s": 0.7, "say": ["x "]}))
        wait_until(stage.live_jobs)
        answer = stage.request("GET", f"/v1/jobs/{stage.live_jobs()[0]}/events")
        asking.result()
    assert answer.body.count(b": keep-alive\n\n") >= 2


@pytest.mark.parametrize("cursor", ["x", "1", "1-", "-", "1-2-3", "one-two", "1--5", "1_0-1", f"1-{10**20}"])
def test_a_malformed_cursor_is_400(stage: Stage, cursor: str) -> None:
    answer = stage.request("GET", f"/v1/jobs/{finished_job(stage)}/events", Last_Event_ID=cursor)
    assert (answer.status, answer.error["param"]) == (400, "Last-Event-ID")


def test_a_cursor_that_the_job_never_reached_is_410(stage: Stage) -> None:
    answer = stage.request("GET", f"/v1/jobs/{finished_job(stage)}/events", Last_Event_ID="999-0")
    assert (answer.status, answer.error["code"]) == (410, "job_events_expired")


def test_the_events_of_an_interactive_job_that_redis_lost_say_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    with (
        running_api_alone(tmp_path_factory.mktemp("lost"), keepalive_s=0.2) as stage,
        ThreadPoolExecutor(2) as pool,
    ):
        asking = pool.submit(stage.request, "POST", CHAT, stage.chat("hi", model="org/other-model"))
        wait_until(stage.live_jobs)
        with stage.connect() as reader:
            path = f"/v1/jobs/{stage.live_jobs()[0]}/events"
            reader.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert reader.recv(1000).startswith(b"HTTP/1.1 200")
            stage.call(forget_everything(stage))
            seen = b""
            while piece := reader.recv(1000):
                seen += piece
        assert b"id: 0-4294967295\nevent: failed\n" in seen and b"it was lost" in seen
        assert asking.result().status == 500


def test_a_running_job_can_be_cancelled_and_a_finished_one_not(stage: Stage) -> None:
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(stage.request, "POST", CHAT, stage.chat({"say": ["a "], "hold": True}))
        wait_until(lambda: stage.live_jobs() and stage.claimed(stage.live_jobs()[0]))
        (job_id,) = stage.live_jobs()
        assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").json["id"] == job_id
        answer = asking.result()
    assert (answer.status, answer.error["code"]) == (409, "cancelled")
    assert answer.headers["x-should-retry"] == "false"
    assert stage.job(job_id)["state"] == "cancelled"
    assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").status == 200
    finished = stage.request("POST", f"/v1/jobs/{finished_job(stage)}/cancel")
    assert (finished.status, finished.error["code"]) == (409, "job_conflict")


def test_jobs_are_listed_newest_first(stage: Stage) -> None:
    connections = []
    for _ in range(3):
        data = json.dumps(stage.chat("hi", model="org/other-model")).encode()
        connection = stage.connect()
        connections.append(connection)
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
        )
        connection.sendall(data)
        wait_until(lambda: len(stage.live_jobs()) == len(connections))
    page = stage.request("GET", "/v1/jobs?limit=2").json
    assert [job["id"] for job in page["data"]] == stage.live_jobs()[:2]
    assert (page["object"], page["has_more"]) == ("list", True)
    assert [job["state"] for job in page["data"]] == ["queued", "queued"]
    for connection in connections:
        connection.close()
    wait_until(lambda: not stage.live_jobs())


def test_a_key_sees_the_jobs_of_its_tenant_only(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_api_alone(tmp_path_factory.mktemp("tenants")) as stage:
        store = KeyStore(stage.services.database)
        keys = {name: stage.call(store.create(name, tenant=name))[1] for name in ("ann", "bob")}
        owned = {
            name: stage.request("POST", CHAT, stage.chat("hi"), X_Api_Key=key).headers["spillway-job"]
            for name, key in keys.items()
        }

        async def record() -> None:
            views = [await stage.services.queue.view(job_id) for job_id in owned.values()]
            await stage.services.jobs.record([view for view in views if view is not None])

        stage.call(record())
        for name, key in keys.items():
            other = "bob" if name == "ann" else "ann"
            assert stage.request("GET", f"/v1/jobs/{owned[name]}", X_Api_Key=key).json["tenant"] == name
            for method, suffix in (("GET", ""), ("GET", "/events"), ("POST", "/cancel")):
                assert stage.request(method, f"/v1/jobs/{owned[other]}{suffix}", X_Api_Key=key).status == 404
            listed = stage.request("GET", "/v1/jobs", X_Api_Key=key).json["data"]
            assert [job["id"] for job in listed] == [owned[name]]
