"""Single clients of the durable side: a submitted job until its result is there, a batch until its files are."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

from tests.chaos.clients import HONEST, Desk, ask, code_of, note_job_id, pause, take_error, take_whole
from tests.chaos.http_client import Broken, exchange
from tests.chaos.ledger import Entry, Ledger

_POLL_S = 0.3
_BATCH_ENDS = ("completed", "failed", "expired", "cancelled")


async def submit(desk: Desk, entry: Entry, rng: random.Random, **wishes: Any) -> dict[str, Any] | None:
    """POST /v1/jobs until it is accepted; the job, or None where it is refused."""
    submission = {"body": entry.order.body, "metadata": {"order": entry.order.name}, **wishes}
    status, body = await ask(desk, entry, rng, "POST", "/v1/jobs", submission, key=entry.order.name)
    if status not in (200, 202):
        take_error(desk.ledger, entry, status, body)
        return None
    note_job_id(desk.ledger, entry, body["id"])
    return body


async def cancel(desk: Desk, entry: Entry, rng: random.Random) -> None:
    """Cancels the entry's job on any API; that it is over already is an answer too."""
    job_id = entry.job_id
    status, body = await ask(desk, entry, rng, "POST", f"/v1/jobs/{job_id}/cancel")
    desk.ledger.note(entry, f"cancel of {job_id}: {status} {code_of(body)}")
    if status not in (200, 409):
        desk.ledger.blame(f"cancel answered {status} {body}", entry)


async def reprioritise(desk: Desk, entry: Entry, rng: random.Random, priority: str) -> None:
    job_id = entry.job_id
    status, body = await ask(desk, entry, rng, "PATCH", f"/v1/jobs/{job_id}", {"priority": priority})
    desk.ledger.note(entry, f"priority {priority} for {job_id}: {status} {code_of(body)}")
    if status == 200 and body["priority"] != priority and body["state"] in ("scheduled", "queued"):
        desk.ledger.blame(f"asked for priority {priority}, it has {body['priority']}", entry)
    if status not in (200, 409):
        desk.ledger.blame(f"the change of priority answered {status} {body}", entry)


async def fetch_result(desk: Desk, entry: Entry, rng: random.Random) -> None:
    """Polls the job's result until it has one, or ended without."""
    while not entry.answered:
        status, body = await ask(desk, entry, rng, "GET", f"/v1/jobs/{entry.job_id}/result")
        if status == 200:
            choice = body["choices"][0]
            take_whole(desk.ledger, entry, choice["message"]["content"], choice["finish_reason"])
        elif status == 202:
            await asyncio.sleep(_POLL_S)
        else:
            take_error(desk.ledger, entry, status, body)


async def run_batch(desk: Desk, entry: Entry, lines: list[Entry], rng: random.Random, *, leave: bool) -> None:
    """Uploads, creates, waits and compares; `entry` stands for the batch. `leave`: cancels it half-way."""
    file_id = await _upload(desk, entry, lines, rng)
    batch = await _create(desk, entry, file_id, rng)
    if leave:
        await asyncio.sleep(rng.uniform(0.0, 3.0))
        status, body = await ask(desk, entry, rng, "POST", f"/v1/batches/{batch['id']}/cancel")
        if status not in (200, 409):
            desk.ledger.blame(f"cancel of {batch['id']} answered {status} {body}", entry)
    while batch["status"] not in _BATCH_ENDS:
        await asyncio.sleep(_POLL_S)
        batch = await _expect(desk, entry, rng, f"/v1/batches/{batch['id']}")
    desk.ledger.note(entry, f"{batch['id']}: {batch['status']} {batch['request_counts']}")
    if batch["status"] != "completed" and not leave:
        desk.ledger.blame(f"{batch['id']} ended {batch['status']}: {batch}", entry)
    entry.answered = True
    desk.ledger.count(f"batches {batch['status']}")
    await _compare(desk, batch, lines, rng)


