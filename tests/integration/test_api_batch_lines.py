"""Lines of a batch are jobs that nobody tries again: counts and files of a batch stay as they are told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.api_stage import Stage, wait_until
from tests.batch_stage import CHAT, count, ended, jsonl, line, read, running_batches, sdk, submit, until


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_batches(tmp_path_factory.mktemp("lines"), max_attempts=1) as (stage, _):
        yield stage


@pytest.fixture
def client(stage: Stage) -> Iterator[OpenAI]:
    with sdk(stage) as client:
        yield client


def lines_of(stage: Stage, batch_id: str) -> list[str]:
    listed = stage.request("GET", f"/v1/jobs?batch_id={batch_id}").json["data"]
    return [job["id"] for job in reversed(listed)]


def refused(stage: Stage, path: str, batch_id: str) -> None:
    answer = stage.request("POST", path)
    assert (answer.status, answer.error["code"]) == (409, "job_conflict")
    assert batch_id in answer.error["message"] and answer.headers["x-should-retry"] == "false"


def test_a_line_that_failed_is_not_tried_again_after_the_end_of_its_batch(client: OpenAI, stage: Stage) -> None:
    batch = ended(client, submit(client, jsonl([line("good", "x"), line("bad", {"fail": "engine_failure"})])))
    assert count(batch) == (2, 1, 1)
    _, bad = lines_of(stage, batch.id)
    before = (client.batches.retrieve(batch.id), client.files.content(batch.error_file_id or "").text)
    refused(stage, f"/v1/jobs/{bad}/retry", batch.id)
    refused(stage, f"/admin/dead/{bad}/replay", batch.id)
    assert stage.job(bad)["state"] == "failed"
    assert stage.request("GET", f"/v1/jobs/{bad}/result").error["code"] == "engine_failure"
    assert (client.batches.retrieve(batch.id), client.files.content(batch.error_file_id or "").text) == before


def test_a_line_that_failed_is_not_tried_again_while_its_batch_runs(client: OpenAI, stage: Stage) -> None:
    lines = [line("bad", {"fail": "engine_failure"}), line("held", {"say": ["a "], "hold": True})]
    batch = until(client, submit(client, jsonl(lines)), lambda now: count(now)[2] == 1)
    bad, _ = lines_of(stage, batch.id)
    refused(stage, f"/v1/jobs/{bad}/retry", batch.id)
    client.batches.cancel(batch.id)
    assert set(read(client, ended(client, batch).error_file_id)) == {"bad", "held"}


def test_dead_letters_of_lines_take_no_place_from_those_that_can_be_replayed(client: OpenAI, stage: Stage) -> None:
    job = {"endpoint": CHAT, "body": stage.chat({"fail": "engine_failure"})}
    plain = stage.request("POST", "/v1/jobs", job).json["id"]
    wait_until(lambda: stage.job(plain)["state"] == "failed")
    batch = ended(client, submit(client, jsonl([line(f"{n}", {"fail": "engine_failure"}) for n in range(3)])))
    letters = stage.request("GET", "/admin/dead?limit=4").json["data"]
    told = {letter["job_id"]: letter["replayable"] for letter in letters}
    assert told == dict.fromkeys(lines_of(stage, batch.id), False) | {plain: True}
    replayed = stage.request("POST", "/admin/dead/replay", {"limit": 1}).json
    assert (replayed["replayed"], replayed["failed"]) == ([plain], [])
