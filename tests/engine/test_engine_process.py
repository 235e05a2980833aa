"""The engine as a process behind its pipe: its worker can tell apart how it serves, refuses, dies and hangs."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from scheduler.errors import StartupError
from scheduler.job import ClaimedJob, Priority
from scheduler.request import InferenceRequest, Message, SamplingParams, encode_request
from scheduler.settings import Settings
from tests.conftest import wait_until
from tests.tiny_model import write_tiny_model
from workers.backend import BackendDied, BackendEvent, ChoiceProgress, JobDone, JobError, JobProgress
from workers.engine.engine_loop import EXIT_NO_FRAME
from workers.engine.protocol import HEADER, Cancel, frame
from workers.engine_environment import system_openblas
from workers.local import LocalBackend

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context_tokens=512)


def _settings(home: Path, **fields: Any) -> Settings:
    return Settings(home=home, **{"max_rows": 4, "compile": False, "system_blas": False, **fields})


@asynccontextmanager
async def _engine(model_path: Path, settings: Settings) -> AsyncIterator[LocalBackend]:
    backend = LocalBackend(str(model_path), settings, position=3)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalBackend]:
    """One engine for the tests that leave it as they found it."""
    async with _engine(model_path, _settings(tmp_path_factory.mktemp("home"))) as backend:
        yield backend


def _job(job_id: str, text: str, attempt: int = 1, n: int = 1, **sampling: Any) -> ClaimedJob:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **sampling})
    request = InferenceRequest(model="tiny", messages=(Message(role="user", content=text),), sampling=params, n=n)
    return ClaimedJob(job_id, attempt, encode_request(request), Priority.NORMAL, "ann", rows=n)


@dataclass
class Seen:
    """What one job reported."""

    tokens: list[int] = field(default_factory=list[int])
    text: str = ""
    end: JobDone | JobError | None = None

    def add(self, event: BackendEvent) -> None:
        if isinstance(event, JobProgress):
            for choice in event.choices:
                self.tokens += choice.token_ids
                self.text += choice.text
        else:
            self.end = event


async def _until_ended(backend: LocalBackend, *job_ids: str) -> dict[str, Seen]:
    seen = {job_id: Seen() for job_id in job_ids}
    async with asyncio.timeout(60):
        while any(one.end is None for one in seen.values()):
            for event in await backend.events():
                seen[event.job_id].add(event)
    return seen


async def test_jobs_run_together_and_each_says_what_it_says_alone(backend: LocalBackend) -> None:
    texts = {f"job-t-{index}": f"hello number {index}" for index in range(4)}
    alone: dict[str, Seen] = {}
    for job_id, text in texts.items():
        await backend.submit(_job(job_id, text), ())
        alone |= await _until_ended(backend, job_id)
    for job_id, text in texts.items():
        await backend.submit(_job(job_id, text, attempt=2), ())
    together = await _until_ended(backend, *texts)
    for job_id in texts:
        assert together[job_id].tokens == alone[job_id].tokens and len(alone[job_id].tokens) == 24
        end = together[job_id].end
        assert isinstance(end, JobDone) and end.usage.completion_tokens == 24
    assert len({tuple(one.tokens) for one in alone.values()}) == 4


async def test_a_takeover_continues_after_what_was_visible(backend: LocalBackend) -> None:
    await backend.submit(_job("job-t-1", "once upon a time", temperature=0.9, seed=11), ())
    whole = (await _until_ended(backend, "job-t-1"))["job-t-1"]
    for cut in (0, 7, 23, 24):
        await backend.submit(_job("job-t-1", "once upon a time", temperature=0.9, seed=11, max_tokens=cut or 1), ())
        before = (await _until_ended(backend, "job-t-1"))["job-t-1"]
        visible = (ChoiceProgress(0, tuple(before.tokens), before.text),)
        await backend.submit(_job("job-t-1", "once upon a time", attempt=2, temperature=0.9, seed=11), visible)
        after = (await _until_ended(backend, "job-t-1"))["job-t-1"]
        assert before.tokens + after.tokens == whole.tokens
        assert isinstance(after.end, JobDone) and after.end.usage.completion_tokens == 24


async def test_a_prompt_beyond_the_context_fails_alone(backend: LocalBackend) -> None:
    await backend.submit(_job("job-t-1", "1" * 600), ())
    await backend.submit(_job("job-t-2", "hello"), ())
    seen = await _until_ended(backend, "job-t-1", "job-t-2")
    refused = seen["job-t-1"].end
    assert isinstance(refused, JobError) and refused.code == "context_length_exceeded"
    assert "512 tokens" in refused.message
    assert isinstance(seen["job-t-2"].end, JobDone)


async def test_a_body_that_is_no_request_fails_alone(backend: LocalBackend) -> None:
    await backend.submit(ClaimedJob("job-t-1", 1, b"\xc1", Priority.HIGH, "ann"), ())
    end = (await _until_ended(backend, "job-t-1"))["job-t-1"].end
    assert isinstance(end, JobError) and end.code == "internal_error"


async def test_a_cancelled_job_says_no_more_and_frees_its_rows(backend: LocalBackend) -> None:
    await backend.submit(_job("job-t-1", "endless", max_tokens=400, n=4), ())
    assert backend.capacity().rows == 0
    assert all(event.job_id == "job-t-1" for event in await backend.events())
    await backend.cancel("job-t-1", 1)
    assert backend.capacity().rows == 4
    await backend.submit(_job("job-t-2", "next"), ())
    seen = await _until_ended(backend, "job-t-2")  # a late event of job-t-1 would be a KeyError
    assert isinstance(seen["job-t-2"].end, JobDone)
    assert backend.status().busy_rows <= 1


async def test_capacity_allows_for_what_the_engine_has_not_counted_yet(backend: LocalBackend) -> None:
    before = backend.capacity()
    await backend.submit(_job("job-t-1", "x" * 100, n=2), ())
    at_once = backend.capacity()
    assert at_once.rows == before.rows - 2 and at_once.kv_tokens < before.kv_tokens
    await _until_ended(backend, "job-t-1")
    assert backend.capacity().rows == before.rows


async def test_what_the_engine_measured_comes_with_its_frames(backend: LocalBackend) -> None:
    before = backend.status().stats.get("decode_tokens", 0.0)
    await backend.submit(_job("job-t-1", "count me"), ())
    await _until_ended(backend, "job-t-1")
    status = backend.status()
    assert status.stats["decode_tokens"] == before + 24 == status.histograms["batch_rows"].total
    assert sum(status.histograms["token_gaps"].counts) > 0


async def test_signals_of_a_terminal_or_service_manager_do_not_end_the_engine(backend: LocalBackend) -> None:
    engine_pid = backend.status().engine_pid
    assert engine_pid is not None and os.getpgid(engine_pid) != os.getpgid(0)
    os.kill(engine_pid, signal.SIGINT)
    os.kill(engine_pid, signal.SIGTERM)
    await backend.submit(_job("job-t-1", "still there"), ())
    assert isinstance((await _until_ended(backend, "job-t-1"))["job-t-1"].end, JobDone)


async def test_a_killed_engine_is_reported_and_can_be_started_again(model_path: Path, tmp_path: Path) -> None:
    async with _engine(model_path, _settings(tmp_path)) as backend:
        engine_pid = backend.status().engine_pid
        assert engine_pid is not None
        await backend.submit(_job("job-t-1", "x", max_tokens=400), ())
        os.kill(engine_pid, signal.SIGKILL)
        with pytest.raises(BackendDied, match="signal 9"):
            async with asyncio.timeout(30):
                while True:
                    await backend.events()
        await backend.close()
        card = await backend.start()
        assert (card.id, card.position, card.context_tokens, card.max_rows) == ("tiny", 3, 512, 4)
        assert backend.capacity().rows == 4
        await backend.submit(_job("job-t-1", "x", attempt=2), ())
        assert isinstance((await _until_ended(backend, "job-t-1"))["job-t-1"].end, JobDone)
    assert list((tmp_path / "tmp").iterdir()) == []


async def test_a_stopped_engine_is_given_up(model_path: Path, tmp_path: Path) -> None:
    async with _engine(model_path, _settings(tmp_path, engine_hang_s=1.5)) as backend:
        engine_pid = backend.status().engine_pid
        assert engine_pid is not None
        os.kill(engine_pid, signal.SIGSTOP)
        with pytest.raises(BackendDied, match="no sign of life"):
            async with asyncio.timeout(30):
                while True:
                    await backend.events()
        assert not psutil.pid_exists(engine_pid)


async def test_an_engine_that_reads_garbage_ends_and_says_why(model_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "workers.engine", "--model", str(model_path)]
    environment = {**os.environ, "SPILLWAY_HOME": str(tmp_path), "SPILLWAY_COMPILE": "false"}
    engine = await asyncio.create_subprocess_exec(
        *command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert engine.stdin is not None
    engine.stdin.write(frame(Cancel("job-t-1", 1)) + HEADER.pack(3) + b"\xc1\xc1\xc1")
    # stdin stays open: only the garbage can end it
    assert engine.stdout is not None and engine.stderr is not None
    async with asyncio.timeout(60):
        log = (await asyncio.gather(engine.stdout.read(), engine.stderr.read()))[1].decode()
        assert await engine.wait() == EXIT_NO_FRAME
    assert "what is no frame" in log


async def test_a_model_that_cannot_be_loaded_is_one_line_and_leaves_nothing(model_path: Path, tmp_path: Path) -> None:
    backend = LocalBackend(str(tmp_path / "nothing"), _settings(tmp_path / "home"))
    with pytest.raises(StartupError, match="is not a directory"):
        await backend.start()
    assert list((tmp_path / "home" / "tmp").iterdir()) == []


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_compilers_end_with_their_engine(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, compiler = tmp_path / "running", tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\necho $$ >>{running}\nexec sleep 600\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", f"{compiler.parent}{os.pathsep}{os.environ['PATH']}")
    backend = LocalBackend(str(model_path), _settings(tmp_path / "home", compile=True))
    starting = asyncio.ensure_future(backend.start())
    await wait_until(lambda: running.exists() and running.read_text().endswith("\n"), within_s=60)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    pids = [int(pid) for pid in running.read_text().split()]
    await wait_until(lambda: not any(_is_running(pid) for pid in pids))
    assert list((tmp_path / "home" / "tmp").iterdir()) == []


async def test_a_start_that_is_given_up_at_once_leaves_no_directory(model_path: Path, tmp_path: Path) -> None:
    backend = LocalBackend(str(model_path), _settings(tmp_path))
    starting = asyncio.ensure_future(backend.start())
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await backend.close()
    assert list((tmp_path / "tmp").iterdir()) == []


_PARENT = """
import asyncio, sys, uvloop
from pathlib import Path
from scheduler.settings import Settings
from scheduler.telemetry import configure
from workers.local import LocalBackend

