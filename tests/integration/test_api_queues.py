"""/admin/queues: what waits and runs per pool and class, and pause, resume and drain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.api_stage import Stage, wait_until
from tests.scheduling_stage import running_durable_api


@pytest.fixture
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_durable_api(tmp_path_factory.mktemp("queues")) as stage:
        yield stage


def submit(stage: Stage, script: Any = "hi", **fields: Any) -> str:
    body = {"model": "demo", "messages": stage.chat(script)["messages"]}
    return stage.request("POST", "/v1/jobs", {"body": body, **fields}).json["id"]


def queue(stage: Stage, priority: str, pool: str = "demo") -> dict[str, Any]:
    found = stage.request("GET", "/admin/queues").json["data"]
    (row,) = [row for row in found if (row["pool"], row["priority"]) == (pool, priority)]
    return row


def test_a_paused_class_starts_nothing_until_it_is_resumed(stage: Stage) -> None:
    paused = stage.request("POST", "/admin/queues/pause", {"pool": "demo", "priority": "low"})
    assert [row["priority"] for row in paused.json["data"] if row["paused"]] == ["low"]
    waiting, going = submit(stage, priority="low"), submit(stage, priority="normal")
    wait_until(lambda: stage.job(going)["state"] == "succeeded")
    row = queue(stage, "low")
    assert (row["waiting"], row["running"], row["paused"], row["draining"]) == (1, 0, True, False)
    assert row["oldest_ms"] >= 0
    assert stage.job(waiting)["state"] == "queued"
    resumed = stage.request("POST", "/admin/queues/resume", {"pool": "demo", "priority": "low"})
    assert not any(row["paused"] for row in resumed.json["data"])
    wait_until(lambda: stage.job(waiting)["state"] == "succeeded")


def test_a_draining_pool_takes_no_new_jobs_until_it_is_resumed(stage: Stage) -> None:
    assert stage.request("POST", "/admin/queues/drain", {"pool": "demo"}).status == 200
    assert queue(stage, "high")["draining"] is True
    refused = stage.request("POST", "/v1/chat/completions", stage.chat("hi"))
    assert (refused.status, refused.error["code"]) == (503, "pool_draining")
    held = submit(stage)
    assert stage.job(held)["state"] == "queued"
    assert stage.request("POST", "/admin/queues/resume", {"pool": "demo"}).status == 200
    wait_until(lambda: stage.job(held)["state"] == "succeeded")


@pytest.mark.parametrize("action", ["pause", "resume", "drain"])
@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"pool": "nope"}, 404, "pool"),
        ({}, 400, "pool"),
        ({"pool": 1}, 400, "pool"),
        ({"pool": "demo", "priority": "urgent"}, 400, "priority"),
        ({"pool": "demo", "class": "low"}, 400, "class"),
    ],
)
def test_a_bad_order_is_named_and_changes_nothing(
    shared: Stage, action: str, body: dict[str, Any], status: int, param: str
) -> None:
    answer = shared.request("POST", f"/admin/queues/{action}", body)
    assert (answer.status, answer.error["param"]) == (status, param)
    assert not any(row["paused"] or row["draining"] for row in shared.request("GET", "/admin/queues").json["data"])


def test_a_class_cannot_be_drained(shared: Stage) -> None:
    answer = shared.request("POST", "/admin/queues/drain", {"pool": "demo", "priority": "low"})
    assert (answer.status, answer.error["param"]) == (400, "priority")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_durable_api(tmp_path_factory.mktemp("shared")) as stage:
        yield stage
