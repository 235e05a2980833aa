"""The `spillway` command. Each module is one group of commands; app.py names them all and imports them when asked."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point: an error that a user may meet is one line and exit status 1."""
    from scheduler.errors import SpillwayError

    try:
        from api.cli.app import app

        app()
    except SpillwayError as error:
        from scheduler.telemetry import redact

        sys.exit(f"spillway: {redact(error.message)}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `spillway jobs | head`
        sys.exit(0)
    finally:
        _let_go_of_output()


def _let_go_of_output() -> None:
    """What is still buffered may have no reader: a closed pipe or terminal, which must not become the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
