"""What a cached page is worth, in pages of plain prefill: the one place that weighs age against recomputation. Pure.

GreedyDual with frequency (Cao & Irani 1997; Cherkasova 1998), all pages being of one size: a page that is used gets
the value `clock + worth`, the page with the least value goes first, and the clock becomes that page's value. So value
fades as others come and go, and a page worth twice as much stays about twice as long. A constant worth is plain LRU.

    worth(position, uses) = (1 + position / ATTENTION_EVEN_TOKENS) * min(uses, MOST_USES)

The first factor is the cost of prefilling the page again: linear layers cost the same anywhere, attention grows with
the position. The second is how often somebody asked: the end of a long shared prefix stays, a prompt seen once goes.
"""

from __future__ import annotations

from collections.abc import Callable

# Where attention over what came before costs as much as the layers' products: 6 x hidden size, at a usual 4B model.
ATTENTION_EVEN_TOKENS = 16_384
MOST_USES = 8

Worth = Callable[[int, int], float]


def recompute_worth(position_tokens: int, uses: int) -> float:
    """The formula above, for a page that begins at token `position_tokens` and was asked for `uses` times."""
    return (1.0 + position_tokens / ATTENTION_EVEN_TOKENS) * min(uses, MOST_USES)


def plain_lru(position_tokens: int, uses: int) -> float:
    """Every page is worth the same: what the formula is compared with."""
    return 1.0
