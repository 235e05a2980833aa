"""Single clients: a stream that is asked for until it is whole, and a reader of a job's events that resumes.

What a client may honestly meet is listed in HONEST; each is counted, and the client asks again with the same key.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

from scheduler.tokens import EventId
from tests.chaos.event_check import EventCheck
from tests.chaos.http_client import Answer, Broken, Silent, exchange
from tests.chaos.ledger import Entry, Ledger

# (status, code) → why an answer may be this error without breaking a promise.
HONEST: dict[tuple[int, str | None], str] = {
    (503, "queue_unavailable"): "Redis was away for longer than the API's patience",
    (503, "shutting_down"): "this API was asked to end and its drain time is over",
    (200, "shutting_down"): "the same, after the stream had begun",
}
# A job's own end as its client hears it → the state of its record.
ENDS = {"cancelled": "cancelled", "deadline_exceeded": "expired", "worker_lost": "failed"}
_PAUSES_S = (0.1, 0.6)


@dataclass(slots=True)
class Desk:
    """Where clients work: the ports of the APIs, the book, and whether the run is over."""

    ports: tuple[int, ...]
    ledger: Ledger

    def port(self, rng: random.Random) -> int:
        return rng.choice(self.ports)


@dataclass(slots=True)
class Manner:
    """How a client behaves: `leave_after` events it hangs up for good, `dawdle_s` it waits after each event."""

    leave_after: int | None = None
    dawdle_s: float = 0.0


class Left(Exception):
    """The client hung up by its own will."""


async def pause(rng: random.Random) -> None:
    await asyncio.sleep(rng.uniform(*_PAUSES_S))


async def converse(desk: Desk, entry: Entry, rng: random.Random, manner: Manner) -> None:
    """Streams a chat completion until it has ended; without a key it asks once. The entry has what came of it."""
    headers = {**entry.order.headers}
    if entry.keyed:
        headers["Idempotency-Key"] = entry.order.name
    while not entry.answered:
        port = desk.port(rng)
        try:
            async with exchange(
                port, "POST", "/v1/chat/completions", {**entry.order.body, "stream": True}, headers
            ) as answer:
                await _read_stream(desk.ledger, entry, answer, manner)
        except Broken as error:
            desk.ledger.count("broken connections")
            desk.ledger.note(entry, f"{port}: {error}")
            if not entry.keyed:
                return
        except Silent as error:
            desk.ledger.blame(f"the API on {port} kept a client in silence: {error}", entry)
        except Left:
            desk.ledger.note(entry, "left")
            return
        if not entry.answered:
            await pause(rng)


async def _read_stream(ledger: Ledger, entry: Entry, answer: Answer, manner: Manner) -> None:
    if job_id := answer.headers.get("spillway-job"):
        note_job_id(ledger, entry, job_id)
    if answer.status != 200:
        take_error(ledger, entry, answer.status, await answer.json())
        return
    text, finish_reason, seen = "", None, 0
    async for event in answer.events(manner.dawdle_s):
        seen += 1
        if event["data"] == "[DONE]":
            take_whole(ledger, entry, text, finish_reason)
            return
        chunk = json.loads(event["data"])
        if "error" in chunk:
            take_error(ledger, entry, 200, chunk)
            return
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            finish_reason = choice["finish_reason"] or finish_reason
        expected = entry.order.expected
        if expected is not None and not expected.text.startswith(text):
            ledger.blame(f"the stream says {text[-60:]!r}, which differs from the solo run", entry)
            entry.answered = True
            entry.known.set()
            return
        if manner.leave_after is not None and seen >= manner.leave_after:
            raise Left
    raise Broken("the stream ended without [DONE]")


def take_whole(ledger: Ledger, entry: Entry, text: str, finish_reason: str | None) -> None:
    """The client has its answer."""
    entry.text, entry.answered = text, True
    entry.known.set()
    ledger.count("whole answers")
    expected = entry.order.expected
    if expected is not None and (text, finish_reason) != (expected.text, expected.finish_reason):
        ledger.blame(f"{len(text)} of {len(expected.text)} characters, finish reason {finish_reason}", entry)


def take_error(ledger: Ledger, entry: Entry, status: int, body: Any) -> None:
    """An honest error is asked again; one that is the order's own end ends it; any other is wrong."""
    error = body["error"] if isinstance(body, dict) and "error" in body else {"code": None, "message": str(body)}
    code = error.get("code")
    ledger.note(entry, f"error {status} {code}: {error.get('message')}")
    if (status, code) in HONEST:
        ledger.count(f"honest errors: {status} {code}")
        return
    entry.error_code, entry.answered = str(code), True
    entry.known.set()
    ledger.count(f"ends by error: {code}")
    if code not in ENDS:
        ledger.blame(f"its client was told {status} {code}: {error.get('message')}", entry)


