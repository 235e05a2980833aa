"""Server-sent events as the commands read them."""

from __future__ import annotations

from api.cli.event_stream import ServerEvent, read_events


def test_an_event_is_its_data_lines_up_to_an_empty_line() -> None:
    assert list(read_events(["data: one", "data:two", "", "data: three", ""])) == [
        ServerEvent("one\ntwo"),
        ServerEvent("three"),
    ]


def test_comments_and_unknown_fields_are_no_events() -> None:
    assert list(read_events([": keep-alive", "", "retry: 100", "", "data: x", ""])) == [ServerEvent("x")]


def test_the_id_stays_until_another_comes_and_the_name_does_not() -> None:
    lines = ["id: 1-4", "event: delta", "data: a", "", "data: b", "", "id: 1-5", "data: c", ""]
    assert list(read_events(lines)) == [
        ServerEvent("a", "delta", "1-4"),
        ServerEvent("b", "message", "1-4"),
        ServerEvent("c", "message", "1-5"),
    ]


def test_an_event_cut_off_by_the_end_of_the_stream_is_dropped() -> None:
    assert list(read_events(["data: whole", "", "data: half"])) == [ServerEvent("whole")]
