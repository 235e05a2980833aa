"""The processes under fire: started, killed, stopped, and started again by a keeper, as a process manager would."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.timeline import Timeline

_LOOK_S = 0.05
_RESTART_AFTER_S = 0.2
_END_S = 15.0


@dataclass(frozen=True, slots=True)
class Hurt:
    """What was done to a process, in wall-clock ms: between the two its jobs may have been lost."""

    pid: int
    from_ms: int
    until_ms: int


@dataclass(slots=True)
class Managed:
    """One process by its role; `pid` changes with each restart."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    log: Path
    pipe: int
    process: subprocess.Popen[bytes] | None = None
    stopped: bool = False
    died_s: float = 0.0
    starts: int = 0
    hurts: list[Hurt] = field(default_factory=list)

    def start(self) -> None:
        environment = {**self.environment, "SPILLWAY_PARENT_PIPE": str(self.pipe)}
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                pass_fds=(self.pipe,),
            )
        self.stopped, self.died_s = False, 0.0
        self.starts += 1

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        if self.alive:
            os.kill(self.pid, number)
            self.stopped = number == signal.SIGSTOP or (self.stopped and number != signal.SIGCONT)

    def engine(self) -> int | None:
        """The pid of its engine process, where it has one."""
        try:
            children = psutil.Process(self.pid).children()
            return next((child.pid for child in children if "workers.engine" in child.cmdline()), None)
        except psutil.Error:
            return None


class Keeper:
    """Restarts what died until `over`; its run is one task."""

    def __init__(self, processes: Sequence[Managed], timeline: Timeline) -> None:
        self.processes = processes
        self._timeline = timeline
        self.over = False

    async def run(self) -> None:
        while not self.over:
            for process in self.processes:
                self._look(process)
            await asyncio.sleep(_LOOK_S)

    def _look(self, process: Managed) -> None:
        if process.alive:
            return
        now = time.monotonic()
        if not process.died_s:
            process.died_s = now
            assert process.process is not None
            self._timeline.note("death", f"{process.name} pid {process.pid} status {process.process.returncode}")
        elif now - process.died_s >= _RESTART_AFTER_S:
            process.start()
            self._timeline.note("start", f"{process.name} pid {process.pid}")

    def resume(self) -> None:
        """Nobody stays stopped."""
        for process in self.processes:
            process.send(signal.SIGCONT)

    async def end(self) -> None:
        """SIGTERM to all, in their order of dependence; SIGKILL for who does not listen."""
        self.over = True
        self.resume()
        for process in self.processes:
            process.send(signal.SIGTERM)
        for process in self.processes:
            await asyncio.to_thread(self._await_end, process)

    def _await_end(self, process: Managed) -> None:
        if process.process is None:
            return
        try:
            process.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._timeline.note("oddity", f"{process.name} did not end on SIGTERM within {_END_S:g} s")
            process.send(signal.SIGKILL)
            process.process.wait()
