"""Bodies of /v1/jobs and the Prefer header: what is read, and how precisely a refusal says why."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.datastructures import Headers

from api.errors import problem_of
from api.protocols.native_job import MAX_AHEAD_MS, JobCall, parse_change, parse_job
from api.request_headers import Preference, read_prefer
from scheduler.errors import ClientError
from scheduler.job import Priority

NOW_MS = 1_790_000_000_000
NOW_S = NOW_MS / 1000
CHAT: dict[str, Any] = {"model": "m", "messages": []}


def parse(**fields: Any) -> JobCall:
    return parse_job(json.dumps({"body": CHAT, **fields}).encode(), NOW_MS)


def test_the_smallest_submission_is_a_chat_for_now() -> None:
    call = parse()
    assert (call.endpoint, json.loads(call.body)) == ("/v1/chat/completions", CHAT)
    assert (call.priority, call.not_before_ms, call.deadline_ms, call.webhook) == (None, None, None, None)
    assert call.metadata == {}


def test_the_inference_body_stays_as_it_was_written() -> None:
    assert parse_job(b'{"body": {"model" : "m", "seed": 1.0}}', NOW_MS).body == b'{"model" : "m", "seed": 1.0}'


def test_explicit_nulls_are_defaults() -> None:
    names = ("endpoint", "priority", "not_before", "delay_ms", "deadline", "deadline_ms", "webhook", "metadata")
    assert parse(**dict.fromkeys(names)) == parse()


@pytest.mark.parametrize(
    ("fields", "not_before_ms", "deadline_ms"),
    [
        ({"not_before": NOW_S + 60}, NOW_MS + 60_000, None),
        ({"not_before": "2026-09-21T14:13:20.250Z"}, NOW_MS + 250, None),
        ({"not_before": "2026-09-21T16:13:21+02:00"}, NOW_MS + 1000, None),
        ({"not_before": NOW_S - 60}, None, None),
        ({"delay_ms": 1500}, NOW_MS + 1500, None),
        ({"delay_ms": 0}, None, None),
        ({"deadline": NOW_S + 5}, None, NOW_MS + 5000),
        ({"deadline_ms": 5000, "delay_ms": 4000}, NOW_MS + 4000, NOW_MS + 5000),
    ],
)
def test_times_are_points_or_distances(
    fields: dict[str, Any], not_before_ms: int | None, deadline_ms: int | None
) -> None:
    call = parse(**fields)
    assert (call.not_before_ms, call.deadline_ms) == (not_before_ms, deadline_ms)


def test_priority_webhook_and_metadata_are_read() -> None:
    call = parse(priority="batch", webhook="whe_1", metadata={"run": "7"})
    assert (call.priority, call.webhook, call.metadata) == (Priority.BATCH, "whe_1", {"run": "7"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"body": "text"}, "body"),
        ({"body": None}, "body"),
        ({"body": []}, "body"),
        ({"endpoint": 3}, "endpoint"),
        ({"priority": "urgent"}, "priority"),
        ({"priority": 1}, "priority"),
        ({"not_before": "tomorrow"}, "not_before"),
        ({"not_before": "2026-12-24T18:00:00"}, "not_before"),
        ({"not_before": True}, "not_before"),
        ({"not_before": -1}, "not_before"),
        ({"not_before": float(NOW_MS)}, "not_before"),
        ({"not_before": 1e300}, "not_before"),
        ({"not_before": "0001-01-01T00:00:00+14:00", "deadline": "0001-01-01T00:00:00+14:00"}, "deadline"),
        ({"not_before": "9999-12-31T23:59:59Z"}, "not_before"),
        ({"delay_ms": -1}, "delay_ms"),
        ({"delay_ms": 1.5}, "delay_ms"),
        ({"delay_ms": MAX_AHEAD_MS + 1}, "delay_ms"),
        ({"delay_ms": 1, "not_before": NOW_S + 1}, "delay_ms"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"deadline": NOW_S}, "deadline"),
        ({"deadline": NOW_S + 10, "not_before": NOW_S + 10}, "deadline"),
        ({"deadline_ms": 5, "delay_ms": 6}, "deadline_ms"),
        ({"webhook": "x" * 2049}, "webhook"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"notbefore": NOW_S + 10}, "notbefore"),
    ],
)
def test_a_bad_member_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ClientError) as caught:
        parse(**fields)
    problem = problem_of(caught.value)
    assert problem.status == 400
    assert (problem.param or "").startswith(param)


def test_a_misspelt_member_is_answered_with_its_right_name() -> None:
    with pytest.raises(ClientError, match="did you mean 'not_before'"):
        parse(notbefore=1)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}", b'{"body": {}, "body2": {}}', b'{"body":{"a":"\xff"}}'])
def test_what_is_no_submission_is_refused(body: bytes) -> None:
    with pytest.raises(ClientError):
        parse_job(body, NOW_MS)


def test_a_change_is_a_priority() -> None:
    assert parse_change(b'{"priority": "high"}') is Priority.HIGH
    for body in (b"{}", b'{"priority": null}', b'{"priority": "high", "state": "done"}'):
        with pytest.raises(ClientError):
            parse_change(body)


@pytest.mark.parametrize(
    ("lines", "preference"),
    [
        ([], None),
        (["return=minimal"], None),
        (["wait=10"], None),
        (["respond-async"], Preference()),
        (["Respond-Async, wait=10"], Preference(10)),
        (["wait=10", 'foo="a, respond-sync"; bar, respond-async'], Preference(10)),
        (['respond-async, wait="7"'], Preference(7)),
        (["respond-async; x=1, wait = 3 ; y"], Preference(3)),
        (["respond-async, wait=100000"], Preference(60)),
        (['foo="respond-async, wait=1"'], None),
        (["wait=1, respond-async, wait=9"], Preference(1)),
    ],
)
def test_the_wish_for_an_asynchronous_answer(lines: list[str], preference: Preference | None) -> None:
    assert read_prefer(Headers(raw=[(b"prefer", line.encode()) for line in lines])) == preference


@pytest.mark.parametrize("wait", ["wait", "wait=", "wait=-1", "wait=1.5", "wait=soon", "wait=²"])
def test_a_bad_wait_is_refused(wait: str) -> None:
    with pytest.raises(ClientError) as caught:
        read_prefer(Headers({"prefer": f"respond-async, {wait}"}))
    assert caught.value.param == "Prefer"
