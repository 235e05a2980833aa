"""Rows of very different length: attention group by group says the same, and costs what the lengths need."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama

from tests.engine.engine_stage import (
    Stage,
    assert_all_free,
    config,
    greedy,
    job,
    loaded,
    prompt,
    reference,
    seeded,
    slot_lane,
    stage,
    tiny_llama,
)
from workers.engine.attention_hook import attention, install
from workers.engine.engine import Engine
from workers.engine.model_runner import CompiledSteps, attends_by_group, probe_slots
from workers.engine.slot_cache import LayerShape, SlotCache, zeros
from workers.engine.slot_layout import Change
from workers.engine.slot_plan import Shape

TOKEN_BYTES = 2 * 2 * 2 * 12 * 4  # layers, keys and values, heads, head size, fp32


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


def groups(on: Stage) -> float:
    return on.engine.stats()["slot_groups"]


@pytest.mark.parametrize("compile_steps", [False, True])
def test_a_long_row_beside_short_ones_changes_nobodys_tokens(model: nn.Module, compile_steps: bool) -> None:
    on = stage(model, compile=compile_steps)
    on.add(job("long", prompt(1, 700), greedy(90)))
    on.run(until=lambda: bool(on.jobs["long"].tokens))
    on.add(*(job(f"short-{at}", prompt(2 + at, 8 + at), greedy(40 + 9 * at)) for at in range(6)))
    on.run(until=lambda: groups(on) > 1)
    assert groups(on) == 2
    on.run()
    assert on.jobs["long"].tokens == reference(model, prompt(1, 700), 90)
    for at in range(6):
        assert on.jobs[f"short-{at}"].tokens == reference(model, prompt(2 + at, 8 + at), 40 + 9 * at)
    assert_all_free(on)


def test_rows_that_grow_from_group_to_group_say_what_they_say_alone(model: nn.Module) -> None:
    on = stage(model)
    on.add(job("long", prompt(1, 800), greedy(200)), job("grows", prompt(2, 300), greedy(420)))
    on.run(until=lambda: bool(on.jobs["grows"].tokens) and bool(on.jobs["long"].tokens))
    on.add(*(job(f"short-{at}", prompt(3 + at, 5), greedy(100 * (1 + at))) for at in range(4)))
    seen: set[float] = set()
    while on.engine.has_work:
        on.step()
        seen.add(groups(on))
    assert {1, 2} <= seen
    assert on.jobs["long"].tokens == reference(model, prompt(1, 800), 200)
    assert on.jobs["grows"].tokens == reference(model, prompt(2, 300), 420)
    for at in range(4):
        assert on.jobs[f"short-{at}"].tokens == reference(model, prompt(3 + at, 5), 100 * (1 + at))


def test_mixed_groups_survive_prefix_hits_preemption_and_cancels(model: nn.Module) -> None:
    on = stage(model, kv_budget_bytes=2 * 1500 * TOKEN_BYTES)
    common = prompt(1, 500)
    on.add(*(job(f"long-{at}", common + prompt(50 + at, 9), greedy(60), rank=at) for at in range(2)))
    on.add(*(job(f"short-{at}", prompt(2 + at, 12), greedy(150)) for at in range(6)))
    on.run(until=lambda: len(on.jobs["short-5"].tokens) > 3 and groups(on) > 1)
    on.engine.cancel("short-5", 1)
    on.run()
    assert on.engine.stats()["preemptions"] > 0
    for at in range(2):
        assert on.jobs[f"long-{at}"].tokens == reference(model, common + prompt(50 + at, 9), 60)
    for at in range(5):
        assert on.jobs[f"short-{at}"].tokens == reference(model, prompt(2 + at, 12), 150)
    assert_all_free(on)


def test_a_seeded_row_draws_the_same_whatever_group_it_is_in(model: nn.Module) -> None:
    said: list[list[int]] = []
    for others in (0, 5):
        on = stage(model)
        on.add(*(job(f"other-{at}", prompt(9 + at, 900), greedy(80)) for at in range(others)))
        on.add(job("seeded", prompt(3, 20), seeded(11, 60)))
        on.run()
        said.append(on.jobs["seeded"].tokens)
    assert said[0] == said[1]


def test_slots_cost_what_the_lengths_need_and_are_given_back(model: nn.Module) -> None:
    on = Stage(Engine(loaded(model, context_tokens=8192), config(max_rows=32, kv_budget_bytes=1 << 26)))
    on.add(job("long", prompt(1, 4100), greedy(100)))
    on.run(until=lambda: bool(on.jobs["long"].tokens))
    on.add(*(job(f"short-{at}", prompt(2 + at, 80 + at), greedy(12)) for at in range(31)))
    on.run(until=lambda: all(len(outcome.tokens) >= 6 for outcome in on.jobs.values()))
    lengths = 4100 + len(on.jobs["long"].tokens) + sum(80 + at + len(on.jobs[f"short-{at}"].tokens) for at in range(31))
    assert on.engine.stats()["slot_bytes"] <= 1.6 * lengths * TOKEN_BYTES
    on.run()
    assert on.engine.stats()["slot_bytes"] == 0


def test_a_change_in_one_group_does_not_copy_the_others() -> None:
    cache = SlotCache([LayerShape(1, 4, 4, mx.float32)])
    cache.groups = [[mx.full(array.shape, 1.0) for array in zeros(cache_shapes(), 1, 64)]]
    cache.rearrange(Change((Shape(1, 64), Shape(2, 32)), (((0, 0),), (None, None))))
    long, short = cache.groups
    cache.put_row(1, 1, [mx.full((1, 1, 3, 4), 2.0)] * 2)
    cache.rearrange(Change((Shape(1, 64), Shape(4, 48)), (((0, 0),), (None, (1, 1), None, None))))
    assert all(now is before for now, before in zip(cache.groups[0], long, strict=True))
    assert cache.groups[1][0].shape == (4, 1, 48, 4) and short[0].shape == (2, 1, 32, 4)
    assert mx.array_equal(cache.groups[1][0][1, 0, :4, 0], mx.array([2.0, 2.0, 2.0, 0.0]))


def test_a_row_brings_all_its_kv_from_another_group() -> None:
    cache = SlotCache(cache_shapes())
    marked = mx.arange(4 * 32).reshape(4, 1, 32, 1).astype(mx.float32) * mx.ones(4)
    cache.groups = [[marked, -marked], [mx.full((1, 1, 64, 4), 7.0), mx.full((1, 1, 64, 4), -7.0)]]
    cache.rearrange(Change((Shape(2, 32), Shape(2, 80)), (((0, 3), (0, 1)), ((1, 0), (0, 2)))))
    assert mx.array_equal(cache.groups[0][0], marked[mx.array([3, 1])])
    assert mx.array_equal(cache.groups[1][1][1, :, :32], -marked[2]) and not mx.any(cache.groups[1][1][1, :, 32:])
    assert mx.array_equal(cache.groups[1][0][0, :, :64], mx.full((1, 64, 4), 7.0))


def cache_shapes() -> list[LayerShape]:
    return [LayerShape(1, 4, 4, mx.float32)]


def test_the_hook_is_reached_in_every_layer_of_a_llama_and_is_mlx_lms_own_for_others(model: nn.Module) -> None:
    shapes = probe_slots(model)
    assert shapes is not None and attends_by_group(model, shapes)
    assert vars(llama)["scaled_dot_product_attention"] is attention
    install(model)
    assert reference(model, prompt(1, 9), 5) == reference(tiny_llama(), prompt(1, 9), 5)


class StretchedLlama(llama.Model):
    """Reads the shape of the keys that its cache gives out, as a model with masks of its own does."""

    def __init__(self, arguments: llama.ModelArgs) -> None:
        super().__init__(arguments)
        for layer in self.model.layers:
            layer.self_attn = StretchedAttention(arguments)


class StretchedAttention(llama.Attention):
    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        return super().__call__(x, mask, None if cache is None else _ShapeReader(cache))


class _ShapeReader:
    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.offset = cache.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = self._cache.update_and_fetch(keys, values)
        return keys + mx.zeros((1, 1, keys.shape[2], 1)), values


def test_traces_of_old_compositions_are_dropped_and_made_again(model: nn.Module) -> None:
    shapes = probe_slots(model)
    assert shapes is not None
    steps = CompiledSteps(model, most=2)
    said: list[mx.array] = []
    for rows in (1, 2, 3, 1):
        blank = mx.zeros(rows, mx.int32)
        logits, _, _ = steps(blank, blank, blank, [zeros(shapes, rows, 32)])
        said.append(logits[0])
        assert len(steps) <= 2
    assert mx.array_equal(said[0], said[3])


def test_a_model_that_touches_the_keys_keeps_all_rows_in_one_group() -> None:
    model = tiny_llama(kind=StretchedLlama)
    on = stage(model)
    assert slot_lane(on).most_groups == 1
    on.add(job("long", prompt(1, 700), greedy(20)))
    on.add(*(job(f"short-{at}", prompt(2 + at, 8), greedy(30)) for at in range(4)))
    on.run()
    assert on.jobs["long"].tokens == reference(model, prompt(1, 700), 20)
    for at in range(4):
        assert on.jobs[f"short-{at}"].tokens == reference(model, prompt(2 + at, 8), 30)
