"""What a lane cannot give back, prepare or tidy up costs a restart of its rows: no job is lost, none fails for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import pytest

from scheduler.request import SamplingParams
from tests.engine.engine_stage import Stage, config, greedy, job, loaded, prompt, reference, stage, tiny_llama
from tests.engine.test_isolation import POISON, BrokenTokenizer, OverflowingLlama
from workers.backend import JobDone, JobError
from workers.engine.engine import Engine
from workers.engine.lane import Lane
from workers.engine.sequence import Sequence


class FailingLane:
    """The lane of an engine, but for device calls that fail: on leaving, for the jobs named, and in idle work."""

    def __init__(self, real: Lane) -> None:
        self.real = real
        self.cannot_leave: set[str] = set()
        self.failures = 0
        self.cannot_warm = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def vacate(self, sequence: Sequence) -> None:
        if sequence.job_id in self.cannot_leave:
            self.cannot_leave.discard(sequence.job_id)
            self.failures += 1
            raise RuntimeError("the device is gone")
        self.real.vacate(sequence)

    def warm_next(self) -> bool:
        going_on = self.real.warm_next()
        if self.cannot_warm:
            self.failures += 1
            raise RuntimeError("no space left on device")
        return going_on


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


def _failing(on: Stage, *cannot_leave: str) -> FailingLane:
    lane = FailingLane(on.engine.lane)
    lane.cannot_leave.update(cannot_leave)
    on.engine.lane = lane  # pyright: ignore[reportAttributeAccessIssue]
    return lane


def _assert_all_free(on: Stage, lane: FailingLane) -> None:
    assert on.engine.busy_rows == 0 and on.engine.waiting == 0 and not on.engine.has_work
    on.engine.check_integrity()
    assert lane.real.stats()["slot_rows"] == 0


@pytest.mark.parametrize("others", [1, 3])
def test_a_cancel_whose_rows_cannot_be_given_back_harms_nobody(model: nn.Module, others: int) -> None:
    on = stage(model)
    lane = _failing(on, "gone")
    on.add(job("gone", prompt(9, 20), greedy(60), n=2))
    on.add(*(job(f"good-{at}", prompt(at, 20), greedy(30)) for at in range(others)))
    on.run(until=lambda: all(len(on.jobs[f"good-{at}"].tokens) > 8 for at in range(others)))
    on.engine.cancel("gone", 1)
    on.engine.check_integrity()
    said = len(on.jobs["gone"].tokens)
    on.run()
    assert lane.failures == 1 and len(on.jobs["gone"].tokens) == said and on.jobs["gone"].usage is None
    for at in range(others):
        assert on.jobs[f"good-{at}"].tokens == reference(model, prompt(at, 20), 30)
        assert on.jobs[f"good-{at}"].usage is not None
    _assert_all_free(on, lane)


def test_a_row_that_ended_and_cannot_be_given_back_is_answered_and_harms_nobody(model: nn.Module) -> None:
    on = stage(model)
    lane = _failing(on, "short")
    on.add(job("short", prompt(1, 20), greedy(5)), job("long", prompt(2, 20), greedy(30)))
    on.run()
    assert lane.failures == 1
    for name, seed, tokens in (("short", 1, 5), ("long", 2, 30)):
        assert on.jobs[name].tokens == reference(model, prompt(seed, 20), tokens)
        assert on.jobs[name].usage is not None
    _assert_all_free(on, lane)


def test_a_row_whose_text_fails_and_that_cannot_be_given_back_fails_alone(model: nn.Module) -> None:
    said = reference(model, prompt(2, 20), 30)
    others = {seed: reference(model, prompt(seed, 20), 30) for seed in (3, 4)}
    broken = next(token for token in said[5:] if not any(token in other for other in others.values()))
    kind = loaded(model)
    on = Stage(Engine(dataclasses.replace(kind, tokenizer=BrokenTokenizer(kind.tokenizer, broken)), config()))
    lane = _failing(on, "bad")
    with_logprobs = msgspec.structs.replace(greedy(30), logprobs=True)
    on.add(job("3", prompt(3, 20), with_logprobs), job("bad", prompt(2, 20), greedy(30)))
    on.add(job("4", prompt(4, 20), with_logprobs))
    on.run()
    error = on.jobs["bad"].error
    assert lane.failures == 1 and error is not None and error.code == "engine_failure"
    for seed, tokens in others.items():
        assert on.jobs[str(seed)].tokens == tokens and on.jobs[str(seed)].usage is not None
        assert len(on.jobs[str(seed)].choices[0].logprobs) == len(tokens)
    _assert_all_free(on, lane)


def test_a_row_that_ends_in_the_step_that_another_breaks_is_answered(model: nn.Module) -> None:
    on = Stage(Engine(loaded(tiny_llama(kind=OverflowingLlama)), config()))
    lane = _failing(on, "bad")
    no_poison = SamplingParams(temperature=0.0, max_tokens=30, logit_bias={POISON: -100.0})
    on.add(job("last", prompt(1, 20), msgspec.structs.replace(no_poison, max_tokens=1)))
    on.add(job("bad", (*prompt(2, 19), POISON), no_poison), job("goes on", prompt(3, 20), no_poison))
    together = False
    while on.engine.has_work:
        events = on.step()
        ends = {event.job_id for event in events if isinstance(event, JobDone | JobError)}
        together = together or {"last", "bad"} <= ends
    assert together and lane.failures == 1
    error = on.jobs["bad"].error
    assert error is not None and "not finite" in error.message
    calm = stage(model)
    calm.add(job("last", prompt(1, 20), msgspec.structs.replace(no_poison, max_tokens=1)))
    calm.add(job("goes on", prompt(3, 20), no_poison))
    calm.run()
    for name in ("last", "goes on"):
        assert on.jobs[name].tokens == calm.jobs[name].tokens and on.jobs[name].usage is not None
    _assert_all_free(on, lane)


def test_a_last_token_is_answered_though_memory_cannot_be_given_back(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(mx, "clear_cache", fail)
    on = stage(model)
    ignoring = SamplingParams(temperature=0.0, max_tokens=512, ignore_eos=True)  # memory is given back at step 512
    on.add(job("last", prompt(1, 20), ignoring))
    on.run()
    assert on.engine.stats()["failed_steps"] == 1
    assert len(on.jobs["last"].tokens) == 512 and on.jobs["last"].finish_reason == "length"
    assert on.jobs["last"].usage is not None


def test_idle_work_that_fails_ends_nothing(model: nn.Module) -> None:
    on = stage(model)
    on.engine.warm_up()
    lane = _failing(on)
    lane.cannot_warm = True
    assert not on.engine.warm_next()
    assert not on.engine.warm_next()
    assert lane.failures == 2
    on.add(job("job", prompt(1, 20), greedy(10)))
    on.run()
    assert on.jobs["job"].tokens == reference(model, prompt(1, 20), 10)
    lane.cannot_warm = False
    assert on.engine.warm_next(), "what is left is prepared once that works again"
    while on.engine.warm_next():
        pass
    _assert_all_free(on, lane)
