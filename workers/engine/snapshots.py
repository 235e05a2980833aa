"""Prefix reuse for models that keep more than plain KV: what the other layers held at the ends of turns.

Plain keys and values go to pages, as everywhere. A sliding window or a recurrent state exists only as of now, so a
snapshot of it is kept at the end of a prompt, at the end of an answer, and where a prompt leaves a chain of tokens that
is already known (a shared beginning, from the second time on). A snapshot hangs on the page before it; the few tokens
behind that page, and their keys and values, are part of it. Engine thread only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from workers.engine.cache_state import (
    fill_plain,
    fill_states,
    plain_rows,
    state_arrays,
    state_bytes,
    take_states,
)
from workers.engine.kv_pages import KvPages
from workers.engine.prefix_cache import CachedPage
from workers.engine.sequence import Sequence

_BRANCH_WORTH_TOKENS = 64  # prefilling less again costs less than a snapshot


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The tokens behind the last full page, their plain keys and values, and all other layers' states."""

    tail: tuple[int, ...]
    tail_rows: tuple[mx.array, ...]
    states: list[Any]

    @property
    def nbytes(self) -> int:
        return state_bytes([self.tail_rows, self.states])


@dataclass(frozen=True, slots=True)
class Restored:
    """Caches that have read `position` tokens; the next snapshot is wanted at `branch`, if anywhere before the end."""

    caches: list[Any]
    position: int
    branch: int | None


class Snapshots:
    """At most `budget_bytes` of snapshots; those not used for longest go first, and with a page all behind it."""

    def __init__(self, model: nn.Module, pages: KvPages, budget_bytes: int, *, stateful: bool) -> None:
        self._model = model
        self._pages = pages
        self._budget_bytes = budget_bytes
        self._stateful = stateful  # else pages say it all
        self._held: OrderedDict[tuple[bytes, tuple[int, ...]], Snapshot] = OrderedDict()
        self._tails: dict[bytes, list[tuple[int, ...]]] = {}
        self._bytes = 0
        self.hits = self.taken = self.dropped = 0
        pages.on_evict = self._forget_pages

    def restore(self, sequence: Sequence) -> Restored:
        """Caches with the longest beginning of the sequence that is known, its last token excepted."""
        tokens = sequence.tokens[: sequence.prefill_target]
        table = self._pages.find(sequence, tokens, sequence.isolation)
        position, snapshot = self._longest(sequence, tokens, len(table))
        caches = make_prompt_cache(self._model)
        if snapshot is not None:
            size = self._pages.page_tokens
            rows = self._pages.gather(table[: position // size])
            if snapshot.tail:
                rows = [mx.concatenate(list(pair), axis=2) for pair in zip(rows, snapshot.tail_rows, strict=True)]
            fill_plain(caches, rows, position)
            fill_states(caches, snapshot.states)
            self.hits += 1
        branch = len(table) * self._pages.page_tokens
        self._pages.release(table)
        return Restored(caches, position, branch if branch - position >= _BRANCH_WORTH_TOKENS else None)

    def keep(self, sequence: Sequence, caches: Items[Any], position: int) -> None:
        """Remember what the caches hold after the sequence's first `position` tokens; they may read on."""
        size, tokens = self._pages.page_tokens, sequence.tokens[:position]
        names, known = self._pages.cache.names(tokens, sequence.isolation)
        if not names:
            return
        rows = plain_rows(caches)
        key, tail = names[-1].key, tuple(tokens[len(names) * size :])
        if known < len(names):
            table = self._pages.cache.match(tokens, sequence.isolation, counted=False)
            self._pages.keep(tokens, table, rows, 0, position, sequence.isolation)
            known = len(table)
            self._pages.release(table)
            mx.eval(self._pages.store.slabs)
        if not self._stateful or known < len(names) or (key, tail) in self._held:
            return
        tail_rows = tuple(mx.contiguous(row[:, :, len(names) * size : position]) for row in rows) if tail else ()
        snapshot = Snapshot(tail, tail_rows, take_states(caches))
        mx.eval(state_arrays([snapshot.tail_rows, snapshot.states]))
        self._hold(key, snapshot)

    def reset(self) -> None:
        """Give up everything: a failed step left the arrays in doubt."""
        self._held.clear()
        self._tails.clear()
        self._bytes = 0
        self._pages.reset()

    def stats(self) -> dict[str, float]:
        return {
            **self._pages.stats(),
            "snapshots": len(self._held),
            "snapshot_bytes": self._bytes,
            "snapshot_hits": self.hits,
            "snapshots_taken": self.taken,
            "snapshots_dropped": self.dropped,
        }

    @property
    def nbytes(self) -> int:
        return self._bytes + self._pages.store.nbytes

    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not balance; nobody holds pages between two calls."""
        self._pages.check_integrity([])
        assert self._bytes == sum(snapshot.nbytes for snapshot in self._held.values()) <= self._budget_bytes
        listed = {(key, tail) for key, tails in self._tails.items() for tail in tails}
        assert listed == set(self._held), "a snapshot that cannot be found"

    def _longest(self, sequence: Sequence, tokens: list[int], pages: int) -> tuple[int, Snapshot | None]:
        size = self._pages.page_tokens
        if not self._stateful:
            return pages * size, Snapshot((), (), []) if pages else None
        names, _ = self._pages.cache.names(tokens, sequence.isolation)
        for name in reversed(names[:pages]):
            start = (name.position + 1) * size
            behind = tuple(tokens[start : start + size])
            fitting = [tail for tail in self._tails.get(name.key, ()) if behind[: len(tail)] == tail]
            if fitting:
                tail = max(fitting, key=len)
                self._held.move_to_end((name.key, tail))
                return start + len(tail), self._held[name.key, tail]
        return 0, None

    def _hold(self, key: bytes, snapshot: Snapshot) -> None:
        if snapshot.nbytes > self._budget_bytes:
            self.dropped += 1
            return
        self._held[key, snapshot.tail] = snapshot
        self._tails.setdefault(key, []).append(snapshot.tail)
        self._bytes += snapshot.nbytes
        self.taken += 1
        while self._bytes > self._budget_bytes:
            self._drop(*next(iter(self._held)))

    def _drop(self, key: bytes, tail: tuple[int, ...]) -> None:
        self._bytes -= self._held.pop((key, tail)).nbytes
        self._tails[key].remove(tail)
        if not self._tails[key]:
            del self._tails[key]
        self.dropped += 1

    def _forget_pages(self, nodes: list[CachedPage]) -> None:
        for node in nodes:
            for tail in list(self._tails.get(node.name.key, ())):
                self._drop(node.name.key, tail)
