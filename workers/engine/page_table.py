"""Who holds which KV page: a free list and reference counts over page numbers. Pure; the arrays are in page_store.

A page is free (no holder), or held by the prefix cache, by sequences' block tables, or both. Full pages are never
written again, so sharing needs no copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class PageTable:
    """Reference counts of `pages` pages; all start free."""

    def __init__(self, pages: int) -> None:
        self._references = [0] * pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def total(self) -> int:
        return len(self._references)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - self.free

    def references(self, page: int) -> int:
        return self._references[page]

    def allocate(self, count: int) -> list[int]:
        """Up to `count` free pages, each with one reference that the caller owns."""
        taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
        for page in taken:
            self._references[page] = 1
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        """One more reference to each of the pages, which must be in use."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less; a page without references is free again."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def check_integrity(self, holders: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless the counts are exactly those of `holders` and the free list holds the rest."""
        counted = Counter(page for pages in holders for page in pages)
        for page, references in enumerate(self._references):
            assert counted[page] == references, f"page {page}: {references} counted, {counted[page]} held"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is twice in the free list"
        assert free == {page for page, references in enumerate(self._references) if references == 0}
