"""Every test with `settings` runs on SQLite and on PostgreSQL, each time in a fresh database."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import asyncpg
import pytest

from scheduler.db.schema import migrate
from scheduler.db.session import Database
from scheduler.settings import Settings
from tests.integration.sql.postgres_server import running_postgres


@pytest.fixture(scope="session")
def postgres_socket() -> Generator[Path]:
    with running_postgres() as folder:
        yield folder


async def _create_database(socket: Path, name: str) -> None:
    connection = await asyncpg.connect(host=str(socket), user="spillway", database="postgres")
    try:
        await connection.execute(f'CREATE DATABASE "{name}"')
    finally:
        await connection.close()


@pytest.fixture
def sqlite_settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def postgres_settings(tmp_path: Path, postgres_socket: Path) -> Settings:
    name = f"test_{secrets.token_hex(6)}"
    asyncio.run(_create_database(postgres_socket, name))
    return Settings(home=tmp_path, database_url=f"postgresql://spillway@/{name}?host={postgres_socket}")


@pytest.fixture(params=["sqlite", "postgres"])
def settings(request: pytest.FixtureRequest) -> Settings:
    return request.getfixturevalue(f"{request.param}_settings")


@pytest.fixture
def migrated(settings: Settings) -> Settings:
    migrate(settings)
    return settings


@pytest.fixture
async def database(migrated: Settings) -> AsyncGenerator[Database]:
    database = Database(migrated)
    yield database
    await database.close()
