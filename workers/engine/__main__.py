"""The engine process: `python -m workers.engine --model REF`; workers/local.py starts it and speaks protocol.py to it.

The main thread is the engine thread (engine_loop.py). Beside it: intake (reads and tokenizes), frame writer, watchdog.
SIGINT and SIGTERM are ignored: a service manager sends them to every process, and the worker decides. The worker ends
this process by closing its stdin.
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import NoReturn

from scheduler.errors import StartupError
from scheduler.settings import Settings, load_settings
from scheduler.telemetry import configure
from workers.engine import kernel_header
from workers.engine.frame_writer import FrameWriter
from workers.engine.model_files import resolve
from workers.engine.protocol import LoadFailed, Loading
from workers.engine.watchdog import EXIT_PARENT_GONE, Watchdog, end_with_any_thread, exit_now, take_children_along

EXIT_LOAD_FAILED = 2
_STDIN_FD = 0


def main() -> None:
    """Find the model's files, then serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    take_children_along()
    end_with_any_thread()
    arguments = _arguments()
    settings = load_settings()
    writer = FrameWriter(_take_stdout(), on_gone=lambda: exit_now(EXIT_PARENT_GONE))
    configure(settings, "engine")
    watchdog = Watchdog(_STDIN_FD, settings.engine_hang_s)
    watchdog.start()
    writer.start()
    try:
        _serve(arguments, settings, writer, watchdog)
    except StartupError as error:
        writer.send(LoadFailed(error.message))
        writer.drain(timeout_s=5.0)
        exit_now(EXIT_LOAD_FAILED)


def _serve(arguments: argparse.Namespace, settings: Settings, writer: FrameWriter, watchdog: Watchdog) -> NoReturn:
    path = resolve(arguments.model, settings, lambda message: writer.send(Loading(message)))
    kernel_header.precompile()
    from workers.engine.engine_loop import serve  # takes seconds, and a model that is not there needs none of it

    serve(path, arguments.model, arguments.position, settings, writer, watchdog)


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


if __name__ == "__main__":
    main()
