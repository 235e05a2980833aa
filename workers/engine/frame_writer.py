"""Writes the engine's frames to its parent on a thread of its own, so that a slow parent does not hold up a step.

Backpressure: up to MAX_WAITING frames wait here (besides what the pipe holds); then `send` blocks, and the engine
pauses until its parent reads again. A parent that is gone ends the process.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from workers.engine.protocol import FromEngine, frame

MAX_WAITING = 512
_PAUSE_S = 0.25
_IDLE_WAIT_S = 5.0


class FrameWriter:
    """`send` is for any thread; `on_gone` is called from the writer's thread when nobody reads any more."""

    def __init__(self, fd: int, on_gone: Callable[[], None]) -> None:
        self._fd = fd
        self._on_gone = on_gone
        self._changed = threading.Condition()
        self._waiting: deque[FromEngine] = deque()
        self._writing = False
        self._thread = threading.Thread(target=self._run, name="frame-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, message: FromEngine, while_paused: Callable[[], None] | None = None) -> None:
        """Queue a frame; where the parent is too far behind, wait, calling `while_paused` every quarter second."""
        with self._changed:
            while len(self._waiting) >= MAX_WAITING:
                if not self._changed.wait(_PAUSE_S) and while_paused is not None:
                    while_paused()
            self._waiting.append(message)
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything is written; False if it was not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._writing, timeout_s)

    def _run(self) -> None:
        while True:
            data = b"".join(map(frame, self._take()))
            try:
                self._write(data)
            except OSError:
                self._on_gone()
                return
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _take(self) -> list[FromEngine]:
        with self._changed:
            while not self._waiting:
                self._changed.wait(_IDLE_WAIT_S)
            taken = list(self._waiting)
            self._waiting.clear()
            self._writing = True
            self._changed.notify_all()
            return taken

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
