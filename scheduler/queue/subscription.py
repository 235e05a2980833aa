"""One listener of one job: joins live messages and the event log into a stream without gap or repeat.

    live message: id ≤ last → drop · successor of last → deliver · anything else (gap, new attempt) → read the log
    the log is read too: on entry (but of a job that is yet to be submitted), after a reconnect or an overflow of the
    bounded buffer, after 1–5 s of silence

An event is logged before it is published, so whatever was dropped live is in the log.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from scheduler.errors import QueueUnavailable
from scheduler.tokens import SEQ_STARTED, EventId, Finished, TokenEvent, decode_event

BUFFER_EVENTS = 256
LOG_PAGE_EVENTS = 1000
_SILENCE_S = (1.0, 5.0)  # first and longest pause before the log is read for want of messages
_FIRST = EventId(1, SEQ_STARTED)

ReadLog = Callable[[str, EventId | None, int], Awaitable[list[tuple[EventId, bytes]]]]


class Subscription:
    """Made by TokenBus.subscribe. One reader at a time; `offer` and `catch_up` are the bus's side, and never block."""

    def __init__(self, job_id: str, after: EventId | None, read_log: ReadLog, *, is_new: bool = False) -> None:
        self.job_id = job_id
        self.last_id = after
        self.ended = after is not None and after.is_terminal
        self.overflows = 0
        self._read_log = read_log
        self._live: deque[bytes] = deque()
        self._behind = not is_new
        self._waiter: asyncio.Future[None] | None = None
        self._silence_s = _SILENCE_S[0]
        self._look_at = asyncio.get_running_loop().time() + self._silence_s

    def offer(self, message: bytes) -> None:
        """A live message `<attempt>-<seq> <payload>`; on overflow all of them go, and the log is read instead."""
        if self._behind:
            return
        if len(self._live) >= BUFFER_EVENTS:
            self.overflows += 1
            self.catch_up()
            return
        self._live.append(message)
        self._wake()

    def catch_up(self) -> None:
        """Live messages may have been missed: the next read goes to the log."""
        self._live.clear()
        self._behind = True
        self._wake()

    async def read(self, timeout_s: float) -> list[tuple[EventId, TokenEvent]]:
        """All ready events, in order; waits up to `timeout_s` for the first, [] if none came.

        Nothing comes twice, nothing is left out, nothing of an older attempt follows a newer one. After the terminal
        event `ended` is True. An unreachable Redis is silence here: reading goes on when it is back.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + timeout_s
        while not self.ended:
            events = await self._collect()
            if events:
                self._silence_s = _SILENCE_S[0]
                self._look_at = loop.time() + self._silence_s
                return events
            now = loop.time()
            if now >= give_up:
                break
            if not self._behind and not self._live:
                await self._wait(min(give_up, self._look_at) - now)
        return []

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self, seconds: float) -> None:
        """Until woken or `seconds` later; a bare future and timer, as this runs once per event of every stream."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        alarm = loop.call_later(max(0.0, seconds), self._wake)
        try:
            await self._waiter
        finally:
            alarm.cancel()
            self._waiter = None
        now = loop.time()
        if now >= self._look_at and not self._live:
            self._silence_s = min(self._silence_s * 2, _SILENCE_S[1])
            self._look_at = now + self._silence_s
            self._behind = True

    async def _collect(self) -> list[tuple[EventId, TokenEvent]]:
        events = self._take_live()
        if events or not self._behind:
            return events
        self._behind = False  # first: what is published from here on is kept
        try:
            page = await self._read_log(self.job_id, self.last_id, LOG_PAGE_EVENTS)
        except QueueUnavailable:
            self._look_at = asyncio.get_running_loop().time() + self._silence_s
            return []
        except BaseException:
            self._behind = True
            raise
        if len(page) == LOG_PAGE_EVENTS:
            self.catch_up()
        return self._accept([(event_id, decode_event(payload)) for event_id, payload in page])

    def _take_live(self) -> list[tuple[EventId, TokenEvent]]:
        fitting: list[tuple[EventId, TokenEvent]] = []
        last = self.last_id
        while self._live:
            at, _, payload = self._live.popleft().partition(b" ")
            event_id = EventId.parse(at)
            if last is not None and event_id <= last:
                continue
            event = decode_event(payload)
            if not _follows(last, event_id, event):
                self.catch_up()
                break
            fitting.append((event_id, event))
            last = event_id
        return self._accept(fitting)

    def _accept(self, events: list[tuple[EventId, TokenEvent]]) -> list[tuple[EventId, TokenEvent]]:
        if events:
            self.last_id = events[-1][0]
            self.ended = self.last_id.is_terminal
        return events


def _follows(last: EventId | None, event_id: EventId, event: TokenEvent) -> bool:
    """Whether certainly nothing lies between: the first event, the next number, or an end that says after which."""
    if last is None:
        return event_id == _FIRST
    if isinstance(event, Finished) and event.after_seq is not None:
        return event_id.attempt == last.attempt and event.after_seq == last.seq
    return last.precedes(event_id)
