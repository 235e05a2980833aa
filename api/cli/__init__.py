"""The `spillway` command. Each module is one group of commands; app.py names them all and imports them when asked."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point: an error that a user may meet is one line and exit status 1."""
    from api.cli.app import app
    from scheduler.errors import SpillwayError

    try:
        app()
    except SpillwayError as error:
        from scheduler.telemetry import redact

        sys.exit(f"spillway: {redact(error.message)}")
    except BrokenPipeError:  # `spillway jobs | head`
        sys.stderr.close()
        sys.exit(0)
