"""A step that never ends, a thread that died: the engine process ends, and its parent hands the jobs on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from workers.engine.watchdog import EXIT_HUNG, EXIT_PARENT_GONE, EXIT_THREAD_DIED

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
