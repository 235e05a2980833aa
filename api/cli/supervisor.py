"""Keeps the processes of `spillway up` running, and ends them in order.

    start ──all at once──► keep (restart what ends, later each time) ──stop──► drain: api, then workers, then scheduler

Until the service was ready, a child that cannot start ends the whole start with the child's own reason. Everything
happens on the event loop of `up`.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from api.cli.child import Child, ProcessSpec
from api.cli.log_relay import LogRelay
from api.cli.restarts import RestartState, gives_up
from scheduler.errors import StartupError
from scheduler.telemetry import get_logger

HURRY_S = 2.0
_OUTPUT_WAIT_S = 2.0

log = get_logger(__name__)
Action = Callable[[], Coroutine[Any, Any, None]]


class Supervisor:
    """The children of one `up`. `on_change` is called after every start."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        environment: Mapping[str, str],
        relay: LogRelay,
        *,
        stage_grace_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self._specs = tuple(specs)
        self._environment = environment
        self._relay = relay
        self._stage_grace_s = stage_grace_s
        self._on_change = on_change
        self._outputs: dict[str, asyncio.Task[None]] = {}
        self._starting: set[asyncio.Task[Child | None]] = set()
        self.children: dict[str, Child] = {}
        self.history: dict[str, RestartState] = {spec.name: RestartState() for spec in self._specs}
        self.was_ready = False

    async def run(self, beside: Sequence[Action], stop: asyncio.Event, hurry: asyncio.Event) -> None:
        """Run all children, and `beside` with them, until `stop`; then drain. Raises StartupError where one fails."""
        self._parent_pipe, holding = os.pipe()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                try:
                    failure = await self._keep_all(beside, stop)
                finally:
                    await self._drain(hurry)
        finally:
            os.close(holding)
            os.close(self._parent_pipe)
        if failure is not None:
            raise failure

    async def _keep_all(self, beside: Sequence[Action], stop: asyncio.Event) -> StartupError | None:
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as keepers:
                tasks = [keepers.create_task(self._keep(spec)) for spec in self._specs]
                tasks += [keepers.create_task(action()) for action in beside]
                await stop.wait()
                for task in tasks:
                    task.cancel()
        except* StartupError as group:
            failure = group.exceptions[0]
        return failure if isinstance(failure, StartupError) else None

    async def _keep(self, spec: ProcessSpec) -> None:
        if spec.after is not None:
            await spec.after.wait()
        while True:
            child = await self._start(spec)
            status = None if child is None else await self._end_of(spec.name, child)
            ran_s = 0.0 if child is None else child.ran_s
            state = self.history[spec.name] = self.history[spec.name].after_exit(ran_s)
            words = self._relay.last_words(spec.name)
            if gives_up(state, was_ready=self.was_ready, says_final=words.cannot_start is not None):
                raise StartupError(words.cannot_start or self._relay.obituary(spec.name, status))
            log.warning(
                "a process ended and is started again",
                child=spec.name,
                status=status,
                reason=words.trouble,
                restarts=state.restarts,
                delay_s=state.delay_s,
            )
            await asyncio.sleep(state.delay_s)

    async def _end_of(self, name: str, child: Child) -> int:
        status = await child.wait()
        await child.kill_group()
        await self._last_output(name)
        return status

    async def _start(self, spec: ProcessSpec) -> Child | None:
        # A start that is cancelled half-way would leave a process that nobody knows of.
        task = self._tasks.create_task(self._spawn(spec))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)
        return await asyncio.shield(task)

    async def _spawn(self, spec: ProcessSpec) -> Child | None:
        self._relay.forget_words(spec.name)
        try:
            child = await Child.spawn(spec, self._environment, self._parent_pipe)
        except OSError as error:  # no memory, no process or no file left
            self._relay.last_words(spec.name).trouble = f"it cannot be started: {error.strerror}"
            return None
        self.children[spec.name] = child
        relay = functools.partial(self._relay.line, spec.name)
        self._outputs[spec.name] = self._tasks.create_task(child.relay_output(relay))
        self._on_change()
        return child

    async def _last_output(self, name: str) -> None:
        await asyncio.wait([self._outputs[name]], timeout=_OUTPUT_WAIT_S)

    async def _drain(self, hurry: asyncio.Event) -> None:
        if self._starting:
            await asyncio.wait(set(self._starting))
        for stage in sorted({spec.stage for spec in self._specs}):
            if not hurry.is_set():
                await self._end_all([spec.name for spec in self._specs if spec.stage == stage], hurry)
        await self._end_all([name for name, child in self.children.items() if child.is_running], hurry)

    async def _end_all(self, names: Sequence[str], hurry: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as enders:
            for name in names:
                if name in self.children:
                    enders.create_task(self._end(name, hurry))

    async def _end(self, name: str, hurry: asyncio.Event) -> None:
        child = self.children[name]
        child.terminate()
        if not await _ended_unless(child, self._stage_grace_s, hurry) and not await child.ended_within(HURRY_S):
            log.warning("a process did not end in time and is killed", child=name)
        await child.kill_group()
        await self._last_output(name)
        self._outputs[name].cancel()


async def _ended_unless(child: Child, grace_s: float, hurry: asyncio.Event) -> bool:
    """Wait for the end of the child, `grace_s` or until somebody is in a hurry; whether it ended."""
    waits = {asyncio.ensure_future(child.wait()), asyncio.ensure_future(hurry.wait())}
    try:
        await asyncio.wait(waits, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return not child.is_running
