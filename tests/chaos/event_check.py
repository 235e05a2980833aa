"""I2 and I3 on one job's events, read over HTTP or from its log: order, gaps, repeats, attempts, tokens, one end."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.tokens import (
    SEQ_STARTED,
    SEQ_TERMINAL,
    Delta,
    EventId,
    Failed,
    Finished,
    Started,
    decode_event,
)
from tests.chaos.ledger import Expected


@dataclass(slots=True)
class EventCheck:
    """Fed event by event; `wrong` says what broke an invariant."""

    expected: Expected | None
    last: EventId | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    end: str | None = None
    wrong: list[str] = field(default_factory=list)

    def started(self, at: EventId) -> None:
        self._order(at)

    def delta(self, at: EventId, token_ids: list[int], text: str, finish_reason: str | None) -> None:
        self._order(at)
        if self.finish_reason is not None:
            self.wrong.append(f"{at}: a delta after the finish reason")
        self.token_ids += token_ids
        self.text += text
        self.finish_reason = self.finish_reason if finish_reason is None else finish_reason
        if self.expected is not None and not self.wrong:
            self._compare(at)

    def ended(self, at: EventId, end: str) -> None:
        """`end`: "finished", or an error's code."""
        self._order(at)
        self.end = end
        if end == "finished" and self.expected is not None and not self.wrong:
            self._compare_whole()

    def _order(self, at: EventId) -> None:
        last, self.last = self.last, at
        if self.end is not None:
            self.wrong.append(f"{at} after the end {last}")
        elif last is None:
            if at not in (EventId(1, SEQ_STARTED), EventId(0, SEQ_TERMINAL)):
                self.wrong.append(f"the first event is {at}")
        elif at <= last:
            self.wrong.append(f"{at} after {last}: a repeat, or of an older attempt")
        elif at.seq == SEQ_TERMINAL and at.attempt == last.attempt:
            return
        elif not (last.precedes(at) or at == EventId(last.attempt + 1, SEQ_STARTED)):
            self.wrong.append(f"{at} after {last}: a gap")

    def _compare(self, at: EventId) -> None:
        expected = self.expected
        assert expected is not None
        if tuple(self.token_ids) != expected.token_ids[: len(self.token_ids)]:
            self.wrong.append(
                f"{at}: token ids {self.token_ids[-8:]} at {len(self.token_ids)} differ from the solo run"
            )
        elif not expected.text.startswith(self.text):
            self.wrong.append(f"{at}: text {self.text[-60:]!r} differs from the solo run")

    def _compare_whole(self) -> None:
        expected = self.expected
        assert expected is not None
        got = (tuple(self.token_ids), self.text, self.finish_reason)
        if got != (expected.token_ids, expected.text, expected.finish_reason):
            self.wrong.append(
                f"ended with {len(self.token_ids)} of {len(expected.token_ids)} tokens, "
                f"{len(self.text)} of {len(expected.text)} characters, {self.finish_reason}"
            )


def feed_log(check: EventCheck, events: list[tuple[str, bytes]]) -> None:
    """A job's log, ids and payloads, into the check."""
    for at_text, payload in events:
        at, event = EventId.parse(at_text), decode_event(payload)
        match event:
            case Delta():
                for choice in event.choices:
                    check.delta(at, list(choice.token_ids), choice.text, choice.finish_reason)
            case Finished():
                check.ended(at, "finished")
            case Failed():
                check.ended(at, event.code)
            case Started():
                check.started(at)
