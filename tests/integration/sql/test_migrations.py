"""Bringing a database up to date: at once from several processes, over wrecks, and the line that says why not."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect, text

from migrations import VERSION_TABLE
from scheduler.db.models import Table
from scheduler.db.schema import migrate, schema_differences
from scheduler.db.session import Database, startup_error
from scheduler.errors import StartupError
from scheduler.settings import Settings


async def _execute(settings: Settings, *statements: str) -> None:
    database = Database(settings)
    async with database.engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))
    await database.close()


async def _tables(settings: Settings) -> set[str]:
    database = Database(settings)
    async with database.engine.connect() as connection:
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    await database.close()
    return set(names)


def test_migrations_make_exactly_the_tables_of_the_models(settings: Settings) -> None:
    revision = migrate(settings)
    assert migrate(settings) == revision
    assert schema_differences(settings) == []
    assert asyncio.run(_tables(settings)) == {*Table.metadata.tables, VERSION_TABLE}


def test_a_table_that_differs_from_the_models_is_reported(settings: Settings) -> None:
    migrate(settings)
    asyncio.run(_execute(settings, "ALTER TABLE api_keys ADD COLUMN forgotten INTEGER"))
    assert any("forgotten" in line for line in schema_differences(settings))


def test_processes_that_start_at_once_migrate_once(settings: Settings) -> None:
    environment = {**os.environ, "SPILLWAY_HOME": str(settings.home)}
    if settings.database_url is not None:
        environment["SPILLWAY_DATABASE_URL"] = settings.database_url
    command = [sys.executable, "-m", "migrations", "upgrade"]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, outputs
    assert schema_differences(settings) == []


def test_a_database_of_a_newer_version_is_refused_and_left_alone(migrated: Settings) -> None:
    asyncio.run(_execute(migrated, f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(StartupError, match=r"written by a newer version of Spillway .*9999.* is not known") as refusal:
        migrate(migrated)
    assert "\n" not in refusal.value.message
    assert schema_differences(migrated) == []


def test_a_migration_that_fails_leaves_nothing_behind(settings: Settings) -> None:
    asyncio.run(_execute(settings, "CREATE TABLE finished_jobs (id INTEGER)"))
    with pytest.raises(StartupError):
        migrate(settings)
    assert asyncio.run(_tables(settings)) == {"finished_jobs"}
    asyncio.run(_execute(settings, "DROP TABLE finished_jobs"))
    migrate(settings)
    assert schema_differences(settings) == []


def test_only_its_owner_reads_the_database_file(sqlite_settings: Settings) -> None:
    migrate(sqlite_settings)
    assert (sqlite_settings.home / "spillway.db").stat().st_mode & 0o777 == 0o600


def test_sqlite_is_set_up_for_many_processes(sqlite_settings: Settings) -> None:
    migrate(sqlite_settings)

    async def pragmas() -> dict[str, Any]:
        database = Database(sqlite_settings)
        async with database.engine.connect() as connection:
            names = ("journal_mode", "busy_timeout", "foreign_keys")
            found = {name: (await connection.execute(text(f"PRAGMA {name}"))).scalar() for name in names}
        await database.close()
        return found

    assert asyncio.run(pragmas()) == {"journal_mode": "wal", "busy_timeout": 10_000, "foreign_keys": 1}


def test_a_file_that_is_no_database_is_named(sqlite_settings: Settings) -> None:
    (sqlite_settings.home / "spillway.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StartupError, match=r"spillway\.db is not an SQLite database"):
        migrate(sqlite_settings)


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("postgresql://u:hunter2@127.0.0.1:1/x", "cannot be used"),
        ("mysql://u:hunter2@h/x", "'mysql' is not supported"),
        ("no url, hunter2", "is not a database URL"),
    ],
)
def test_a_database_out_of_reach_is_one_line_without_the_password(tmp_path: Path, url: str, line: str) -> None:
    with pytest.raises(StartupError, match=line) as refusal:
        migrate(Settings(home=tmp_path, database_url=url))
    assert "hunter2" not in refusal.value.message and "\n" not in refusal.value.message


def test_sqlites_own_full_disk_error_is_understood(sqlite_settings: Settings) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (x)")
    connection.execute("PRAGMA max_page_count=2")
    with pytest.raises(sqlite3.OperationalError) as full:
        connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
    connection.close()
    assert startup_error(full.value, sqlite_settings).message.startswith("The disk is full")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Generator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, timeout=10, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root with CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=10)


def test_a_full_disk_is_one_clear_line(tiny_disk: Path) -> None:
    with pytest.raises(StartupError, match=r"^The disk is full: the database .* Free some space") as refusal:
        migrate(Settings(home=tiny_disk))
    assert "\n" not in refusal.value.message
