"""Models whose caches cannot be batched take turns within each step: exact, cancellable, and nobody starves."""

from __future__ import annotations

import pytest

from tests.engine.engine_stage import Stage, config, greedy, job, prompt, reference
from tests.engine.model_zoo import zoo_model
from workers.engine.engine import Engine
from workers.engine.sequential_lane import SequentialLane

LLAMA4 = zoo_model("llama4")


@pytest.fixture
def on() -> Stage:
    stage = Stage(Engine(LLAMA4, config(prefill_stall_ms=1, max_rows=3)))
    assert isinstance(stage.engine.lane, SequentialLane)
    return stage


def test_rows_advance_together_however_long_one_of_them_is(on: Stage) -> None:
    on.add(job("long", prompt(2, 21), greedy(200)))
    on.run(until=lambda: len(on.jobs["long"].tokens) == 5)
    on.add(job("short", prompt(3, 9), greedy(12)))
    on.run(until=lambda: on.jobs["short"].usage is not None)
    assert 5 + 12 <= len(on.jobs["long"].tokens) <= 5 + 12 + 4
    assert on.jobs["short"].tokens == reference(LLAMA4.model, prompt(3, 9), 12, LLAMA4.eos_ids)


def test_a_long_prompt_goes_in_by_pieces_between_the_tokens_of_the_others(on: Stage) -> None:
    on.add(job("stream", prompt(2, 9), greedy(200)))
    on.run(until=lambda: len(on.jobs["stream"].tokens) == 5)
    before = on.engine.stats()
    on.add(job("long", prompt(4, 300), greedy(3)))
    on.run(until=lambda: bool(on.jobs["long"].tokens))
    chunks = on.engine.stats()["prefill_steps"] - before["prefill_steps"]
    assert chunks >= 3
    assert len(on.jobs["stream"].tokens) >= 5 + chunks - 1


def test_a_higher_class_goes_first_and_a_cancelled_row_makes_room(on: Stage) -> None:
    on.add(*(job(f"low-{at}", prompt(at, 9), greedy(200), rank=2) for at in range(3)))
    on.run(until=lambda: len(on.jobs["low-2"].tokens) > 3)
    on.add(job("later", prompt(5, 9), greedy(5), rank=2), job("high", prompt(6, 9), greedy(5), rank=0))
    assert (on.engine.busy_rows, on.engine.waiting, on.engine.free_rows) == (3, 2, 0)
    on.engine.cancel("low-1", 1)
    on.run(until=lambda: on.jobs["high"].usage is not None)
    assert not on.jobs["later"].tokens
    on.engine.cancel("low-0", 1)
    on.run()
    assert on.jobs["later"].tokens == reference(LLAMA4.model, prompt(5, 9), 5, LLAMA4.eos_ids)
    assert on.engine.stats()["row_bytes"] == 0
