"""When a reader of live events goes to the log, and when it may do without."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scheduler.queue.subscription import Subscription
from scheduler.request import Usage
from scheduler.tokens import (
    SEQ_TERMINAL,
    ChoiceDelta,
    Delta,
    EventId,
    Finished,
    Started,
    TokenEvent,
    encode_event,
)

STARTED = (EventId(1, 0), Started(worker="w"))
WORDS = [(EventId(1, seq), Delta((ChoiceDelta(0, (seq,), f"{seq} "),))) for seq in range(1, 4)]


def end(after_seq: int | None, attempt: int = 1) -> tuple[EventId, TokenEvent]:
    return EventId(attempt, SEQ_TERMINAL), Finished(Usage(), after_seq)


class Log:
    """The log of one job, and how often it was read."""

    def __init__(self, *events: tuple[EventId, TokenEvent]) -> None:
        self.events = events
        self.reads = 0

    async def read(self, _job: str, after: EventId | None, _limit: int) -> list[tuple[EventId, bytes]]:
        self.reads += 1
        return [(at, encode_event(event)) for at, event in self.events if after is None or at > after]


def live(*events: tuple[EventId, TokenEvent]) -> list[bytes]:
    return [str(at).encode() + b" " + encode_event(event) for at, event in events]


async def read_all(subscription: Subscription) -> list[EventId]:
    seen: list[EventId] = []
    while not subscription.ended:
        seen += [at for at, _ in await subscription.read(5)]
    return seen


async def test_a_new_jobs_reader_that_misses_nothing_never_reads_the_log() -> None:
    log = Log(STARTED, *WORDS, end(3))
    subscription = Subscription("job", None, log.read, is_new=True)
    for message in live(STARTED, *WORDS, end(3)):
        subscription.offer(message)
    assert await read_all(subscription) == [at for at, _ in (STARTED, *WORDS, end(3))]
    assert log.reads == 0


@pytest.mark.parametrize(
    "heard",
    [
        lambda: live(STARTED, *WORDS[:2], end(3)),  # the last word went by
        lambda: live(STARTED, *WORDS, end(None)),  # an end that does not say after what
        lambda: live(*WORDS, end(3)),  # the begin went by
        lambda: live(end(3)),
    ],
)
async def test_whatever_may_have_gone_by_is_read_from_the_log(heard: Callable[[], list[bytes]]) -> None:
    log = Log(STARTED, *WORDS, end(3))
    subscription = Subscription("job", None, log.read, is_new=True)
    for message in heard():
        subscription.offer(message)
    assert await read_all(subscription) == [at for at, _ in (STARTED, *WORDS, end(3))]
    assert log.reads >= 1


async def test_the_end_of_another_attempt_with_the_same_number_is_read_from_the_log() -> None:
    second = [(EventId(2, 0), Started(worker="v")), (EventId(2, 1), WORDS[1][1]), end(1, attempt=2)]
    log = Log(STARTED, WORDS[0], *second)
    subscription = Subscription("job", None, log.read, is_new=True)
    for message in live(STARTED, WORDS[0], second[-1]):
        subscription.offer(message)
    assert await read_all(subscription) == [at for at, _ in (STARTED, WORDS[0], *second)]
    assert log.reads >= 1


async def test_a_reader_of_a_known_job_begins_with_the_log() -> None:
    log = Log(STARTED, *WORDS, end(3))
    subscription = Subscription("job", None, log.read)
    assert await read_all(subscription) == [at for at, _ in (STARTED, *WORDS, end(3))]
    assert log.reads == 1
