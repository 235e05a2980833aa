"""POST /v1/chat/completions over HTTP: streams, whole answers, failures with their right status, cancel, takeover."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.api_stage import Stage, running_api_alone, wait_until

CHAT = "/v1/chat/completions"
HOLD = {"say": ["a ", "b "], "hold": True}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_api_alone(tmp_path_factory.mktemp("chat")) as stage:
        yield stage


def chunks(body: bytes) -> list[Any]:
    """The JSON of a stream's events; `[DONE]` as it is. Fails on anything but data lines and comments."""
    events = [part for part in body.decode().split("\n\n") if part and not part.startswith(":")]
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    texts = [event.removeprefix("data: ") for event in events]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def text_of(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events if event != "[DONE]" for choice in event.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices if choice["index"] == index)


def open_stream(stage: Stage, body: dict[str, Any], until: bytes) -> tuple[socket.socket, bytes, str]:
    """A raw connection that has read `until`; what it read so far, and the job's id."""
    data = json.dumps(body).encode()
    connection = stage.connect()
    connection.sendall(
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(data))
    )
    connection.sendall(data)
    seen = b""
    while until not in seen:
        piece = connection.recv(65536)
        assert piece, f"the stream ended early: {seen!r}"
        seen += piece
    head = seen.partition(b"\r\n\r\n")[0].decode()
    job = next(line.partition(": ")[2] for line in head.split("\r\n") if line.lower().startswith("spillway-job"))
    return connection, seen, job


def test_a_stream_has_role_text_finish_usage_and_done(stage: Stage) -> None:
    body = stage.chat("one two three", stream=True, stream_options={"include_usage": True})
    answer = stage.request("POST", CHAT, body)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["spillway-job"].startswith("job-")
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["spillway-served-by"] == "scripted-0"
    events = chunks(answer.body)
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert text_of(events) == "one two three "
    assert events[-3]["choices"][0]["finish_reason"] == "stop"
    assert events[-2]["usage"]["total_tokens"] == 8
    assert events[-2]["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert len({(event["id"], event["created"], event["model"]) for event in events[:-1]}) == 1


def test_a_stream_holds_no_id_and_no_event_lines(stage: Stage) -> None:
    answer = stage.request("POST", CHAT, stage.chat("one two", stream=True))
    assert all(line.startswith(b"data: ") or not line for line in answer.body.split(b"\n"))


def test_choices_start_with_index_0_and_each_finishes_once(stage: Stage) -> None:
    events = chunks(stage.request("POST", CHAT, stage.chat("one two", stream=True, n=3)).body)
    choices = [event["choices"][0] for event in events[:-1]]
    assert [choice["index"] for choice in choices[:3]] == [0, 1, 2]
    assert [text_of(events, index) for index in range(3)] == ["one two "] * 3
    assert sorted(choice["index"] for choice in choices if choice["finish_reason"]) == [0, 1, 2]


def test_a_whole_answer(stage: Stage) -> None:
    answer = stage.request("POST", CHAT, stage.chat("one two", n=2, logprobs=True, service_tier="flex"))
    assert answer.status == 200
    assert int(answer.headers["openai-processing-ms"]) >= 0
    assert [choice["message"]["content"] for choice in answer.json["choices"]] == ["one two "] * 2
    assert answer.json["choices"][0]["logprobs"]["content"][0]["token"] == "one "
    assert answer.json["service_tier"] == "flex"
    assert answer.json["usage"]["completion_tokens"] == 4
    job = stage.job(answer.headers["spillway-job"])
    assert (job["state"], job["priority"], job["usage"]["completion_tokens"]) == ("succeeded", "low", 4)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status", "kind", "param"),
    [
        ("context_length_exceeded", 400, "invalid_request_error", "messages"),
        ("unsupported_parameter", 400, "invalid_request_error", None),
        ("internal_error", 500, "server_error", None),
    ],
)
def test_a_failure_before_the_first_token_keeps_its_status(
    stage: Stage, code: str, status: int, kind: str, param: str | None, stream: bool
) -> None:
    answer = stage.request("POST", CHAT, stage.chat({"fail": code}, stream=stream))
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert (answer.error["type"], answer.error["code"], answer.error["param"]) == (kind, code, param)
    assert answer.headers["spillway-job"].startswith("job-")


