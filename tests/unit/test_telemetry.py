"""What a log line contains, for a machine and for a person, and what it must never contain."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest
import structlog

from scheduler.settings import Settings
from scheduler.telemetry import configure, get_logger, log_context, redact, render_human


@pytest.fixture
def sink() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level, sys.excepthook)
    stream = io.StringIO()
    configure(Settings(log_level="debug"), "worker-1", stream)
    yield stream
    root.handlers[:], sys.excepthook = before[0], before[2]
    root.setLevel(before[1])
    logging.captureWarnings(False)
    structlog.reset_defaults()


def read(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


SECRETS = [
    ("provider said no to sk-proj-abcDEF123456_789", "sk-proj-abcDEF123456_789"),
    ("sent Authorization: Bearer abc.def-123456", "abc.def-123456"),
    ("headers={'x-api-key': 'key-of-mine'}", "key-of-mine"),
    ("headers=[(b'x-api-key', b'key-of-mine')]", "key-of-mine"),
    ('body={\\"api_key\\": \\"key-of-mine\\"}', "key-of-mine"),
    ("redis://user:s3cr3t@db.example:6379/0", "s3cr3t"),
    ("redis://:s3cr3t@db.example:6379/0", "s3cr3t"),
    ("postgresql://u:p/w%40rd@db/spillway", "p/w%40rd"),
    ("sealed gAAAAABnK3x9-Qw7ZtR0aaaaaaaaaaaaaaaaaaaaaaaaa==", "gAAAAABnK3x9"),
    ("GET https://h/v1?key=AbCd1234&x=1", "AbCd1234"),
    ("hf_abcdefghijklmnopqrstu is no good", "hf_abcdefghijklmnopqrstu"),
    ("password=hunter2 given", "hunter2"),
    ("Set-Cookie: session-of-mine", "session-of-mine"),
    ("token eyJhbGciOi.eyJzdWIiOiIx.c2lnbmF0dXJl", "eyJzdWIiOiIx"),
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_no_secret_passes_the_sink(sink: io.StringIO, text: str, secret: str) -> None:
    get_logger("t").info(text, detail=text, nested={"deep": [text]})
    logging.getLogger("library").warning("%s", text)
    try:
        raise ValueError(text)
    except ValueError:
        get_logger("t").exception("failed")
    assert len(read(sink)) == 3
    assert secret not in sink.getvalue()
    assert secret not in render_human({"event": text, "detail": text, "exception": text}, colours=True)


def test_a_field_with_a_secret_name_is_hidden_whatever_it_holds(sink: io.StringIO) -> None:
    get_logger("t").info("sent", api_key="plain words", Authorization="plain words")
    assert read(sink)[0]["api_key"] == "[redacted]"
    assert "plain words" not in sink.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "task-12345678 has 4 tokens",
        "http://127.0.0.1:8000/v1",
        "job-0-018f3a7b2c1deadbeef",
        "a cookie, banana",
        "key=3",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


def test_redacting_twice_changes_nothing() -> None:
    for text, _ in SECRETS:
        assert redact(redact(text)) == redact(text)


def test_a_json_line_names_time_level_process_and_logger(sink: io.StringIO) -> None:
    get_logger("workers.consumer").warning("claimed jobs", count=3)
    line = read(sink)[0]
    assert list(line)[:4] == ["ts", "level", "event", "process"]
    assert (line["level"], line["process"], line["logger"]) == ("warning", "worker-1", "workers.consumer")
    assert (line["event"], line["count"]) == ("claimed jobs", 3)


def test_stdlib_records_come_out_in_the_same_form(sink: io.StringIO) -> None:
    logging.getLogger("some.library").info("listening on %s", "8000")
    assert read(sink)[0]["event"] == "listening on 8000"


async def test_the_job_id_follows_tasks_and_does_not_leak_to_others(sink: io.StringIO) -> None:
    async def step(name: str) -> None:
        await asyncio.sleep(0)
        get_logger("t").info(name)

    async def run(job: str) -> None:
        with log_context(job=job):
            await asyncio.create_task(step(job))
        await step("after")

    await asyncio.gather(run("job-a"), run("job-b"))
    jobs = {(line["event"], line.get("job")) for line in read(sink)}
    assert jobs == {("job-a", "job-a"), ("job-b", "job-b"), ("after", None)}


def test_levels_below_the_setting_are_dropped(sink: io.StringIO) -> None:
    configure(Settings(log_level="warning"), "api", sink)
    get_logger("t").info("quiet")
    logging.getLogger("t").info("quiet")
    get_logger("t").warning("loud")
    assert [line["event"] for line in read(sink)] == ["loud"]


def test_a_value_that_is_no_json_is_shown_as_text(sink: io.StringIO) -> None:
    get_logger("t").info("odd", value=object(), error=ValueError("x"))
    assert read(sink)[0]["error"] == "x"


def test_a_person_reads_time_process_event_and_fields() -> None:
    fields = {"ts": "2026-11-21T04:05:06.7Z", "level": "info", "process": "api", "logger": "x", "event": "ready"}
    assert render_human({**fields, "port": 8000, "model": "a b"}, colours=False) == (
        '04:05:06 api        ready  port=8000 model="a b"'
    )
    assert "warning: slow" in render_human({**fields, "level": "warning", "event": "slow"}, colours=False)


def test_what_a_client_sent_cannot_drive_the_terminal() -> None:
    shown = render_human({"event": "model \x1b]0;owned\x07", "name": "\x1b[2J\nforged line"}, colours=False)
    assert "\x1b" not in shown
    assert "\n" not in shown


def test_an_uncaught_error_is_one_critical_line(sink: io.StringIO) -> None:
    error = ValueError("boom sk-abcdefgh12345")
    sys.excepthook(ValueError, error, None)
    line = read(sink)[0]
    assert line["level"] == "critical"
    assert line["event"] == "ValueError: boom sk-[redacted]"


def test_a_reader_that_went_away_does_not_break_the_writer(capsys: pytest.CaptureFixture[str]) -> None:
    class Gone(io.StringIO):
        def write(self, _text: str, /) -> int:
            raise BrokenPipeError

    root = logging.getLogger()
    before, level, hook = root.handlers[:], root.level, sys.excepthook
    try:
        configure(Settings(), "api", Gone())
        get_logger("t").info("into the void")
    finally:
        root.handlers[:], sys.excepthook = before, hook
        root.setLevel(level)
        logging.captureWarnings(False)
        structlog.reset_defaults()
    assert capsys.readouterr().err == ""
