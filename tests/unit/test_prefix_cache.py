"""The prefix cache: what it finds, what it forgets first, and that it agrees with a plain dictionary of prefixes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.page_table import PageTable
from workers.engine.prefix_cache import PrefixCache

PAGE = 2


def _cache(pages: int = 8, salt: str = "model") -> tuple[PageTable, PrefixCache]:
    table = PageTable(pages)
    return table, PrefixCache(table, PAGE, salt)


def _remember(table: PageTable, cache: PrefixCache, tokens: list[int]) -> list[int]:
    """What a sequence does: match, allocate the rest, insert, leave."""
    held = cache.match(tokens)
    held += cache.allocate(len(tokens) // PAGE - len(held))
    cache.insert(tokens, held)
    table.release(held)
    return held


def test_the_longest_known_run_of_full_pages_is_found() -> None:
    table, cache = _cache()
    pages = _remember(table, cache, [1, 2, 3, 4, 5])
    assert len(pages) == 2
    assert cache.match([1, 2, 3, 4, 9, 9]) == pages
    assert cache.match([1, 2, 9, 9]) == pages[:1]
    assert cache.match([1]) == [] and cache.match([3, 4]) == []


def test_a_match_holds_its_pages_until_released() -> None:
    table, cache = _cache(pages=2)
    _remember(table, cache, [1, 2, 3, 4])
    held = cache.match([1, 2, 3, 4])
    assert cache.allocate(1) == []
    table.release(held)
    assert len(cache.allocate(2)) == 2 and len(cache) == 0


def test_the_least_recently_used_goes_first_and_never_a_page_that_others_follow() -> None:
    table, cache = _cache(pages=4)
    old = _remember(table, cache, [1, 2, 3, 4])
    new = _remember(table, cache, [5, 6, 7, 8])
    table.release(cache.match([1, 2, 3, 4]))
    assert cache.allocate(1) == new[1:]
    cache.check_integrity()
    assert cache.match([5, 6, 7, 8]) == new[:1]
    assert cache.match([1, 2, 3, 4]) == old


def test_a_longer_chain_can_be_evicted_whole() -> None:
    table, cache = _cache(pages=3)
    _remember(table, cache, [1, 2, 3, 4, 5, 6])
    assert cache.evict(3) == 3
    assert (len(cache), table.free) == (0, 3)


def test_other_salts_make_other_keys() -> None:
    _, one = _cache(salt="one")
    _, other = _cache(salt="other")
    assert one.root("") != other.root("")
    assert one.root("tenant") != one.root("")


def test_equal_hashes_with_other_tokens_are_no_hit() -> None:
    table, cache = _cache()
    _remember(table, cache, [1, 2])
    (node,) = cache._nodes.values()  # pyright: ignore[reportPrivateUsage]
    node.name = replace(node.name, tokens=(7, 7))
    assert cache.match([1, 2]) == []


def test_the_first_writer_of_a_page_wins_and_the_second_keeps_its_own() -> None:
    table, cache = _cache()
    first, second = cache.allocate(1), cache.allocate(1)
    cache.insert([1, 2], first)
    cache.insert([1, 2], second)
    table.release(first)
    table.release(second)
    assert cache.match([1, 2]) == first
    assert table.references(second[0]) == 0


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=12), st.booleans()), max_size=25), st.integers(1, 12))
def test_any_history_balances_and_never_answers_wrongly(history: list[tuple[list[int], bool]], pages: int) -> None:
    table, cache = _cache(pages)
    content: dict[int, tuple[int, ...]] = {}  # what each page was written with: the whole prefix up to its end
    kept: list[list[int]] = []
    for tokens, keep in history:
        held = cache.match(tokens)
        for at, page in enumerate(held):
            assert content[page] == tuple(tokens[: (at + 1) * PAGE])
        fresh = cache.allocate(len(tokens) // PAGE - len(held))
        for page in fresh:
            held.append(page)
            content[page] = tuple(tokens[: len(held) * PAGE])
        cache.insert(tokens, held)
        if keep:
            kept.append(held)
        else:
            table.release(held)
        table.check_integrity([cache.cached_pages(), *kept])
        cache.check_integrity()
    for held in kept:
        table.release(held)
    cache.evict(len(cache))
    assert (len(cache), table.free) == (0, pages)
