"""What becomes of a child's lines: file, terminal, last words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.cli import log_relay
from api.cli.log_relay import LogRelay
from scheduler.settings import Settings


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[LogRelay]:
    relay = LogRelay(tmp_path, Settings(home=tmp_path, log_format="human"))
    yield relay
    relay.close()


def event(text: str, level: str = "info") -> str:
    return json.dumps({"ts": "2026-11-21T04:05:06Z", "level": level, "event": text, "process": "worker", "port": 1})


def test_a_line_goes_to_the_file_as_json_and_to_the_terminal_for_people(
    relay: LogRelay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    relay.line("worker-2", event("loaded"))
    assert capsys.readouterr().err == "04:05:06 worker-2   loaded  port=1\n"
    kept = json.loads((tmp_path / "logs" / "worker-2.log").read_text())
    assert (kept["event"], kept["process"], kept["port"]) == ("loaded", "worker-2", 1)


def test_what_is_no_event_is_kept_as_text(relay: LogRelay, tmp_path: Path) -> None:
    for text in ("Traceback (most recent call last):", '{"broken', '{"no": "event"}', ""):
        relay.line("api", text)
    lines = (tmp_path / "logs" / "api.log").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == [
        "Traceback (most recent call last):",
        '{"broken',
        '{"no": "event"}',
    ]


def test_a_secret_in_a_librarys_own_output_is_removed(
    relay: LogRelay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    relay.line("api", "curl -H 'Authorization: Bearer abcdef123456'")
    assert "abcdef123456" not in capsys.readouterr().err + (tmp_path / "logs" / "api.log").read_text()


def test_during_the_start_only_trouble_reaches_the_terminal(
    relay: LogRelay, capsys: pytest.CaptureFixture[str]
) -> None:
    relay.quiet = True
    relay.line("api", event("fine"))
    relay.line("api", event("slow disk", "warning"))
    relay.line("api", event("Port 1 is taken.", "critical"))  # the start itself ends with this line
    assert [line.split("  ")[-2] for line in capsys.readouterr().err.splitlines()] == ["warning: slow disk"]


def test_last_words_tell_why_a_process_ended(relay: LogRelay) -> None:
    relay.line("api", event("no luck", "error"))
    relay.line("api", event("trying"))
    assert "no luck" in relay.obituary("api", 1)
    relay.line("api", event("Port 1 is taken.", "critical"))
    assert relay.last_words("api").cannot_start == "Port 1 is taken."
    relay.forget_words("api")
    assert "status 9" in relay.obituary("api", 9)


def test_files_rotate_and_old_ones_go(tmp_path: Path) -> None:
    for _ in range(log_relay.FILES_KEPT + 3):
        relay = LogRelay(tmp_path, Settings(home=tmp_path, log_format="human"))
        relay.line("api", event("one more"))
        relay.close()
        os.truncate(tmp_path / "logs" / "api.log", log_relay.FILE_BYTES - 1)  # a sparse file is quickly full
    files = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert files == ["api.log", *(f"api.log.{number}" for number in range(1, log_relay.FILES_KEPT + 1))]
    assert all(path.stat().st_size <= log_relay.FILE_BYTES for path in (tmp_path / "logs").iterdir())


def test_a_log_that_cannot_be_written_is_said_once(
    tmp_path: Path, relay: LogRelay, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs" / "api.log").mkdir()
    for _ in range(3):
        relay.line("api", event("still here"))
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1
    assert said.count("still here") == 3
