"""Ends the engine process when it has nobody to work for, or works no more.

The parent's end of our stdin is closed → the parent is gone, whatever we are doing. No step began for `hang_s` while
rows are active → the device or the loop hangs; the parent then hands the jobs on. Only the process's end frees both.
A thread that died → what it did for the engine is not done any more.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from typing import NoReturn

from scheduler.telemetry import get_logger

EXIT_PARENT_GONE = 0
EXIT_HUNG = 70
EXIT_THREAD_DIED = 72

_log = get_logger(__name__)
_LOOK_EVERY_S = 0.2


class Watchdog:
    """`beat` is called by the engine thread before each step and while idle; the rest happens on the own thread."""

    def __init__(self, parent_fd: int, hang_s: float) -> None:
        self._hang_s = hang_s
        self._beat: tuple[float, bool] = (time.monotonic(), False)
        self._parent = select.poll()
        self._parent.register(parent_fd, 0)  # POLLHUP is always reported, also behind unread data
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def beat(self, rows_active: bool) -> None:
        """The loop is alive; `rows_active`: the next beat is due within `hang_s`."""
        self._beat = (time.monotonic(), rows_active)

    def _run(self) -> None:
        while True:
            if self._parent.poll(_LOOK_EVERY_S * 1000):
                exit_now(EXIT_PARENT_GONE)
            since, rows_active = self._beat
            silent_s = time.monotonic() - since
            if rows_active and silent_s > self._hang_s:
                _log.critical("engine hangs: no step while rows are active; ending it", silent_s=round(silent_s, 1))
                exit_now(EXIT_HUNG)


def end_with_any_thread() -> None:
    """Make an exception that leaves a thread end the process: without reader or writer an engine is deaf or mute."""
    threading.excepthook = _end_with_thread


def _end_with_thread(failure: threading.ExceptHookArgs) -> None:
    thread = "?" if failure.thread is None else failure.thread.name
    _log.critical("a thread of the engine died; ending it", thread=thread, exc_info=failure.exc_value)
    exit_now(EXIT_THREAD_DIED)


def take_children_along() -> None:
    """Make `exit_now` end this process's group with it: compilers run on otherwise. On the main thread."""
    signal.signal(signal.SIGHUP, _stay)


def exit_now(status: int) -> NoReturn:
    """End the process from any thread, without waiting for the device or for exit handlers."""
    if signal.getsignal(signal.SIGHUP) is _stay and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGHUP)
    os._exit(status)


def _stay(_number: int, _frame: object) -> None:
    """Unlike SIG_IGN, not inherited by the programs that this process runs."""
