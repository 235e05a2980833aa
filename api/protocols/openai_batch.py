"""OpenAI's Batch API on the wire: what POST /v1/batches asks for, and the batch object. Pure; called by routes/batches.

Beside OpenAI's members a batch may name a `webhook`, and its window may be any whole number of hours up to a week.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

from api.protocols.native_job import read_metadata
from api.protocols.parameters import BadParameter, check_range, check_text, decode_fields, decode_struct
from scheduler.batch import BatchRecord, LineCounts

MAX_WEBHOOK_CHARS = 2048
MAX_WINDOW_H = 168
MIN_FILE_LIFE_S = 3600
MAX_FILE_LIFE_S = 2_592_000
_WINDOW = re.compile(r"([1-9][0-9]{0,2})h")


class WireExpiry(msgspec.Struct):
    anchor: str
    seconds: int


class WireBatch(msgspec.Struct, kw_only=True):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: WireExpiry | None = None
    webhook: str | None = None


@dataclass(frozen=True, slots=True)
class BatchCall:
    """One parsed submission; `webhook` is an endpoint's id or URL."""

    input_file_id: str
    endpoint: str
    completion_window: str
    window_ms: int
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    output_expires_after_s: int | None = None
    webhook: str | None = None


def parse_batch(body: bytes, endpoints: frozenset[str]) -> BatchCall:
    """The submission in `body`; `endpoints` are those whose requests may be lines. Raises BadParameter."""
    decode_fields(body)
    wire = decode_struct(body, WireBatch)
    check_text("input_file_id", wire.input_file_id)
    if wire.endpoint not in endpoints:
        known = ", ".join(f"'{name}'" for name in sorted(endpoints))
        message = f"Invalid 'endpoint': '{wire.endpoint[:64]}' is not supported in batches. Supported: {known}."
        raise BadParameter(message, param="endpoint", reason="invalid_value")
    if wire.webhook is not None:
        check_text("webhook", wire.webhook, MAX_WEBHOOK_CHARS)
    expiry = wire.output_expires_after
    return BatchCall(
        input_file_id=wire.input_file_id,
        endpoint=wire.endpoint,
        completion_window=wire.completion_window,
        window_ms=_read_window(wire.completion_window),
        metadata=read_metadata(wire.metadata),
        output_expires_after_s=None if expiry is None else read_expiry("output_expires_after", expiry),
        webhook=wire.webhook,
    )


def read_expiry(param: str, expiry: WireExpiry) -> int:
    """Seconds after a file's creation. Raises BadParameter."""
    if expiry.anchor != "created_at":
        message = f"Invalid '{param}.anchor': the one supported anchor is 'created_at'."
        raise BadParameter(message, param=f"{param}.anchor", reason="invalid_value")
    check_range(f"{param}.seconds", expiry.seconds, MIN_FILE_LIFE_S, MAX_FILE_LIFE_S)
    return expiry.seconds


def batch_body(batch: BatchRecord, counts: LineCounts) -> dict[str, Any]:
    """The batch object; times are Unix seconds, null where not reached."""
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": _errors_body(batch),
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status.value,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_ms // 1000,
        "in_progress_at": _seconds(batch.in_progress_ms),
        "expires_at": batch.expires_ms // 1000,
        "finalizing_at": _seconds(batch.finalizing_ms),
        "completed_at": _seconds(batch.completed_ms),
        "failed_at": _seconds(batch.failed_ms),
        "expired_at": _seconds(batch.expired_ms),
        "cancelling_at": _seconds(batch.cancelling_ms),
        "cancelled_at": _seconds(batch.cancelled_ms),
        "request_counts": {"total": counts.total, "completed": counts.completed, "failed": counts.failed},
        "usage": _usage_body(batch),
        "metadata": batch.metadata,
    }


def _errors_body(batch: BatchRecord) -> dict[str, Any] | None:
    if not batch.errors:
        return None
    data = [{"code": e.code, "line": e.line, "message": e.message, "param": e.param} for e in batch.errors]
    return {"object": "list", "data": data}


def _usage_body(batch: BatchRecord) -> dict[str, Any] | None:
    if not batch.status.is_terminal:
        return None
    usage = batch.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _read_window(window: str) -> int:
    found = _WINDOW.fullmatch(window)
    if found is None or int(found[1]) > MAX_WINDOW_H:
        message = f"Invalid 'completion_window': expected '24h', or another number of hours from 1h to {MAX_WINDOW_H}h."
        raise BadParameter(message, param="completion_window", reason="invalid_value")
    return int(found[1]) * 3600 * 1000


def _seconds(moment_ms: int | None) -> int | None:
    return None if moment_ms is None else moment_ms // 1000
