"""retry.decide: what is retried, when, and when enough is enough."""

from __future__ import annotations

import random

import pytest

from scheduler.errors import BY_CODE
from scheduler.retry import GiveUp, Limits, Retry, decide

LIMITS = Limits(max_attempts=5)


@pytest.mark.parametrize("code", ["engine_failure", "worker_error", "worker_lost"])
def test_a_worker_at_fault_is_retried(code: str) -> None:
    assert isinstance(decide(code, 1, 0, LIMITS, random.Random(1)), Retry)


@pytest.mark.parametrize("code", sorted(code for code, error in BY_CODE.items() if not error.retry_here))
def test_what_its_class_says_is_not_worth_it_is_given_up_and_no_dead_letter(code: str) -> None:
    decision = decide(code, 1, 0, LIMITS, random.Random(1))
    assert isinstance(decision, GiveUp) and not decision.exhausted


def test_an_unknown_code_is_given_up() -> None:
    assert isinstance(decide("no_such_code", 1, 0, LIMITS, random.Random(1)), GiveUp)


def test_the_last_allowed_attempt_ends_exhausted() -> None:
    assert isinstance(decide("engine_failure", 4, 3, LIMITS, random.Random(1)), Retry)
    decision = decide("engine_failure", 5, 4, LIMITS, random.Random(1))
    assert isinstance(decision, GiveUp) and decision.exhausted and "5" in decision.reason


def test_attempts_that_were_handed_back_do_not_count() -> None:
    assert isinstance(decide("engine_failure", 40, 0, LIMITS, random.Random(1)), Retry)


def test_delays_have_full_jitter_below_a_doubling_capped_limit() -> None:
    rng = random.Random(7)
    limits = Limits(max_attempts=100)
    for failures, longest in ((0, 200), (1, 400), (2, 800), (5, 6400), (6, 10_000), (50, 10_000)):
        delays: list[int] = []
        for _ in range(300):
            decision = decide("engine_failure", 1, failures, limits, rng)
            assert isinstance(decision, Retry)
            delays.append(decision.delay_ms)
        assert 0 <= min(delays) < longest * 0.1 and longest * 0.9 < max(delays) <= longest
