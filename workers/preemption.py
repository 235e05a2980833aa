"""Which batch jobs a worker is about to hand back for higher work, and whether the room that this made is there yet.

    over ──begin(named)──► handing back ──end(last)──► settling ──room grew, or 0.5 s──► over

Asked by the claim loop of an incarnation (may I name more victims?), carried out by its deliver loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from workers.backend import Capacity

_SETTLE_S = 0.5


class Preemption:
    """A backend's account of its KV cache lags behind its cancels: without this, each claim would name more jobs."""

    def __init__(self) -> None:
        self._named: set[str] = set()
        self._room_before: Capacity | None = None
        self._settled_at_s = 0.0

    @property
    def named(self) -> tuple[str, ...]:
        """Jobs to hand back now."""
        return tuple(self._named)

    @property
    def settling(self) -> bool:
        """Whether room was made that may not show yet."""
        return self._room_before is not None

    def begin(self, job_ids: Iterable[str], room: Capacity) -> None:
        """A claim named these jobs, made with this room."""
        self._named.update(job_ids)
        self._room_before = room
        self._settled_at_s = time.monotonic() + _SETTLE_S

    def end(self, job_id: str) -> None:
        """This job was handed back, or is gone."""
        self._named.discard(job_id)

    def is_over(self, room: Capacity) -> bool:
        """Whether further jobs may be named."""
        before = self._room_before
        if before is None:
            return True
        grew = room.rows > before.rows and room.kv_tokens > before.kv_tokens
        if self._named or not (grew or time.monotonic() >= self._settled_at_s):
            return False
        self._room_before = None
        return True
