"""`spillway jobs`, `queues` and `dead` against a running API: what they print, into a pipe, and their exit status."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from api.cli import main
from tests.api_stage import Stage, wait_until
from tests.scheduling_stage import running_durable_api
from tests.service import environment


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_durable_api(tmp_path_factory.mktemp("cli"), max_attempts=1) as stage:
        yield stage


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def spillway(stage: Stage, *arguments: str, piped: str = "") -> Done:
    """The command in this process, as a new one computes for a second; what the API beside it logs is left out."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), capture_logs():
        patch.setattr(sys, "argv", ["spillway", *arguments, "--url", stage.url])
        patch.setattr(sys, "stdin", io.StringIO(piped))
        with pytest.raises(SystemExit) as left:
            main()
    code = left.value.code
    if isinstance(code, str):
        return Done(1, out.getvalue(), f"{err.getvalue()}{code}\n")
    return Done(0 if code is None else code, out.getvalue(), err.getvalue())


def said(stage: Stage, *arguments: str, piped: str = "") -> str:
    done = spillway(stage, *arguments, piped=piped)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(stage: Stage, *arguments: str, piped: str = "") -> Any:
    return json.loads(said(stage, *arguments, "--json", piped=piped))


def test_a_job_is_submitted_awaited_and_its_result_printed(stage: Stage) -> None:
    order = ("--priority", "low", "--metadata", "run=7", "--metadata", "by=me", "--deadline", "1h")
    waited = spillway(stage, "jobs", "submit", "one two three", "--wait", *order)
    job_id = waited.stderr.split()[1].rstrip(".")
    assert (waited.returncode, waited.stdout) == (0, "one two three \n")
    job = shown(stage, "jobs", "show", job_id)
    assert (job["priority"], job["metadata"], job["state"]) == ("low", {"run": "7", "by": "me"}, "succeeded")
    assert said(stage, "jobs", "result", job_id) == "one two three \n"
    assert shown(stage, "jobs", "result", job_id)["object"] == "chat.completion"
    details = said(stage, "jobs", "show", job_id)
    assert "run" in details and "deadline" in details


def test_a_job_for_later_is_listed_changed_cancelled_and_tried_again(stage: Stage) -> None:
    job_id = said(stage, "jobs", "submit", "--in", "2h", piped="hi\n").strip()
    assert stage.job(job_id)["not_before_ms"] - stage.job(job_id)["created_ms"] == pytest.approx(7_200_000, abs=2000)
    (listed,) = shown(stage, "jobs", "list", "--state", "scheduled", "--since", "1h")
    assert listed["id"] == job_id
    assert job_id in said(stage, "jobs", "list", "--state", "scheduled")
    assert said(stage, "jobs", "list", "--until", "1d") == "No such jobs.\n"
    early = spillway(stage, "jobs", "result", job_id)
    assert (early.returncode, early.stderr) == (1, f"spillway: {job_id} is scheduled; wait for it with --wait.\n")
    assert said(stage, "jobs", "priority", job_id, "high") == f"{job_id} has priority high.\n"
    assert said(stage, "jobs", "cancel", job_id) == f"Cancelled {job_id}.\n"
    wait_until(lambda: stage.job(job_id)["state"] == "cancelled")
    assert said(stage, "jobs", "retry", job_id).startswith(f"{job_id} is ")


def test_it_is_the_command_that_a_shell_runs(stage: Stage) -> None:
    command = [sys.executable, "-m", "api.cli", "jobs", "submit", "--wait"]
    settings = environment(SPILLWAY_URL=stage.url)
    done = subprocess.run(command, env=settings, input="hi\n", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "hi \n"), done.stderr


def test_a_whole_body_comes_from_a_file(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "body.json"
    path.write_text(json.dumps(stage.chat("from a file", stream=False)))
    answer = shown(stage, "jobs", "submit", "--file", str(path), "--wait")
    assert answer["choices"][0]["message"]["content"] == "from a file "


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("hi", "--in", "soon"), "no duration"),
        (("hi", "--in", "1h", "--at", "2999-01-01T00:00"), "--at and --in"),
        (("hi", "--metadata", "novalue"), "no pair"),
        (("hi", "--file", "missing.json"), "not both"),
        (("--file", "missing.json"), "cannot be read"),
        ((), "empty"),
        (("hi", "--model", "nope"), "does not exist"),
    ],
)
def test_a_bad_submission_is_one_line(stage: Stage, arguments: tuple[str, ...], reason: str) -> None:
    done = spillway(stage, "jobs", "submit", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("spillway: ") and reason in done.stderr


def test_queues_are_shown_paused_and_resumed(stage: Stage) -> None:
    table = said(stage, "queues")
    assert "demo" in table and "paused" not in table
    assert "paused" in said(stage, "queues", "pause", "demo", "--priority", "batch")
    assert [row["priority"] for row in shown(stage, "queues") if row["paused"]] == ["batch"]
    assert "draining" in said(stage, "queues", "drain", "demo")
    said(stage, "queues", "resume", "demo", "--priority", "batch")
    assert "draining" not in said(stage, "queues", "resume", "demo")
    unknown = spillway(stage, "queues", "pause", "nope")
    assert (unknown.returncode, unknown.stdout) == (1, "")


def test_dead_letters_are_listed_shown_replayed_and_discarded(stage: Stage) -> None:
    assert said(stage, "dead") == "No dead letters.\n"
    failing = json.dumps({"fail": "engine_failure"})
    made = [said(stage, "jobs", "submit", failing).strip() for _ in range(2)]
    wait_until(lambda: len(stage.request("GET", "/admin/dead").json["data"]) == 2)
    assert [letter["job_id"] for letter in shown(stage, "dead", "list")] == made[::-1]
    assert "engine_failure" in said(stage, "dead")
    assert "scripted engine_failure" in said(stage, "dead", "show", made[0])
    assert said(stage, "dead", "discard", made[1]) == f"Discarded {made[1]}.\n"
    assert said(stage, "dead", "replay", "--all", "--code", "worker_lost") == "Replayed 0.\n"
    assert said(stage, "dead", "replay", "--all") == "Replayed 1.\n"
    wait_until(lambda: stage.job(made[0])["attempt"] == 2)
    assert spillway(stage, "dead", "replay").returncode == 1
    assert "is no dead letter" in spillway(stage, "dead", "show", made[1]).stderr
