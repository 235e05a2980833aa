"""The one transport of every request that this server makes on somebody's behalf: webhooks, providers, images.

It refuses what outbound_policy.py refuses, resolves names itself and connects to the very address that it checked (SNI
and certificate check keep the name), so that no second answer of the DNS can lead elsewhere. It follows no redirect,
reads no proxy from the environment, and bounds time and size, whatever client is on top of it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import httpcore2
import httpx2

from scheduler.outbound_policy import OutboundPolicy, is_public
from scheduler.settings import Settings

DNS_S = 5.0
MAX_ADDRESSES = 4  # of one name, tried in turn
REDIRECTS = frozenset({301, 302, 303, 307, 308})

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]  # host and port → addresses; raises OSError


class OutboundRefused(httpx2.TransportError):
    """The request was not sent, or its answer not taken, for our own rules; trying again changes nothing."""


@dataclass(frozen=True, slots=True)
class OutboundLimits:
    """Bounds of one request. `total_s` runs from the call to the last byte of the answer."""

    connect_s: float = 5.0
    read_s: float = 10.0
    total_s: float = 15.0
    body_bytes: int = 1 << 20
    connections: int = 100


async def system_resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a name, as the operating system has them."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # of the IDNA codec: a label that is empty or too long
        raise socket.gaierror(socket.EAI_NONAME, "it is no host name") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def outbound_client(
    settings: Settings,
    limits: OutboundLimits,
    *,
    resolve: Resolve = system_resolve,
    tls: ssl.SSLContext | None = None,
) -> httpx2.AsyncClient:
    """A client whose every request passes the guard; close it. `tls`: with other authorities than the system's."""
    transport = GuardedTransport(OutboundPolicy(settings), limits, resolve, tls)
    return httpx2.AsyncClient(transport=transport, trust_env=False, follow_redirects=False, timeout=None)


async def check_url(text: str, policy: OutboundPolicy, resolve: Resolve = system_resolve) -> str | None:
    """Why a URL would be refused if it were called now, without connecting; a name that does not resolve is fine."""
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        return f"it is not a URL: {error}"
    refusal = policy.refusal(url)
    if refusal is not None or policy.trusts(url):
        return refusal
    try:
        async with asyncio.timeout(DNS_S):
            addresses = await resolve(url.raw_host.decode("ascii"), url.port or 443)
    except OSError:  # TimeoutError too
        return None
    return None if any(map(is_public, addresses)) else f"'{url.host}' has no public address"


class GuardedTransport(httpx2.AsyncBaseTransport):
    """Two pools: one for the owner's origins, one whose connections go to public addresses only."""

    def __init__(
        self, policy: OutboundPolicy, limits: OutboundLimits, resolve: Resolve, tls: ssl.SSLContext | None
    ) -> None:
        self._policy = policy
        self._limits = limits
        context = httpx2.create_ssl_context() if tls is None else tls
        self._trusted = _transport(_PinnedBackend(resolve, public_only=False), limits, context)
        self._public = _transport(_PinnedBackend(resolve, public_only=True), limits, context)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        refusal = self._policy.refusal(request.url)
        if refusal is not None:
            raise OutboundRefused(f"{_shown(request.url)} is not called: {refusal}", request=request)
        self._prepare(request)
        transport = self._trusted if self._policy.trusts(request.url) else self._public
        ends_s = asyncio.get_running_loop().time() + self._limits.total_s
        try:
            async with asyncio.timeout_at(ends_s):
                response = await transport.handle_async_request(request)
        except TimeoutError:
            raise httpx2.ReadTimeout(f"no answer within {self._limits.total_s:g} s", request=request) from None
        refusal = self._refused_answer(response)
        if refusal is not None:
            await response.aclose()
            raise OutboundRefused(refusal, request=request)
        response.stream = _BoundedStream(cast(httpx2.AsyncByteStream, response.stream), self._limits, ends_s)
        return response

    async def aclose(self) -> None:
        await self._trusted.aclose()
        await self._public.aclose()

    def _prepare(self, request: httpx2.Request) -> None:
        limits = self._limits
        ours = {"connect": limits.connect_s, "read": limits.read_s, "write": limits.read_s, "pool": limits.connect_s}
        theirs: dict[str, float | None] = request.extensions.get("timeout", {})
        given = {name: theirs.get(name) for name in ours}
        timeout = {name: most if (wish := given[name]) is None else min(wish, most) for name, most in ours.items()}
        request.extensions = {"timeout": timeout}
        request.headers["accept-encoding"] = "identity"  # a compressed answer has no bound

    def _refused_answer(self, response: httpx2.Response) -> str | None:
        headers = response.headers
        if response.status_code in REDIRECTS:
            return f"the answer is a redirect ({response.status_code}), which is not followed; use its final URL"
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            return "the answer is compressed, which was not asked for"
        announced = headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > self._limits.body_bytes:
            return f"the answer is larger than {self._limits.body_bytes} bytes"
        return None


