"""The Batch API through the official openai SDK, with a real scheduler process and scripted workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch
from standardwebhooks import Webhook

from scheduler.batch import BatchRecord, BatchStatus, NewBatch
from tests.api_stage import Stage, running_api_alone, wait_until
from tests.batch_stage import CHAT, count, ended, jsonl, line, read, running_batches, sdk, submit, text_of, until
from tests.conftest import wait_until as until_async
from tests.http_receiver import receiving
from tests.scripted_worker import ROWS
from tests.service import free_port

RECEIVER = f"http://127.0.0.1:{free_port()}/hook"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_batches(
        tmp_path_factory.mktemp("batches"), batch_window=96, outbound_origins=RECEIVER.removesuffix("/hook")
    ) as (stage, _):
        yield stage


@pytest.fixture
def client(stage: Stage) -> Iterator[OpenAI]:
    with sdk(stage) as client:
        yield client


def test_every_line_is_answered_and_counted(client: OpenAI) -> None:
    lines = [line(f"say-{n}", f"one two {n}", max_tokens=50) for n in range(20)]
    batch = submit(client, jsonl(lines), metadata={"night": "1"})
    assert batch.status in {"validating", "in_progress"} and batch.expires_at == batch.created_at + 24 * 3600
    batch = ended(client, batch)
    assert (batch.status, batch.model, batch.metadata) == ("completed", "demo", {"night": "1"})
    assert count(batch) == (20, 20, 0)
    assert batch.error_file_id is None and batch.errors is None
    assert batch.usage is not None
    assert (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.total_tokens) == (100, 60, 160)
    assert batch.created_at and batch.in_progress_at and batch.finalizing_at and batch.completed_at
    found = read(client, batch.output_file_id)
    assert {name: text_of(entry) for name, entry in found.items()} == {f"say-{n}": f"one two {n} " for n in range(20)}
    entry = found["say-7"]
    assert entry["id"].startswith("batch_req_") and entry["error"] is None
    assert entry["response"]["status_code"] == 200 and entry["response"]["request_id"]
    assert entry["response"]["body"]["object"] == "chat.completion"
    file = client.files.retrieve(batch.output_file_id or "")
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert file.expires_at == file.created_at + 30 * 24 * 3600


def test_lines_that_fail_go_to_the_error_file_as_the_endpoint_would_answer(client: OpenAI) -> None:
    lines = [
        line("good", "fine"),
        line("long", {"fail": "context_length_exceeded"}),
        line("bug", {"fail": "internal_error"}),
    ]
    batch = ended(client, submit(client, jsonl(lines)))
    assert batch.status == "completed" and count(batch) == (3, 1, 2)
    assert set(read(client, batch.output_file_id)) == {"good"}
    failed = read(client, batch.error_file_id)
    assert failed["long"]["response"]["status_code"] == 400 and failed["long"]["error"] is None
    assert failed["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert failed["bug"]["response"]["status_code"] == 500


@pytest.mark.parametrize(
    ("broken", "code", "param"),
    [
        ("{not json", "invalid_json_line", None),
        ("[1]", "invalid_json_line", None),
        (json.dumps({"method": "POST", "url": CHAT, "body": {}}), "missing_required_parameter", "custom_id"),
        (json.dumps({"custom_id": "a", "method": "POST", "url": CHAT}), "missing_required_parameter", "body"),
        (json.dumps({"custom_id": 7, "method": "POST", "url": CHAT, "body": {}}), "invalid_type", "custom_id"),
        (json.dumps(line("a", "x") | {"custom_id": ""}), "invalid_custom_id", "custom_id"),
        (json.dumps(line("a", "x") | {"method": "GET"}), "invalid_method", "method"),
        (json.dumps(line("a", "x") | {"url": "/v1/embeddings"}), "invalid_url", "url"),
        (json.dumps(line("first", "x")), "duplicate_custom_id", "custom_id"),
        (json.dumps(line("a", "x", temperature=9)), "decimal_above_max_value", "body.temperature"),
        (json.dumps(line("a", "x", stream=True)), "invalid_request", "body.stream"),
        (json.dumps(line("a", "x", model="nope")), "model_not_found", "body.model"),
        (json.dumps(line("a", "x") | {"body": []}), "invalid_json", "body"),
    ],
)  # fmt: skip
def test_a_bad_line_fails_the_batch_and_is_named(client: OpenAI, broken: str, code: str, param: str | None) -> None:
    content = jsonl([line("first", "x")]) + b"\n" + broken.encode() + b"\n"
    batch = ended(client, submit(client, content))
    assert batch.status == "failed" and batch.failed_at and batch.output_file_id is None
    assert batch.errors is not None and batch.errors.data is not None
    (error,) = batch.errors.data
    assert (error.code, error.line, error.param) == (code, 3, param)


def test_at_most_a_hundred_errors_are_told(client: OpenAI) -> None:
    batch = ended(client, submit(client, b"nonsense\n" * 150))
    assert batch.errors is not None and batch.errors.data is not None
    assert [error.line for error in batch.errors.data] == list(range(1, 101))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_requests_fails(client: OpenAI, content: bytes) -> None:
    batch = ended(client, submit(client, content))
    assert batch.errors is not None and batch.errors.data is not None
    assert [(error.code, error.line) for error in batch.errors.data] == [("empty_file", None)]


def test_no_line_runs_before_the_whole_file_is_judged(client: OpenAI, stage: Stage) -> None:
    before = set(stage.workers[0].requests)
    ended(client, submit(client, jsonl([line(f"{n}", "never said") for n in range(700)]) + b"broken\n"))
    assert set(stage.workers[0].requests) == before


def test_dos_line_ends_a_byte_order_mark_and_a_missing_last_line_end_are_fine(client: OpenAI) -> None:
    content = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(line(f"ü{n}", "hi")).encode() for n in range(3))
    assert set(read(client, ended(client, submit(client, content)).output_file_id)) == {"ü0", "ü1", "ü2"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1s"}, "completion_window"),
        ({"completion_window": "169h"}, "completion_window"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"metadata": {"k": "v" * 600}}, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "now", "seconds": 7200}}, "output_expires_after.anchor"),
        ({"extra_body": {"webhook": "https://nobody.example"}}, "webhook"),
    ],
)
def test_a_bad_submission_is_told_precisely(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    file = client.files.create(file=("in.jsonl", jsonl([line("a", "x")])), purpose="batch")
    asked: dict[str, Any] = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(**asked | fields)
    assert caught.value.param == param
    if param == "endpoint":
        assert CHAT in caught.value.message


def test_a_file_of_another_purpose_is_no_input(client: OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", b"{}"), purpose="user_data")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def test_lists_page_and_files_of_results_expire_as_asked(client: OpenAI) -> None:
    expiry: Any = {"anchor": "created_at", "seconds": 7200}
    made = [submit(client, jsonl([line("a", "x")]), output_expires_after=expiry).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == made[::-1]
    batch = ended(client, client.batches.retrieve(made[0]))
    file = client.files.retrieve(batch.output_file_id or "")
    assert file.expires_at == file.created_at + 7200


def test_a_cancel_in_mid_way_keeps_what_is_done(client: OpenAI, stage: Stage) -> None:
    lines = [line("done", "said"), *(line(f"held-{n}", {"say": ["a "], "hold": True}) for n in range(150))]
    batch = submit(client, jsonl(lines))
    until(client, batch, lambda now: count(now)[1] == 1)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
    assert count(batch) == (151, 1, 150)
    assert set(read(client, batch.output_file_id)) == {"done"}
    cut = read(client, batch.error_file_id)
    assert {(entry["response"], entry["error"]["code"]) for entry in cut.values()} == {(None, "batch_cancelled")}
    assert len(cut) == 150
    assert client.batches.cancel(batch.id).status == "cancelled"
    wait_until(lambda: stage.live_jobs() == [])


def test_a_batch_at_its_end_cannot_be_cancelled_and_an_unknown_one_is_not_found(client: OpenAI) -> None:
    batch = ended(client, submit(client, jsonl([line("a", "x")])))
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")


def test_a_batch_past_its_window_keeps_what_is_done(client: OpenAI, stage: Stage) -> None:
    lines = [line("done", "said"), *(line(f"held-{n}", {"say": ["a "], "hold": True}) for n in range(150))]
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    now_ms = file.created_at * 1000 + 1000
    new = NewBatch("default", CHAT, file.id, "24h", expires_ms=now_ms + 3000)
    made = stage.call(stage.services.batches.create(new, now_ms))
    batch = ended(client, client.batches.retrieve(made.id))
    assert batch.status == "expired" and batch.expired_at and batch.expired_at >= (batch.expires_at or 0)
    assert count(batch) == (151, 1, 150)
    cut = read(client, batch.error_file_id)
    assert {(entry["response"], entry["error"]["code"]) for entry in cut.values()} == {(None, "batch_expired")}
    wait_until(lambda: stage.live_jobs() == [])


def test_a_batch_whose_window_passed_before_it_was_read_expires(client: OpenAI, stage: Stage) -> None:
    new = NewBatch("default", CHAT, "file-gone", "24h", expires_ms=1000)
    made = stage.call(stage.services.batches.create(new, 500))
    assert ended(client, client.batches.retrieve(made.id)).status == "expired"


def test_a_batch_whose_file_was_deleted_before_it_was_read_fails(client: OpenAI, stage: Stage) -> None:
    new = NewBatch("default", CHAT, "file-gone", "24h", expires_ms=2**42)
    made = stage.call(stage.services.batches.create(new, 2**41))
    batch = ended(client, client.batches.retrieve(made.id))
    assert batch.errors is not None and batch.errors.data is not None
    assert [error.code for error in batch.errors.data] == ["file_not_found"]


def test_no_late_writer_undoes_a_cancel(stage: Stage) -> None:
    """Whoever read the batch before the cancel moves nothing after it."""
    store = stage.services.batches
    new = NewBatch("default", CHAT, "file-x", "24h", expires_ms=2**42)
    made = stage.call(store.create(new, 2**41))
    assert stage.call(store.move(made, BatchStatus.CANCELLING, 1))
    for late in (BatchStatus.IN_PROGRESS, BatchStatus.FAILED):
        assert not stage.call(store.move(made, late, 2))
    assert not stage.call(store.note(made, total=5))


def test_lines_run_in_the_class_of_batches_and_people_go_before_them(client: OpenAI, stage: Stage) -> None:
    """Every line that runs goes on until it is cancelled: who waits for them waits for ever."""
    batch = submit(client, jsonl([line(f"{n}", {"say": ["a "], "hold": True}) for n in range(200)]))
    worker = stage.workers[0]
    ours = f"job-{stage.settings.shard}-{batch.id.removeprefix('batch_')[:11]}"

    def claimed() -> list[str]:
        return [name for name in list(worker.claims) if name.startswith(ours)]

    wait_until(lambda: len(claimed()) >= ROWS)
    answer = client.chat.completions.with_raw_response.create(
        model="demo", messages=[{"role": "user", "content": "hello"}]
    )
    mine = answer.headers["spillway-job"]
    assert answer.parse().choices[0].message.content == "hello "
    assert worker.claims[mine].priority == "normal"
    assert {worker.claims[name].priority for name in claimed()} == {"batch"}
    assert len(claimed()) < 200, "no line waited: the test proved nothing"
    client.batches.cancel(batch.id)
    ended(client, batch)


async def test_the_end_of_a_batch_is_told_to_the_webhook_that_it_names(client: OpenAI, stage: Stage) -> None:
    made = await asyncio.to_thread(
        stage.request, "POST", "/v1/webhook_endpoints", {"url": RECEIVER, "event_types": ["batch.completed"]}
    )
    async with receiving(port=int(RECEIVER.rpartition(":")[2].partition("/")[0])) as receiver:
        content, named = jsonl([line("a", "one")]), {"webhook": made.json["id"]}
        batch = await asyncio.to_thread(submit, client, content, extra_body=named)
        await until_async(lambda: receiver.received)
    event = Webhook(made.json["signing_secret"]).verify(receiver.received[0].body, receiver.received[0].headers)
    assert (event["type"], event["data"]["id"]) == ("batch.completed", batch.id)
    seen = client.batches.retrieve(batch.id)
    assert (seen.status, count(seen)) == ("completed", (1, 1, 0))


def test_lines_beyond_the_window_in_the_queue_each_end_once(client: OpenAI) -> None:
    batch = submit(client, jsonl([line(f"n{n}", f"{n}") for n in range(500)]))
    batch = ended(client, batch, within_s=60)
    found = read(client, batch.output_file_id)
    assert {name: text_of(entry) for name, entry in found.items()} == {f"n{n}": f"{n} " for n in range(500)}


def test_a_repeated_idempotency_key_is_answered_by_its_batch(client: OpenAI) -> None:
    key = {"Idempotency-Key": "night-1"}
    file = client.files.create(file=("in.jsonl", jsonl([line("a", "x")])), purpose="batch")
    asked: dict[str, Any] = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(client.batches.create, **asked, extra_headers=key) for _ in range(8)]
        made = {call.result().id for call in calls}
    assert len(made) == 1
    done = ended(client, client.batches.retrieve(made.pop()))
    client.files.delete(file.id)
    again = client.batches.create(**asked, extra_headers=key)
    assert (again.id, again.status, count(again)) == (done.id, "completed", (1, 1, 0))
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.batches.create(**asked, metadata={"other": "body"}, extra_headers=key)
    assert (caught.value.code, caught.value.type) == ("idempotency_key_reused", "invalid_request_error")
    with pytest.raises(openai.BadRequestError):
        client.batches.create(**asked, extra_headers={"Idempotency-Key": "two words"})


def test_too_many_open_batches_are_refused_until_one_ends(tmp_path: Path) -> None:
    with running_api_alone(tmp_path, workers=0, open_batches_cap=2) as stage, sdk(stage) as client:
        first, _ = (submit(client, jsonl([line("a", "x")])) for _ in range(2))
        with pytest.raises(openai.RateLimitError) as caught:
            submit(client, jsonl([line("a", "x")]))
        assert (caught.value.code, caught.value.type) == ("open_batches_limit_exceeded", "rate_limit_error")
        headers = caught.value.response.headers
        assert (headers["retry-after"], headers["x-should-retry"]) == ("60", "false")
        stage.call(stage.services.batches.move(_record_of(stage, first), BatchStatus.FAILED, 1))
        assert submit(client, jsonl([line("a", "x")])).status == "validating"


def _record_of(stage: Stage, batch: Batch) -> BatchRecord:
    record = stage.call(stage.services.batches.get(batch.id))
    assert record is not None
    return record
