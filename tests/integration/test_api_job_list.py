"""GET /v1/jobs: pages that stand still while jobs come and move, filters, and no job twice or left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from scheduler.job import JobState
from tests.api_stage import Stage, running_api_alone, wait_until
from tests.scheduling_stage import running_durable_api

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_durable_api(tmp_path_factory.mktemp("list")) as stage:
        yield stage


def submit(stage: Stage, script: Any = "hi", **fields: Any) -> str:
    body = {"model": "demo", "messages": stage.chat(script)["messages"]}
    answer = stage.request("POST", "/v1/jobs", {"body": {**body, **fields.pop("body", {})}, **fields})
    assert answer.status == 202, answer.body
    return answer.json["id"]


def page(stage: Stage, **query: Any) -> dict[str, Any]:
    answer = stage.request("GET", f"/v1/jobs?{urlencode(query)}")
    assert answer.status == 200, answer.body
    return answer.json


def ids(stage: Stage, **query: Any) -> list[str]:
    return [job["id"] for job in page(stage, **query)["data"]]


def walk(stage: Stage, limit: int, **query: Any) -> list[str]:
    """All ids, page by page."""
    found: list[str] = []
    after: dict[str, str] = {}
    while True:
        body = page(stage, limit=limit, **query, **after)
        found += [job["id"] for job in body["data"]]
        if not body["has_more"]:
            return found
        after = {"after": body["last_id"]}


def ended(stage: Stage, *job_ids: str) -> None:
    wait_until(lambda: all(JobState(stage.job(job_id)["state"]).is_terminal for job_id in job_ids))


@pytest.fixture(scope="module")
def everywhere(stage: Stage) -> list[str]:
    """Jobs in each of the places, newest first: held, waiting, running, recorded, interactive."""
    made: list[str] = []
    for _ in range(3):
        made.append(submit(stage, {"say": ["a "]}))
        made.append(stage.request("POST", CHAT, stage.chat("hi")).headers["spillway-job"])
        made.append(submit(stage, {"say": ["a "], "hold": True}))
        made.append(submit(stage, delay_ms=3_600_000, priority="low"))
        made.append(submit(stage, body={"model": "org/other-model"}))
    ended(stage, *made[0::5], *made[1::5])
    wait_until(lambda: all(stage.claimed(job_id) for job_id in made[2::5]))
    return made[::-1]


def test_every_job_is_listed_once_in_the_order_of_its_making(stage: Stage, everywhere: list[str]) -> None:
    assert ids(stage, limit=100) == everywhere


@pytest.mark.parametrize("limit", [1, 2, 4, 7])
def test_pages_join_without_gap_or_repeat(stage: Stage, everywhere: list[str], limit: int) -> None:
    assert walk(stage, limit) == everywhere
    first = page(stage, limit=limit)
    assert (first["first_id"], first["last_id"]) == (everywhere[0], everywhere[limit - 1])


def test_a_page_stays_where_it_is_while_jobs_come(stage: Stage, everywhere: list[str]) -> None:
    first = page(stage, limit=5)
    new = submit(stage, delay_ms=3_600_000)
    assert ids(stage, limit=5, after=first["last_id"]) == everywhere[5:10]
    assert ids(stage, limit=1) == [new]
    stage.request("POST", f"/v1/jobs/{new}/cancel")
    assert ids(stage, limit=1, after=new) == everywhere[:1]
    assert ids(stage, state="cancelled") == [new]


def test_a_job_that_ends_keeps_its_place(stage: Stage, everywhere: list[str]) -> None:
    running = everywhere[2]
    position = walk(stage, 100).index(running)
    assert stage.request("POST", f"/v1/jobs/{running}/cancel").status == 200
    ended(stage, running)
    assert walk(stage, 3).index(running) == position


@pytest.mark.parametrize(
    ("query", "position"),
    [
        ({"state": "scheduled"}, (3,)),
        ({"state": "queued"}, (4,)),
        ({"state": "queued,scheduled", "priority": "low"}, (3,)),
        ({"state": "succeeded"}, (0, 1)),
        ({"model": "org/other-model"}, (4,)),
        ({"state": "succeeded", "model": "org/other-model"}, ()),
        ({"batch_id": "batch_none"}, ()),
        ({"schedule_id": "schedule_none"}, ()),
    ],
)
def test_filters_choose(stage: Stage, everywhere: list[str], query: dict[str, str], position: tuple[int, ...]) -> None:
    oldest_first = everywhere[::-1]
    chosen = [job_id for number, job_id in enumerate(oldest_first) if number % 5 in position]
    assert walk(stage, 2, **query) == chosen[::-1]


def test_times_choose(stage: Stage, everywhere: list[str]) -> None:
    middle = everywhere[7]
    made = stage.job(middle)["created_ms"] / 1000
    before = walk(stage, 4, created_before=made - 0.001)
    after = walk(stage, 4, created_after=made + 0.001)
    assert set(before) <= set(everywhere[7:]) and set(after) & set(everywhere) <= set(everywhere[:8])
    assert everywhere[-1] in before and everywhere[0] in after
    assert ids(stage, created_after="2999-01-01T00:00:00Z") == []
    assert ids(stage, created_before="2001-01-01T00:00:00+02:00") == []
    assert ids(stage, created_after=time.time() + 60) == []


@pytest.mark.parametrize(
    "query",
    [
        {"limit": 0},
        {"limit": "x"},
        {"limit": 1001},
        {"state": "done"},
        {"state": ""},
        {"priority": "urgent"},
        {"after": "nope"},
        {"after": "job-other-01"},
        {"created_after": "yesterday"},
        {"created_before": "nan"},
        {"model": "m" * 300},
        {"sate": "failed"},
    ],
)
def test_a_bad_parameter_is_named(stage: Stage, query: dict[str, Any]) -> None:
    answer = stage.request("GET", f"/v1/jobs?{urlencode(query)}")
    assert (answer.status, answer.error["param"]) == (400, next(iter(query)))


def test_jobs_whose_end_is_not_recorded_yet_are_listed(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_api_alone(tmp_path_factory.mktemp("unrecorded")) as stage:
        job_id = stage.request("POST", CHAT, stage.chat("hi")).headers["spillway-job"]
        assert ids(stage) == [job_id]
        assert ids(stage, state="succeeded") == [job_id]
        assert ids(stage, state="failed") == []
