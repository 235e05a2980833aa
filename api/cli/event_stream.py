"""Server-sent events, read: the few rules of the WHATWG's "event stream interpretation" that a client needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event; `id` is the last one seen, so that a reader can come back after it."""

    data: str
    event: str = "message"
    id: str | None = None


def read_events(lines: Iterable[str]) -> Iterator[ServerEvent]:
    """Events from the lines of a response body (without their ends); comments and unfinished events are dropped."""
    data: list[str] = []
    name, last_id = "message", None
    for line in lines:
        if not line:
            if data:
                yield ServerEvent("\n".join(data), name, last_id)
            data, name = [], "message"
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "data":
                data.append(value)
            case "event":
                name = value
            case "id":
                last_id = value
            case _:
                continue
