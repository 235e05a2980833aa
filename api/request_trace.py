"""Outermost ASGI layer of a request: its id, the headers that every answer carries, its log line and its metrics.

Also the request's loop top: what no handler knew becomes a logged 500 in OpenAI's shape.
"""

from __future__ import annotations

import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import plain_problem
from api.metrics import ApiMetrics
from api.responses import problem_response
from scheduler.telemetry import get_logger, log_context

QUIET_PATHS = frozenset({"/livez", "/readyz", "/metrics"})
_CLIENT_ID = re.compile(rb"[\x21-\x7e]{1,512}")

log = get_logger(__name__)


class RequestTrace:
    """Gives each request an id, and follows its response from start to end."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = _Trace(scope, send)
        with log_context(request=trace.request_id):
            try:
                await self._app(scope, receive, trace.send)
            except Exception:
                log.exception("request failed", path=scope["path"], **trace.job())
                if trace.status is not None:
                    raise  # the response began; the server closes the connection
                problem = plain_problem(
                    500, f"The server failed on this request ({trace.request_id}).", "internal_error"
                )
                await problem_response(problem)(scope, receive, trace.send)
            finally:
                self._finish(scope, trace)

    def _finish(self, scope: Scope, trace: _Trace) -> None:
        route = getattr(scope.get("route"), "path", "other")
        status = 499 if trace.status is None else trace.status
        took_s = time.perf_counter() - trace.began
        self._metrics.request_ended(route, scope["method"], status, took_s)
        write = log.debug if scope["path"] in QUIET_PATHS else log.info
        write(
            "request",
            method=scope["method"],
            path=scope["path"][:200],
            status=status,
            ms=round(took_s * 1000, 1),
            **trace.job(),
        )


class _Trace:
    """One request's id and response status; `send` adds the headers when the response starts."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.request_id = f"req_{secrets.token_hex(12)}"
        self.status: int | None = None
        self.began = time.perf_counter()
        self._scope = scope
        self._send = send
        scope.setdefault("state", {})["request_id"] = self.request_id

    def job(self) -> dict[str, str]:
        job_id = self._scope["state"].get("job_id")
        return {} if job_id is None else {"job": job_id}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._headers(message)]
        await self._send(message)

    def _headers(self, message: Message) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", self.request_id.encode())]
        headers += [(b"spillway-job", job_id.encode()) for job_id in self.job().values()]
        served_by = self._scope["state"].get("served_by")
        if served_by is not None:
            headers.append((b"spillway-served-by", served_by.encode()))
        for name, value in self._scope["headers"]:
            if name == b"x-client-request-id" and _CLIENT_ID.fullmatch(value):
                headers.append((name, value))
        if not any(
            name == b"content-type" and value.startswith(b"text/event") for name, value in message.get("headers", ())
        ):
            took_ms = int((time.perf_counter() - self.began) * 1000)
            headers.append((b"openai-processing-ms", str(took_ms).encode()))
        return headers
