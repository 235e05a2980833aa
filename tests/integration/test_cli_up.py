"""`spillway up` and the commands that talk to it, on one running instance with a tiny model."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.cli_call import call
from tests.service import Service, environment, free_port, stop, wait_until_ready
from tests.tiny_model import write_tiny_model

SPILLWAY = str(Path(sys.executable).parent / "spillway")
QUIET = {"SPILLWAY_COMPILE": "false"}
# The editor of the chat turns bracketed paste on when it asks, and off when it has a message.
PROMPT, SENT = "\x1b[?2004h", "\x1b[?2004l"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Started in a directory whose `api`, `workers` and `scheduler` are not ours, with a proxy that leads nowhere."""
    base = tmp_path_factory.mktemp("up")
    for name in ("api", "workers", "scheduler", "migrations"):
        (base / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')")
    model = write_tiny_model(base / "tiny", context_tokens=8192)
    running = start(
        base, free_port(), "--model", str(model), http_proxy="http://127.0.0.1:9", all_proxy="http://[::1]:9"
    )
    try:
        wait_until_ready(running)
        wait_until_said(running, "Ctrl-C stops")
        yield running
    finally:
        stop(running)


def start(base: Path, port: int, *arguments: str, **variables: str) -> Service:
    output = base / "output"
    command = [SPILLWAY, "up", "--home", str(base / "home"), "--port", str(port), *arguments]
    with output.open("ab") as sink:
        process = subprocess.Popen(
            command,
            cwd=base,
            env=environment(**QUIET) | variables,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    return Service(process, port, base / "home", output)


def wait_until_said(service: Service, text: str, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while text not in service.said():
        assert time.monotonic() < deadline, service.said()
        time.sleep(0.05)


def run(*arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SPILLWAY, *arguments],
        input=stdin,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refused(*arguments: str, **variables: str) -> str:
    """The one line of a start that was refused."""
    done = run("up", *arguments, **variables)
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""
    return lines[0]


def test_ready_names_the_address_and_a_line_to_paste(service: Service) -> None:
    said = service.said().splitlines()
    assert f"Spillway is ready: {service.url}" in said
    paste = next(line.strip() for line in said if line.strip().startswith("curl "))
    done = subprocess.run(["bash", "-c", paste], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


async def test_the_openai_sdk_streams_an_answer(service: Service) -> None:
    async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Hello"}],
            max_completion_tokens=12,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_every_process_logs_json_into_a_file_of_its_own(service: Service) -> None:
    for name in ("up", "api", "scheduler", "worker-1"):
        lines = [json.loads(line) for line in (service.home / "logs" / f"{name}.log").read_text().splitlines()]
        assert lines
        assert {line["process"] for line in lines} == {name}


def test_status_shows_processes_workers_and_queue(service: Service) -> None:
    done = call("status", "--home", service.home, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ready"], report["address"]) == (0, True, service.url)
    assert set(report["processes"]) == {"api", "scheduler", "worker-1"}
    assert [(worker["worker"], worker["models"]) for worker in report["workers"]] == [("worker-1", ["tiny"])]
    assert report["waiting"] == 0
    assert f"is ready: {service.url}" in run("status", "--home", str(service.home)).stdout


def test_a_second_up_on_the_same_home_is_refused_with_pid_and_address(service: Service) -> None:
    line = refused("--home", str(service.home), "--port", str(free_port()))
    assert f"already runs on {service.home} at {service.url} (pid {service.process.pid})" in line


def test_a_taken_port_is_refused_before_anything_starts(service: Service, tmp_path: Path) -> None:
    line = refused("--home", str(tmp_path / "other"), "--port", str(service.port))
    assert f"Port {service.port} on 127.0.0.1 is taken" in line
    assert not (tmp_path / "other" / "redis").exists()


def test_a_state_written_by_a_newer_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"format": 99, "version": "7.0.0"}')
    assert "newer Spillway (7.0.0" in refused("--home", str(tmp_path), "--port", str(free_port()))


def test_a_bad_setting_is_refused_by_its_name(tmp_path: Path) -> None:
    assert "SPILLWAY_MAX_ROWS" in refused("--home", str(tmp_path), SPILLWAY_MAX_ROWS="many")


def test_piped_chat_answers_once(service: Service) -> None:
    done = run("chat", "--home", str(service.home), "--max-tokens", "8", stdin="Hello there\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_chat_with_nobody_there_says_how_to_start(tmp_path: Path) -> None:
    done = run("chat", "--home", str(tmp_path), SPILLWAY_PORT=str(free_port()), stdin="hi")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "spillway up" in done.stderr


def test_chat_shows_the_servers_own_words_on_an_error(service: Service) -> None:
    done = run("chat", "--home", str(service.home), "--model", "nope", stdin="hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nope" in done.stderr


def test_models_and_jobs_are_listed_shown_and_watched(service: Service) -> None:
    home = ("--home", str(service.home))
    answer = run("chat", *home, "--max-tokens", "8", stdin="One more").stdout
    assert call("models", *home).stdout == "tiny\n"
    newest: dict[str, Any] = json.loads(call("jobs", "list", *home, "--json").stdout)[0]
    assert newest["id"] in run("jobs", *home).stdout
    shown = json.loads(call("jobs", "show", newest["id"], *home, "--json").stdout)
    assert (shown["state"], shown["usage"]["completion_tokens"]) == ("succeeded", newest["usage"]["completion_tokens"])
    assert call("jobs", "watch", newest["id"], *home).stdout.strip("\n") == answer.strip("\n")
    refusal = call("jobs", "cancel", newest["id"], *home)
    assert refusal.returncode == 1
    assert "already succeeded" in refusal.stderr


def test_ctrl_c_in_a_chat_cancels_the_answer_and_keeps_the_chat(service: Service) -> None:
    with Terminal(SPILLWAY, "chat", "--home", str(service.home)) as terminal:
        terminal.read_until("Ctrl-D leaves")
        for _ in range(20):  # a random model may end its answer before the key arrives
            terminal.read_until(PROMPT)
            terminal.type("Go on and on\r")
            terminal.read_until(SENT)
            terminal.read_something()
            terminal.type("\x03")
            if terminal.read_until("(cancelled)", PROMPT) == "(cancelled)" and newest_end(service) == "cancelled":
                break
            terminal.type("/clear\r")
            terminal.read_until("is forgotten")
        else:
            raise AssertionError(f"no answer was cancelled:\n{terminal.seen[-2000:]}")
        terminal.read_until(PROMPT)
        terminal.type("/help\r")
        terminal.read_until("forget the conversation")
        terminal.read_until(PROMPT)
        terminal.type("\x04")
        assert terminal.wait() == 0


def newest_end(service: Service) -> str:
    """The state in which the newest job ended."""
    while (state := service.get("/v1/jobs?limit=1")["data"][0]["state"]) in {"queued", "running"}:
        time.sleep(0.02)
    return state


def test_doctor_finds_the_running_service_and_what_it_needs(service: Service) -> None:
    done = run("doctor", "--home", str(service.home), "--json", SPILLWAY_PORT=str(service.port))
    report = json.loads(done.stdout)
    found = {finding["topic"]: finding for finding in report["findings"]}
    assert {"python", "mlx", "redis", "database", "home", "disk", "demo model", "model cache"} <= set(found)
    assert service.url in found["running"]["found"]
    assert found["port"]["level"] == found["mlx"]["level"] == found["database"]["level"] == "ok"
    assert done.returncode == (0 if report["ok"] else 1)


def test_doctor_names_what_is_broken_and_its_mend(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"format": 99}')
    tmp_path.chmod(0o755)
    done = run("doctor", "--home", str(tmp_path), "--json", SPILLWAY_REDIS_URL="redis://127.0.0.1:1")
    found = {finding["topic"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert found["redis"]["level"] == found["home"]["level"] == "broken"
    assert "Upgrade" in found["home"]["mend"]


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("spillway 0.")
    assert "doctor" in run("--help").stdout


def test_status_and_stop_with_nothing_running(tmp_path: Path) -> None:
    assert call("status", "--home", tmp_path).returncode == 3
    assert json.loads(call("status", "--home", tmp_path, "--json").stdout) == {"running": False}
    done = call("stop", "--home", tmp_path)
    assert (done.returncode, done.stdout[:12]) == (0, "Nothing runs")


class Terminal:
    """A command in a pseudo-terminal of its own."""

    def __init__(self, *command: str) -> None:
        self._command = command
        self.seen = ""
        self._unread = ""

    def __enter__(self) -> Terminal:
        self._handle, other = pty.openpty()
        variables = environment(TERM="xterm", COLUMNS="100", LINES="30", PROMPT_TOOLKIT_NO_CPR="1")
        self._process = subprocess.Popen(
            self._command,
            stdin=other,
            stdout=other,
            stderr=other,
            env=variables,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C becomes a signal
        )
        os.close(other)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._handle)

    def type(self, keys: str) -> None:
        os.write(self._handle, keys.encode())

    def read_until(self, *wanted: str, within_s: float = 30.0) -> str:
        """Read on from here until one of the texts comes; which one."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            found = [text for text in wanted if text in self._unread]
            if found:
                first = min(found, key=self._unread.index)
                self._unread = self._unread.partition(first)[2]
                return first
            self._read()
        raise AssertionError(f"{wanted} did not come within {within_s} s:\n{self.seen[-2000:]}")

    def read_something(self, within_s: float = 30.0) -> None:
        """Read on until anything at all comes."""
        deadline = time.monotonic() + within_s
        while not self._unread and time.monotonic() < deadline:
            self._read()

    def _read(self) -> None:
        if select.select([self._handle], [], [], 0.1)[0]:
            chunk = os.read(self._handle, 65536).decode("utf-8", "replace")
            self._unread, self.seen = self._unread + chunk, self.seen + chunk

    def wait(self) -> int:
        return self._process.wait(timeout=30)