async def ask(
    desk: Desk, entry: Entry, rng: random.Random, method: str, path: str, body: Any = None, key: str | None = None
) -> tuple[int, Any]:
    """Status and JSON; asks again, here or there, after a broken connection and an honest error. For what is safe to
    repeat."""
    headers = {} if key is None else {"Idempotency-Key": key}
    while True:
        port = desk.port(rng)
        try:
            async with exchange(port, method, path, body, headers) as answer:
                status, found = answer.status, await answer.json()
        except Broken as error:
            desk.ledger.count("broken connections")
            desk.ledger.note(entry, f"{method} {path} on {port}: {error}")
        except Silent as error:
            desk.ledger.blame(f"{method} {path}: the API on {port} was silent: {error}", entry)
        else:
            if (status, code_of(found)) not in HONEST:
                return status, found
            desk.ledger.count(f"honest errors: {status} {code_of(found)}")
        await pause(rng)


def code_of(body: Any) -> str | None:
    """The code of an error's body."""
    error = body.get("error") if isinstance(body, dict) else None
    return error.get("code") if isinstance(error, dict) else None


def note_job_id(ledger: Ledger, entry: Entry, job_id: str) -> None:
    """An id that the service gave for this order."""
    if job_id not in entry.job_ids:
        ledger.note(entry, f"job {job_id}")
        entry.job_ids.append(job_id)
        entry.known.set()


async def watch_events(desk: Desk, entry: Entry, rng: random.Random, dawdle_s: float = 0.0) -> EventCheck:
    """Reads the job's events to their end, from one API or the other, each time behind the last id it has."""
    check = EventCheck(entry.order.expected)
    while check.end is None and not check.wrong:
        port = desk.port(rng)
        headers = {} if check.last is None else {"Last-Event-ID": str(check.last)}
        try:
            async with exchange(port, "GET", f"/v1/jobs/{entry.job_id}/events", headers=headers) as answer:
                await _read_events(desk.ledger, entry, answer, check, dawdle_s)
        except Broken as error:
            desk.ledger.count("broken event readers")
            desk.ledger.note(entry, f"events from {port} broke after {check.last}: {error}")
        except Silent as error:
            desk.ledger.blame(f"the events route on {port} was silent: {error}", entry)
        if check.end is None:
            await pause(rng)
    for text in check.wrong:
        desk.ledger.blame(f"events route: {text}", entry)
    desk.ledger.count("whole event readers")
    return check


async def _read_events(ledger: Ledger, entry: Entry, answer: Answer, check: EventCheck, dawdle_s: float) -> None:
    if answer.status != 200:
        body = await answer.json()
        code = body["error"]["code"] if body else None
        if (answer.status, code) in HONEST:
            ledger.count(f"honest errors: {answer.status} {code}")
        else:
            check.wrong.append(f"status {answer.status} {body}")
        return
    async for event in answer.events(dawdle_s):
        feed(check, event)


def feed(check: EventCheck, event: dict[str, str]) -> None:
    """One SSE event of the events route into the check."""
    at, data = EventId.parse(event["id"]), json.loads(event["data"])
    match event["event"]:
        case "started":
            check.started(at)
        case "delta":
            for choice in data["choices"]:
                check.delta(at, choice["token_ids"], choice["text"], choice["finish_reason"])
        case "finished":
            check.ended(at, "finished")
        case "failed":
            check.ended(at, data["error"]["code"])
        case other:
            check.wrong.append(f"unknown event {other!r}")
