"""Which pages already hold the KV of a token prefix, and which of them go first when room is needed. Pure.

Full pages form chains (see page_chain). A hit compares the tokens and the page before, so a hash collision cannot serve
wrong KV. Only a page that no known page follows and nobody else holds can go; among those, the one with the least value
(see page_worth).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.engine.page_chain import PageName, chain, chain_root
from workers.engine.page_table import PageTable
from workers.engine.page_worth import Worth, recompute_worth

STORABLE_USES = 2  # written once, asked for once: worth keeping beyond memory


@dataclass(slots=True)
class CachedPage:
    """A known page: its name, the page number that holds it, and what decides when it goes."""

    name: PageName
    root: bytes
    page: int
    uses: int = 0
    value: float = 0.0
    tick: int = 0  # of its last entry among the leaves; older entries are outdated
    children: int = 0


class PrefixCache:
    """Chains of full pages; holds one reference to each page it knows.

    `on_evict` gets what is about to go, while its page is still held and its content is there.
    """

    def __init__(
        self,
        table: PageTable,
        page_tokens: int,
        salt: str,
        *,
        worth: Worth = recompute_worth,
        on_evict: Callable[[list[CachedPage]], None] | None = None,
    ) -> None:
        self._table = table
        self._page_tokens = page_tokens
        self._salt = salt
        self._worth = worth
        self._on_evict = on_evict
        self._nodes: dict[bytes, CachedPage] = {}
        self._leaves: list[tuple[float, int, bytes]] = []  # heap of (value, tick, key)
        self._asked_again: dict[bytes, CachedPage] = {}
        self._clock = 0.0
        self._ticks = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def names(self, tokens: Sequence[int], isolation: str = "") -> tuple[list[PageName], int]:
        """The names of the full pages of `tokens`, and how many of them, from the first on, are known here."""
        names = list(chain(self.root(isolation), tokens, self._page_tokens))
        known = next((at for at, name in enumerate(names) if self._find(name) is None), len(names))
        return names, known

    def match(self, tokens: Sequence[int], isolation: str = "", *, counted: bool = True) -> list[int]:
        """Pages of the longest known prefix of full pages; the caller owns one new reference to each.

        Not `counted`: nobody asked, somebody adds to them.
        """
        found: list[CachedPage] = []
        for name in chain(self.root(isolation), tokens, self._page_tokens):
            node = self._find(name)
            if node is None:
                break
            found.append(node)
        for node in found:
            node.uses += counted
            if counted and node.uses == STORABLE_USES:
                self._asked_again[node.name.key] = node
        self._touch(found)
        pages = [node.page for node in found]
        self._table.retain(pages)
        return pages

    def insert(self, tokens: Sequence[int], pages: Sequence[int], isolation: str = "") -> None:
        """Make `pages`, which hold the KV of the leading full pages of `tokens`, findable; what is known stays."""
        root = self.root(isolation)
        held: list[CachedPage] = []
        for page, name in zip(pages, chain(root, tokens, self._page_tokens), strict=False):
            node = self._nodes.get(name.key)
            if node is None:
                node = self._nodes[name.key] = CachedPage(name, root, page, uses=1)
                self._table.retain((page,))
                if held:
                    held[-1].children += 1
            elif node.name != name:
                break
            held.append(node)
        self._touch(held)

    def allocate(self, count: int) -> list[int]:
        """Up to `count` pages, unreferenced cached ones evicted where the free list is too short."""
        if count > self._table.free:
            self.evict(count - self._table.free)
        return self._table.allocate(count)

    def evict(self, count: int) -> int:
        """Forget up to `count` pages of least value that nothing else holds and no known page follows."""
        chosen: list[CachedPage] = []
        held: list[CachedPage] = []
        while len(chosen) < count and (node := self._pop_leaf()) is not None:
            if self._table.references(node.page) > 1:
                held.append(node)
                continue
            self._clock = max(self._clock, node.value)
            chosen.append(node)
            self._forget(node)
        for node in held:
            self._offer_leaf(node)
        if chosen and self._on_evict is not None:
            self._on_evict(chosen)
        self._table.release(node.page for node in chosen)
        self.evictions += len(chosen)
        return len(chosen)

    def take_asked_again(self, count: int) -> list[CachedPage]:
        """Up to `count` pages that were asked for since they were written; each is named once."""
        keys = [key for key, _ in zip(self._asked_again, range(count), strict=False)]
        return [self._asked_again.pop(key) for key in keys]

    def cached_pages(self) -> list[int]:
        """The pages that the cache holds a reference to."""
        return [node.page for node in self._nodes.values()]

    def check_integrity(self) -> None:
        """Raise AssertionError unless every parent is known and counts its children, and every leaf can be evicted."""
        children: dict[bytes, int] = {}
        for node in self._nodes.values():
            if node.name.parent != node.root:
                assert node.name.parent in self._nodes, "a page outlived its parent"
                children[node.name.parent] = children.get(node.name.parent, 0) + 1
        offered = {entry[2] for entry in self._leaves if self._is_current(entry)}
        for key, node in self._nodes.items():
            assert node.children == children.get(key, 0), "children miscounted"
            assert node.children or key in offered, "a leaf that eviction never meets"

    def root(self, isolation: str) -> bytes:
        """What chains with this isolation tag begin at."""
        return chain_root(self._salt, self._page_tokens, isolation)

    def _find(self, name: PageName) -> CachedPage | None:
        node = self._nodes.get(name.key)
        return node if node is not None and node.name == name else None

    def _touch(self, nodes: list[CachedPage]) -> None:
        """Give the nodes of one chain, first page first, the value of something just used."""
        for node in nodes:
            node.value = self._clock + self._worth(node.name.position * self._page_tokens, node.uses)
        for node in reversed(nodes):
            if not node.children:
                self._offer_leaf(node)

    def _forget(self, node: CachedPage) -> None:
        del self._nodes[node.name.key]
        self._asked_again.pop(node.name.key, None)
        parent = self._nodes.get(node.name.parent)
        if parent is not None:
            parent.children -= 1
            if not parent.children:
                self._offer_leaf(parent)

    def _offer_leaf(self, node: CachedPage) -> None:
        if len(self._leaves) > 2 * len(self._nodes) + 64:
            self._leaves = [entry for entry in self._leaves if self._is_current(entry)]
            heapq.heapify(self._leaves)
        self._ticks += 1
        node.tick = self._ticks
        heapq.heappush(self._leaves, (node.value, self._ticks, node.name.key))

    def _pop_leaf(self) -> CachedPage | None:
        while self._leaves:
            entry = heapq.heappop(self._leaves)
            if self._is_current(entry):
                return self._nodes[entry[2]]
        return None

    def _is_current(self, entry: tuple[float, int, bytes]) -> bool:
        _, tick, key = entry
        node = self._nodes.get(key)
        return node is not None and not node.children and node.tick == tick
