"""The engine thread of an engine process: load and warm up, then orders in, steps, frames out until stdin ends."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from scheduler.errors import SpillwayError
from scheduler.model_card import ModelCard
from scheduler.settings import Settings
from scheduler.telemetry import get_logger
from workers.backend import BackendEvent, JobError
from workers.engine.engine import Engine, EngineConfig
from workers.engine.frame_writer import FrameWriter
from workers.engine.intake import Intake, Order
from workers.engine.loader import LoadedModel, load
from workers.engine.protocol import Cancel, Loading, Ready, Step
from workers.engine.sequence import PreparedJob
from workers.engine.watchdog import EXIT_PARENT_GONE, Watchdog, exit_now

_log = get_logger(__name__)

SIGN_OF_LIFE_S = 0.5
EXIT_ENGINE_FAILED = 71
EXIT_NO_FRAME = 73
STATS_EVERY_S = 0.25


def serve(path: Path, ref: str, position: int, settings: Settings, writer: FrameWriter, watchdog: Watchdog) -> NoReturn:
    """Serve the model until the process ends; raises StartupError where it cannot be loaded."""
    writer.send(Loading(f"Loading {ref}"))
    model = load(path, ref)
    engine = Engine(model, EngineConfig.from_settings(settings))
    writer.send(Loading(f"Warming up {model.name}"))
    engine.warm_up()
    model = dataclasses.replace(model, context_tokens=engine.context_tokens)
    intake = Intake(
        sys.stdin.buffer,
        model,
        on_end=lambda: exit_now(EXIT_PARENT_GONE),
        on_garbage=lambda: exit_now(EXIT_NO_FRAME),
    )
    writer.send(Ready(card=_card(model, engine, position), pid=os.getpid()))
    intake.start()
    loop = EngineLoop(engine, intake, writer, watchdog)
    try:
        while True:
            loop.run_once()
    except Exception:
        _log.critical("engine loop failed; its jobs go to other workers", exc_info=True)
        exit_now(EXIT_ENGINE_FAILED)


class EngineLoop:
    """One round per call; on the engine thread."""

    def __init__(self, engine: Engine, intake: Intake, writer: FrameWriter, watchdog: Watchdog) -> None:
        self._engine = engine
        self._intake = intake
        self._writer = writer
        self._watchdog = watchdog
        self._accepted = 0
        self._step_count = 0
        self._sent_s = 0.0
        self._stats_sent_s = 0.0

    def run_once(self) -> None:
        """Take the orders that are there, make one step, report; waits where there is nothing to do."""
        self._watchdog.beat(rows_active=False)
        # Before the first order the worker copies what is compiled, and nothing may be half written.
        busy = self._engine.has_work or (self._accepted > 0 and self._engine.warm_next())
        orders = self._intake.take(0.0 if busy else SIGN_OF_LIFE_S)
        events: list[BackendEvent] = []
        for order in orders:
            self._obey(order, events)
        if self._engine.has_work:
            self._watchdog.beat(rows_active=True)
            events += self._engine.step()
            self._step_count += 1
        if events or orders or time.monotonic() - self._sent_s >= SIGN_OF_LIFE_S:
            self._report(events)

    def _obey(self, order: Order, events: list[BackendEvent]) -> None:
        match order:
            case PreparedJob():
                self._accepted += 1
                try:
                    self._engine.add(order)
                except SpillwayError as error:
                    events.append(JobError(order.job_id, order.attempt, error.code, error.message, error.param))
            case JobError():
                self._accepted += 1
                events.append(order)
            case Cancel():
                self._engine.cancel(order.job_id, order.attempt)

    def _report(self, events: list[BackendEvent]) -> None:
        engine = self._engine
        now_s = time.monotonic()
        has_stats = not engine.has_work or now_s - self._stats_sent_s >= STATS_EVERY_S
        step = Step(
            events=tuple(events),
            busy_rows=engine.busy_rows,
            free_rows=engine.free_rows,
            free_kv_tokens=engine.free_kv_tokens,
            waiting=engine.waiting,
            step_count=self._step_count,
            stats=engine.stats() if has_stats else {},
            histograms=engine.histograms() if has_stats else {},
            accepted=self._accepted,
        )
        self._writer.send(step, while_paused=lambda: self._watchdog.beat(rows_active=False))
        self._sent_s = now_s
        if has_stats:
            self._stats_sent_s = now_s


def _card(model: LoadedModel, engine: Engine, position: int) -> ModelCard:
    return ModelCard(
        id=model.name,
        context_tokens=model.context_tokens,
        created_s=int((model.path / "config.json").stat().st_mtime),
        position=position,
        vocab_size=model.vocab_size,
        max_rows=engine.max_rows,
        kv_budget_tokens=engine.kv_budget_tokens,
        details={
            "model_type": str(model.config.get("model_type", "")),
            "dtype": str(model.dtype).removeprefix("mlx.core."),
            **engine.traits(),
        },
    )