class _BoundedStream(httpx2.AsyncByteStream):
    """An answer's body within the limits of its request."""

    def __init__(self, stream: httpx2.AsyncByteStream, limits: OutboundLimits, ends_s: float) -> None:
        self._stream = stream
        self._limits = limits
        self._ends_s = ends_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        parts = aiter(self._stream)
        seen = 0
        while (part := await self._next(parts)) is not None:
            seen += len(part)
            if seen > self._limits.body_bytes:
                raise OutboundRefused(f"the answer is larger than {self._limits.body_bytes} bytes")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def _next(self, parts: AsyncIterator[bytes]) -> bytes | None:
        try:
            async with asyncio.timeout_at(self._ends_s):
                return await anext(parts, None)
        except TimeoutError:
            raise httpx2.ReadTimeout(f"the answer was not complete within {self._limits.total_s:g} s") from None


class _PinnedBackend(httpcore2.AsyncNetworkBackend):
    """Opens connections: resolves, checks, and connects to a checked address by number."""

    def __init__(self, resolve: Resolve, *, public_only: bool) -> None:
        self._resolve = resolve
        self._public_only = public_only
        self._network = cast(httpcore2.AsyncNetworkBackend, httpcore2.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore2's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + (DNS_S if timeout is None else timeout)
        addresses = await self._addresses(host, port, ends_s)
        failure: Exception = httpcore2.ConnectError(f"{host} has no address")
        for position, address in enumerate(addresses):
            share_s = (ends_s - loop.time()) / (len(addresses) - position)
            try:
                return await self._network.connect_tcp(address, port, max(share_s, 0.0), local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(self, path: str, timeout: float | None = None, socket_options: Any = None) -> Any:  # noqa: ASYNC109
        raise OutboundRefused("unix sockets are not called")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _addresses(self, host: str, port: int, ends_s: float) -> list[str]:
        try:
            async with asyncio.timeout_at(ends_s):
                found = await self._resolve(host, port)
        except TimeoutError:
            raise httpcore2.ConnectTimeout(f"the DNS did not answer for {host}") from None
        except OSError as error:
            raise httpcore2.ConnectError(f"{host} cannot be resolved: {error}") from error
        allowed = [address for address in found if not self._public_only or is_public(address)]
        if found and not allowed:
            raise OutboundRefused(f"{host} is not called: it has no public address")
        return allowed[:MAX_ADDRESSES]


def _transport(
    backend: httpcore2.AsyncNetworkBackend, limits: OutboundLimits, context: ssl.SSLContext
) -> httpx2.AsyncHTTPTransport:
    transport = httpx2.AsyncHTTPTransport(verify=context, trust_env=False)
    # httpx2 has no seam for a network backend; its pool is httpcore2's, which has one.
    transport._pool = httpcore2.AsyncConnectionPool(  # pyright: ignore[reportPrivateUsage]
        ssl_context=context, max_connections=limits.connections, keepalive_expiry=30.0, network_backend=backend
    )
    return transport


def _shown(url: httpx2.URL) -> str:
    """Without its userinfo, path and query: they may hold secrets."""
    return f"{url.scheme}://{url.raw_host.decode('ascii', 'replace')[:120]}"
