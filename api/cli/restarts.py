"""When a child that ended is started again. Pure: the supervisor acts on it."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 30.0
STEADY_S = 60.0
ATTEMPTS_AT_START = 3


@dataclass(frozen=True, slots=True)
class RestartState:
    """One child's history: starts that failed since it last ran steadily, and all restarts."""

    failures: int = 0
    restarts: int = 0

    def after_exit(self, ran_s: float) -> RestartState:
        """The state after the child ended by itself; one that ran steadily begins with a clean slate."""
        failures = 1 if ran_s >= STEADY_S else self.failures + 1
        return RestartState(failures, self.restarts + 1)

    @property
    def delay_s(self) -> float:
        """How long to wait before the next start: doubling, bounded."""
        return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(16, max(0, self.failures - 1)))


def gives_up(state: RestartState, *, was_ready: bool, says_final: bool) -> bool:
    """Whether the whole start fails with this child. A service that was ready never gives up: it may recover."""
    return not was_ready and (says_final or state.failures >= ATTEMPTS_AT_START)
