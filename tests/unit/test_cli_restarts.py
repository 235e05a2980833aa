"""When an ended child is started again, and when the whole start gives up."""

from __future__ import annotations

from api.cli.restarts import ATTEMPTS_AT_START, FIRST_DELAY_S, LONGEST_DELAY_S, STEADY_S, RestartState, gives_up


def test_delays_double_up_to_a_bound() -> None:
    state, delays = RestartState(), []
    for _ in range(20):
        state = state.after_exit(ran_s=0.1)
        delays.append(state.delay_s)
    assert delays[:3] == [FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S]
    assert delays[-1] == LONGEST_DELAY_S
    assert state.restarts == 20


def test_a_child_that_ran_steadily_begins_with_a_clean_slate() -> None:
    state = RestartState(failures=9, restarts=9).after_exit(ran_s=STEADY_S)
    assert state == RestartState(failures=1, restarts=10)


def test_a_start_gives_up_after_some_failures_or_when_the_child_says_so() -> None:
    almost = RestartState(failures=ATTEMPTS_AT_START - 1)
    assert not gives_up(almost, was_ready=False, says_final=False)
    assert gives_up(almost, was_ready=False, says_final=True)
    assert gives_up(RestartState(failures=ATTEMPTS_AT_START), was_ready=False, says_final=False)


def test_a_service_that_was_ready_never_gives_up() -> None:
    assert not gives_up(RestartState(failures=100), was_ready=True, says_final=True)
