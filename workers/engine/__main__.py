"""The engine process: `python -m workers.engine --model REF`; workers/local.py starts it and speaks protocol.py to it.

The main thread is the engine thread: it loads, steps and frees. Beside it: intake (reads and tokenizes), frame writer,
watchdog. SIGINT and SIGTERM are ignored: a service manager sends them to every process, and the worker decides. The
worker ends this process by closing its stdin.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from typing import NoReturn

from scheduler.errors import SpillwayError, StartupError
from scheduler.model_card import ModelCard
from scheduler.settings import Settings, load_settings
from scheduler.telemetry import configure, get_logger
from workers.backend import BackendEvent, JobError
from workers.engine.engine import Engine, EngineConfig
from workers.engine.frame_writer import FrameWriter
from workers.engine.intake import Intake, Order
from workers.engine.loader import LoadedModel, load
from workers.engine.model_files import resolve
from workers.engine.protocol import Cancel, LoadFailed, Loading, Ready, Step
from workers.engine.sequence import PreparedJob
from workers.engine.watchdog import EXIT_PARENT_GONE, Watchdog, exit_now

_log = get_logger(__name__)

SIGN_OF_LIFE_S = 0.5
EXIT_LOAD_FAILED = 2
EXIT_ENGINE_FAILED = 71
_STDIN_FD = 0


class EngineLoop:
    """Orders in, steps, frames out; on the engine thread."""

    def __init__(self, engine: Engine, intake: Intake, writer: FrameWriter, watchdog: Watchdog) -> None:
        self._engine = engine
        self._intake = intake
        self._writer = writer
        self._watchdog = watchdog
        self._accepted = 0
        self._step_count = 0
        self._sent_s = 0.0

    def run_once(self) -> None:
        """Take the orders that are there, make one step, report; waits where there is nothing to do."""
        self._watchdog.beat(rows_active=False)
        orders = self._intake.take(0.0 if self._engine.has_work else SIGN_OF_LIFE_S)
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
        step = Step(
            events=tuple(events),
            busy_rows=engine.busy_rows,
            free_rows=engine.free_rows,
            free_kv_tokens=engine.free_kv_tokens,
            waiting=engine.waiting,
            step_count=self._step_count,
            stats=engine.stats(),
            accepted=self._accepted,
        )
        self._writer.send(step, while_paused=lambda: self._watchdog.beat(rows_active=False))
        self._sent_s = time.monotonic()


def main() -> None:
    """Load, say Ready, then serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    arguments = _arguments()
    settings = load_settings()
    frames_fd = _take_stdout()
    configure(settings, "engine")
    watchdog = Watchdog(_STDIN_FD, settings.engine_hang_s)
    watchdog.start()
    writer = FrameWriter(frames_fd, on_gone=lambda: exit_now(EXIT_PARENT_GONE))
    writer.start()
    try:
        model, engine = _start_engine(arguments, settings, writer)
    except StartupError as error:
        _refuse(writer, error)
    intake = Intake(sys.stdin.buffer, model, on_end=lambda: exit_now(EXIT_PARENT_GONE))
    writer.send(Ready(card=_card(arguments, model, engine), pid=os.getpid()))
    intake.start()
    _serve(EngineLoop(engine, intake, writer, watchdog))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workers.engine", description=__doc__)
    parser.add_argument("--model", required=True, help="demo, a directory, or a Hugging Face repo id")
    parser.add_argument("--position", type=int, default=0, help="place of the model among those of this service")
    return parser.parse_args()


def _take_stdout() -> int:
    """A private descriptor for the frames; whatever prints to stdout from now on (compilers too) goes to stderr."""
    frames_fd = os.dup(1)
    os.dup2(2, 1)
    return frames_fd


def _start_engine(arguments: argparse.Namespace, settings: Settings, writer: FrameWriter) -> tuple[LoadedModel, Engine]:
    def say(message: str) -> None:
        writer.send(Loading(message))

    path = resolve(arguments.model, settings, say)
    say(f"Loading {arguments.model}")
    model = load(path, arguments.model)
    engine = Engine(model, EngineConfig.from_settings(settings))
    say(f"Warming up {model.name}")
    engine.warm_up()
    return model, engine


def _refuse(writer: FrameWriter, error: StartupError) -> NoReturn:
    writer.send(LoadFailed(error.message))
    writer.drain(timeout_s=5.0)
    exit_now(EXIT_LOAD_FAILED)


def _serve(loop: EngineLoop) -> None:
    try:
        while True:
            loop.run_once()
    except Exception:
        _log.critical("engine loop failed; its jobs go to other workers", exc_info=True)
        exit_now(EXIT_ENGINE_FAILED)


def _card(arguments: argparse.Namespace, model: LoadedModel, engine: Engine) -> ModelCard:
    return ModelCard(
        id=model.name,
        context_tokens=model.context_tokens,
        created_s=int((model.path / "config.json").stat().st_mtime),
        position=arguments.position,
        vocab_size=model.vocab_size,
        max_rows=engine.max_rows,
        kv_budget_tokens=engine.kv_budget_tokens,
        details={
            "model_type": str(model.config.get("model_type", "")),
            "dtype": str(model.dtype).removeprefix("mlx.core."),
        },
    )


if __name__ == "__main__":
    main()
