"""A minute of everything at once: producers, workers of both kinds, two APIs, and every fault of the chaos run."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from scheduler.request import Usage
from scheduler.tokens import ChoiceDelta, Delta, Finished, Started, encode_event
from tests.chaos.event_check import EventCheck, feed_log
from tests.chaos.faults import KINDS, plan
from tests.chaos.ledger import Expected
from tests.chaos.run import Options, run

SECONDS = 60.0
STARTED, FINISHED = encode_event(Started(worker="w")), encode_event(Finished(Usage()))
SAID = Expected("a b c ", (0, 1, 2))


@pytest.mark.timeout(600)  # start, storm and quiet take 90 s where the machine is free
async def test_every_accepted_job_ends_once_and_every_stream_is_exact_under_random_faults(tmp_path: Path) -> None:
    seed = secrets.randbelow(10**6)
    print(f"seed {seed}")
    report = await run(Options(seed=seed, seconds=SECONDS, kinds=list(KINDS), home=tmp_path))
    assert not report, report


def test_a_seed_repeats_its_faults_and_a_longer_run_begins_with_the_same() -> None:
    short, long = plan(7, 60, list(KINDS)), plan(7, 600, list(KINDS))
    assert short == plan(7, 60, list(KINDS))
    assert long[: len(short)] == short
    assert {fault.kind for fault in long} == KINDS.keys()


def _word(token: int, finish_reason: str | None = None) -> bytes:
    choice = ChoiceDelta(0, (token,), f"{'abc'[token]} ", "stop" if finish_reason else None)
    return encode_event(Delta((choice,)))


GOOD = [
    ("1-0", STARTED),
    ("1-1", _word(0)),
    ("2-0", STARTED),
    ("2-1", _word(1)),
    ("2-2", _word(2, "stop")),
    ("2-4294967295", FINISHED),
]


def _found(events: list[tuple[str, bytes]]) -> str:
    check = EventCheck(SAID)
    feed_log(check, events)
    return "; ".join(check.wrong)


def test_the_check_accepts_a_stream_that_went_on_in_a_second_attempt() -> None:
    assert _found(GOOD) == ""


@pytest.mark.parametrize(
    ("events", "complaint"),
    [
        ([*GOOD[:3], *GOOD[4:]], "a gap"),
        ([*GOOD[:2], GOOD[1], *GOOD[2:]], "a repeat"),
        ([*GOOD[:4], ("1-2", _word(1)), *GOOD[4:]], "of an older attempt"),
        ([*GOOD[:3], ("2-1", _word(0)), *GOOD[4:]], "differ from the solo run"),
        ([*GOOD[:4], GOOD[5]], "2 of 3 tokens"),
        ([*GOOD, ("2-4294967295", FINISHED)], "after the end"),
        ([GOOD[1]], "the first event"),
        ([*GOOD[:2], ("3-0", STARTED)], "a gap"),
    ],
    ids=[
        "gap",
        "repeat",
        "older attempt",
        "token repeated by the takeover",
        "short",
        "two ends",
        "headless",
        "skipped",
    ],
)
def test_the_check_complains_of(events: list[tuple[str, bytes]], complaint: str) -> None:
    assert complaint in _found(events)
