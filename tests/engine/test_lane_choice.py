"""Which models batch, which steps compile: decided by trying at load, and wrong guesses cost speed, never tokens."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama
from mlx_lm.models.base import create_causal_mask

from scheduler.errors import StartupError
from tests.engine.engine_stage import Stage, config, greedy, job, loaded, prompt, reference, tiny_llama
from tests.engine.model_zoo import MODELS, zoo_model
from workers.engine.engine import Engine
from workers.engine.lane_choice import kv_bytes
from workers.engine.model_runner import compiles, probe_slots
from workers.engine.row_lane import RowLane
from workers.engine.row_layers import RowKV
from workers.engine.sequential_lane import SequentialLane
from workers.engine.slot_lane import SlotLane


class CountingLlama(llama.Model):
    """Reads a value on the host in mid-pass, which no trace can do."""

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        assert isinstance(mx.max(inputs).item(), int)
        return super().__call__(inputs, cache, input_embeddings)


class OffsetLlama(llama.Model):
    """Uses the cache's offset as a plain number, as model files with their own position tables do."""

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        assert cache is None or isinstance(cache[0].offset, int)
        return super().__call__(inputs, cache, input_embeddings)


def test_a_plain_model_batches_and_compiles() -> None:
    model = tiny_llama()
    shapes = probe_slots(model)
    assert shapes is not None and len(shapes) == 2
    assert (shapes[0].kv_heads, shapes[0].key_dim, shapes[0].value_dim) == (2, 12, 12)
    assert compiles(model, shapes)


def test_a_step_that_cannot_be_traced_runs_uncompiled() -> None:
    model = tiny_llama(kind=CountingLlama)
    on = Stage(Engine(loaded(model), config(compile=True)))
    assert isinstance(on.engine.lane, SlotLane)
    on.add(job("job", prompt(1, 9), greedy(10)))
    on.run()
    assert on.jobs["job"].tokens == reference(model, prompt(1, 9), 10)


def test_a_model_that_needs_plain_offsets_runs_in_the_sequential_lane() -> None:
    model = tiny_llama(kind=OffsetLlama)
    on = Stage(Engine(loaded(model), config()))
    assert isinstance(on.engine.lane, SequentialLane)
    on.add(job("job", prompt(1, 9), greedy(10)))
    on.run()
    assert on.jobs["job"].tokens == reference(model, prompt(1, 9), 10)


def test_the_kv_budget_is_split_between_rows_and_pages() -> None:
    token_bytes = 2 * 2 * 2 * 12 * 4  # layers, keys and values, heads, head size, fp32
    on = Stage(Engine(loaded(tiny_llama()), config(kv_budget_bytes=1 << 20, page_tokens=16)))
    assert isinstance(on.engine.lane, SlotLane)
    half_tokens = (1 << 19) // token_bytes
    assert on.engine.kv_budget_tokens == half_tokens
    assert on.engine.lane.pages.table.total == half_tokens // 16


IN_SLOTS = {"llama", "qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3"}
IN_TURNS = {"llama4"}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_cache_runs_in_the_fastest_lane_it_can(name: str) -> None:
    lane = Engine(zoo_model(name), config()).lane
    assert type(lane) is (SlotLane if name in IN_SLOTS else SequentialLane if name in IN_TURNS else RowLane)


class StrangeCache:
    """Nothing that mlx_lm's models could use."""


class StrangeLlama(llama.Model):
    def make_cache(self) -> list[Any]:
        return [StrangeCache() for _ in self.layers]


def test_a_cache_that_does_not_work_at_all_is_named_at_the_start() -> None:
    with pytest.raises(StartupError, match=r"'tiny' cannot run here with its caches \(StrangeCache\)"):
        Engine(loaded(tiny_llama(kind=StrangeLlama)), config())


@pytest.mark.parametrize("window", [None, 3, 8])
def test_a_row_looks_at_what_mlx_lm_would_let_it_look_at(window: int | None) -> None:
    lengths = (1, 3, 7, 8)
    blank = mx.zeros((len(lengths), 1, 8, 1))
    seen = RowKV(blank, blank, mx.array(lengths) - 1, 4).make_mask(1, window_size=window)
    for row, length in enumerate(lengths):
        alone = create_causal_mask(1, length - 1, window_size=window)[0]
        assert mx.array_equal(seen[row, 0, 0], mx.pad(alone, (0, 8 - length)))


def test_windows_and_states_leave_half_of_the_room_to_tokens() -> None:
    hybrid = zoo_model("granitemoehybrid")
    token_bytes, row_bytes = kv_bytes(hybrid)
    room_bytes = 6 * row_bytes
    on = Stage(Engine(hybrid, config(kv_budget_bytes=2 * room_bytes)))
    assert on.engine.max_rows == 3
    assert on.engine.kv_budget_tokens == 3 * row_bytes // token_bytes
