"""The error tree. Each class answers three questions: retry here? try the next target? whose fault is it?

    SpillwayError
    ├── ClientError            the request is at fault; never retried
    │   ├── InvalidRequest     └── UnsupportedOption, ContextLengthExceeded, UnknownModel, BodyTooLarge,
    │                              JobNotFound, JobConflict, IdempotencyMismatch, AuthenticationRequired, Forbidden,
    │                              FileNotFound, BatchNotFound, BatchConflict, WebhookNotFound, WebhookConflict,
    │                              ScheduleNotFound
    ├── CapacityError          nothing is wrong, there is no room now: QueueFull, TooManyBatches, NoModelYet,
    │                          PoolDraining, ShuttingDown, QueueUnavailable, StorageFull, VaultLocked
    ├── DeadlineExceeded       the job's own deadline passed; QueueTimeout: nobody came to it within the queue's TTL
    ├── JobCancelled           somebody with the right to do so ended it
    └── WorkerError            the worker is at fault: EngineFailure (this row), WorkerLost (crash), InternalError

`code` is the stable name: it is what a Failed event carries, what SQL keeps, and what api/errors.py maps to HTTP.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Fault = Literal["client", "server", "owner"]


class SpillwayError(Exception):
    """Base of every error that a user may meet. `message` says what happened, to what, and what to do."""

    code: ClassVar[str] = "internal_error"
    retry_here: ClassVar[bool] = False
    next_target: ClassVar[bool] = False
    fault: ClassVar[Fault] = "server"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class ClientError(SpillwayError):
    code = "invalid_request"
    fault = "client"


class InvalidRequest(ClientError):
    """A value is missing, of the wrong type or out of range; `param` is its dotted path."""


class UnsupportedOption(ClientError):
    """A known option that would change the output and cannot be honoured."""

    code = "unsupported_parameter"


class ContextLengthExceeded(ClientError):
    code = "context_length_exceeded"


class UnknownModel(ClientError):
    code = "model_not_found"


class BodyTooLarge(ClientError):
    code = "request_too_large"


class JobNotFound(ClientError):
    code = "job_not_found"


class JobConflict(ClientError):
    """The job is in a state that does not allow what was asked."""

    code = "job_conflict"


class IdempotencyMismatch(ClientError):
    """The same Idempotency-Key came with another body."""

    code = "idempotency_key_reused"


class FileNotFound(ClientError):
    code = "file_not_found"


class BatchNotFound(ClientError):
    code = "batch_not_found"


class WebhookNotFound(ClientError):
    """No endpoint, or no delivery, of this id."""

    code = "webhook_not_found"


class WebhookConflict(ClientError):
    """The delivery or endpoint is in a state that does not allow what was asked."""

    code = "webhook_conflict"


class ScheduleNotFound(ClientError):
    code = "schedule_not_found"


class BatchConflict(ClientError):
    """The batch is in a state that does not allow what was asked."""

    code = "batch_conflict"


class AuthenticationRequired(ClientError):
    code = "invalid_api_key"


class Forbidden(ClientError):
    """Known caller, not allowed: a foreign Host or Origin, a missing scope, a model outside the key's list."""

    code = "forbidden"


class CapacityError(SpillwayError):
    code = "overloaded"
    next_target = True


class QueueFull(CapacityError):
    code = "rate_limit_exceeded"


class TooManyBatches(CapacityError):
    """As many batches of the tenant are open as may be."""

    code = "open_batches_limit_exceeded"


class NoModelYet(CapacityError):
    """No worker serves anything: they still load, or none was started."""

    code = "no_model_yet"


class PoolDraining(CapacityError):
    """Its operator lets this pool run empty."""

    code = "pool_draining"


class StorageFull(CapacityError):
    """The disk has no room for a file."""

    code = "storage_full"


class ShuttingDown(CapacityError):
    code = "shutting_down"


class QueueUnavailable(CapacityError):
    """Redis cannot be reached or refuses writes."""

    code = "queue_unavailable"


class DeadlineExceeded(SpillwayError):
    code = "deadline_exceeded"
    fault = "owner"


class VaultLocked(CapacityError):
    """No key at hand opens a stored secret."""

    code = "vault_locked"


class QueueTimeout(DeadlineExceeded):
    """The job waited longer than the queue keeps one; it had no deadline of its own, or a later one."""

    code = "queue_timeout"


class JobCancelled(SpillwayError):
    code = "cancelled"
    fault = "client"


class WorkerError(SpillwayError):
    code = "worker_error"
    retry_here = True
    next_target = True


class EngineFailure(WorkerError):
    """This job's row failed inside the engine; its neighbours did not."""

    code = "engine_failure"


class WorkerLost(WorkerError):
    """The job's worker died too often while it ran."""

    code = "worker_lost"


class InternalError(WorkerError):
    code = "internal_error"
    retry_here = False


class StartupError(SpillwayError):
    """The process cannot start; `message` is the one line that the user sees."""

    code = "startup_failed"
    fault = "owner"


def _tree(root: type[SpillwayError]) -> dict[str, type[SpillwayError]]:
    found: dict[str, type[SpillwayError]] = {}
    for child in root.__subclasses__():
        found.update(_tree(child))
    found.setdefault(root.code, root)  # a base that shares its code with a leaf gives way
    return found


BY_CODE: dict[str, type[SpillwayError]] = _tree(SpillwayError)


def from_code(code: str, message: str, param: str | None = None) -> SpillwayError:
    """The error that a Failed event or a SQL row names; an unknown code becomes InternalError."""
    return BY_CODE.get(code, InternalError)(message, param=param)
