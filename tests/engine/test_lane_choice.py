"""Which models batch, which steps compile: decided by trying at load, and wrong guesses cost speed, never tokens."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import llama

from tests.engine.engine_stage import Stage, config, greedy, job, loaded, prompt, reference, tiny_llama
from workers.engine.engine import Engine
from workers.engine.model_runner import compiles, probe_slots
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
    assert on.engine.lane.page_table.total == half_tokens // 16
