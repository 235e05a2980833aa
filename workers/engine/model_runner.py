"""Forward passes: which lane a model can run in, prefill chunks, and the decode step, compiled once per shape.

mx.compile keeps one trace of the step per list of groups. Engine thread only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from workers.engine.attention_hook import GroupedLayer, SlotLayer, StepGroups, install
from workers.engine.sampler import Sampling, Variant, sample
from workers.engine.slot_cache import LayerShape, StagedLayer, zeros
from workers.engine.slot_plan import SMALLEST_CAPACITY

_GREEDY = Sampling(Variant(), [], [])
_MOST_SAMPLERS = 128  # there is a variant for every mix of sampling parameters
_PROBE_TOKENS = (1, 2, 3, 5, 7)
_PROBE_TOLERANCE = 0.05  # relative to the spread of the logits; a cache that is misread is off by far more


_MOST_TRACES = 256
_Forward = Callable[
    [mx.array, mx.array, mx.array, list[list[mx.array]]], tuple[mx.array, mx.array, list[list[mx.array]]]
]


class StepOutput(NamedTuple):
    """One decode step: tokens [rows] int32, their successors' offsets, each group's KV arrays, edit arrays, raw logits
    f32.
    """

    tokens: mx.array
    offsets: mx.array
    groups: list[list[mx.array]]
    edit: list[mx.array]
    logits: mx.array


class ModelRunner:
    """The model behind the slot lane."""

    def __init__(self, model: nn.Module, *, compile_steps: bool) -> None:
        self._model = model
        self.compiles = compile_steps
        self._forward: _Forward = CompiledSteps(model) if compile_steps else partial(_forward, model)
        # Where compiling means running g++, the sampler's dozens of kernels are not worth their start-up time.
        self._compile_sampler = compile_steps and mx.metal.is_available()
        self._samplers: dict[Any, Callable[..., Any]] = {}

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
        self, tokens: mx.array, offsets: mx.array, live: mx.array, groups: list[list[mx.array]], sampling: Sampling
    ) -> StepOutput:
        """One token for every row, group after group; `live` [rows] int32 is 1 for rows that hold a sequence."""
        logits, next_offsets, new_groups = self._forward(tokens, offsets, live, groups)
        drawn, edit = self._sampler(sampling, logits)(logits, offsets, sampling.draw, sampling.edit)
        return StepOutput(drawn, next_offsets, new_groups, edit, logits)

    def _sampler(self, sampling: Sampling, logits: mx.array) -> Callable[..., Any]:
        """One function per variant and shapes, as a compiled one keeps a trace for all shapes it ever saw."""
        if not self._compile_sampler:
            return partial(sample, sampling.variant)
        key = (sampling.variant, logits.shape, *(array.shape for array in (*sampling.draw, *sampling.edit)))
        if key not in self._samplers:
            if len(self._samplers) >= _MOST_SAMPLERS:
                self._samplers.clear()
            self._samplers[key] = mx.compile(partial(sample, sampling.variant))
        return self._samplers[key]


class CompiledSteps:
    """The step, traced once per list of groups; of `most` traces the one not used for longest is dropped."""

    def __init__(self, model: nn.Module, most: int = _MOST_TRACES) -> None:
        self._model = model
        self._most = most
        self._steps: OrderedDict[tuple[tuple[int, ...], ...], _Forward] = OrderedDict()

    def __len__(self) -> int:
        return len(self._steps)

    def __call__(
        self, tokens: mx.array, offsets: mx.array, live: mx.array, groups: list[list[mx.array]]
    ) -> tuple[mx.array, mx.array, list[list[mx.array]]]:
        shapes = tuple(arrays[0].shape for arrays in groups)
        if shapes in self._steps:
            self._steps.move_to_end(shapes)
        else:
            # A function of its own for each: what mx.compile traced is freed with the function.
            self._steps[shapes] = mx.compile(partial(_forward, self._model))
            if len(self._steps) > self._most:
                self._steps.popitem(last=False)
        return self._steps[shapes](tokens, offsets, live, groups)


def _forward(
    model: nn.Module, tokens: mx.array, offsets: mx.array, live: mx.array, groups: list[list[mx.array]]
) -> tuple[mx.array, mx.array, list[list[mx.array]]]:
    if len(groups) == 1:
        (arrays,) = groups
        layers = _slot_layers(arrays, offsets)
        logits = _last_logits(model, tokens, layers)
        new_groups = [[array for layer in layers for array in (layer.keys, layer.values)]]
    else:
        grouped = _grouped_layers(groups, offsets)
        logits = _last_logits(model, tokens, grouped)
        new_groups = [
            [array for layer in grouped for array in (layer.keys.arrays[at], layer.values.arrays[at])]
            for at in range(len(groups))
        ]
    return logits, offsets + live, new_groups


def _last_logits(model: nn.Module, tokens: mx.array, layers: Sequence[SlotLayer | GroupedLayer]) -> mx.array:
    return model(tokens[:, None], cache=list(layers))[:, -1, :].astype(mx.float32)


def _grouped_layers(groups: list[list[mx.array]], offsets: mx.array) -> list[GroupedLayer]:
    step = StepGroups([arrays[0].shape[0] for arrays in groups], [arrays[0].shape[2] for arrays in groups], offsets)
    by_layer = list(zip(*groups, strict=True))
    return [GroupedLayer(*pair, step) for pair in zip(by_layer[::2], by_layer[1::2], strict=True)]


def compiles(model: nn.Module, shapes: Sequence[LayerShape]) -> bool:
    """Whether the compiled step runs and says what the plain one says; a model file may do what a trace cannot."""
    logits: list[mx.array] = []
    for compile_steps in (False, True):
        runner = ModelRunner(model, compile_steps=compile_steps)
        row = mx.array([1], dtype=mx.int32)
        try:
            out = runner.decode(row, row, row, [zeros(shapes, 1, SMALLEST_CAPACITY)], _GREEDY)
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


def attends_by_group(model: nn.Module, shapes: Sequence[LayerShape]) -> bool:
    """Whether every layer's attention can run group by group; installs the hook for that.

    Proven by a step over two groups that must reach the hook in every layer, with the keys, values and mask that the
    caches gave out, and say what the step over one group of the same rows says.
    """
    filled = _probe_rows(model, shapes)
    tokens, offsets = _probe_inputs()
    together = _last_logits(model, tokens, _slot_layers(filled, offsets))
    install(model)
    apart = [[array[row : row + 1] for array in filled] for row in range(2)]
    apart[1] = [mx.pad(array, [(0, 0), (0, 0), (0, SMALLEST_CAPACITY), (0, 0)]) for array in apart[1]]
    layers = _grouped_layers(apart, offsets)
    try:
        logits = _last_logits(model, tokens, layers)
        mx.eval(together, logits)
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError):
        return False
    return all(layer.attended for layer in layers) and _agree(together, logits)


def _agree(reference: mx.array, logits: mx.array) -> bool:
    spread = mx.max(reference) - mx.min(reference)
    return bool(mx.all(mx.abs(reference - logits) <= _PROBE_TOLERANCE * spread).item())


def _shape_of(cache: KVCache) -> LayerShape:
    keys, values = cache.keys, cache.values
    assert keys is not None and values is not None
    return LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)


def _probe_logits(model: nn.Module, shapes: Sequence[LayerShape]) -> mx.array:
    """The logits after the probe tokens, in row 1 of two rows of different length."""
    tokens, offsets = _probe_inputs()
    return _last_logits(model, tokens, _slot_layers(_probe_rows(model, shapes), offsets))[1:]


def _probe_rows(model: nn.Module, shapes: Sequence[LayerShape]) -> list[mx.array]:
    """Keys and values of two rows: the first two probe tokens, and all but the last."""
    ids: list[int] = list(_PROBE_TOKENS)
    runner = ModelRunner(model, compile_steps=False)
    return runner.prefill(zeros(shapes, 2, 2 * len(ids)), [ids[:2], ids[:-1]], 0)


def _probe_inputs() -> tuple[mx.array, mx.array]:
    """Tokens [2] and offsets [2] of the step that comes after the probe rows."""
    tokens = mx.array([_PROBE_TOKENS[2], _PROBE_TOKENS[-1]], dtype=mx.int32)
    return tokens, mx.array([2, len(_PROBE_TOKENS) - 1], dtype=mx.int32)


def _slot_layers(arrays: list[mx.array], offsets: mx.array) -> list[SlotLayer]:
    return [SlotLayer(*pair, offsets) for pair in zip(arrays[::2], arrays[1::2], strict=True)]
