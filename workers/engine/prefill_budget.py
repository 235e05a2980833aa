"""How many prompt tokens the next prefill launch may take, from the measured speed and the time it may take. Pure.

Time that a launch took beyond its target is a debt, which the next one pays.
"""

from __future__ import annotations

MIN_CHUNK_TOKENS = 16
MIN_IDLE_CHUNK_TOKENS = 128
MAX_CHUNK_TOKENS = 2048
TELLING_CHUNK_TOKENS = 64  # a shorter chunk is mostly overhead and says little about a long one's speed
LONGEST_IDLE_CHUNK_S = 5.0  # a slow machine takes a smaller one: cancels wait for it, and the watchdog's patience ends


class PrefillBudget:
    """`idle_s` is what a launch may take while no stream runs: only cancels and new arrivals wait for it."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._tokens_per_s = 0.0
        self._debt_s = 0.0

    def tokens(self, stall_s: float | None) -> int:
        """For a launch that may hold up running streams for `stall_s`; None: no stream runs."""
        if stall_s is None:
            least, room_s = self._least_idle_tokens(), self._idle_s
        else:
            least, room_s = MIN_CHUNK_TOKENS, max(stall_s - self._debt_s, 0.0)
        return min(MAX_CHUNK_TOKENS, max(least, int(self._tokens_per_s * room_s)))

    def observe(self, tokens: int, seconds: float, stall_s: float | None) -> None:
        """A launch of so many tokens took so long; `stall_s` as it was given to `tokens`."""
        if tokens <= 0 or seconds <= 0:
            return
        speed = tokens / seconds
        if self._tokens_per_s == 0:
            self._tokens_per_s = speed
        elif tokens >= TELLING_CHUNK_TOKENS or speed > self._tokens_per_s:
            self._tokens_per_s = 0.6 * self._tokens_per_s + 0.4 * speed
        if stall_s is not None:
            self._debt_s = min(max(0.0, self._debt_s + seconds - stall_s), stall_s)

    def _least_idle_tokens(self) -> int:
        if self._tokens_per_s == 0:
            return MIN_IDLE_CHUNK_TOKENS
        in_time = int(self._tokens_per_s * LONGEST_IDLE_CHUNK_S)
        return min(MIN_IDLE_CHUNK_TOKENS, max(MIN_CHUNK_TOKENS, in_time))
