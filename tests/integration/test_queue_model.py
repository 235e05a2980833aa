"""The scripts against a model in Python: whatever workers, clients and operators do in whatever order, it holds.

An accepted job reaches exactly one terminal record per acceptance; nothing of an older attempt follows a newer one;
what waits, runs and has ended adds up to what was accepted; only the owner of an attempt changes a job; nothing is
left behind in Redis.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import redis as sync_redis
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from scheduler.job import JobState, Priority
from scheduler.queue.connection import connect
from scheduler.queue.keys import Keys
from scheduler.settings import Settings
from tests.conftest import SHARD
from tests.queue_cases import changed
from tests.queue_model import KV, OUTCOMES, ROWS, WORKERS, Model

NUMBERS = st.integers(0, 1000)
PRIORITIES = st.sampled_from(Priority)
_LEFT_BEHIND = ("q:", "act:", "own:", "urg:", "b:")


class QueueMachine(RuleBasedStateMachine):
    """One example: a shard from its first job until everything has ended. `configuration` comes from the test."""

    configuration: Settings

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._client = connect(self.configuration, "command")
        self._do(self._client.flushall())
        self.model = Model(self._client, self.configuration)
        self._steps = 0

    def _do(self, call: Coroutine[Any, Any, Any] | Any) -> None:
        async def wait() -> None:
            await call

        self._runner.run(wait())

    def _waiting(self, state: JobState) -> list[str]:
        return [job_id for job_id, job in self.model.jobs.items() if job.state is state]

    @initialize(priority=PRIORITIES)
    def begin(self, priority: Priority) -> None:
        self._do(self.model.enqueue(priority, 0, due=True, deadline=False, durable=False))
        self._do(self.model.claim(WORKERS[0], ROWS, KV))

    @rule(
        priority=PRIORITIES, tenant=st.integers(0, 2), due=st.sampled_from((True, True, False)),
        deadline=st.booleans(), durable=st.booleans(),
    )  # fmt: skip
    def enqueue(self, priority: Priority, tenant: int, due: bool, deadline: bool, durable: bool) -> None:
        self._do(self.model.enqueue(priority, tenant, due=due, deadline=deadline, durable=durable))

    @rule(worker=st.sampled_from(WORKERS), rows=st.integers(0, ROWS), kv=st.sampled_from((KV, KV, 400, 100)))
    def claim(self, worker: str, rows: int, kv: int) -> None:
        self._do(self.model.claim(worker, rows, kv))

    @precondition(lambda self: self.model.handed)
    @rule(number=NUMBERS)
    def emit(self, number: int) -> None:
        self._do(self.model.emit(*self.model.handed[number % len(self.model.handed)]))

    @precondition(lambda self: self.model.handed)
    @rule(number=NUMBERS, outcome=st.sampled_from(OUTCOMES))
    def finish(self, number: int, outcome: Any) -> None:
        self._do(self.model.finish(*self.model.handed[-1 - number % len(self.model.handed)], outcome))

    @precondition(lambda self: self.model.handed)
    @rule(number=NUMBERS, preempted=st.booleans())
    def hand_back(self, number: int, preempted: bool) -> None:
        worker, claimed = self.model.handed[-1 - number % len(self.model.handed)]
        self._do(self.model.hand_back(worker, claimed, preempted=preempted))

    @rule(worker=st.sampled_from(WORKERS), how=st.sampled_from(("die", "lapse", "retire")))
    def leave(self, worker: str, how: str) -> None:
        self._do(getattr(self.model, how)(worker))

    @precondition(lambda self: self._waiting(JobState.SCHEDULED))
    @rule(number=NUMBERS)
    def come_due(self, number: int) -> None:
        waiting = self._waiting(JobState.SCHEDULED)
        self._do(self.model.come_due(waiting[number % len(waiting)]))

    @rule(number=NUMBERS)
    def pass_deadline(self, number: int) -> None:
        self._do(self.model.pass_deadline(self.model.pick(number)[0]))

    @rule(number=NUMBERS)
    def cancel(self, number: int) -> None:
        self._do(self.model.cancel(self.model.pick(number)[0]))

    @rule(number=NUMBERS, priority=PRIORITIES)
    def reprioritise(self, number: int, priority: Priority) -> None:
        self._do(self.model.reprioritise(self.model.pick(number)[0], priority))

    @rule(what=st.sampled_from((None, *Priority)), on=st.sampled_from((True, False, False)))
    def pause(self, what: Priority | None, on: bool) -> None:
        self._do(self.model.pause(what, on))

    @rule(number=NUMBERS)
    def replay(self, number: int) -> None:
        self._do(self.model.replay(self.model.pick(number)[0]))

    @rule(number=NUMBERS)
    def discard(self, number: int) -> None:
        self._do(self.model.discard(self.model.pick(number)[0]))

    @invariant()
    def sums(self) -> None:
        """Every few steps: the operations compare their own answers, and the example ends with all checks."""
        self._steps += 1
        if self._steps % 4 == 0:
            self._do(self.model.check_sums())
            self._do(self.model.check_lanes())
        if self._steps % 16 == 0:
            self._do(self.model.check_jobs())

    def teardown(self) -> None:
        try:
            self._do(self.model.check_jobs())
            self._do(self.model.check_lanes())
            self._do(self.model.drain())
            self._do(self.model.check_sums())
            self._do(self.model.check_jobs())
            self._do(self.model.check_records())
            self._do(self._look_for_leavings())
        finally:
            self._do(self._client.aclose())
            self._runner.close()

    async def _look_for_leavings(self) -> None:
        keys, bodies = Keys(SHARD), {job_id for job_id, job in self.model.jobs.items() if job.body}
        async for raw_key in self._client.scan_iter(count=1000):
            key = raw_key.decode()
            assert keys.is_singleton(key) or await self._client.pttl(key) > 0, key
            name = key.removeprefix(keys.prefix)
            assert not name.startswith(_LEFT_BEHIND) or name.removeprefix("b:") in bodies, key


def test_any_order_of_operations_keeps_the_invariants(settings: Settings) -> None:
    """The lease outlives the test: only what the rules do makes time pass."""
    QueueMachine.configuration = changed(settings, lease_ttl_ms=3_600_000, urgent_slack_ms=2 * 3_600_000)
    run_state_machine_as_test(  # pyright: ignore[reportUnknownMemberType]
        QueueMachine,
        settings=hypothesis_settings(
            max_examples=30,
            stateful_step_count=50,
            deadline=None,
            phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
    with sync_redis.Redis.from_url(settings.redis_url or "") as client:
        client.flushall()
