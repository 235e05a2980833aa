"""How much prefill the next launch may hold, from what launches took so far and the time that it may take. Pure.

A token of a prompt costs the more the further behind it stands, because it attends to all before it; so a chunk is
reckoned as `token_s * tokens + column_s * columns attended`, both learned from what was launched. Time that a launch
took beyond its target is a debt, which the next one pays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

MIN_CHUNK_TOKENS = 16
MIN_IDLE_CHUNK_TOKENS = 128
MAX_CHUNK_TOKENS = 2048
TELLING_CHUNK_TOKENS = 64  # a shorter chunk is mostly overhead and says little about a long one's speed
LONGEST_IDLE_CHUNK_S = 5.0  # a slow machine takes a smaller one: cancels wait for it, and the watchdog's patience ends
_KEEP = 0.97  # what an older launch weighs beside the one after it
_RIDGE = 0.01  # what launches of one shape cannot tell apart is put down to tokens
_PACE_WEIGHT = 0.4

Span = tuple[int, int]
"""First token and number of tokens of a chunk."""


class PrefillPace:
    """The two costs, by least squares of relative errors, and how much slower than that it goes just now."""

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._token_s = self._column_s = 0.0
        self._now = 1.0
        self.longest_tokens = 0

    @property
    def is_known(self) -> bool:
        return self.longest_tokens > 0

    def seconds(self, start: int, tokens: int) -> float:
        return self._now * (self._token_s * tokens + self._column_s * _columns(start, tokens))

    def tokens(self, seconds: float, start: int) -> int:
        """The longest chunk from `start` on that takes no longer."""
        first_s, more_s = self._now * (self._token_s + self._column_s * start), self._now * self._column_s
        if seconds <= 0:
            return 0
        # 2 s / (f + sqrt(f² + 2 m s)) solves f n + m n² / 2 = s also where m is 0
        return int(2 * seconds / (first_s + math.sqrt(first_s**2 + 2 * more_s * seconds)) + 1e-6)

    def learn(self, spans: Iterable[Span], seconds: float) -> None:
        spans = list(spans)
        tokens = sum(count for _, count in spans)
        if self.is_known and tokens < TELLING_CHUNK_TOKENS and seconds >= sum(self.seconds(*span) for span in spans):
            return
        columns = sum(_columns(*span) for span in spans)
        x, y = tokens / seconds, columns / seconds
        new = (x * x, x * y, y * y, x, y)
        self._sums = tuple(_KEEP * old + one for old, one in zip(self._sums, new, strict=True))  # pyright: ignore
        self._solve()
        ratio = seconds / (self._token_s * tokens + self._column_s * columns)
        self._now = (1 - _PACE_WEIGHT) * self._now + _PACE_WEIGHT * ratio if self.is_known else ratio
        self.longest_tokens = max(self.longest_tokens, tokens)

    def _solve(self) -> None:
        xx, xy, yy, x, y = self._sums
        yy *= 1 + _RIDGE
        determinant = xx * yy - xy * xy
        self._token_s, self._column_s = (yy * x - xy * y) / determinant, (xx * y - xy * x) / determinant
        if self._column_s < 0:
            self._token_s, self._column_s = x / xx, 0.0
        elif self._token_s < 0:
            self._token_s, self._column_s = 0.0, y / yy


class PrefillBudget:
    """`idle_s` is what a launch may take while no stream runs: only cancels and new arrivals wait for it."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._debt_s = 0.0
        self._pace = PrefillPace()

    def shares(self, wanted: list[Span], stall_s: float | None) -> list[int]:
        """Tokens for each of the prompts that want (start, tokens), in order of service; the launch may hold up running
        streams for `stall_s`, None where there are none. The first gets half of the time and what the others leave.
        """
        pace = self._pace
        least = MIN_CHUNK_TOKENS if stall_s is not None else self._least_idle_tokens(wanted[0][0])
        if not pace.is_known:
            return _divided(wanted, least)
        room_s = self._idle_s if stall_s is None else stall_s - self._debt_s
        room_s = max(room_s, pace.seconds(wanted[0][0], least))
        # Launches grow by doubling, so that none relies on much shorter ones for what it will take.
        most = min(MAX_CHUNK_TOKENS, max(MIN_IDLE_CHUNK_TOKENS, 2 * pace.longest_tokens))
        (start, tokens), others = wanted[0], wanted[1:]
        first = min(tokens, most, pace.tokens(room_s / 2 if others else room_s, start))
        left_s, left = room_s - pace.seconds(start, first), most - first
        shares = [first]
        for other_start, other in others:
            share = min(other, left, pace.tokens(left_s, other_start))
            left_s, left = left_s - pace.seconds(other_start, share), left - share
            shares.append(share)
        shares[0] = min(tokens, first + left, pace.tokens(left_s + pace.seconds(start, first), start))
        return shares

    def observe(self, spans: list[Span], seconds: float, stall_s: float | None) -> None:
        """A launch of these chunks took so long; `stall_s` as it was given to `shares`."""
        if seconds <= 0 or not sum(count for _, count in spans):
            return
        self._pace.learn(spans, seconds)
        if stall_s is not None:
            self._debt_s = min(max(0.0, self._debt_s + seconds - stall_s), stall_s)

    def _least_idle_tokens(self, start: int) -> int:
        if not self._pace.is_known:
            return MIN_IDLE_CHUNK_TOKENS
        in_time = self._pace.tokens(LONGEST_IDLE_CHUNK_S, start)
        return min(MIN_IDLE_CHUNK_TOKENS, max(MIN_CHUNK_TOKENS, in_time))


def _columns(start: int, tokens: int) -> float:
    return tokens * (start + tokens / 2)


def _divided(wanted: list[Span], tokens: int) -> list[int]:
    """The tokens in order, as far as they reach."""
    shares: list[int] = []
    for _, count in wanted:
        shares.append(min(count, tokens))
        tokens -= shares[-1]
    return shares
