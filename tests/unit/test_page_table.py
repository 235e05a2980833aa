"""The page table: pages are never lost, never given twice, free exactly when nobody holds them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.page_table import PageTable


def test_pages_are_given_out_once_and_come_back() -> None:
    table = PageTable(4)
    first, second = table.allocate(3), table.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3] and len(second) == 1
    table.release(first)
    assert (table.free, table.used) == (3, 1)
    table.check_integrity([second])


def test_a_page_with_two_holders_is_free_after_the_second_release() -> None:
    table = PageTable(2)
    pages = table.allocate(1)
    table.retain(pages)
    table.release(pages)
    assert table.used == 1
    table.release(pages)
    assert table.used == 0


def test_releasing_or_retaining_a_free_page_is_a_bug() -> None:
    table = PageTable(1)
    with pytest.raises(AssertionError, match="page 0 is free"):
        table.release([0])
    with pytest.raises(AssertionError, match="page 0 is free"):
        table.retain([0])


def test_a_leak_is_found() -> None:
    table = PageTable(2)
    table.allocate(1)
    with pytest.raises(AssertionError, match="1 counted, 0 held"):
        table.check_integrity([])


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 5)), max_size=60))
def test_any_order_of_calls_balances(calls: list[tuple[str, int]]) -> None:
    table, holders = PageTable(9), list[list[int]]()
    for action, number in calls:
        if action == "allocate":
            holders.append(table.allocate(number))
        elif holders and action == "share":
            shared = list(holders[number % len(holders)])
            table.retain(shared)
            holders.append(shared)
        elif holders:
            table.release(holders.pop(number % len(holders)))
        table.check_integrity(holders)
