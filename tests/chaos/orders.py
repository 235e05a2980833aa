"""What producers order: scripted jobs made up as they go, and demo-model requests whose answers were heard alone."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

from tests.chaos.clients import Desk, Manner, converse, watch_events
from tests.chaos.ledger import POISONED, SUCCEEDED, Expected, Order
from tests.chaos.script import MODEL, Script, encode_script

DEMO_REQUESTS = 6


class OrderBook:
    """Makes orders for one producer; `demo` is shared, its answers being known from the solo run."""

    def __init__(self, name: str, rng: random.Random, demo: list[Order]) -> None:
        self._name = name
        self._rng = rng
        self._demo = demo
        self._numbers = itertools.count(1)

    def any(self, may_end: frozenset[str] = SUCCEEDED) -> Order:
        """One in four runs on the demo model."""
        if self._demo and self._rng.random() < 0.25:
            order = self._rng.choice(self._demo)
            return replace(order, name=f"{self.name()}/{order.name}", may_end=may_end)
        return self.scripted(may_end=may_end)

    def scripted(
        self, *, may_end: frozenset[str] = SUCCEEDED, words: tuple[int, int] = (5, 120), failures: int = 0
    ) -> Order:
        name = self.name()
        pause_ms = self._rng.choice((2.0, 10.0, 20.0))
        return _scripted_order(
            Script(tag=name, words=self._rng.randint(*words), pause_ms=pause_ms, failures=failures), may_end
        )

    def poison(self) -> Order:
        script = Script(tag=self.name(), words=40, poison_at=self._rng.choice((0, 3, 20)))
        return replace(_scripted_order(script, POISONED), poison=True)

    def name(self) -> str:
        return f"{self._name}.{next(self._numbers)}"


def _scripted_order(script: Script, may_end: frozenset[str]) -> Order:
    messages = [{"role": "user", "content": encode_script(script)}]
    expected = Expected(script.text, tuple(range(script.words)))
    return Order(script.tag, {"model": MODEL, "messages": messages}, expected, may_end)


def demo_requests(rng: random.Random) -> list[Order]:
    """Requests to the demo model, greedy and seeded; their answers are still to be heard."""
    words = ["heron", "pebble", "lantern", "quartz", "willow", "copper", "ember", "fjord", "marble", "thistle"]
    orders: list[Order] = []
    for number in range(DEMO_REQUESTS):
        line = " ".join(f"{rng.choice(words)} {rng.randrange(1000)}" for _ in range(8))
        sampling = {"temperature": 0} if number % 2 else {"temperature": 1.0, "seed": rng.randrange(2**31)}
        body = {
            "model": "default",
            "messages": [{"role": "user", "content": f"Repeat after me: {line}"}],
            "min_tokens": 32,
            "max_tokens": 96,
            **sampling,
        }
        orders.append(Order(f"demo.{number + 1}", body, None))
    return orders


async def heard_alone(desk: Desk, orders: list[Order], rng: random.Random) -> list[Order]:
    """The same orders with the answers that an undisturbed run of each gives."""
    heard: list[Order] = []
    for order in orders:
        unknown = desk.ledger.open(order, keyed=True)
        await converse(desk, unknown, rng, Manner())
        check = await watch_events(desk, unknown, rng)
        if unknown.text != check.text or check.finish_reason is None:
            desk.ledger.blame("the solo run's stream and its events differ", unknown)
        expected = Expected(check.text, tuple(check.token_ids), str(check.finish_reason))
        unknown.order = replace(order, expected=expected)
        heard.append(unknown.order)
    return heard
