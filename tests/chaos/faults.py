"""Which fault comes when: a plan that depends on the seed alone, and the driver that carries it out.

The same seed gives the same faults at the same seconds; which process a share picks depends on who is alive then.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from tests.chaos.stage import Stage

# kind → (weight, least seconds between two of its group). Killing the engine costs seconds of both cores.
KINDS: dict[str, tuple[float, float]] = {
    "kill-worker": (6, 0.0),
    "kill-engine": (1.5, 9.0),
    "kill-local": (1.5, 9.0),
    "kill-api": (3, 2.0),
    "kill-scheduler": (1, 3.0),
    "kill-redis": (2, 3.0),
    "stop-worker": (3, 0.0),
    "stop-redis": (1.5, 3.0),
    "drain-worker": (1.5, 0.0),
    "drain-api": (1, 5.0),
    "partition": (1.5, 3.0),
    "cut": (3, 0.0),
    "lose-reply": (3, 0.0),
    "kill-pubsub": (3, 0.0),
}
_GROUPS = {
    "kill-engine": "engine",
    "kill-local": "engine",
    "kill-redis": "redis",
    "stop-redis": "redis",
    "partition": "redis",
}
# kind → the roles that may be hit, and how.
_SIGNALS = {
    "kill-worker": ("scripted", signal.SIGKILL),
    "kill-local": ("local", signal.SIGKILL),
    "kill-api": ("api", signal.SIGKILL),
    "kill-scheduler": ("scheduler", signal.SIGKILL),
    "drain-worker": ("scripted local", signal.SIGTERM),
    "drain-api": ("api", signal.SIGTERM),
}
_MEAN_GAP_S = 1.1


@dataclass(frozen=True, slots=True)
class Fault:
    """`share` in [0, 1) picks the victim among those alive; `for_s`: how long it is stopped or stays down."""

    at_s: float
    kind: str
    share: float
    for_s: float


def plan(seed: int, seconds: float, kinds: Collection[str]) -> list[Fault]:
    """The faults of a run. A longer run of the same seed begins with the same ones."""
    return [fault for fault in _endless(seed, kinds, seconds) if fault.at_s < seconds]


def _endless(seed: int, kinds: Collection[str], seconds: float) -> Iterator[Fault]:
    rng = random.Random(seed)
    chosen = [kind for kind in KINDS if kind in kinds]
    last: dict[str, float] = {}
    at_s = 1.0
    while chosen and at_s < seconds:
        kind = rng.choices(chosen, [KINDS[kind][0] for kind in chosen])[0]
        fault = Fault(at_s, kind, rng.random(), _duration(kind, rng))
        group = _GROUPS.get(kind, kind)
        if at_s - last.get(group, -100.0) >= KINDS[kind][1]:
            last[group] = at_s + fault.for_s
            yield fault
        at_s = round(at_s + rng.expovariate(1 / _MEAN_GAP_S), 3)


def _duration(kind: str, rng: random.Random) -> float:
    match kind:
        case "stop-worker":
            return round(rng.uniform(0.2, 4.0), 3)
        case "stop-redis" | "partition":
            return round(rng.choice((rng.uniform(0.1, 1.0), rng.uniform(1.0, 5.0))), 3)
        case "kill-redis":
            return round(rng.uniform(0.0, 0.8), 3)
        case _:
            return 0.0


class Driver:
    """Carries a plan out on a stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    async def run(self, faults: list[Fault]) -> None:
        timeline = self._stage.timeline
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(max(0.0, fault.at_s - timeline.now_s))
                group.create_task(self._do(fault))

    async def _do(self, fault: Fault) -> None:
        stage = self._stage
        if fault.kind in _SIGNALS:
            roles, number = _SIGNALS[fault.kind]
            stage.hurt(stage.pick(roles, fault.share), number)
            return
        match fault.kind:
            case "kill-engine":
                stage.kill_engine()
            case "stop-worker":
                await stage.stop_for(stage.pick("scripted local", fault.share), fault.for_s)
            case "kill-redis":
                await stage.redis.kill(fault.for_s)
            case "stop-redis":
                await stage.redis.stop_for(fault.for_s)
            case "kill-pubsub":
                await stage.redis.kill_pubsub()
            case "partition":
                await stage.partition(fault.for_s)
            case "cut":
                stage.cut()
            case "lose-reply":
                stage.lose_reply()
            case other:
                raise AssertionError(f"unknown fault {other}")
