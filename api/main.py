"""The API application: its layers, routes, error handlers and lifespan; `serve` is the API process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

import uvloop
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from starlette.exceptions import HTTPException

from api import server
from api.drain import Drain
from api.errors import plain_problem, problem_of
from api.host_guard import HostGuard
from api.metrics import ApiMetrics
from api.protocols.parameters import BadParameter, check_text
from api.request_trace import RequestTrace
from api.responses import problem_response
from api.routes import (
    admin,
    batches,
    chat,
    dead_letters,
    files,
    health,
    job_events,
    job_submission,
    jobs,
    models,
    queues,
    schedules,
    webhooks,
)
from api.services import open_services
from scheduler import telemetry
from scheduler.db.schema import migrate
from scheduler.db.session import is_unstorable
from scheduler.errors import CapacityError, SpillwayError
from scheduler.settings import Settings
from scheduler.telemetry import get_logger

log = get_logger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application. Entering its lifespan connects; leaving it disconnects."""
    metrics = ApiMetrics()
    drain = Drain()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings, metrics, drain) as services:
            app.state.services = services
            yield

    app = FastAPI(
        lifespan=lifespan,
        title="Spillway",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        dependencies=[Depends(check_url_text)],
    )
    app.state.drain = drain
    app.add_middleware(HostGuard, settings=settings)
    app.add_middleware(RequestTrace, metrics=metrics)
    native = (jobs, job_submission, job_events, admin, queues, dead_letters, webhooks, schedules)
    for routes in (chat, models, files, batches, *native, health):
        app.include_router(routes.router)
    app.add_exception_handler(SpillwayError, _answer_error)
    app.add_exception_handler(SQLAlchemyError, _answer_database_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    return app


def serve(settings: Settings) -> None:
    """The API process, until SIGTERM or SIGINT. Raises StartupError in one line where it cannot start."""
    telemetry.configure(settings, "api")
    migrate(settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.run(create_app(settings), settings))


async def check_url_text(request: Request) -> None:
    """Ids and filters in a URL go to SQL and Redis, of which PostgreSQL takes no NUL. Raises BadParameter."""
    for name, text in (*request.path_params.items(), *request.query_params.multi_items()):
        check_text(name.replace("\0", "")[:64], name + text)


async def _answer_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, SpillwayError)
    return problem_response(problem_of(error))


async def _answer_database_error(_request: Request, error: Exception) -> Response:
    log.error("the database failed", error=str(error).partition("\n")[0])
    if isinstance(error, DBAPIError) and is_unstorable(error):
        return problem_response(problem_of(BadParameter("The database cannot store a value of this request.")))
    return problem_response(problem_of(CapacityError("The database cannot be read now.")))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    url = f"{request.method} {request.url.path[:200]}"
    headers = dict(error.headers or {})
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            return problem_response(plain_problem(404, f"Unknown request URL: {url}.", "unknown_url"))
        case HTTPStatus.METHOD_NOT_ALLOWED:
            message = f"Not allowed method: {url}. Allowed: {headers.get('Allow', headers.get('allow', 'another'))}."
            return problem_response(plain_problem(405, message, "method_not_allowed", headers))
        case status:
            return problem_response(plain_problem(status, str(error.detail), headers=headers))


async def _answer_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    return problem_response(
        problem_of(BadParameter(f"Invalid '{param}': {first['msg']}.", param=param, reason="invalid_value"))
    )