def test_a_failure_in_mid_stream_ends_it_with_an_error_and_no_done(stage: Stage) -> None:
    script = {"say": ["a ", "b "], "fail": "context_length_exceeded", "pause_s": 0.05}
    answer = stage.request("POST", CHAT, stage.chat(script, stream=True))
    events = chunks(answer.body)
    assert answer.status == 200
    assert text_of(events[:-1]) == "a b "
    assert events[-1]["error"]["code"] == "context_length_exceeded"
    assert set(events[-1]["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_choice_never_ended_is_not_called_complete(stage: Stage, stream: bool) -> None:
    script = {"say": ["a "], "forget_reason": True, "pause_s": 0.05}
    answer = stage.request("POST", CHAT, stage.chat(script, stream=stream))
    error = chunks(answer.body)[-1]["error"] if stream else answer.error
    assert answer.status == (200 if stream else 500)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_404_with_near_matches(stage: Stage, stream: bool) -> None:
    answer = stage.request("POST", CHAT, stage.chat("hi", stream=stream, model="demmo"))
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert "'demo'" in answer.error["message"]
    assert "spillway-job" not in answer.headers


def test_default_is_the_first_model(stage: Stage) -> None:
    assert stage.request("POST", CHAT, stage.chat("hi", model="default")).json["model"] == "demo"


@pytest.mark.parametrize(
    ("header", "tier", "priority", "echo"),
    [
        ("high", "flex", "high", "priority"),
        ("batch", None, "batch", "flex"),
        (None, "priority", "high", "priority"),
        (None, None, "normal", "default"),
    ],
)
def test_priority_comes_from_header_then_tier(
    stage: Stage, header: str | None, tier: str | None, priority: str, echo: str
) -> None:
    headers = {} if header is None else {"Spillway_Priority": header}
    answer = stage.request("POST", CHAT, stage.chat("hi", service_tier=tier), **headers)
    assert answer.json["service_tier"] == echo
    assert stage.job(answer.headers["spillway-job"])["priority"] == priority


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Spillway-Priority", "urgent"),
        ("Spillway-Deadline-Ms", "0"),
        ("Spillway-Deadline-Ms", "soon"),
        ("Spillway-Deadline-Ms", "9" * 30),
        ("Idempotency-Key", "x" * 300),
        ("Idempotency-Key", '""'),
    ],
)
def test_bad_steering_headers_are_named(stage: Stage, name: str, value: str) -> None:
    answer = stage.request("POST", CHAT, stage.chat("hi"), **{name: value})
    assert (answer.status, answer.error["param"]) == (400, name)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_job(stage: Stage, stream: bool) -> None:
    body = stage.chat({**HOLD, "say": [f"{stream} "]}, stream=stream)
    if stream:
        connection, _, job_id = open_stream(stage, body, until=f"{stream} ".encode())
    else:
        before = set(stage.workers[0].requests)
        connection = stage.connect()
        data = json.dumps(body).encode()
        connection.sendall(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(data))
        )
        connection.sendall(data)
        wait_until(lambda: set(stage.workers[0].requests) - before)
        (job_id,) = set(stage.workers[0].requests) - before
    connection.close()
    wait_until(lambda: stage.cancelled(job_id))
    wait_until(lambda: stage.job(job_id)["state"] == "cancelled")


def test_a_client_that_leaves_before_its_job_began_cancels_it(stage: Stage) -> None:
    """No worker serves this pool, so the job waits."""
    for stream in (False, True):
        data = json.dumps(stage.chat("hi", stream=stream, model="org/other-model")).encode()
        connection = stage.connect()
        connection.sendall(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(data))
        )
        connection.sendall(data)
        wait_until(stage.live_jobs)
        (job_id,) = stage.live_jobs()
        connection.close()
        wait_until(lambda: not stage.live_jobs())
        assert stage.job(job_id)["state"] == "cancelled"


def test_a_job_that_somebody_else_cancels_ends_its_request(stage: Stage) -> None:
    connection, seen, job_id = open_stream(stage, stage.chat(HOLD, stream=True), until=b"b ")
    assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").status == 200
    while piece := connection.recv(65536):
        seen += piece
        if b"error" in seen:
            break
    connection.close()
    assert b'"code":"cancelled"' in seen
    assert b"[DONE]" not in seen


def test_a_deadline_that_passes_is_504(stage: Stage) -> None:
    body = stage.chat("hi", model="org/other-model")
    answer = stage.request("POST", CHAT, body, Spillway_Deadline_Ms="300")
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(("ahead_s", "deadline_ms", "status"), [(-3600, "60000", 200), (3600, "300", 504)])
def test_a_deadline_counts_from_now_although_the_api_and_redis_disagree_about_the_time(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, ahead_s: int, deadline_ms: str, status: int
) -> None:
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + ahead_s)
    model = "demo" if status == 200 else "org/other-model"
    body = stage.chat({"start_after_s": 1, "say": ["late "]}, model=model)
    answer = stage.request_within(8, "POST", CHAT, body, Spillway_Deadline_Ms=deadline_ms)
    assert answer.status == status


