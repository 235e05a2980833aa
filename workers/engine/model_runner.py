"""Forward passes: which lane a model can run in, prefill chunks, and the decode step, compiled once per shape.

mx.compile keeps one trace of the step per (rows, capacity). Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from workers.engine.batch_scheduler import SMALLEST_CAPACITY
from workers.engine.sampler import Sampling, Variant, sample
from workers.engine.slot_cache import LayerShape, SlotLayer, StagedLayer, zeros

_GREEDY = Sampling(Variant(), [], [])
_PROBE_TOKENS = (1, 2, 3, 5, 7)
_PROBE_TOLERANCE = 0.05  # relative to the spread of the logits; a cache that is misread is off by far more


class StepOutput(NamedTuple):
    """One decode step: tokens [rows] int32, their successors' offsets, KV arrays, edit arrays, raw logits f32."""

    tokens: mx.array
    offsets: mx.array
    arrays: list[mx.array]
    edit: list[mx.array]
    logits: mx.array


class ModelRunner:
    """The model behind the slot lane."""

    def __init__(self, model: nn.Module, *, compile_steps: bool) -> None:
        self._model = model
        forward = partial(_forward, model)
        self._forward: Callable[..., Any] = mx.compile(forward) if compile_steps else forward
        # Where compiling means running g++, the sampler's dozens of kernels are not worth their start-up time.
        self._compile_sampler = compile_steps and mx.metal.is_available()
        self._samplers: dict[Variant, Callable[..., Any]] = {}

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
        logits, next_offsets, new_arrays = self._forward(tokens, offsets, live, arrays)
        drawn, edit = self._sampler(sampling.variant)(logits, offsets, sampling.draw, sampling.edit)
        return StepOutput(drawn, next_offsets, new_arrays, edit, logits)

    def _sampler(self, variant: Variant) -> Callable[..., Any]:
        sampler = self._samplers.get(variant)
        if sampler is None:
            sampler = partial(sample, variant)
            if self._compile_sampler:
                sampler = mx.compile(sampler)
            self._samplers[variant] = sampler
        return sampler


def _forward(
    model: nn.Module, tokens: mx.array, offsets: mx.array, live: mx.array, arrays: list[mx.array]
) -> tuple[mx.array, mx.array, list[mx.array]]:
    layers = [SlotLayer(*pair, offsets) for pair in zip(arrays[::2], arrays[1::2], strict=True)]
    logits = model(tokens[:, None], cache=layers)[:, -1, :].astype(mx.float32)
    return logits, offsets + live, [array for layer in layers for array in (layer.keys, layer.values)]


def compiles(model: nn.Module, shapes: Sequence[LayerShape]) -> bool:
    """Whether the compiled step runs and says what the plain one says; a model file may do what a trace cannot."""
    logits: list[mx.array] = []
    for compile_steps in (False, True):
        runner = ModelRunner(model, compile_steps=compile_steps)
        row = mx.array([1], dtype=mx.int32)
        try:
            out = runner.decode(row, row, row, zeros(shapes, 1, SMALLEST_CAPACITY), _GREEDY)
            mx.eval(out.logits)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return False
        logits.append(out.logits)
    return _agree(logits[0], logits[1])


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
    return shapes if _agree(reference, logits) else None


def _agree(reference: mx.array, logits: mx.array) -> bool:
    spread = mx.max(reference) - mx.min(reference)
    return bool(mx.all(mx.abs(reference - logits) <= _PROBE_TOLERANCE * spread).item())


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
