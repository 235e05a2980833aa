"""A histogram as an engine fills it, its worker publishes it and /metrics shows it."""

from __future__ import annotations

from bisect import bisect_left

import msgspec


class Histogram(msgspec.Struct, array_like=True):
    """`counts[i]` values were at most `bounds[i]` and above the bound before; the last count is of all larger ones."""

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    @staticmethod
    def of(*bounds: float) -> Histogram:
        """An empty one; bounds ascending."""
        return Histogram(bounds, [0] * (len(bounds) + 1))

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def copy(self) -> Histogram:
        """As it is now, for another thread."""
        return Histogram(self.bounds, list(self.counts), self.total)
