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
from workers.engine.snapshots import Snapshots


class PromptCaches:
    """`snapshots`, where the model's caches allow it, know the beginnings of prompts that were read before."""

    def __init__(self, model: nn.Module, snapshots: Snapshots | None = None) -> None:
        self._model = model
        self._snapshots = snapshots
        self._caches: dict[Sequence, list[Any]] = {}
        self._branches: dict[Sequence, int] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._caches

    def __getitem__(self, sequence: Sequence) -> list[Any]:
        return self._caches[sequence]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for caches in self._caches.values() for array in cache_arrays(caches))

    def begin(self, sequence: Sequence) -> None:
        if self._snapshots is None:
            sequence.prefilled = 0
            self._caches[sequence] = make_prompt_cache(self._model)
            return
        restored = self._snapshots.restore(sequence)
        self._caches[sequence] = restored.caches
        sequence.prefilled = restored.position
        sequence.cached_tokens = max(sequence.cached_tokens, restored.position)
        if restored.branch is not None:
            self._branches[sequence] = restored.branch

    def prefill(self, chunks: Items[Chunk]) -> list[mx.array]:
        """Launch the chunks; returns the arrays to wait for. Logits are never computed: nothing asks for them."""
        arrays: list[mx.array] = []
        for chunk in chunks:
            caches = self._caches[chunk.sequence]
            start, end = chunk.start, chunk.start + chunk.count
            branch = self._branches.get(chunk.sequence)
            if self._snapshots is not None and branch is not None and start < branch < end:
                self._read(chunk.sequence, start, branch)
                self._snapshots.keep(chunk.sequence, caches, branch)
                start = branch
            self._read(chunk.sequence, start, end)
            arrays.extend(cache_arrays(caches))
        mx.async_eval(arrays)
        return arrays

    def complete(self, sequence: Sequence) -> None:
        """The prompt was read: what its caches hold now will help who begins with it."""
        self._branches.pop(sequence, None)
        if self._snapshots is not None:
            self._snapshots.keep(sequence, self._caches[sequence], sequence.prefill_target)

    def take(self, sequence: Sequence) -> list[Any]:
        """The sequence's caches, which are no longer kept here."""
        return self._caches.pop(sequence)

    def drop(self, sequence: Sequence) -> None:
        self._caches.pop(sequence, None)
        self._branches.pop(sequence, None)

    def _read(self, sequence: Sequence, start: int, end: int) -> None:
        self._model(mx.array([sequence.tokens[start:end]]), cache=self._caches[sequence])


def cache_arrays(caches: list[Any]) -> list[mx.array]:
    """The arrays in the caches' states; states also hold plain numbers and empty places."""
    leaves = tree_flatten([cache.state for cache in caches])
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]
