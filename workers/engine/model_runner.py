"""Forward passes: which lane a model can run in, prefill chunks, and the decode step, compiled once per shape.

A compiled step exists per sampler variant; mx.compile keeps one trace per (rows, capacity). Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from workers.engine.sampler import Sampling, Variant, sample
from workers.engine.slot_cache import LayerShape, SlotLayer, StagedLayer, zeros

_PROBE_TOKENS = (1, 2, 3, 5, 7)
_PROBE_TOLERANCE = 0.05  # relative to the spread of the logits; a cache that is misread is off by far more


class StepOutput(NamedTuple):
    """One decode step: tokens [rows] int32, their successors' offsets, KV arrays, edit arrays, raw logits."""

    tokens: mx.array
    offsets: mx.array
    arrays: list[mx.array]
    edit: list[mx.array]
    logits: mx.array


class ModelRunner:
    """The model behind the slot lane."""

    def __init__(self, model: nn.Module, *, compile_steps: bool) -> None:
        self._model = model
        self._compile = compile_steps
        self._steps: dict[Variant, Callable[..., Any]] = {}  # mx.compile returns plain tuples

    def prefill(self, arrays: list[mx.array], tokens: list[list[int]], start: int) -> list[mx.array]:
        """KV arrays [rows, ...] with `tokens` appended from column `start` on; shorter rows are padded behind.

        Nothing but the returned arrays is computed: the head and the last layer's output are never evaluated.
        """
        longest = max(map(len, tokens))
        padded = mx.array([row + [0] * (longest - len(row)) for row in tokens])
        layers = [StagedLayer(*pair, start) for pair in zip(arrays[::2], arrays[1::2], strict=True)]
        self._model(padded, cache=layers)
        return [array for layer in layers for array in (layer.keys, layer.values)]

    def decode(
        self, tokens: mx.array, offsets: mx.array, live: mx.array, arrays: list[mx.array], sampling: Sampling
    ) -> StepOutput:
        """One token for every row; `live` [rows] int32 is 1 for rows that hold a sequence."""
        step = self._steps.get(sampling.variant)
        if step is None:
            step = partial(_decode, self._model, sampling.variant)
            if self._compile:
                step = mx.compile(step)
            self._steps[sampling.variant] = step
        outputs: Any = step(tokens, offsets, live, arrays, sampling.draw, sampling.edit)
        return StepOutput(*outputs)


def _decode(
    model: nn.Module,
    variant: Variant,
    tokens: mx.array,
    offsets: mx.array,
    live: mx.array,
    arrays: list[mx.array],
    draw: list[mx.array],
    edit: list[mx.array],
) -> StepOutput:
    layers = [SlotLayer(*pair, offsets) for pair in zip(arrays[::2], arrays[1::2], strict=True)]
    logits = model(tokens[:, None], cache=layers)[:, -1, :].astype(mx.float32)
    drawn, edit = sample(variant, logits, offsets, draw, edit)
    new_arrays = [array for layer in layers for array in (layer.keys, layer.values)]
    return StepOutput(drawn, offsets + live, new_arrays, edit, logits)


def probe_slots(model: nn.Module) -> tuple[LayerShape, ...] | None:
    """The layers' shapes if every cache of the model can live in slots, else None.

    Only plain KVCache layers qualify, and only if the model computes the same logits from a slot as from mlx_lm's
    own cache: a model file that reads more of a cache than the slot offers falls back to the sequential lane.
    """
    caches = make_prompt_cache(model)
    if not all(type(cache) is KVCache for cache in caches):
        return None
    ids = mx.array([_PROBE_TOKENS])
    model(ids[:, :-1], cache=caches)
    reference = model(ids[:, -1:], cache=caches)[:, -1]
    shapes = tuple(_shape_of(cache) for cache in caches)
    try:
        logits = _probe_logits(model, shapes)
        mx.eval(reference, logits)
    except (AttributeError, TypeError, ValueError, NotImplementedError, AssertionError):
        return None
    spread = mx.max(reference) - mx.min(reference)
    agrees = mx.all(mx.abs(reference - logits) <= _PROBE_TOLERANCE * spread)
    return shapes if agrees.item() else None


def _shape_of(cache: KVCache) -> LayerShape:
    keys, values = cache.keys, cache.values
    assert keys is not None and values is not None
    return LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)


def _probe_logits(model: nn.Module, shapes: tuple[LayerShape, ...]) -> mx.array:
    """The logits after the probe tokens, in row 1 of two rows of different length."""
    ids: list[int] = list(_PROBE_TOKENS)
    runner = ModelRunner(model, compile_steps=False)
    arrays = runner.prefill(zeros(shapes, 2, 2 * len(ids)), [ids[:2], ids[:-1]], 0)
    offsets = mx.array([2, len(ids) - 1], dtype=mx.int32)
    layers = [SlotLayer(*pair, offsets) for pair in zip(arrays[::2], arrays[1::2], strict=True)]
    return model(mx.array([[ids[2]], [ids[-1]]]), cache=layers)[1:, -1]