def test_the_same_idempotency_key_attaches_to_the_running_job_and_replays_the_finished_one(stage: Stage) -> None:
    body = stage.chat({"say": [f"{number} " for number in range(12)], "pause_s": 0.03}, stream=True)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stage.request, "POST", CHAT, body, Idempotency_Key='"k-1"')
        second = pool.submit(stage.request, "POST", CHAT, body, Idempotency_Key="k-1")
        running = [first.result(), second.result()]
    reordered = dict(reversed(body.items()))
    replayed = stage.request("POST", CHAT, reordered, Idempotency_Key="k-1")
    answers = [*running, replayed]
    assert len({answer.headers["spillway-job"] for answer in answers}) == 1
    assert {text_of(chunks(answer.body)) for answer in answers} == {"".join(f"{number} " for number in range(12))}
    assert len({chunks(answer.body)[0]["id"] for answer in answers}) == 1
    assert chunks(replayed.body)[-1] == "[DONE]"


def test_the_same_idempotency_key_with_another_body_is_422(stage: Stage) -> None:
    assert stage.request("POST", CHAT, stage.chat("one"), Idempotency_Key="k-2").status == 200
    answer = stage.request("POST", CHAT, stage.chat("two"), Idempotency_Key="k-2")
    assert (answer.status, answer.error["code"]) == (422, "idempotency_key_reused")


def test_with_an_idempotency_key_a_client_may_leave_and_come_back(stage: Stage) -> None:
    words = [f"w{number} " for number in range(20)]
    body = stage.chat({"say": words, "pause_s": 0.03}, stream=True)
    data = json.dumps(body).encode()
    connection = stage.connect()
    connection.sendall(
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: k-3\r\nContent-Length: %d\r\n\r\n"
        % (CHAT.encode(), len(data))
    )
    connection.sendall(data)
    seen = b""
    while b"w3 " not in seen:
        seen += connection.recv(65536)
    connection.close()
    answer = stage.request("POST", CHAT, body, Idempotency_Key="k-3")
    assert text_of(chunks(answer.body)) == "".join(words)
    assert answer.headers["spillway-job"].encode() in seen


def test_a_takeover_continues_the_stream_without_gap_or_repeat(stage: Stage) -> None:
    words = [f"w{number} " for number in range(30)]
    answer = stage.request("POST", CHAT, stage.chat({"say": words, "die_after": 12, "pause_s": 0.005}, stream=True))
    events = chunks(answer.body)
    assert text_of(events) == "".join(words)
    assert events[-1] == "[DONE]"
    assert len([event for event in events[:-1] if event["choices"][0]["delta"].get("role")]) == 1
    assert stage.job(answer.headers["spillway-job"])["attempt"] == 2


def test_32_streams_at_once_each_get_their_own_text(stage: Stage) -> None:
    scripts = [[f"s{stream}-{number} " for number in range(40)] for stream in range(32)]
    with ThreadPoolExecutor(32) as pool:
        bodies = [stage.chat({"say": words, "pause_s": 0.005}, stream=True) for words in scripts]
        answers = list(pool.map(lambda body: stage.request("POST", CHAT, body), bodies))
    assert [text_of(chunks(answer.body)) for answer in answers] == ["".join(words) for words in scripts]


def test_silence_is_filled_with_comments(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_api_alone(tmp_path_factory.mktemp("silence"), keepalive_s=0.1) as stage:
        script = {"start_after_s": 0.35, "say": ["late "]}
        answer = stage.request("POST", CHAT, stage.chat(script, stream=True))
        assert answer.status == 200
        assert answer.body.startswith(b": keep-alive\n\n: keep-alive\n\n")
        assert text_of(chunks(answer.body)) == "late "
        failed = stage.request("POST", CHAT, stage.chat({"start_after_s": 0.3, "fail": "internal_error"}, stream=True))
        assert failed.status == 200  # committed by the comment
        assert chunks(failed.body)[-1]["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_that_redis_lost_ends_in_an_error_not_in_silence(
    tmp_path_factory: pytest.TempPathFactory, stream: bool
) -> None:
    with (
        running_api_alone(tmp_path_factory.mktemp("lost"), keepalive_s=0.2) as stage,
        ThreadPoolExecutor(1) as pool,
    ):
        body = stage.chat("hi", stream=stream, model="org/other-model")
        asking = pool.submit(stage.request, "POST", CHAT, body)
        wait_until(stage.live_jobs)
        stage.call(forget_everything(stage))
        answer = asking.result()
        error = chunks(answer.body)[-1]["error"] if answer.status == 200 else answer.error
        assert (error["type"], error["code"]) == ("server_error", "internal_error")
        assert stream or answer.status == 500


async def forget_everything(stage: Stage) -> None:
    await stage.services.redis.flushall()


def test_a_full_queue_is_429_with_retry_after(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_api_alone(tmp_path_factory.mktemp("full"), queue_depth_cap=1) as stage:
        body = stage.chat("hi", stream=True, model="org/other-model")
        data = json.dumps(body).encode()
        with stage.connect() as waiting:
            waiting.sendall(
                b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(data)) + data
            )
            wait_until(stage.live_jobs)
            answer = stage.request("POST", CHAT, body)
        assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        wait_until(lambda: not stage.live_jobs())
