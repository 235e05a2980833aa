"""Prompts under prefill in mlx_lm's own caches, one set per sequence: any model that mlx_lm runs can start here.

Used by the lanes for models whose caches are not plain KV. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from workers.engine.batch_scheduler import Chunk
from workers.engine.sequence import Sequence


class PromptCaches:
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._caches: dict[Sequence, list[Any]] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._caches

    def __getitem__(self, sequence: Sequence) -> list[Any]:
        return self._caches[sequence]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for caches in self._caches.values() for array in cache_arrays(caches))

    def begin(self, sequence: Sequence) -> None:
        sequence.prefilled = 0
        self._caches[sequence] = make_prompt_cache(self._model)

    def prefill(self, chunks: Items[Chunk]) -> list[mx.array]:
        """Launch the chunks; returns the arrays to wait for. Logits are never computed: nothing asks for them."""
        arrays: list[mx.array] = []
        for chunk in chunks:
            caches = self._caches[chunk.sequence]
            tokens = chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
            self._model(mx.array([tokens]), cache=caches)
            arrays.extend(cache_arrays(caches))
        mx.async_eval(arrays)
        return arrays

    def take(self, sequence: Sequence) -> list[Any]:
        """The sequence's caches, which are no longer kept here."""
        return self._caches.pop(sequence)

    def drop(self, sequence: Sequence) -> None:
        self._caches.pop(sequence, None)


def cache_arrays(caches: list[Any]) -> list[mx.array]:
    """The arrays in the caches' states; states also hold plain numbers and empty places."""
    leaves = tree_flatten([cache.state for cache in caches])
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]
