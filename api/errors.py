"""The one map from errors to HTTP: status, wire type and code, retry headers; and the bodies of the wire dialects.

Routes raise classes of scheduler/errors.py (or the parsers' BadParameter); handlers and streams ask `problem_of`.
Another dialect (Anthropic, RFC 9457) is another function from Problem to bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import msgspec

from api.protocols.parameters import BadParameter
from scheduler.errors import (
    AuthenticationRequired,
    BatchConflict,
    BatchNotFound,
    BodyTooLarge,
    CapacityError,
    ClientError,
    DeadlineExceeded,
    FileNotFound,
    Forbidden,
    IdempotencyMismatch,
    InvalidRequest,
    JobCancelled,
    JobConflict,
    JobNotFound,
    QueueFull,
    ScheduleNotFound,
    SpillwayError,
    StorageFull,
    TooManyBatches,
    UnknownModel,
    WebhookConflict,
    WebhookNotFound,
    WorkerError,
)

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]

# The OpenAI SDK gives up at once on a longer Retry-After than 120 s; longer waits are announced as "do not retry".
MAX_RETRY_AFTER_S = 60.0
DEFAULT_RETRY_AFTER_S = 1.0


class UnsupportedEncoding(ClientError):
    """The body's Content-Encoding cannot be read."""

    code = "unsupported_content_encoding"


class RequestTimeout(ClientError):
    """The client stopped sending its body."""

    code = "request_timeout"


class EventsExpired(ClientError):
    """The job is known, its events are no longer kept."""

    code = "job_events_expired"


class ResultExpired(ClientError):
    """The job is known, its answer, or what a retry needs, is no longer kept."""

    code = "job_result_expired"


class PoolNotFound(ClientError):
    """No worker offers this pool and no job waits in it."""

    code = "pool_not_found"


class ClientGone(ClientError):
    """The client closed its connection; nobody reads the answer."""

    code = "client_closed_request"


@dataclass(frozen=True, slots=True)
class Rule:
    """How a class of errors looks on the wire; its `code` is the error's own, or none where that says nothing."""

    status: int
    type: ErrorType
    retry: Literal["client decides", "after", "never"] = "client decides"
    silent_code: bool = False


# The nearest class along the error's MRO decides.
_RULES: dict[type[SpillwayError], Rule] = {
    ClientError: Rule(400, "invalid_request_error"),
    InvalidRequest: Rule(400, "invalid_request_error", silent_code=True),
    UnknownModel: Rule(404, "invalid_request_error"),
    BodyTooLarge: Rule(413, "invalid_request_error"),
    UnsupportedEncoding: Rule(415, "invalid_request_error"),
    RequestTimeout: Rule(408, "invalid_request_error"),
    JobNotFound: Rule(404, "invalid_request_error"),
    FileNotFound: Rule(404, "invalid_request_error"),
    BatchNotFound: Rule(404, "invalid_request_error"),
    WebhookNotFound: Rule(404, "invalid_request_error"),
    WebhookConflict: Rule(409, "invalid_request_error", retry="never"),
    ScheduleNotFound: Rule(404, "invalid_request_error"),
    BatchConflict: Rule(409, "invalid_request_error", retry="never"),
    EventsExpired: Rule(410, "invalid_request_error"),
    ResultExpired: Rule(410, "invalid_request_error"),
    PoolNotFound: Rule(404, "invalid_request_error"),
    ClientGone: Rule(499, "invalid_request_error"),
    JobConflict: Rule(409, "invalid_request_error", retry="never"),
    IdempotencyMismatch: Rule(422, "invalid_request_error"),
    AuthenticationRequired: Rule(401, "invalid_request_error"),
    Forbidden: Rule(403, "invalid_request_error"),
    QueueFull: Rule(429, "rate_limit_error", retry="after"),
    TooManyBatches: Rule(429, "rate_limit_error", retry="after"),
    StorageFull: Rule(507, "server_error", retry="never"),
    CapacityError: Rule(503, "server_error", retry="after"),
    DeadlineExceeded: Rule(504, "server_error", retry="never"),
    JobCancelled: Rule(409, "invalid_request_error", retry="never"),
    WorkerError: Rule(500, "server_error", retry="never"),
    SpillwayError: Rule(500, "server_error"),
}
_DEFAULT_PARAMS = {"model_not_found": "model", "context_length_exceeded": "messages"}


@dataclass(frozen=True, slots=True)
class Problem:
    """An error ready for any dialect; `headers` say when to come again."""

    status: int
    type: ErrorType
    code: str | None
    message: str
    param: str | None
    headers: dict[str, str]


def problem_of(error: SpillwayError) -> Problem:
    """The HTTP form of an error."""
    rule = next(_RULES[kind] for kind in type(error).__mro__ if kind in _RULES)
    code = error.reason if isinstance(error, BadParameter) else None if rule.silent_code else error.code
    param = _DEFAULT_PARAMS.get(error.code) if error.param is None else error.param
    return Problem(rule.status, rule.type, code, error.message, param, _retry_headers(rule, error.retry_after_s))


def plain_problem(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> Problem:
    """A problem that no error class stands for: an unknown URL, a wrong method, a bug."""
    kind: ErrorType = "server_error" if status >= 500 else "invalid_request_error"
    return Problem(status, kind, code, message, None, {} if headers is None else headers)


def openai_body(problem: Problem) -> bytes:
    """`{"error": {message, type, param, code}}`, all four keys always."""
    error = {"message": problem.message, "type": problem.type, "param": problem.param, "code": problem.code}
    return msgspec.json.encode({"error": error})


def openai_stream_error(problem: Problem) -> bytes:
    """The event that ends an OpenAI stream which failed after its 200."""
    return b"data: " + openai_body(problem) + b"\n\n"


def _retry_headers(rule: Rule, retry_after_s: float | None) -> dict[str, str]:
    if rule.retry == "client decides":
        return {}
    if rule.retry == "never":
        return {"x-should-retry": "false"}
    wait_s = DEFAULT_RETRY_AFTER_S if retry_after_s is None else retry_after_s
    headers = {"retry-after": str(max(1, math.ceil(min(wait_s, MAX_RETRY_AFTER_S))))}
    if wait_s > MAX_RETRY_AFTER_S:
        headers["x-should-retry"] = "false"
    return headers