async def main():
    settings = Settings(home=Path(sys.argv[2]), compile=False)
    configure(settings, "worker")
    backend = LocalBackend(sys.argv[1], settings)
    starting = asyncio.ensure_future(backend.start())
    while backend.status().engine_pid is None:
        await asyncio.sleep(0.01)
    if sys.argv[3] == "ready":
        await starting
    print(backend.status().engine_pid, flush=True)
    await asyncio.sleep(600)

uvloop.run(main())
"""


@pytest.mark.parametrize("moment", ["loading", "ready"])
async def test_a_killed_worker_takes_its_engine_along(model_path: Path, tmp_path: Path, moment: str) -> None:
    command = [sys.executable, "-c", _PARENT, str(model_path), str(tmp_path), moment]
    parent = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    engine = psutil.Process(int(await parent.stdout.readline()))
    if moment == "ready" and system_openblas() is not None:
        assert any("openblas" in mapping.path for mapping in engine.memory_maps())
    parent.kill()
    await parent.wait()
    await wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


async def test_a_killed_engine_left_its_pages_to_the_next_one_and_to_no_other_tenant(
    model_path: Path, tmp_path: Path
) -> None:
    settings = _settings(tmp_path, page_tokens=8)
    async with _engine(model_path, settings) as backend:
        before: dict[str, Seen] = {}
        for name in ("job-k-0", "job-k-1"):
            await backend.submit(_job(name, "a question asked twice " * 4), ())
            before |= await _until_ended(backend, name)
        await wait_until(lambda: len(list(tmp_path.glob("kv/*/*.safetensors"))) >= 2)
        os.kill(backend.status().engine_pid or 0, signal.SIGKILL)
    async with _engine(model_path, settings) as backend:
        await backend.submit(dataclasses.replace(_job("job-k-b", "a question asked twice " * 4), tenant="bob"), ())
        await backend.submit(_job("job-k-a", "a question asked twice " * 4), ())
        after = await _until_ended(backend, "job-k-b", "job-k-a")
    cached = {name: one.end.usage.cached_tokens for name, one in after.items() if isinstance(one.end, JobDone)}
    assert cached["job-k-b"] == 0 and cached["job-k-a"] >= 16
    assert after["job-k-a"].tokens == after["job-k-b"].tokens == before["job-k-1"].tokens
