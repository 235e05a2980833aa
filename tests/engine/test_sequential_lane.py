"""Models whose caches cannot live in slots run one row at a time, exactly as mlx_lm runs them."""

from __future__ import annotations

import mlx.nn as nn
import pytest

from tests.engine.engine_stage import greedy, job, prompt, reference, run_alone, seeded, stage, tiny_llama
from workers.engine.sequential_lane import SequentialLane


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama(layer_types=["sliding_attention", "full_attention"], sliding_window=16)


def test_a_sliding_window_model_says_what_mlx_lm_says(model: nn.Module) -> None:
    on = stage(model, prefill_stall_ms=1)
    assert isinstance(on.engine.lane, SequentialLane) and on.engine.max_rows == 1
    lengths = (1, 5, 16, 17, 60)
    on.add(*(job(f"job-{at}", prompt(at, length), greedy(50)) for at, length in enumerate(lengths)))
    on.run()
    for at, length in enumerate(lengths):
        assert on.jobs[f"job-{at}"].tokens == reference(model, prompt(at, length), 50)


def test_a_takeover_of_a_seeded_row_draws_the_same(model: nn.Module) -> None:
    whole = run_alone(model, job("job", prompt(2, 21), seeded(3, 40)))
    first = stage(model)
    first.add(job("job", prompt(2, 21), seeded(3, 40)))
    first.run(until=lambda: len(first.jobs["job"].tokens) >= 15)
    before = first.jobs["job"].choices[0]
    after = run_alone(model, job("job", prompt(2, 21), seeded(3, 40), progress=(before.progress(0),), attempt=2))
    assert before.tokens + after.tokens == whole.tokens


def test_a_cancelled_row_makes_room_for_the_next(model: nn.Module) -> None:
    on = stage(model)
    on.add(job("gone", prompt(2, 21), greedy(500)), job("next", prompt(3, 9), greedy(12)))
    on.run(until=lambda: len(on.jobs["gone"].tokens) > 5)
    assert (on.engine.busy_rows, on.engine.waiting, on.engine.free_rows) == (1, 1, 0)
    on.engine.cancel("gone", 1)
    on.run()
    assert on.jobs["next"].tokens == reference(model, prompt(3, 9), 12)
    assert on.engine.stats()["kv_bytes"] == 0
