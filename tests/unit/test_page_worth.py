"""What is evicted: on a trace of chats, shared prompts and one-off documents, recomputing costs less than by LRU."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from workers.engine.page_table import PageTable
from workers.engine.page_worth import ATTENTION_EVEN_TOKENS, MOST_USES, Worth, plain_lru, recompute_worth
from workers.engine.prefix_cache import PrefixCache

PAGE = 32


def _trace(rng: random.Random, requests: int) -> Iterator[list[int]]:
    """Prompts: 30 % open a chat on one of six system prompts, 35 % are a next turn, the rest are seen once."""
    systems = [_tokens(rng, 1024 + 512 * at) for at in range(6)]
    chats: list[list[int]] = []
    for _ in range(requests):
        kind = rng.random()
        if kind < 0.30:
            chats.append(systems[min(int(rng.expovariate(0.6)), 5)] + _tokens(rng, rng.randrange(50, 400)))
            yield chats[-1]
        elif kind < 0.65 and chats:
            at = max(0, len(chats) - 1 - int(rng.expovariate(0.15)))
            chats[at] = chats[at] + _tokens(rng, rng.randrange(60, 500))
            yield chats[at]
        else:
            yield _tokens(rng, rng.randrange(200, 2500))


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1000) for _ in range(count)]


def _recomputed(worth: Worth, pages: int, seed: int) -> float:
    """The cost of what was prefilled, in pages of plain prefill."""
    table = PageTable(pages)
    cache = PrefixCache(table, PAGE, "model", worth=worth)
    cost = 0.0
    for tokens in _trace(random.Random(seed), 500):
        held = cache.match(tokens)
        needed = len(tokens) // PAGE
        cost += sum(1 + at * PAGE / ATTENTION_EVEN_TOKENS for at in range(len(held), needed))
        held += cache.allocate(needed - len(held))
        cache.insert(tokens, held)
        table.release(held)
    return cost


@pytest.mark.parametrize("pages", [300, 1000])
def test_recomputing_costs_less_than_with_plain_lru(pages: int) -> None:
    assert _recomputed(recompute_worth, pages, seed=0) < 0.95 * _recomputed(plain_lru, pages, seed=0)


def test_a_constant_worth_is_plain_lru() -> None:
    table = PageTable(8)
    cache = PrefixCache(table, 1, "model", worth=plain_lru)
    for token in (1, 2, 3, 4):
        pages = cache.allocate(1)
        cache.insert([token], pages)
        table.release(pages)
    for token in (3, 1, 4, 2):
        table.release(cache.match([token]))
    order: list[int] = []
    while len(cache):
        cache.evict(1)
        order.append(next(token for token in (3, 1, 4, 2) if token not in order and not cache.names([token])[1]))
    assert order == [3, 1, 4, 2]


def test_later_pages_and_pages_asked_for_often_are_worth_more() -> None:
    assert recompute_worth(8192, 1) > recompute_worth(0, 1)
    assert recompute_worth(0, 3) > recompute_worth(0, 1)
    assert recompute_worth(0, MOST_USES + 5) == recompute_worth(0, MOST_USES)


def test_a_prompt_seen_once_goes_before_an_older_one_that_was_asked_for_again() -> None:
    table = PageTable(4)
    cache = PrefixCache(table, 1, "model")
    for token, asked in ((1, 2), (2, 0), (3, 0)):
        pages = cache.allocate(1)
        cache.insert([token], pages)
        table.release(pages)
        for _ in range(asked):
            table.release(cache.match([token]))
    cache.evict(2)
    assert cache.names([1])[1] == 1 and len(cache) == 1
