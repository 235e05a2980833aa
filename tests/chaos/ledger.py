"""The producers' own book: what was ordered, what must come back, what each client saw. The checks read it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.timeline import Timeline

SUCCEEDED = frozenset({"succeeded"})
CANCELLABLE = frozenset({"succeeded", "cancelled"})
MORTAL = frozenset({"succeeded", "expired"})
POISONED = frozenset({"failed"})


@dataclass(frozen=True, slots=True)
class Expected:
    """The undisturbed answer: text, token ids and how it ends."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str = "stop"


@dataclass(frozen=True, slots=True)
class Order:
    """One request: its body, its answer, and the states in which it may end (`poison`: it kills its workers).

    `expected` None: not known yet, this is the solo run.
    """

    name: str
    body: dict[str, Any]
    expected: Expected | None
    may_end: frozenset[str] = SUCCEEDED
    headers: dict[str, str] = field(default_factory=dict)
    poison: bool = False
    durable: bool = False
    line: bool = False  # of a batch: its job's id is found in SQL by its custom_id


@dataclass(slots=True)
class Entry:
    """What became of one order. `job_ids`: more than one only where an earlier one failed or was cancelled."""

    order: Order
    keyed: bool = False
    job_ids: list[str] = field(default_factory=list)
    answered: bool = False
    text: str | None = None
    error_code: str | None = None
    unborn: bool = False  # a line of a batch that was cancelled before its file was read
    history: list[str] = field(default_factory=list)
    known: asyncio.Event = field(default_factory=asyncio.Event)  # it has a job's id, or is answered

    @property
    def job_id(self) -> str | None:
        return self.job_ids[-1] if self.job_ids else None


class Ledger:
    """All entries of a run, and what was found wrong so far. Honest errors are counted by reason."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.entries: list[Entry] = []
        self.counts: dict[str, int] = {}
        self.wrong: list[tuple[str, Entry | None]] = []

    def open(self, order: Order, *, keyed: bool = False) -> Entry:
        entry = Entry(order, keyed)
        self.entries.append(entry)
        return entry

    def note(self, entry: Entry, text: str) -> None:
        entry.history.append(f"{self.timeline.now_s:8.3f} {text}")

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def blame(self, text: str, entry: Entry | None = None) -> None:
        """Something that must not be; ends up in the report with the job's history."""
        self.wrong.append((text, entry))
        self.timeline.note("WRONG", text if entry is None else f"{entry.order.name} {entry.job_id}: {text}")

    def by_job(self) -> dict[str, Entry]:
        return {job_id: entry for entry in self.entries for job_id in entry.job_ids}
