"""Ends of jobs that no worker writes: cancelled, overdue, lost. The Lua scripts carry them as a table, `$ends`."""

from __future__ import annotations

from scheduler.job import JobState
from scheduler.tokens import Failed, encode_event

# By why a job ended, as the scripts call it: state, error code, message.
_ENDS = {
    "cancelled": (JobState.CANCELLED, "cancelled", "The job was cancelled."),
    "expired": (JobState.EXPIRED, "deadline_exceeded", "The job's deadline passed before it was done."),
    "lost": (
        JobState.FAILED,
        "worker_lost",
        "The job's worker died too often while it ran; it is kept as a dead letter for a day.",
    ),
    "timeout": (
        JobState.EXPIRED,
        "queue_timeout",
        "The job waited for a worker longer than the queue keeps one; nothing of it was run.",
    ),
}


def lua_ends() -> str:
    """The table as Lua source, terminal events included."""
    return "{ " + ", ".join(f"{why} = {_lua_end(*end)}" for why, end in _ENDS.items()) + " }"


def _lua_end(state: JobState, code: str, message: str) -> str:
    payload = encode_event(Failed(code=code, message=message))
    words = {"state": state.value.encode(), "code": code.encode(), "message": message.encode(), "payload": payload}
    return "{ " + ", ".join(f"{name} = {_lua_text(word)}" for name, word in words.items()) + " }"


def _lua_text(value: bytes) -> str:
    """A Lua string literal; Lua 5.1 knows bytes as decimals."""
    plain = {byte for byte in range(32, 127) if byte not in b"'\\"}
    return "'" + "".join(chr(byte) if byte in plain else f"\\{byte:03d}" for byte in value) + "'"
