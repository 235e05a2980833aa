"""`spillway batch` and `spillway files` against a running service, as scripts use them: piped, by exit status."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api_stage import Stage
from tests.batch_stage import jsonl, line, running_batches, text_of
from tests.cli_call import spillway
from tests.service import environment


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_batches(tmp_path_factory.mktemp("cli")) as (stage, _):
        yield stage


def command(stage: Stage, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "api.cli", *map(str, arguments), "--url", stage.url]


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_bytes(jsonl(list(lines)))
    return path


def answers(text: str) -> dict[str, dict[str, Any]]:
    return {entry["custom_id"]: entry for entry in map(json.loads, text.splitlines())}


def test_submit_waits_and_writes_the_answers(stage: Stage, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", line("a", "one"), line("b", "two")), tmp_path / "out.jsonl"
    done = spillway(stage, "batch", "submit", source, "--wait", "--output", output, "--metadata", "night=1")
    assert done.returncode == 0, done.stderr
    batch = done.stdout.strip()
    assert {name: text_of(entry) for name, entry in answers(output.read_text()).items()} == {"a": "one ", "b": "two "}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    shown = json.loads(spillway(stage, "batch", "show", batch, "--json").stdout)
    assert (shown["status"], shown["metadata"]) == ("completed", {"night": "1"})
    assert batch in spillway(stage, "batch", "list").stdout
    table = spillway(stage, "batch", "show", batch).stdout
    assert "2 (2 done, 0 failed)" in table and shown["output_file_id"] in table
    assert batch in spillway(stage, "batch", "list", columns=80).stdout
    files = spillway(stage, "files", "list", columns=80).stdout
    assert shown["output_file_id"] in files
    assert "age" in files and "name" in files and "expires" not in files, "what has no room was not left out"


def test_a_failed_line_is_exit_status_1_and_lies_beside_the_answers(stage: Stage, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", line("good", "one"), line("bad", {"fail": "internal_error"}))
    done = spillway(stage, "batch", "submit", source, "--wait", "--output", tmp_path / "out")
    assert done.returncode == 1 and "1 of 2 lines done, 1 failed" in done.stderr
    assert set(answers((tmp_path / "out").read_text())) == {"good"}
    assert set(answers((tmp_path / "out.errors").read_text())) == {"bad"}
    again = spillway(stage, "batch", "results", done.stdout.strip())
    assert again.returncode == 1 and set(answers(again.stdout)) == {"good", "bad"}


def test_a_bad_file_is_told_line_by_line(stage: Stage, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    done = spillway(stage, "batch", "submit", source, "--wait")
    assert done.returncode == 1 and "spillway: line 1: This line has no 'custom_id'." in done.stderr
    assert done.stderr.endswith("failed; none of its lines ran.\n")
    missing = spillway(stage, "batch", "submit", tmp_path / "none")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1) and "cannot be read" in missing.stderr


def test_of_many_bad_lines_the_first_are_told(stage: Stage, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n" * 30)
    told = spillway(stage, "batch", "submit", source, "--wait").stderr
    assert "line 10:" in told and "line 11:" not in told and "20 more" in told


def test_a_refused_submission_leaves_no_file_behind(stage: Stage, tmp_path: Path) -> None:
    source = write(tmp_path / "refused.jsonl", line("a", "one"))
    refused = spillway(stage, "batch", "submit", source, "--window", "2d")
    assert refused.returncode == 1 and "completion_window" in refused.stderr
    assert "refused.jsonl" not in spillway(stage, "files", "list").stdout


def test_ctrl_c_detaches_and_the_batch_can_be_cancelled(stage: Stage, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", line("held", {"say": ["a "], "hold": True}))
    process = subprocess.Popen(
        command(stage, "batch", "submit", source, "--wait"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=_take_interrupts,
    )  # fmt: skip
    assert process.stderr is not None and process.stderr.readline()  # it follows
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=30)
    batch = said.strip()
    assert process.returncode == 130 and f"spillway batch results {batch} --wait" in told
    early = spillway(stage, "batch", "results", batch)
    assert early.returncode == 1 and "--wait" in early.stderr
    assert spillway(stage, "batch", "cancel", batch).stdout.startswith(f"{batch} is cancel")
    ended = spillway(stage, "batch", "results", batch, "--wait")
    assert ended.returncode == 1 and answers(ended.stdout)["held"]["error"]["code"] == "batch_cancelled"


def test_files_are_listed_and_deleted(stage: Stage, tmp_path: Path) -> None:
    spillway(stage, "batch", "submit", write(tmp_path / "mine.jsonl", line("a", "one")), "--wait")
    found = json.loads(spillway(stage, "files", "list", "--purpose", "batch", "--json").stdout)
    (mine,) = [file["id"] for file in found if file["filename"] == "mine.jsonl"]
    assert mine in spillway(stage, "files", "list").stdout
    assert spillway(stage, "files", "delete", mine).stdout == f"Deleted {mine}.\n"
    again = spillway(stage, "files", "delete", mine)
    assert (again.returncode, again.stderr) == (1, f"spillway: No such File object: {mine}\n")


def _take_interrupts() -> None:
    """Where the tests run in the background of a shell, their children would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
