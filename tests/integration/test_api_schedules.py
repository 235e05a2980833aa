"""/v1/schedules by HTTP: made, changed, paused, run, and refused by the name of what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.db.keys import KeyStore
from tests.api_stage import Answer, Stage, running_api


@pytest.fixture(scope="module")
def stage(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_api(redis_url, tmp_path_factory.mktemp("schedules"), outbound_origins="http://127.0.0.1:9") as running:
        yield running


def create(stage: Stage, **fields: Any) -> Answer:
    body = {"name": "nightly", "cron": "0 3 * * *", "timezone": "Europe/Berlin", "body": stage.chat("hi")}
    del body["body"]["stream"]
    return stage.request("POST", "/v1/schedules", body | fields)


def test_a_schedule_is_shown_as_it_was_made_and_listed_and_deleted(stage: Stage) -> None:
    made = create(stage, priority="low", deadline_after_ms=1000, metadata={"team": "a"})
    assert made.status == 201
    path = f"/v1/schedules/{made.json['id']}"
    assert stage.request("GET", path).json == made.json
    assert (made.json["priority"], made.json["metadata"]) == ("low", {"team": "a"})
    assert made.json["body"]["messages"][0]["content"] == "hi"
    assert made.json["next_ms"] > made.json["created_ms"]
    assert made.json["id"] in [one["id"] for one in stage.request("GET", "/v1/schedules").json["data"]]
    assert stage.request("DELETE", path).json["deleted"] is True
    gone = stage.request("GET", path)
    assert (gone.status, gone.error["code"]) == (404, "schedule_not_found")


def test_a_change_keeps_what_it_does_not_name(stage: Stage) -> None:
    made = create(stage, metadata={"team": "a"}).json
    path = f"/v1/schedules/{made['id']}"
    changed = stage.request("PATCH", path, {"cron": "@hourly", "metadata": None}).json
    assert (changed["cron"], changed["metadata"], changed["name"]) == ("@hourly", {}, "nightly")
    assert changed["body"] == made["body"] and changed["next_ms"] % 3_600_000 == 0
    bad = stage.request("PATCH", path, {"cron": "never"})
    assert (bad.status, bad.error["param"]) == (400, "cron")
    assert stage.request("GET", path).json == changed


def test_a_pause_ends_with_a_resume(stage: Stage) -> None:
    made = create(stage).json
    path = f"/v1/schedules/{made['id']}"
    paused = stage.request("POST", f"{path}/pause").json
    assert (paused["paused"], paused["next_ms"]) == (True, None)
    assert stage.request("PATCH", path, {"name": "weekly"}).json["paused"] is True
    resumed = stage.request("POST", f"{path}/resume").json
    assert (resumed["paused"], resumed["next_ms"]) == (False, made["next_ms"])
    assert create(stage, paused=True).json["next_ms"] is None


def test_a_run_makes_a_job_now_that_the_schedules_jobs_list(stage: Stage) -> None:
    made = create(stage, paused=True, priority="high").json
    job = stage.request("POST", f"/v1/schedules/{made['id']}/run")
    assert job.status == 202
    assert job.headers["location"] == f"/v1/jobs/{job.json['id']}"
    (listed,) = stage.request("GET", f"/v1/jobs?schedule_id={made['id']}").json["data"]
    assert (listed["id"], listed["priority"]) == (job.json["id"], "high")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"cron": "61 * * * *"}, "cron"),
        ({"cron": "0 0 30 2 *"}, "cron"),
        ({"cron": 5}, "cron"),
        ({"timezone": "Mars/Base"}, "timezone"),
        ({"body": "hi"}, "body"),
        ({"body": {"model": "demo"}}, "body.messages"),
        ({"body": {"model": "demo", "messages": [{"role": "user", "content": "x"}], "stream": True}}, "body.stream"),
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"priority": "urgent"}, "priority"),
        ({"deadline_after_ms": 0}, "deadline_after_ms"),
        ({"webhook": "https://not.registered/"}, "webhook"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"crom": "* * * * *"}, "crom"),
    ],
)
def test_bad_schedules_are_refused_by_name(stage: Stage, fields: dict[str, Any], param: str) -> None:
    refused = create(stage, **fields)
    assert (refused.status, refused.error["param"]) == (400, param)


def test_a_schedule_names_a_webhook_by_its_url(stage: Stage) -> None:
    url = "http://127.0.0.1:9/hook"
    endpoint = stage.request("POST", "/v1/webhook_endpoints", {"url": url}).json
    assert create(stage, webhook=url).json["webhook"] == endpoint["id"]


def test_a_key_sees_the_schedules_of_its_tenant_only(redis_url: str, tmp_path: Path) -> None:
    with running_api(redis_url, tmp_path, workers=0) as stage:
        keys = KeyStore(stage.services.database)
        ann, bob = (f"Bearer {stage.call(keys.create(name, name))[1]}" for name in ("ann", "bob"))
        body = {"cron": "@daily", "body": {"model": "demo", "messages": [{"role": "user", "content": "x"}]}}
        made = stage.request("POST", "/v1/schedules", body, authorization=ann).json
        for method, path in [("GET", ""), ("DELETE", ""), ("POST", "/run"), ("POST", "/pause"), ("PATCH", "")]:
            refused = stage.request(method, f"/v1/schedules/{made['id']}{path}", {}, authorization=bob)
            assert refused.status == 404
        assert stage.request("GET", "/v1/schedules", authorization=bob).json["data"] == []
