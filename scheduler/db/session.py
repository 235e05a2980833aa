"""The SQL database of one process: its engine, its sessions, and what its failures mean to a user.

SQLite (WAL, one file in SPILLWAY_HOME) by default, PostgreSQL by SPILLWAY_DATABASE_URL. Every process that touches
SQL makes one Database and closes it at its end; schema.py brings the tables up to date before.
"""

from __future__ import annotations

import errno
from typing import Any

from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlmodel.ext.asyncio.session import AsyncSession

from scheduler.errors import StartupError
from scheduler.settings import Settings

LOCK_WAIT_S = 10.0


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


def startup_error(error: Exception, settings: Settings) -> StartupError:
    """The one line that says why the database cannot be used and what to do about it."""
    url = make_url(settings.sql_url)
    where = url.database or "memory" if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    text = str(cause).strip().partition("\n")[0] or type(cause).__name__
    if is_disk_full(error):
        return StartupError(
            f"The disk is full: the database {where} cannot be written. Free some space and start again."
        )
    if "file is not a database" in text:
        return StartupError(f"{where} is not an SQLite database. Move it away, or set another SPILLWAY_HOME.")
    if "readonly database" in text or "unable to open" in text or isinstance(cause, PermissionError):
        return StartupError(f"The database {where} cannot be opened for writing: {text}. Check its owner and mode.")
    if url.get_backend_name() == "postgresql":
        return StartupError(f"The database {where} cannot be used: {text}. Check SPILLWAY_DATABASE_URL and the server.")
    return StartupError(f"The database {where} cannot be used: {text}.")


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space, be it SQLite, PostgreSQL (53100) or the file system that says so."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}:
        return True
    return "database or disk is full" in str(cause) or getattr(cause, "sqlstate", None) == "53100"
