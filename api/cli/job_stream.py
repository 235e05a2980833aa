"""Follows a job over HTTP from its first event to its end, through broken connections too."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from api.cli.api_client import ApiClient, NotReachable
from api.cli.plain_text import write_answer
from scheduler.errors import from_code

_RECONNECTS = 5


def print_answer(client: ApiClient, job: str) -> None:
    """The job's text to stdout as it comes. Raises the error that ended it."""
    begun = False
    for name, event in follow(client, job):
        match name:
            case "delta":
                begun = True
                for choice in event["choices"]:
                    write_answer(choice["text"])
            case "finished":
                sys.stdout.write("\n")
            case "failed":
                sys.stdout.write("\n" if begun else "")
                raise from_code(event["error"]["code"], event["error"]["message"])
            case _:
                continue


def follow(client: ApiClient, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All events of a job; a broken connection is taken up again behind the last event that came."""
    seen: str | None = None
    failures = 0
    while failures <= _RECONNECTS:
        headers = {} if seen is None else {"last-event-id": seen}
        try:
            with client.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as events:
                for event in events:
                    seen, failures = event.id, 0
                    yield event.event, json.loads(event.data)
                    if event.event in {"finished", "failed"}:
                        return
        except NotReachable:
            if seen is None or failures == _RECONNECTS:
                raise
        failures += 1
        time.sleep(0.2 * failures)
    raise NotReachable(f"The events of {job} stopped before its end; `spillway jobs show {job}` says how it is.")
