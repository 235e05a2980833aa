"""Jobs changed over HTTP: retried, reprioritised, cancelled wherever they are; dead letters replayed and discarded."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from scheduler.db.keys import KeyStore
from tests.api_stage import Stage, wait_until
from tests.scheduling_stage import running_durable_api

CHAT = "/v1/chat/completions"
HOLD = {"say": ["a "], "hold": True}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_durable_api(tmp_path_factory.mktemp("changes"), max_attempts=1) as stage:
        yield stage


def submit(stage: Stage, script: Any = "hi", model: str = "demo", key: str = "", **fields: Any) -> str:
    body = {"model": model, "messages": stage.chat(script)["messages"]}
    answer = stage.request("POST", "/v1/jobs", {"body": body, **fields}, X_Api_Key=key)
    assert answer.status == 202, answer.body
    return answer.json["id"]


def until(stage: Stage, job_id: str, state: str) -> None:
    wait_until(lambda: stage.job(job_id)["state"] == state)


def recorded(stage: Stage, job_id: str) -> None:
    wait_until(lambda: (row := stage.call(stage.services.durable.get(job_id))) and row.state.is_terminal)


def forget(stage: Stage, job_id: str) -> None:
    """Redis keeps ended jobs and their bodies for a while; not this one."""
    keys = stage.services.queue.keys

    async def delete() -> None:
        await stage.services.redis.delete(keys.job(job_id), keys.log(job_id), keys.of("body", job_id))

    stage.call(delete())


def cancelled(stage: Stage) -> str:
    """A durable job that was cancelled while it ran."""
    job_id = submit(stage, HOLD)
    wait_until(lambda: stage.claimed(job_id))
    assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").status == 200
    recorded(stage, job_id)
    return job_id


def test_a_cancelled_job_can_be_tried_again_under_its_id(stage: Stage) -> None:
    job_id = cancelled(stage)
    again = stage.request("POST", f"/v1/jobs/{job_id}/retry")
    assert (again.status, again.json["id"], again.json["error"]) == (202, job_id, None)
    assert again.json["state"] in {"queued", "running"}
    wait_until(lambda: stage.job(job_id)["attempt"] == 2)
    assert stage.request("POST", f"/v1/jobs/{job_id}/retry").error["code"] == "job_conflict"
    assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").status == 200
    until(stage, job_id, "cancelled")


def test_a_job_that_redis_forgot_is_tried_again_from_sql(stage: Stage) -> None:
    job_id = cancelled(stage)
    forget(stage, job_id)
    again = stage.request("POST", f"/v1/jobs/{job_id}/retry")
    assert (again.status, again.json["state"]) == (202, "queued")
    until(stage, job_id, "running")
    assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").status == 200
    until(stage, job_id, "cancelled")
    recorded(stage, job_id)


def test_the_events_of_a_retry_follow_those_of_the_first_try(stage: Stage) -> None:
    job_id = cancelled(stage)
    end = "1-4294967295"
    path = f"/v1/jobs/{job_id}/events"
    assert stage.request("GET", path, Last_Event_ID=end).status == 204
    assert stage.request("POST", f"/v1/jobs/{job_id}/retry").status == 202
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(stage.request, "GET", path, Last_Event_ID=end)
        until(stage, job_id, "running")
        assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").status == 200
        body = reading.result().body.decode()
    assert "id: 2-0\nevent: started" in body
    assert "id: 2-4294967295\nevent: failed" in body


def test_what_succeeded_or_is_gone_is_not_tried_again(stage: Stage) -> None:
    job_id = submit(stage, {"say": ["a "]})
    until(stage, job_id, "succeeded")
    refused = stage.request("POST", f"/v1/jobs/{job_id}/retry")
    assert (refused.status, refused.error["code"]) == (409, "job_conflict")
    interactive = stage.request("POST", CHAT, stage.chat({"fail": "context_length_exceeded"}))
    gone = stage.request("POST", f"/v1/jobs/{interactive.headers['spillway-job']}/retry")
    assert (gone.status, gone.error["code"]) == (410, "job_result_expired")


def test_the_result_of_an_interactive_job_comes_from_its_log_while_that_is_kept(stage: Stage) -> None:
    body = stage.chat({"say": ["a ", "b "]}, n=2, logprobs=True)
    answer = stage.request("POST", CHAT, body)
    job_id = answer.headers["spillway-job"]
    result = stage.request("GET", f"/v1/jobs/{job_id}/result")
    assert (result.status, result.json) == (200, answer.json)
    wait_until(lambda: stage.call(stage.services.jobs.get(job_id)))
    forget(stage, job_id)
    gone = stage.request("GET", f"/v1/jobs/{job_id}/result")
    assert (gone.status, gone.error["code"]) == (410, "job_result_expired")


@pytest.mark.parametrize("place", ["held", "waiting", "running"])
def test_the_priority_of_a_job_changes_wherever_it_is(stage: Stage, place: str) -> None:
    match place:
        case "held":
            job_id = submit(stage, delay_ms=3_600_000)
        case "waiting":
            job_id = submit(stage, model="org/other-model")
        case _:
            job_id = submit(stage, HOLD)
            wait_until(lambda: stage.claimed(job_id))
    changed = stage.request("PATCH", f"/v1/jobs/{job_id}", {"priority": "batch"})
    assert (changed.status, changed.json["priority"]) == (200, "batch")
    assert stage.job(job_id)["priority"] == "batch"
    row = stage.call(stage.services.durable.get(job_id))
    assert row is not None and row.priority == "batch"
    assert stage.request("POST", f"/v1/jobs/{job_id}/cancel").status == 200
    until(stage, job_id, "cancelled")
    late = stage.request("PATCH", f"/v1/jobs/{job_id}", {"priority": "high"})
    assert (late.status, late.error["code"]) == (409, "job_conflict")


@pytest.mark.parametrize(
    "body", [None, {}, {"priority": "urgent"}, {"priority": None}, {"priority": "low", "state": "x"}, b"["]
)
def test_a_bad_change_is_400(stage: Stage, body: Any) -> None:
    job_id = submit(stage, delay_ms=3_600_000)
    assert stage.request("PATCH", f"/v1/jobs/{job_id}", body).status == 400


@pytest.mark.parametrize(("method", "suffix"), [("GET", "/result"), ("POST", "/retry"), ("PATCH", "")])
def test_an_unknown_job_is_404(stage: Stage, method: str, suffix: str) -> None:
    body = {"priority": "high"} if method == "PATCH" else None
    answer = stage.request(method, f"/v1/jobs/job-0-{'0' * 31}{suffix}", body)
    assert (answer.status, answer.error["code"]) == (404, "job_not_found")


def dead(stage: Stage, code: str = "engine_failure", **fields: Any) -> str:
    job_id = submit(stage, {"fail": code}, **fields)
    key = fields.get("key", "")
    wait_until(lambda: job_id in [letter["job_id"] for letter in letters(stage, key)])
    return job_id


def letters(stage: Stage, key: str = "", query: str = "") -> list[dict[str, Any]]:
    return stage.request("GET", f"/admin/dead?limit=1000{query}", X_Api_Key=key).json["data"]


def test_dead_letters_are_listed_newest_first_with_their_reason(stage: Stage) -> None:
    made = [dead(stage) for _ in range(3)]
    first = stage.request("GET", "/admin/dead?limit=2").json
    assert [letter["job_id"] for letter in first["data"]] == made[:0:-1]
    assert first["has_more"] is True
    newest = first["data"][0]
    assert (newest["reason"]["code"], newest["pool"], newest["replayable"]) == ("engine_failure", "demo", True)
    rest = stage.request("GET", f"/admin/dead?limit=2&after={first['last_id']}").json
    assert rest["data"][0]["job_id"] == made[0]
    assert letters(stage, query="&code=worker_lost") == []
    assert letters(stage, query="&pool=other") == []
    for query in ("after=x", "limit=0", "sort=up"):
        assert stage.request("GET", f"/admin/dead?{query}").status == 400


def test_a_dead_letter_is_replayed_under_its_id(stage: Stage) -> None:
    job_id = dead(stage)
    recorded(stage, job_id)
    replayed = stage.request("POST", f"/admin/dead/{job_id}/replay")
    assert (replayed.status, replayed.json["id"]) == (200, job_id)
    wait_until(lambda: (job := stage.job(job_id))["state"] == "failed" and job["attempt"] == 2)


def test_a_discarded_dead_letter_is_gone_and_its_record_stays(stage: Stage) -> None:
    job_id = dead(stage)
    discarded = stage.request("DELETE", f"/admin/dead/{job_id}")
    assert (discarded.status, discarded.json) == (200, {"id": job_id, "object": "dead_letter", "deleted": True})
    assert job_id not in [letter["job_id"] for letter in letters(stage)]
    assert stage.job(job_id)["state"] == "failed"
    assert stage.request("DELETE", f"/admin/dead/{job_id}").status == 404
    assert stage.request("POST", f"/admin/dead/{job_id}/replay").status == 410


def test_many_dead_letters_are_replayed_within_a_bound(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_durable_api(tmp_path_factory.mktemp("many"), max_attempts=1) as stage:
        made = [dead(stage) for _ in range(3)]
        for job_id in made:
            recorded(stage, job_id)
        assert stage.request("POST", "/admin/dead/replay", {"code": "worker_lost"}).json["replayed"] == []
        two = stage.request("POST", "/admin/dead/replay", {"limit": 2, "pool": "demo", "code": "engine_failure"}).json
        assert (two["replayed"], two["failed"]) == (made[1:], [])
        wait_until(lambda: [stage.job(job_id)["attempt"] for job_id in made] == [1, 2, 2])
        for body in ({"limit": 0}, {"limit": 1001}, {"pools": "demo"}, {"pool": 1}):
            assert stage.request("POST", "/admin/dead/replay", body).status == 400


def test_a_key_sees_and_replays_the_dead_letters_of_its_tenant_only(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_durable_api(tmp_path_factory.mktemp("tenants"), max_attempts=1) as stage:
        store = KeyStore(stage.services.database)
        ann, bob = (stage.call(store.create(name, tenant=name))[1] for name in ("ann", "bob"))
        job_id = dead(stage, key=ann)
        assert letters(stage, bob) == []
        assert stage.request("POST", f"/admin/dead/{job_id}/replay", X_Api_Key=bob).status == 404
        assert stage.request("DELETE", f"/admin/dead/{job_id}", X_Api_Key=bob).status == 404
        assert stage.request("POST", "/admin/dead/replay", X_Api_Key=bob).json["replayed"] == []
        assert stage.request("POST", "/admin/dead/replay", X_Api_Key=ann).json["replayed"] == [job_id]
        assert stage.request("GET", "/admin/dead").status == 401
