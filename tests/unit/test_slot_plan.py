"""Groups of rows by capacity: sizes are few, rows of like lengths share a group, and no division is cheaper."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.slot_plan import (
    MOST_GROUPS,
    Shape,
    capacity_bucket,
    cost,
    longest_row,
    plan,
    planned_tokens,
    row_bucket,
)

LENGTHS = st.lists(st.integers(1, 6000), min_size=1, max_size=8)


def test_sizes_are_few_and_never_much_larger_than_needed() -> None:
    assert [row_bucket(rows) for rows in (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 32)] == [
        1,
        2,
        3,
        4,
        6,
        8,
        12,
        16,
        24,
        32,
        32,
    ]
    assert [capacity_bucket(tokens) for tokens in (1, 33, 64, 65, 129, 513)] == [32, 48, 64, 80, 160, 640]
    assert len({capacity_bucket(tokens) for tokens in range(1, 4097)}) < 30
    assert all(tokens <= capacity_bucket(tokens) <= max(32, 1.25 * tokens + 16) for tokens in range(1, 4097))


def test_one_long_row_does_not_stretch_the_short_ones() -> None:
    lengths = [4096] + [100] * 31
    assert plan(lengths, MOST_GROUPS) == (Shape(32, 112), Shape(1, 4096))
    assert plan(lengths, 1) == (Shape(32, 4096),)
    assert planned_tokens([4100, *range(85, 116)], MOST_GROUPS) <= 1.6 * (4100 + sum(range(85, 116)))


def test_rows_of_nearly_the_same_length_share_a_group() -> None:
    assert plan([100] * 31 + [120], MOST_GROUPS) == (Shape(32, 128),)
    assert plan([], MOST_GROUPS) == ()


@given(LENGTHS)
def test_no_division_into_neighbouring_groups_is_cheaper(lengths: list[int]) -> None:
    ordered = sorted(map(capacity_bucket, lengths))
    found = plan(lengths, MOST_GROUPS)
    borders = [at for at in range(1, len(ordered)) if ordered[at] != ordered[at - 1]]
    for chosen in range(MOST_GROUPS):
        for cuts in combinations(borders, chosen):
            assert cost(found) <= cost(_divided(ordered, cuts))
    assert sum(shape.rows for shape in found) >= len(lengths)


def _divided(ordered: list[int], cuts: tuple[int, ...]) -> list[Shape]:
    groups = [ordered[start:stop] for start, stop in pairwise((0, *cuts, len(ordered)))]
    return [Shape(row_bucket(len(group)), group[-1]) for group in groups]


@given(st.integers(32, 100_000))
def test_the_longest_row_is_the_last_that_fits(slot_tokens: int) -> None:
    longest = longest_row(slot_tokens)
    assert planned_tokens([longest], MOST_GROUPS) <= slot_tokens < planned_tokens([longest + 1], MOST_GROUPS)
