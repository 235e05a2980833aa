"""The running service as the commands see it: where it is, what it answers, and its errors as one line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import httpx2

from api.cli.event_stream import ServerEvent, read_events
from api.cli.home_lock import holder
from api.cli.preflight import address_of, is_loopback
from scheduler.errors import BY_CODE, ClientError, SpillwayError, from_code
from scheduler.settings import Settings

# Until the first byte the server may load, queue and prefill; it sends a keep-alive comment every 15 s.
_SILENCE_S = 60.0


class NotReachable(SpillwayError):
    """Nothing answers at the address."""

    code = "not_reachable"


class ApiClient:
    """Blocking calls, one at a time. Every failure is a SpillwayError."""

    def __init__(self, settings: Settings) -> None:
        self.url = service_url(settings)
        headers = {} if settings.api_key is None else {"authorization": f"Bearer {settings.api_key}"}
        own_machine = is_loopback(urlsplit(self.url).hostname or "")
        timeout = httpx2.Timeout(10.0, read=_SILENCE_S)
        self._http = httpx2.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=not own_machine)

    def close(self) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        return self._json("GET", path)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._json("POST", path, body)

    def send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """The status, below 400, and the JSON of an answer whose status says something."""
        with self._translated():
            answer = self._http.request(method, path, json=body, headers=headers)
        if answer.status_code >= httpx2.codes.BAD_REQUEST:
            raise _error(answer)
        try:
            return answer.status_code, answer.json()
        except ValueError as error:
            raise NotReachable(f"{self.url} answers, and not as Spillway does.") from error

    def upload(self, source: BinaryIO, filename: str, purpose: str) -> Any:
        """Store a file; it is read as it is sent."""
        with self._translated():
            answer = self._http.post("/v1/files", data={"purpose": purpose}, files={"file": (filename, source)})
        if answer.status_code >= httpx2.codes.BAD_REQUEST:
            raise _error(answer)
        return answer.json()

    def download(self, file_id: str, sink: BinaryIO) -> None:
        """Write a stored file's bytes as they come."""
        with self._translated(), self._http.stream("GET", f"/v1/files/{file_id}/content") as answer:
            if answer.status_code != httpx2.codes.OK:
                answer.read()
                raise _error(answer)
            for chunk in answer.iter_bytes():
                sink.write(chunk)

    @contextlib.contextmanager
    def stream(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[Iterator[ServerEvent]]:
        """The events of a streamed answer; leaving the block closes the connection, which cancels the work."""
        with self._translated(), self._http.stream(method, path, json=body, headers=headers) as answer:
            if answer.status_code != httpx2.codes.OK:
                answer.read()
                raise _error(answer)
            yield read_events(answer.iter_lines())

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self.send(method, path, body)[1]

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx2.ConnectError:
            raise NotReachable(f"Nothing answers at {self.url}. Start it with `spillway up`, or give --url.") from None
        except httpx2.TimeoutException:
            raise NotReachable(f"{self.url} did not answer in time.") from None
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise NotReachable(f"{self.url} is not an address like http://127.0.0.1:8000.") from error
        except httpx2.TransportError as error:
            raise NotReachable(f"The connection to {self.url} broke: {error}.") from error


def service_url(settings: Settings) -> str:
    """--url or SPILLWAY_URL, else the service running on this home, else where it would run. Without a path."""
    if settings.url is not None:
        return settings.url.rstrip("/").removesuffix("/v1")
    running = holder(settings.home)
    return running.address if running is not None else address_of(settings.host, settings.port)


def _error(answer: httpx2.Response) -> SpillwayError:
    try:
        said = json.loads(answer.content)["error"]
        code, message = str(said.get("code") or "internal_error"), str(said["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return NotReachable(
            f"The server answered {answer.status_code} {answer.reason_phrase}, and not as Spillway does."
        )
    if answer.status_code == httpx2.codes.UNAUTHORIZED:
        message += " Give --api-key or set SPILLWAY_API_KEY."
    if code not in BY_CODE and answer.is_client_error:  # a parser's own reason, as invalid_value
        return ClientError(message)
    return from_code(code, message)
