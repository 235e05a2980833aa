"""How long open requests may still run once the server was told to stop; one Drain per process."""

from __future__ import annotations

import time

from scheduler.errors import ShuttingDown


class Drain:
    """States: serving → draining (begun, time left) → over. Never goes back."""

    def __init__(self) -> None:
        self._over_at: float | None = None

    def begin(self, grace_s: float) -> None:
        """Requests that are open now may run for `grace_s` more seconds; a second call changes nothing."""
        if self._over_at is None:
            self._over_at = time.monotonic() + grace_s

    @property
    def begun(self) -> bool:
        return self._over_at is not None

    def check(self) -> None:
        """Raise ShuttingDown once the time is over."""
        if self._over_at is not None and time.monotonic() >= self._over_at:
            raise ShuttingDown("The server is shutting down and ended this request. Send it again.")
