"""Into which groups of equal capacity the rows of the working set are divided, and what that costs. Pure.

Attention reads every column of a row's group, so rows of very different lengths belong apart: 31 rows of 100 tokens
beside one of 4,096 cost 31 x 112 + 4,096 columns in two groups and 32 x 4,096 in one. A group has its own price, the
calls it adds to every layer; so rows of nearly the same length share one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

SMALLEST_CAPACITY = 32
MOST_GROUPS = 4
GROUP_PRICE_TOKENS = 1024  # attending so many columns takes about as long as one more group's calls


class Shape(NamedTuple):
    """One group of the working set: every row has `capacity` columns."""

    rows: int
    capacity: int

    @property
    def tokens(self) -> int:
        return self.rows * self.capacity


def power_bucket(value: int) -> int:
    """The next power of two."""
    return 1 << max(0, value - 1).bit_length()


@lru_cache(maxsize=1024)
def row_bucket(rows: int) -> int:
    """A group's row count for `rows` rows: 1, 2, 3, 4, 6, 8, 12, … (two sizes per octave)."""
    return _next_multiple(max(1, rows), max(1, power_bucket(rows) // 4))


@lru_cache(maxsize=1 << 16)
def capacity_bucket(tokens: int) -> int:
    """A group's columns for a longest row of `tokens`: four sizes per octave, so little of it is empty."""
    return max(SMALLEST_CAPACITY, _next_multiple(tokens, max(SMALLEST_CAPACITY // 2, power_bucket(tokens) // 8)))


def longest_row(slot_tokens: int) -> int:
    """Tokens of the longest row whose columns fit; never less than the smallest capacity."""
    step = max(SMALLEST_CAPACITY // 2, power_bucket(slot_tokens) // 8)
    return max(SMALLEST_CAPACITY, slot_tokens // step * step)


def cost(shapes: Iterable[Shape]) -> int:
    """Columns attended per step, and the price of each group in columns."""
    return sum(shape.tokens + GROUP_PRICE_TOKENS for shape in shapes)


def plan(lengths: Iterable[int], most_groups: int) -> tuple[Shape, ...]:
    """The cheapest groups for rows of these lengths in tokens, shortest first; empty for no rows."""
    classes = Counter(map(capacity_bucket, lengths))
    return _cheapest(tuple(sorted(classes.items())), most_groups)


def planned_tokens(lengths: Iterable[int], most_groups: int) -> int:
    """Rows x capacity, summed over the groups of the plan."""
    return sum(shape.tokens for shape in plan(lengths, most_groups))


@lru_cache(maxsize=4096)
def _cheapest(classes: tuple[tuple[int, int], ...], most_groups: int) -> tuple[Shape, ...]:
    """For (capacity, rows) classes in ascending order; a group is a run of neighbouring classes."""
    rows_before = [0, *accumulate(rows for _, rows in classes)]
    best: list[_Partial | None] = [_Partial(0, None, Shape(0, 0))] + [None] * len(classes)
    found: _Partial | None = None
    for _ in range(min(most_groups, len(classes))):
        best = [None] + [_one_more(best, classes, rows_before, end) for end in range(1, len(classes) + 1)]
        whole = best[-1]
        if whole is not None and (found is None or whole.cost < found.cost):
            found = whole
    shapes: list[Shape] = []
    while found is not None and found.before is not None:
        shapes.append(found.last)
        found = found.before
    return tuple(reversed(shapes))


class _Partial(NamedTuple):
    """Groups for the first few classes: their cost, the last of them, and those before it."""

    cost: int
    before: _Partial | None
    last: Shape


def _one_more(
    best: list[_Partial | None], classes: tuple[tuple[int, int], ...], rows_before: list[int], end: int
) -> _Partial | None:
    """The cheapest way to put one more group, which ends before class `end`, behind what is best so far."""
    capacity, found = classes[end - 1][0], None
    for start in range(end - 1, -1, -1):
        before = best[start]
        if before is None:
            continue
        rows = row_bucket(rows_before[end] - rows_before[start])
        price = before.cost + rows * capacity + GROUP_PRICE_TOKENS
        if found is None or price < found.cost:
            found = _Partial(price, before, Shape(rows, capacity))
    return found


def _next_multiple(value: int, step: int) -> int:
    return -(-value // step) * step
