"""The seam between the wire protocols, which live in `api`, and the control plane, which stores and batches requests.

The process that starts the scheduler hands it a Dialect (`api.dialect`), so that `scheduler` imports no protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from scheduler.errors import SpillwayError
from scheduler.job import Priority
from scheduler.request import InferenceRequest, Usage
from scheduler.tokens import ChoiceDelta


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A request body, understood. `priority` is what the body itself asks for."""

    request: InferenceRequest
    priority: Priority
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished job: everything a response body says. `choices` are whole, by index; `model` is the pool's name."""

    job_id: str
    model: str
    priority: Priority
    choices: tuple[ChoiceDelta, ...]
    usage: Usage


class Dialect(Protocol):
    """Bodies of the endpoints that may be jobs. Pure and thread-safe."""

    @property
    def endpoints(self) -> frozenset[str]:
        """The paths that can be asked for, as `/v1/chat/completions`."""
        ...

    def parse(self, endpoint: str, body: bytes, fallback_seed: int) -> ParsedCall:
        """A body of one of `endpoints`; raises ClientError subclasses. `fallback_seed` where the client gave none."""
        ...

    def render(self, endpoint: str, request: InferenceRequest, answer: Answer) -> bytes:
        """The response body that the endpoint would have sent."""
        ...

    def render_error(self, endpoint: str, error: SpillwayError) -> tuple[int, bytes]:
        """HTTP status and body that the endpoint would have sent."""
        ...
