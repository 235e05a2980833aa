"""All that is known of a model's KV, by page: what lanes ask before a prefill and give back after it.

    expect (start reading from disk) → is_ready → find → gather …  keep … release

Two tiers: slabs in memory (page_table, prefix_cache, page_store) and, where there is one, the disk (disk_pages). Pages
that were asked for again are copied to the disk's queue while the engine is idle, or when they are evicted. Engine
thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Items

import mlx.core as mx

from workers.engine.disk_pages import DiskPages, PageContent, PageRead
from workers.engine.page_file import TensorLayout
from workers.engine.page_store import PageStore, slab_kinds
from workers.engine.page_table import PageTable
from workers.engine.page_worth import Worth, recompute_worth
from workers.engine.prefix_cache import STORABLE_USES, CachedPage, PrefixCache
from workers.engine.slot_cache import LayerShape

_SPILL_BYTES = 16 << 20  # copied to the host at once; more would be felt between two steps
_SAFETENSORS = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


def page_layout(shapes: Items[LayerShape], page_tokens: int) -> tuple[TensorLayout, ...] | None:
    """How pages of these layers lie in a file; None where safetensors has no name for a dtype."""
    kinds = slab_kinds(shapes)
    if any(kind.dtype not in _SAFETENSORS for kind in kinds):
        return None
    return tuple(
        TensorLayout(_SAFETENSORS[kind.dtype], kind.shape(1, page_tokens)[1:], kind.page_bytes(page_tokens))
        for kind in kinds
    )


class KvPages:
    """`table` and `cache` are the books, `store` the arrays; `on_evict` hears of pages that go."""

    def __init__(
        self,
        shapes: Items[LayerShape],
        pages: int,
        page_tokens: int,
        salt: str,
        disk: DiskPages | None = None,
        worth: Worth = recompute_worth,
    ) -> None:
        self._pages = pages
        self._salt = salt
        self._worth = worth
        self._disk = disk
        self.page_tokens = page_tokens
        self.store = PageStore(shapes, pages, page_tokens)
        self.on_evict: Callable[[list[CachedPage]], None] | None = None
        self._reads: dict[Hashable, PageRead] = {}
        self.ram_hits = self.disk_hits = 0
        self._evictions = 0
        self._new_books()

    def _new_books(self) -> None:
        self.table = PageTable(self._pages)
        self.cache = PrefixCache(self.table, self.page_tokens, self._salt, worth=self._worth, on_evict=self._evicted)

    def expect(self, owner: Hashable, tokens: Items[int], isolation: str = "") -> None:
        """Begin to read from disk what `find` with the same arguments will look for and memory lacks."""
        if self._disk is None:
            return
        names, known = self.cache.names(tokens, isolation)
        missing = names[known:]
        shared = next((read for read in self._reads.values() if missing and read.names[0] == missing[0]), None)
        read = shared or self._disk.ask(self.cache.root(isolation), missing)
        if read is not None:
            self._reads[owner] = read

    def is_ready(self, owner: Hashable) -> bool:
        """Whether `find` gets all that `expect` asked for, or has waited long enough."""
        read = self._reads.get(owner)
        return read is None or read.is_ready

    def await_pages(self, timeout_s: float) -> None:
        """Wait for a read that somebody expects; returns at once where nobody does."""
        for read in self._reads.values():
            read.done.wait(timeout_s)
            return

    def find(self, owner: Hashable, tokens: Items[int], isolation: str = "") -> list[int]:
        """Pages of the longest known prefix of full pages; the caller owns one new reference to each."""
        pages = self.cache.match(tokens, isolation)
        self.ram_hits += len(pages)
        read = self._reads.pop(owner, None)
        if read is not None:
            pages += self._take(read, tokens, pages, isolation)
        return pages

    def forget(self, owner: Hashable) -> None:
        """The owner will not come: give up what is being read for nobody else."""
        read = self._reads.pop(owner, None)
        if read is not None and self._disk is not None and read not in self._reads.values():
            self._disk.take(read)

    def gather(self, pages: Items[int]) -> list[mx.array]:
        """Keys and values [1, kv_heads, len(pages) * page_tokens, head_dim] of all layers, alternating."""
        return self.store.gather(pages)

    def keep(
        self, tokens: Items[int], table: list[int], rows: Items[mx.array], first: int, valid: int, isolation: str = ""
    ) -> bool:
        """Write the full pages of `tokens[:valid]` that `table` lacks, and append them to it.

        `rows` are keys and values [1, kv_heads, …, head_dim] of all layers that start at token `first`. True where
        something was written: evaluate `store.slabs` before the next step.
        """
        size, known = self.page_tokens, len(table)
        pages = self.cache.allocate(max(0, valid // size - known))
        if pages:
            start, stop = known * size - first, (known + len(pages)) * size - first
            self.store.write(pages, [row[:, :, start:stop] for row in rows])
            table.extend(pages)
        self.cache.insert(tokens, table, isolation)
        return bool(pages)

    def release(self, table: list[int]) -> None:
        """Give up the references of a block table, which is empty after."""
        self.table.release(table)
        table.clear()

    def spill(self) -> bool:
        """While idle: hand a few pages that were asked for again to the disk; False where there is nothing to do."""
        if self._disk is None:
            return False
        nodes = self.cache.take_asked_again(self._spill_room())
        self._spill([node for node in nodes if not self._disk.has(node.name.key)])
        return bool(nodes)

    @property
    def is_writing(self) -> bool:
        """Whether pages that were handed over are not on disk yet."""
        return self._disk is not None and self._disk.is_writing

    def reset(self) -> None:
        """Give up everything in memory: a failed step left the arrays in doubt. The disk's pages stay."""
        for owner in list(self._reads):
            self.forget(owner)
        self._evictions += self.cache.evictions
        self.store.clear()
        self._new_books()

    def close(self) -> None:
        """End the disk's thread."""
        if self._disk is not None:
            self._disk.close()

    def stats(self) -> dict[str, float]:
        """Pages by state; hits by tier, evictions and what became of pages on disk since start."""
        return {
            "pages_used": self.table.used,
            "pages_free": self.table.free,
            "pages_cached": len(self.cache),
            "pages_evicted": self._evictions + self.cache.evictions,
            "prefix_ram_pages": self.ram_hits,
            "prefix_disk_pages": self.disk_hits,
            **({} if self._disk is None else self._disk.stats()),
        }

    def check_integrity(self, holders: Items[Items[int]]) -> None:
        """Raise AssertionError unless the cache and `holders` hold exactly what is counted."""
        self.table.check_integrity([self.cache.cached_pages(), *holders])
        self.cache.check_integrity()

    def _take(self, read: PageRead, tokens: Items[int], pages: list[int], isolation: str) -> list[int]:
        """Move what was read into pages behind `pages`, where it still fits on.

        Two owners that begin alike share a read: of it each takes what is its own, up to where they part.
        """
        assert self._disk is not None
        contents = self._disk.take(read)
        names, _ = self.cache.names(tokens, isolation)
        first = read.names[0].position
        own = 0
        for mine, name in zip(names[first:], read.names, strict=False):
            if mine != name:
                break
            own += 1
        contents, skip = contents[:own], len(pages) - first
        if skip < 0 or not contents[skip:]:
            return []
        fresh = self.cache.allocate(len(contents) - skip)
        if fresh:
            self.store.copy_in(fresh, contents[skip : skip + len(fresh)])
            self.cache.insert(tokens, [*pages, *fresh], isolation)
            self.disk_hits += len(fresh)
        return fresh

    def _spill_room(self) -> int:
        assert self._disk is not None
        return min(self._disk.room, max(1, _SPILL_BYTES // max(1, self.store.page_bytes)))

    def _evicted(self, nodes: list[CachedPage]) -> None:
        """Tell whoever keeps something beside the pages, and the disk.

        Parents leave after their children and are worth more: of the last ones as many go as there is room for.
        """
        if self.on_evict is not None:
            self.on_evict(nodes)
        if self._disk is None:
            return
        wanted = [node for node in nodes if node.uses >= STORABLE_USES and not self._disk.has(node.name.key)]
        room = self._spill_room()
        self._disk.dropped += max(0, len(wanted) - room)
        self._spill(wanted[-room:] if room else [])

    def _spill(self, nodes: list[CachedPage]) -> None:
        if not nodes or self._disk is None:
            return
        contents: list[PageContent] = self.store.copy_out([node.page for node in nodes])
        for node, content in zip(nodes, contents, strict=True):
            self._disk.offer(node.root, node.name, content)
