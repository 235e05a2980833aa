"""The supervisor of `spillway up` over real child processes: restarts, reasons, order and completeness of the end."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from api.cli.child import ProcessSpec
from api.cli.log_relay import LogRelay
from api.cli.supervisor import Action, Supervisor
from scheduler.errors import StartupError
from scheduler.settings import Settings
from tests.conftest import wait_until
from tests.service import alive

SLEEPER = "import time; print('up', flush=True); time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def python(name: str, code: str, stage: int = 0) -> ProcessSpec:
    return ProcessSpec(name, (sys.executable, "-c", code), stage)


async def forever() -> None:
    await asyncio.Event().wait()


class Scene:
    """A supervisor with its relay; `notes` collects what `on_change` saw."""

    def __init__(self, home: Path, *specs: ProcessSpec, grace_s: float = 10.0) -> None:
        self.relay = LogRelay(home, Settings(home=home))
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        self.pids: set[int] = set()
        self.supervisor = Supervisor(specs, dict(os.environ), self.relay, stage_grace_s=grace_s, on_change=self._note)

    async def run(self, when_started: Action) -> None:
        try:
            async with asyncio.timeout(30):
                await self.supervisor.run([when_started], self.stop, self.hurry)
        finally:
            self.relay.close()
        # What a SIGKILL hit is gone a moment later; who ignores SIGTERM and got nothing else would stay for a minute.
        await wait_until(lambda: not any(alive(pid) for pid in self.pids))

    def _note(self) -> None:
        self.pids |= {child.pid for child in self.supervisor.children.values()}

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():  # noqa: ASYNC110 - what is awaited is another process
            await asyncio.sleep(0.02)

    def said(self, name: str) -> str:
        return self.relay.last_words(name).doing


def logged(home: Path, name: str) -> list[str]:
    return [json.loads(line)["event"] for line in (home / "logs" / f"{name}.log").read_text().splitlines()]


async def test_children_run_until_stop_and_leave_nothing(tmp_path: Path) -> None:
    scene = Scene(tmp_path, python("one", SLEEPER), python("two", SLEEPER))

    async def started() -> None:
        await scene.until(lambda: scene.said("one") == scene.said("two") == "up")
        scene.stop.set()

    await scene.run(started)
    assert len(scene.pids) == 2
    assert logged(tmp_path, "one") == ["up"]


async def test_a_killed_child_is_started_again_and_counted(tmp_path: Path) -> None:
    scene = Scene(tmp_path, python("one", SLEEPER))

    async def started() -> None:
        await scene.until(lambda: scene.said("one") == "up")
        first = scene.supervisor.children["one"]
        psutil.Process(first.pid).kill()
        await scene.until(lambda: scene.supervisor.children["one"] is not first and scene.said("one") == "up")
        scene.stop.set()

    await scene.run(started)
    assert scene.supervisor.history["one"].restarts == 1
    assert logged(tmp_path, "one") == ["up", "up"]


async def test_a_child_that_cannot_start_ends_the_start_with_its_own_reason(tmp_path: Path) -> None:
    reason = json.dumps({"level": "critical", "event": "Model 'nope' was not found."})
    scene = Scene(tmp_path, python("one", SLEEPER), python("two", f"print({reason!r}); raise SystemExit(1)"))
    with pytest.raises(StartupError, match="Model 'nope' was not found"):
        await scene.run(forever)
    assert scene.supervisor.history["two"].restarts == 1


async def test_a_child_that_dies_at_once_is_tried_again_then_its_last_line_is_the_reason(tmp_path: Path) -> None:
    scene = Scene(tmp_path, python("one", "raise ImportError('no libfoo here')"))
    with pytest.raises(StartupError, match="ImportError: no libfoo here"):
        await scene.run(forever)
    assert scene.supervisor.history["one"].failures == 3


async def test_once_ready_a_child_that_keeps_dying_does_not_end_the_service(tmp_path: Path) -> None:
    scene = Scene(tmp_path, python("one", "raise SystemExit(1)"), python("two", SLEEPER))
    scene.supervisor.was_ready = True

    async def started() -> None:
        await scene.until(lambda: scene.supervisor.history["one"].restarts >= 4)
        assert scene.supervisor.children["two"].is_running
        scene.stop.set()

    await scene.run(started)


async def test_stages_end_in_order(tmp_path: Path) -> None:
    record = tmp_path / "order"
    code = (
        "import signal, sys, time\n"
        "def end(*_): open({path!r}, 'a').write({name!r} + ' '); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(60)"
    )
    names = {"late": 2, "early": 0, "middle": 1}
    scene = Scene(
        tmp_path, *(python(name, code.format(path=str(record), name=name), stage) for name, stage in names.items())
    )

    async def started() -> None:
        await scene.until(lambda: all(scene.said(name) == "up" for name in names))
        scene.stop.set()

    await scene.run(started)
    assert record.read_text().split() == ["early", "middle", "late"]


async def test_a_child_that_ignores_the_signal_is_killed_with_its_own_children(tmp_path: Path) -> None:
    parent = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    scene = Scene(tmp_path, python("one", parent), grace_s=0.2)

    async def started() -> None:
        await scene.until(lambda: scene.said("one").isdigit())
        scene.pids.add(int(scene.said("one")))
        scene.stop.set()

    await scene.run(started)


async def test_a_second_signal_does_not_wait_for_the_grace(tmp_path: Path) -> None:
    scene = Scene(tmp_path, python("one", DEAF), python("two", DEAF, stage=1), grace_s=1000.0)

    async def started() -> None:
        await scene.until(lambda: scene.said("one") == scene.said("two") == "up")
        scene.stop.set()
        scene.hurry.set()

    await scene.run(started)


async def test_a_line_longer_than_the_buffer_and_broken_text_pass(tmp_path: Path) -> None:
    code = "import sys; sys.stdout.buffer.write(b'x' * 700_000 + b'\\n\\xff\\xfe\\nlast'); sys.stdout.flush()"
    scene = Scene(tmp_path, python("one", code + f"\n{SLEEPER.replace('up', ' up')}"))

    async def started() -> None:
        await scene.until(lambda: scene.said("one") == "last up")
        scene.stop.set()

    await scene.run(started)
    lines = logged(tmp_path, "one")
    assert sum(len(line) for line in lines if line.startswith("x")) == 700_000
    assert "\N{REPLACEMENT CHARACTER}" in lines[-2]


async def test_a_child_waits_for_what_it_needs(tmp_path: Path) -> None:
    needed = asyncio.Event()
    late = ProcessSpec("late", (sys.executable, "-c", SLEEPER), 0, needed)
    scene = Scene(tmp_path, python("early", SLEEPER), late)

    async def started() -> None:
        await scene.until(lambda: scene.said("early") == "up")
        assert "late" not in scene.supervisor.children
        needed.set()
        await scene.until(lambda: scene.said("late") == "up")
        scene.stop.set()

    await scene.run(started)


async def test_a_failure_beside_the_children_ends_them(tmp_path: Path) -> None:
    scene = Scene(tmp_path, python("one", SLEEPER))

    async def fails() -> None:
        await scene.until(lambda: scene.said("one") == "up")
        raise StartupError("The database is newer.")

    with pytest.raises(StartupError, match="The database is newer"):
        await scene.run(fails)
    assert len(scene.pids) == 1


async def test_a_program_that_is_missing_is_named(tmp_path: Path) -> None:
    scene = Scene(tmp_path, ProcessSpec("one", ("/no/such/program",), 0), python("two", SLEEPER))
    with pytest.raises(StartupError, match="one ends at once: it cannot be started: No such file"):
        await scene.run(forever)
