"""A step that never ends, a thread that died: the engine process ends, and its parent hands the jobs on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scheduler.request import InferenceRequest, Message, SamplingParams, encode_request
from scheduler.settings import Settings
from tests.tiny_model import write_tiny_model
from workers.engine.protocol import Step, Submit
from workers.engine.watchdog import EXIT_HUNG, EXIT_PARENT_GONE, EXIT_THREAD_DIED
from workers.engine_pipe import EnginePipe

_HANG = """
from workers.engine.watchdog import Watchdog
watchdog = Watchdog(0, 0.3)
watchdog.start()
watchdog.beat(rows_active={rows_active})
print("stepping", flush=True)
while True:
    pass
"""


@contextmanager
def _engine(*, rows_active: bool) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", _HANG.format(rows_active=rows_active)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"stepping\n"
        yield process


def test_a_step_that_never_ends_ends_the_engine() -> None:
    with _engine(rows_active=True) as process:
        assert process.wait(timeout=30) == EXIT_HUNG


def test_without_active_rows_it_waits_until_its_parent_is_gone() -> None:
    with _engine(rows_active=False) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=30) == EXIT_PARENT_GONE


_DEAF = """
import threading
from workers.engine.watchdog import end_with_any_thread
end_with_any_thread()
threading.Thread(target=[].pop, name="intake").start()
while True:
    pass
"""


def test_a_thread_that_dies_ends_the_engine_and_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", _DEAF], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == EXIT_THREAD_DIED
    assert "a thread of the engine died" in done.stdout + done.stderr and "intake" in done.stdout + done.stderr


async def test_a_hung_step_of_a_running_answer_ends_the_engine(tmp_path: Path) -> None:
    model, hang_file = write_tiny_model(tmp_path / "model"), tmp_path / "hang"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "hanging"}))
    command = [sys.executable, "-m", "tests.hanging_engine", str(hang_file), "--model", str(model)]
    settings = Settings(home=tmp_path, compile=False, engine_hang_s=1.0)
    pipe = await EnginePipe.spawn(command, {**os.environ, **settings.as_environment()})
    try:
        params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
        request = InferenceRequest(model="tiny", messages=(Message(role="user", content="on and on"),), sampling=params)
        await pipe.send(Submit("job-t-1", 1, encode_request(request)), 30)
        answered = False
        while messages := await pipe.read(60):
            answered |= any(isinstance(message, Step) and message.events for message in messages)
            if answered:
                hang_file.touch()
        assert answered and await pipe.exit_status() == EXIT_HUNG
    finally:
        await pipe.kill()
