"""Events: order and successor of ids, payloads as a wire format, merging of deltas."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.request import Usage
from scheduler.tokens import (
    SEQ_TERMINAL,
    ChoiceDelta,
    Delta,
    EventId,
    Failed,
    Finished,
    PositionLogprobs,
    Started,
    TokenEvent,
    TokenLogprob,
    decode_event,
    encode_event,
    merge_deltas,
)

NUMBERS = st.integers(min_value=0, max_value=SEQ_TERMINAL)
CHOICES = st.builds(
    ChoiceDelta,
    index=st.integers(0, 3),
    token_ids=st.lists(st.integers(0, 9999), max_size=4).map(tuple),
    text=st.text(max_size=8),
    finish_reason=st.none(),
)


def deltas() -> st.SearchStrategy[Delta]:
    distinct = st.lists(CHOICES, max_size=4, unique_by=lambda choice: choice.index)
    return distinct.map(lambda choices: Delta(choices=tuple(choices)))


@given(NUMBERS, NUMBERS)
def test_an_id_survives_its_text(attempt: int, seq: int) -> None:
    event_id = EventId(attempt, seq)
    assert EventId.parse(str(event_id)) == EventId.parse(str(event_id).encode()) == event_id


@pytest.mark.parametrize("text", ["", "1", "1-", "-1", "a-b", "1-2-3", b"\xff-1"])
def test_what_is_no_id_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        EventId.parse(text)


def test_successors_stay_within_an_attempt() -> None:
    assert EventId(1, 4).precedes(EventId(1, 5))
    for other in (EventId(1, 4), EventId(1, 6), EventId(2, 5), EventId(2, 0), EventId(1, SEQ_TERMINAL)):
        assert not EventId(1, 4).precedes(other)
    assert EventId(1, SEQ_TERMINAL) < EventId(2, 0) and EventId(1, SEQ_TERMINAL).is_terminal


@pytest.mark.parametrize(
    "event",
    [
        Started(worker="w", at_ms=1),
        Delta(choices=(ChoiceDelta(0, (1,), "é", "stop", (PositionLogprobs(TokenLogprob("é", -0.5, (195, 169))),)),)),
        Finished(Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=1)),
        Failed(code="cancelled", message="m", param="p"),
    ],
)
def test_events_survive_the_wire(event: TokenEvent) -> None:
    assert decode_event(encode_event(event)) == event


def test_a_payload_of_a_newer_version_with_more_fields_is_still_read() -> None:
    payload = msgspec.msgpack.encode({"type": "started", "worker": "w", "at_ms": 5, "new_field": [1]})
    assert decode_event(payload) == Started(worker="w", at_ms=5)


@given(deltas(), deltas(), deltas())
def test_merging_keeps_every_token_in_order_and_does_not_depend_on_grouping(a: Delta, b: Delta, c: Delta) -> None:
    left, right = merge_deltas(merge_deltas(a, b), c), merge_deltas(a, merge_deltas(b, c))

    def by_index(delta: Delta) -> dict[int, ChoiceDelta]:
        return {choice.index: choice for choice in delta.choices}

    assert by_index(left) == by_index(right)
    for index, merged in by_index(left).items():
        parts = [by_index(delta)[index] for delta in (a, b, c) if index in by_index(delta)]
        assert merged.token_ids == tuple(token for part in parts for token in part.token_ids)
        assert merged.text == "".join(part.text for part in parts)
