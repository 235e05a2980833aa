"""The single processes, for a Procfile, compose or another machine: `spillway api | scheduler | worker | migrate`."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from rich.console import Console

from scheduler.errors import StartupError
from scheduler.settings import Settings
from scheduler.telemetry import get_logger


def run_module(module: str, *arguments: str) -> NoReturn:
    """Become `python -m module …`: same process id, so that signals and exit statuses are its own."""
    os.environ["PYTHONSAFEPATH"] = "1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - our own interpreter


def run_api(settings: Settings) -> None:
    """The HTTP server, until a signal."""
    from api.main import serve

    try:
        serve(settings)
    except StartupError as error:
        if sys.stderr.isatty():
            raise
        get_logger(__name__).critical(error.message)
        sys.exit(1)


def run_scheduler() -> NoReturn:
    """The control plane, until a signal."""
    from api.dialect import HttpDialect
    from scheduler.main import main

    sys.exit(main(HttpDialect()))


def run_migrate(settings: Settings) -> None:
    """Bring the tables to this version's revision."""
    from scheduler.db.schema import migrate

    Console(highlight=False).print(f"The database is at revision {migrate(settings)}.")
