"""Which pages already hold the KV of a token prefix, and which of them go first when room is needed. Pure.

Full pages form chains: a page's key is a hash over its tokens and the key before it, salted by what else decides
the KV (model, dtype). A hit compares the tokens too, so a hash collision cannot serve wrong KV.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workers.engine.page_table import PageTable


@dataclass(slots=True)
class _Node:
    page: int
    tokens: tuple[int, ...]
    parent: bytes
    children: int = 0


class PrefixCache:
    """Chains of full pages; holds one reference to each page it knows.

    `_nodes` is in order of use, oldest first, and a chain is always touched from its end to its start, so a parent
    is never older than its child and eviction meets leaves first.
    """

    def __init__(self, table: PageTable, page_tokens: int, salt: str) -> None:
        self._table = table
        self._page_tokens = page_tokens
        self._root = hashlib.blake2b(f"{salt}\0{page_tokens}".encode(), digest_size=16).digest()
        self._nodes: OrderedDict[bytes, _Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Pages of the longest known prefix of full pages; the caller owns one new reference to each."""
        keys: list[bytes] = []
        pages: list[int] = []
        for key, _, block in self._chain(tokens):
            node = self._nodes.get(key)
            if node is None or node.tokens != block:
                break
            keys.append(key)
            pages.append(node.page)
        self._touch(keys)
        self._table.retain(pages)
        return pages

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Make `pages`, which hold the KV of the leading full pages of `tokens`, findable; what is known stays."""
        keys: list[bytes] = []
        for page, (key, parent, block) in zip(pages, self._chain(tokens), strict=False):
            node = self._nodes.get(key)
            if node is None:
                self._nodes[key] = _Node(page, block, parent)
                self._table.retain((page,))
                if parent in self._nodes:
                    self._nodes[parent].children += 1
            elif node.tokens != block:
                break
            keys.append(key)
        self._touch(keys)

    def allocate(self, count: int) -> list[int]:
        """Up to `count` pages, unreferenced cached ones evicted where the free list is too short."""
        if count > self._table.free:
            self.evict(count - self._table.free)
        return self._table.allocate(count)

    def evict(self, count: int) -> int:
        """Forget up to `count` least recently used pages that nothing else holds and no known page follows."""
        evicted = 0
        for key in self._eviction_order(count):
            node = self._nodes.pop(key)
            if node.parent in self._nodes:
                self._nodes[node.parent].children -= 1
            self._table.release((node.page,))
            evicted += 1
        return evicted

    def cached_pages(self) -> list[int]:
        """The pages that the cache holds a reference to."""
        return [node.page for node in self._nodes.values()]

    def check_integrity(self) -> None:
        """Raise AssertionError unless every parent is known, newer than its children, and counts them."""
        children: dict[bytes, int] = {}
        position = {key: at for at, key in enumerate(self._nodes)}
        for key, node in self._nodes.items():
            if node.parent != self._root:
                assert node.parent in self._nodes, "a page outlived its parent"
                assert position[node.parent] > position[key], "a parent is older than its child"
                children[node.parent] = children.get(node.parent, 0) + 1
        for key, node in self._nodes.items():
            assert node.children == children.get(key, 0), "children miscounted"

    def _chain(self, tokens: Sequence[int]) -> Iterator[tuple[bytes, bytes, tuple[int, ...]]]:
        """(key, parent key, tokens) of each full page, in order."""
        parent = self._root
        for start in range(0, len(tokens) - self._page_tokens + 1, self._page_tokens):
            block = tuple(tokens[start : start + self._page_tokens])
            key = hashlib.blake2b(array("I", block).tobytes(), key=parent, digest_size=16).digest()
            yield key, parent, block
            parent = key

    def _touch(self, keys: list[bytes]) -> None:
        for key in reversed(keys):
            self._nodes.move_to_end(key)

    def _eviction_order(self, count: int) -> list[bytes]:
        """Oldest first; a page whose only child is already chosen counts as a leaf."""
        chosen: list[bytes] = []
        gone: dict[bytes, int] = {}
        for key, node in self._nodes.items():
            if len(chosen) == count:
                break
            if node.children == gone.get(key, 0) and self._table.references(node.page) == 1:
                chosen.append(key)
                gone[node.parent] = gone.get(node.parent, 0) + 1
        return chosen
