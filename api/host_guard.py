"""Keeps web pages away from an open API on loopback: DNS rebinding by the Host header, drive-by pages by Origin.

Without a key nothing else tells the owner's own programs from a page in the owner's browser. With keys in use the
guard stands aside. ASGI middleware, outside every route but the probes.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from api.auth import is_loopback
from api.errors import problem_of
from api.responses import problem_response
from scheduler.errors import CapacityError, Forbidden, SpillwayError
from scheduler.settings import Settings

UNGUARDED_PATHS = frozenset({"/livez", "/readyz"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


class HostGuard:
    """Answers 403 to foreign Host and Origin headers while the API is open."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._hosts = _listed(settings.allowed_hosts)
        self._origins = _listed(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in UNGUARDED_PATHS:
            error = await self._refusal(scope)
            if error is not None:
                await problem_response(problem_of(error))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _refusal(self, scope: Scope) -> SpillwayError | None:
        objection = self._objection(scope)
        if objection is None:
            return None
        try:
            return objection if await scope["app"].state.services.authenticator.is_open() else None
        except CapacityError as error:
            return error

    def _objection(self, scope: Scope) -> Forbidden | None:
        server = scope.get("server")
        port = None if server is None else server[1]
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
        for host in hosts:
            if not self._host_allowed(host.lower(), port):
                return Forbidden(
                    f"Host '{host[:80]}' is not this machine. This API is open, so it answers to loopback names only; "
                    "add the host to SPILLWAY_ALLOWED_HOSTS, or create an API key."
                )
        for origin in origins:
            if not self._origin_allowed(origin.lower(), port):
                return Forbidden(
                    f"Origin '{origin[:80]}' may not use this open API; add it to SPILLWAY_ALLOWED_ORIGINS."
                )
        return None

    def _host_allowed(self, host: str, port: int | None) -> bool:
        if host in self._hosts:
            return True
        name, given = _split(host)
        return name is not None and (name in self._hosts or (is_loopback(name) and given in (None, port)))

    def _origin_allowed(self, origin: str, port: int | None) -> bool:
        if origin in self._origins or "*" in self._origins:
            return True
        scheme, separator, authority = origin.partition("://")
        if not separator or scheme not in _DEFAULT_PORTS:
            return False
        if authority in self._hosts:
            return True
        name, given = _split(authority)
        return name is not None and is_loopback(name) and (given or _DEFAULT_PORTS[scheme]) == port


def _split(authority: str) -> tuple[str | None, int | None]:
    """Name and port of `name[:port]`; name None where it is malformed."""
    try:
        parts = urlsplit(f"//{authority}")
        return (parts.hostname if parts.netloc == authority and parts.username is None else None), parts.port
    except ValueError:
        return None, None


def _listed(text: str) -> frozenset[str]:
    return frozenset(item.strip().lower() for item in text.split(",") if item.strip())
