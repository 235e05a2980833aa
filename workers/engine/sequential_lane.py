"""The lane for models whose caches cannot live in slots (rotating, state-space, …): one row, mlx_lm's own caches.

Still queued, prioritised, chunked and cancellable like any other row; no batching and no prefix reuse.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from workers.engine.batch_scheduler import Chunk
from workers.engine.flight import DecodeFlight
from workers.engine.logprobs import launch_logprobs
from workers.engine.sampler import Sampling, build_sampling, sample
from workers.engine.sequence import Sequence


class SequentialLane:
    max_rows = 1

    def __init__(self, model: nn.Module, vocab_size: int, slot_tokens: int) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self.slot_tokens = slot_tokens
        self.reset()

    def warm_up(self) -> None:
        """Nothing is compiled here."""

    def warm_next(self) -> bool:
        return False

    def begin(self, sequence: Sequence) -> None:
        sequence.prefilled = 0
        self._caches[sequence] = make_prompt_cache(self._model)

    def prefill(self, chunks: Items[Chunk]) -> list[mx.array]:
        arrays: list[mx.array] = []
        for chunk in chunks:
            caches = self._caches[chunk.sequence]
            tokens = chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
            self._model(mx.array([tokens]), cache=caches)
            arrays.extend(_arrays_of(caches))
        mx.async_eval(arrays)
        return arrays

    def seat(self, sequences: Items[Sequence]) -> None:
        assert self._seated is None
        (self._seated,) = sequences
        last = self._seated.tokens[-1]
        self._token = mx.array([last], dtype=mx.int32)
        self._offset = mx.array([self._seated.length - 1], dtype=mx.int32)
        self._sampling = build_sampling([self._seated], self._vocab_size)

    def decode(self) -> DecodeFlight:
        sequence = self._seated
        assert sequence is not None
        caches = self._caches[sequence]
        logits = self._model(self._token[:, None], cache=caches)[:, -1, :].astype(mx.float32)
        sampling = self._sampling
        self._token, sampling.edit = sample(sampling.variant, logits, self._offset, sampling.draw, sampling.edit)
        self._offset = self._offset + 1
        params = sequence.params
        logprobs = launch_logprobs(logits, self._token, [0], max(1, params.top_logprobs)) if params.logprobs else None
        others = (*_arrays_of(caches), self._offset, *sampling.edit)
        flight = DecodeFlight(((0, sequence),), self._token, logprobs, others)
        mx.async_eval(self._token, list(others), [] if logprobs is None else logprobs.arrays)
        return flight

    def vacate(self, sequence: Sequence) -> None:
        self._caches.pop(sequence, None)
        if self._seated is sequence:
            self._seated = None

    def reset(self) -> None:
        self._caches: dict[Sequence, list[Any]] = {}
        self._seated: Sequence | None = None
        self._token = self._offset = mx.zeros(1, mx.int32)
        self._sampling: Sampling = build_sampling([None], self._vocab_size)

    def stats(self) -> dict[str, float]:
        held = sum(array.nbytes for caches in self._caches.values() for array in _arrays_of(caches))
        return {"kv_bytes": held}

    def check_integrity(self) -> None:
        assert self._seated is None or self._seated in self._caches


def _arrays_of(caches: list[Any]) -> list[mx.array]:
    """The arrays in the caches' states; states also hold plain numbers and empty places."""
    leaves = tree_flatten([cache.state for cache in caches])
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]