async def _upload(desk: Desk, entry: Entry, lines: list[Entry], rng: random.Random) -> str:
    """A broken upload is simply made again; what the first one left is a file nobody uses."""
    content = b"\n".join(json.dumps(_line(line)).encode() for line in lines)
    mark = "chaos-boundary"
    head = f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{mark}\r\n'
    head += 'Content-Disposition: form-data; name="file"; filename="lines.jsonl"\r\n\r\n'
    form = head.encode() + content + f"\r\n--{mark}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    while True:
        try:
            async with exchange(desk.port(rng), "POST", "/v1/files", form, headers) as answer:
                body = await answer.json()
            if answer.status == 200:
                return body["id"]
            if (answer.status, code_of(body)) not in HONEST:
                desk.ledger.blame(f"the upload answered {answer.status} {body}", entry)
        except Broken as error:
            desk.ledger.note(entry, f"upload: {error}")
        await pause(rng)


def _line(line: Entry) -> dict[str, Any]:
    return {"custom_id": line.order.name, "method": "POST", "url": "/v1/chat/completions", "body": line.order.body}


async def _create(desk: Desk, entry: Entry, file_id: str, rng: random.Random) -> dict[str, Any]:
    """Creating knows no key: after a broken connection, look whether the batch is there, by its metadata."""
    wanted = {
        "input_file_id": file_id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "metadata": {"order": entry.order.name},
    }
    while True:
        try:
            async with exchange(desk.port(rng), "POST", "/v1/batches", wanted) as answer:
                body = await answer.json()
            if answer.status == 200:
                return body
            if (answer.status, code_of(body)) not in HONEST:
                desk.ledger.blame(f"creating a batch answered {answer.status} {body}", entry)
        except Broken as error:
            desk.ledger.note(entry, f"create: {error}")
        await pause(rng)
        listed = await _expect(desk, entry, rng, "/v1/batches?limit=100")
        for batch in listed["data"]:
            if batch["metadata"] == wanted["metadata"]:
                return batch


async def _expect(desk: Desk, entry: Entry, rng: random.Random, path: str) -> Any:
    """A GET that must work."""
    while True:
        status, body = await ask(desk, entry, rng, "GET", path)
        if status == 200:
            return body
        desk.ledger.blame(f"{path} answered {status} {body}", entry)
        await pause(rng)


async def _compare(desk: Desk, batch: dict[str, Any], lines: list[Entry], rng: random.Random) -> None:
    """Every line once, in one of the two files, with its exact answer."""
    waiting = {line.order.name: line for line in lines}
    for file_id in (batch["output_file_id"], batch["error_file_id"]):
        for row in [] if file_id is None else await _rows(desk, file_id, rng):
            line = waiting.pop(row["custom_id"], None)
            if line is None:
                desk.ledger.blame(f"{batch['id']}: {row['custom_id']} came twice, or was never asked for")
            else:
                _take_line(desk.ledger, line, row)
    unread = batch["status"] == "cancelled" and batch["request_counts"]["total"] == 0
    for line in waiting.values():
        line.answered = line.unborn = unread
        if not unread:
            desk.ledger.blame(f"{batch['id']}: the line is in no file", line)


def _take_line(ledger: Ledger, line: Entry, row: dict[str, Any]) -> None:
    response = row["response"]
    if response is not None and response["status_code"] == 200:
        choice = response["body"]["choices"][0]
        take_whole(ledger, line, choice["message"]["content"], choice["finish_reason"])
        return
    ledger.note(line, f"error line: {row}")
    line.answered = True
    ledger.count("error lines of batches")
    if "cancelled" not in line.order.may_end:
        ledger.blame(f"the batch's error file has it: {row}", line)


async def _rows(desk: Desk, file_id: str, rng: random.Random) -> list[dict[str, Any]]:
    while True:
        try:
            async with exchange(desk.port(rng), "GET", f"/v1/files/{file_id}/content") as answer:
                content = await answer.whole()
            if answer.status == 200:
                return [json.loads(line) for line in content.splitlines()]
            if (answer.status, code_of(json.loads(content))) not in HONEST:
                desk.ledger.blame(f"{file_id} answered {answer.status} {content[:300]!r}")
        except Broken:
            desk.ledger.count("broken connections")
        await pause(rng)
