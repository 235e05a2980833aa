"""The SQL database of one process: its engine, its sessions, and what its failures mean to a user.

SQLite (WAL, one file in SPILLWAY_HOME) by default, PostgreSQL by SPILLWAY_DATABASE_URL. Every process that touches
SQL makes one Database and closes it at its end; schema.py brings the tables up to date before.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlmodel.ext.asyncio.session import AsyncSession

from scheduler.errors import StartupError
from scheduler.settings import Settings

LOCK_WAIT_S = 10.0
POSTGRES_DISK_FULL = "53100"


class Database:
    """One engine and its sessions; coroutines of one event loop share it."""

    def __init__(self, settings: Settings) -> None:
        self.engine = make_engine(settings)
        self._sessions = async_sessionmaker(self.engine, class_=AsyncSession, expire_on_commit=False)

    def session(self) -> AsyncSession:
        """A session to use as `async with`; commit what you write."""
        return self._sessions()

    async def close(self) -> None:
        await self.engine.dispose()


def make_engine(settings: Settings) -> AsyncEngine:
    """An async engine with bounded waits. Raises StartupError where SPILLWAY_DATABASE_URL is not usable."""
    url = _checked_url(settings.sql_url)
    if url.get_backend_name() == "postgresql":
        return create_async_engine(
            url,
            pool_size=5,
            max_overflow=5,
            pool_timeout=LOCK_WAIT_S,
            pool_pre_ping=True,
            connect_args={"timeout": 10, "command_timeout": 60, "server_settings": {"application_name": "spillway"}},
        )
    engine = create_async_engine(url, connect_args={"timeout": LOCK_WAIT_S})
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "invalidate", _let_go_of_lock)
    return engine


def _checked_url(text: str) -> URL:
    try:
        url = make_url(text)
        known = url.drivername in {"sqlite+aiosqlite", "postgresql+asyncpg"}
    except (ArgumentError, ValueError):  # not chained: their text repeats the URL, password and all
        raise StartupError("SPILLWAY_DATABASE_URL is not a database URL like postgresql://user@host/name") from None
    if not known:
        raise StartupError(
            f"SPILLWAY_DATABASE_URL: {url.drivername!r} is not supported; use sqlite:// or postgresql://"
        )
    return url


def _prepare_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={int(LOCK_WAIT_S * 1000)}", "journal_mode=WAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _let_go_of_lock(connection: Any, _record: object, _error: object) -> None:
    """Roll back what a cancelled task began: closed with rows of a RETURNING unread, SQLite would keep its lock."""
    with contextlib.suppress(sqlite3.Error, ValueError):
        connection.rollback()


def startup_error(error: Exception, settings: Settings) -> StartupError:
    """The one line that says why the database cannot be used and what to do about it."""
    return StartupError(explain(error, settings))


def explain(error: Exception, settings: Settings) -> str:
    """One line on a failed statement or connection, without credentials: what happened, where, what to do."""
    url = make_url(settings.sql_url)
    is_sqlite = url.get_backend_name() == "sqlite"
    where = url.database or "in memory" if is_sqlite else url.render_as_string(hide_password=True)
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    text = str(cause).strip().partition("\n")[0] or type(cause).__name__
    if _is_disk_full(cause, Path(where).parent if is_sqlite else None):
        return f"The disk is full: the database {where} cannot be written. Free some space and start again."
    if "file is not a database" in text:
        return f"{where} is not an SQLite database. Move it away, or set another SPILLWAY_HOME."
    if "readonly database" in text or "unable to open" in text or isinstance(cause, PermissionError):
        return f"The database {where} cannot be opened for writing: {text}. Check its owner and mode."
    if "database is locked" in text:
        return f"The database {where} was locked by another program for {LOCK_WAIT_S:.0f} s. End that program first."
    hint = "" if is_sqlite else " Check SPILLWAY_DATABASE_URL and the server."
    return f"The database {where} cannot be used: {text}.{hint}"


def _is_disk_full(cause: BaseException, folder: Path | None) -> bool:
    if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}:
        return True
    if "database or disk is full" in str(cause) or getattr(cause, "sqlstate", None) == POSTGRES_DISK_FULL:
        return True
    # Where even the shared-memory file of WAL finds no room, SQLite says no more than "disk I/O error".
    return "disk I/O error" in str(cause) and folder is not None and shutil.disk_usage(folder).free < 2**20


def is_about_a_value(error: DBAPIError) -> bool:
    """Data and integrity errors: trying again changes nothing. asyncpg's are told by their SQLSTATE alone."""
    return is_unstorable(error) or isinstance(error, IntegrityError) or _sqlstate_class(error) == "23"


def is_unstorable(error: DBAPIError) -> bool:
    """Data errors: a value that no column takes, such as text with a NUL on PostgreSQL."""
    return isinstance(error, DataError) or _sqlstate_class(error) == "22"


def _sqlstate_class(error: DBAPIError) -> str:
    code = getattr(error.orig, "sqlstate", None)
    return code[:2] if isinstance(code, str) else ""
