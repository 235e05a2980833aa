"""Greedy tokens do not depend on company: batched = alone = mlx_lm, across joins, leaves, prefix hits and takeovers."""

from __future__ import annotations

import mlx.nn as nn
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.engine_stage import (
    Stage,
    assert_all_free,
    greedy,
    job,
    loaded,
    prompt,
    reference,
    run_alone,
    stage,
    tiny_llama,
)
from workers.engine.engine import Engine, EngineConfig


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


LENGTHS = (1, 2, 7, 8, 9, 30, 61, 90, 17, 64, 3, 40)


def test_rows_that_join_and_leave_at_any_step_say_what_mlx_lm_says(model: nn.Module) -> None:
    on = stage(model)
    expected = {}
    for at, length in enumerate(LENGTHS):
        limit = 5 + (at * 13) % 50
        expected[f"job-{at}"] = reference(model, prompt(at, length), limit)
        on.add(job(f"job-{at}", prompt(at, length), greedy(limit)))
        for _ in range(at % 4):
            on.step()
    on.run()
    assert {name: outcome.tokens for name, outcome in on.jobs.items()} == expected
    assert_all_free(on)


def test_compiled_steps_say_the_same(model: nn.Module) -> None:
    on = Stage(Engine(loaded(model), EngineConfig(max_rows=4, page_tokens=8, compile=True, kv_budget_bytes=1 << 24)))
    for at, length in enumerate(LENGTHS[:6]):
        on.add(job(f"job-{at}", prompt(at, length), greedy(70)))
        on.step()
    on.run()
    for at, length in enumerate(LENGTHS[:6]):
        assert on.jobs[f"job-{at}"].tokens == reference(model, prompt(at, length), 70)


def test_a_row_that_outgrows_its_columns_goes_on_unchanged(model: nn.Module) -> None:
    on = stage(model)
    on.add(job("long", prompt(3, 20), greedy(300)), job("short", prompt(4, 5), greedy(10)))
    on.run(until=lambda: slot_capacity(on) >= 256)
    assert slot_capacity(on) >= 256
    on.run()
    assert on.jobs["long"].tokens == reference(model, prompt(3, 20), 300)


def slot_capacity(on: Stage) -> float:
    return on.engine.stats()["slot_capacity"]


def test_the_working_set_shrinks_again_and_the_rows_that_stay_are_unchanged(model: nn.Module) -> None:
    on = stage(model)
    on.add(job("long", prompt(2, 9), greedy(120)))
    on.add(*(job(f"short-{at}", prompt(at, 6), greedy(4)) for at in range(7)))
    on.run(until=lambda: on.engine.stats()["slot_rows"] == 8)
    on.run(until=lambda: on.engine.stats()["slot_rows"] == 1)
    on.run()
    assert on.jobs["long"].tokens == reference(model, prompt(2, 9), 120)


def test_an_answer_is_the_same_over_a_cached_prefix(model: nn.Module) -> None:
    on = stage(model)
    shared = prompt(5, 50)
    for turn in range(4):
        ids = shared + prompt(40 + turn, 3 + turn)
        on.add(job(f"turn-{turn}", ids, greedy(30)))
        on.run()
        assert on.jobs[f"turn-{turn}"].tokens == reference(model, ids, 30)
    usages = [on.jobs[f"turn-{turn}"].usage for turn in range(4)]
    assert [usage is not None and usage.cached_tokens for usage in usages] == [0, 48, 48, 48]


@pytest.mark.parametrize("shown", [1, 7, 8, 20, 39])
def test_a_takeover_continues_at_the_next_token(model: nn.Module, shown: int) -> None:
    whole = run_alone(model, job("whole", prompt(2, 21), greedy(40)))
    first = stage(model)
    first.add(job("job", prompt(2, 21), greedy(40)))
    first.run(until=lambda: len(first.jobs["job"].tokens) >= shown)
    before = first.jobs["job"].choices[0]
    second = stage(model)
    second.add(job("job", prompt(2, 21), greedy(40), progress=(before.progress(0),), attempt=2))
    second.run()
    after = second.jobs["job"]
    assert before.tokens + after.tokens == whole.tokens
    assert before.text + after.text == whole.text
    assert after.usage is not None and whole.usage is not None
    assert after.usage.completion_tokens == whole.usage.completion_tokens


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_of_joins_cancels_and_prefix_hits_is_exact(model: nn.Module, data: st.DataObject) -> None:
    on = stage(model, max_rows=4, kv_budget_bytes=data.draw(st.sampled_from([1 << 20, 1 << 24])))
    wanted: dict[str, list[int]] = {}
    for at in range(data.draw(st.integers(3, 8))):
        family, length = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 70) | st.integers(450, 520))
        limit = data.draw(st.integers(1, 40))
        ids = prompt(family, 520)[:length]
        on.add(job(f"job-{at}", ids, greedy(limit), rank=data.draw(st.integers(0, 3))))
        wanted[f"job-{at}"] = reference(model, ids, limit)
        for _ in range(data.draw(st.integers(0, 12))):
            on.step()
        if data.draw(st.integers(0, 3)) == 0:
            gone = data.draw(st.sampled_from(sorted(wanted)))
            on.engine.cancel(gone, 1)
            said = on.jobs[gone]
            assert said.tokens == wanted.pop(gone)[: len(said.tokens)]
            if not wanted:
                break
    on.run()
    assert {name: on.jobs[name].tokens for name in wanted} == wanted
    assert_all_free(on)
