"""Retry or not: the one place that decides it. Pure; called by lifecycle.py when an attempt failed.

Losses (a worker that died) are not decided here: the queue counts and caps them itself, see lua/reaping.lua.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from scheduler.errors import BY_CODE, InternalError
from scheduler.settings import Settings

_FIRST_DELAY_MS = 200
_LONGEST_DELAY_MS = 10_000


@dataclass(frozen=True, slots=True)
class Limits:
    """How often a job may be tried; attempts that were handed back do not count."""

    max_attempts: int

    @staticmethod
    def of(settings: Settings) -> Limits:
        return Limits(max_attempts=settings.max_attempts)


@dataclass(frozen=True, slots=True)
class Retry:
    delay_ms: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """`exhausted`: it was worth retrying, but the attempts are used up (a dead letter)."""

    reason: str
    exhausted: bool = False


def decide(error_code: str, attempt: int, failures: int, limits: Limits, rng: random.Random) -> Retry | GiveUp:
    """What follows a failed attempt. `failures`: burnt attempts before this one (retried errors and losses).

    Full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015): uniform in [0, base · 2^failures], capped.
    """
    error = BY_CODE.get(error_code, InternalError)
    if not error.retry_here:
        return GiveUp(f"{error_code} is not retried")
    burnt = failures + 1
    if burnt >= limits.max_attempts:
        return GiveUp(f"{burnt} attempts failed (attempt {attempt} was the last)", exhausted=True)
    longest = min(_LONGEST_DELAY_MS, _FIRST_DELAY_MS * 2**failures)
    return Retry(delay_ms=int(rng.uniform(0, longest)))
