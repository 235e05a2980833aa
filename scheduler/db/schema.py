"""Brings the tables to this version's revision. Every process that uses SQL calls `migrate` before it starts.

Two processes may start at once: a file lock (SQLite) or an advisory lock (PostgreSQL) lets one do the work and the
others find it done. A migration is one transaction on both, so a process killed in the middle leaves the old tables.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

import migrations
from scheduler.db.models import Table
from scheduler.db.session import make_engine, startup_error
from scheduler.errors import StartupError
from scheduler.settings import Settings

LOCK_TIMEOUT_S = 60.0
ADVISORY_LOCK = 0x5350_494C_4C57  # "SPILLW": one number for every Spillway that shares the database

T = TypeVar("T")

log = logging.getLogger(__name__)
logging.getLogger("alembic").setLevel(logging.WARNING)  # three lines at every start, however little there is to do


def migrate(settings: Settings) -> str:
    """Bring the database up to date and return its revision. Blocks: call it before the event loop runs.

    Raises StartupError in one line where the database is newer than this version, locked, full or out of reach.
    """
    return _on_connection(settings, _upgrade)


def revisions(settings: Settings) -> tuple[str | None, str]:
    """The database's revision, None where it is empty, and the one of this version; changes nothing."""
    return _on_connection(settings, _revisions)


def schema_differences(settings: Settings) -> list[str]:
    """What models.py has and the migrated database lacks, or the reverse; empty where they agree."""
    return _on_connection(settings, _compare)


def new_revision(settings: Settings, message: str) -> None:
    """Write migrations/versions/<number>_<message>.py with the difference between the database and models.py."""
    _on_connection(settings, lambda connection: _write_revision(_config(connection), message))


def _on_connection(settings: Settings, act: Callable[[Connection], T]) -> T:
    engine = make_engine(settings)
    try:
        with _file_lock(engine):
            return asyncio.run(_in_transaction(engine, act))
    except (SQLAlchemyError, OSError) as error:
        raise startup_error(error, settings) from error


async def _in_transaction(engine: AsyncEngine, act: Callable[[Connection], T]) -> T:
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _leave_begin_to_us)
        event.listen(engine.sync_engine, "begin", _begin_immediate)
    try:
        async with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                await connection.execute(text(f"SET LOCAL lock_timeout = '{int(LOCK_TIMEOUT_S)}s'"))
                await connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
            return await connection.run_sync(act)
    finally:
        await engine.dispose()


def _leave_begin_to_us(connection: Any, _record: object) -> None:
    # The sqlite3 module begins no transaction before DDL, so half a migration could stay; we begin it ourselves.
    connection.isolation_level = None


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _upgrade(connection: Connection) -> str:
    config = _config(connection)
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    current = set(_context(connection).get_current_heads())
    unknown = current - known
    if unknown:
        raise StartupError(
            f"The database {_name(connection)} was written by a newer version of Spillway (its revision "
            f"{min(unknown)} is not known here). Start that version, or set another SPILLWAY_HOME."
        )
    head = scripts.get_current_head() or ""
    if head not in current:
        command.upgrade(config, head)
        log.info("database brought up to revision %s", head)
    return head


def _revisions(connection: Connection) -> tuple[str | None, str]:
    head = ScriptDirectory.from_config(_config(connection)).get_current_head()
    return _context(connection).get_current_revision(), head or ""


def _compare(connection: Connection) -> list[str]:
    return [repr(item) for item in compare_metadata(_context(connection), Table.metadata)]


def _write_revision(config: Config, message: str) -> None:
    number = 1 + len(list(ScriptDirectory.from_config(config).walk_revisions()))
    command.revision(config, message, autogenerate=True, rev_id=f"{number:04d}")


def _context(connection: Connection) -> MigrationContext:
    return MigrationContext.configure(connection, opts={"version_table": migrations.VERSION_TABLE})


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _name(connection: Connection) -> str:
    return connection.engine.url.database or "in memory"


@contextlib.contextmanager
def _file_lock(engine: AsyncEngine) -> Generator[None]:
    """Hold `<database>.lock` while a file database is migrated; the file stays, as removing it would race."""
    path = engine.url.database
    if engine.dialect.name != "sqlite" or not path or path == ":memory:":
        yield
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    Path(path).touch(mode=0o600)  # it holds key hashes; SQLite gives its WAL the same mode
    with Path(f"{path}.lock").open("w") as file:
        _acquire(file.fileno(), path)
        yield


def _acquire(descriptor: int, path: str) -> None:
    give_up = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > give_up:
                raise StartupError(f"Another process has been migrating {path} for too long. End it first.") from error
            time.sleep(0.05)
