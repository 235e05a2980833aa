"""/livez, /readyz and /metrics: for supervisors, load balancers and Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from api.auth import require_principal
from api.responses import json_response
from api.services import Services
from scheduler.errors import SpillwayError

CHECK_S = 3.0
router = APIRouter()


@router.get("/livez")
async def live() -> Response:
    """The process answers."""
    return json_response({"status": "ok"})


@router.get("/readyz")
async def ready(request: Request) -> Response:
    """Whether a request would be served now; 503 names what is missing."""
    services: Services = request.app.state.services
    checks = {"redis": _redis, "database": _database, "models": _models, "accepting": _accepting}
    findings = await asyncio.gather(*(_finding(check, services) for check in checks.values()))
    found = dict(zip(checks, findings, strict=True))
    missing = [name for name, finding in found.items() if finding != "ok"]
    status = {"status": "not ready" if missing else "ready", "missing": missing, "checks": found}
    return json_response(status, 503 if missing else 200)


@router.get("/metrics", dependencies=[Depends(require_principal)])
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    services: Services = request.app.state.services
    return Response(await services.scrape.text(), media_type=CONTENT_TYPE_LATEST)


async def _finding(check: Callable[[Services], Awaitable[str]], services: Services) -> str:
    try:
        async with asyncio.timeout(CHECK_S):
            return await check(services)
    except TimeoutError:
        return f"no answer within {CHECK_S:g} s"
    except SpillwayError as error:
        return error.message
    except (RedisError, SQLAlchemyError, OSError) as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


async def _redis(services: Services) -> str:
    await services.redis.ping()  # pyright: ignore[reportGeneralTypeIssues]
    return "ok"


async def _database(services: Services) -> str:
    async with services.database.engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
    return "ok"


async def _models(services: Services) -> str:
    return "ok" if await services.fleet.workers() and await services.fleet.models() else "no worker serves a model yet"


async def _accepting(services: Services) -> str:
    return "shutting down" if services.drain.begun else "ok"
