"""Any schedule of joins, cancels, hand-backs and takeovers leaves every answer as it is alone, and the books balanced.

The books (pages, references, rows, lists) are checked by the stage after every single step.
"""

from __future__ import annotations

import unittest
from dataclasses import dataclass
from functools import cache
from itertools import count

import mlx.core as mx
import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlx_lm.generate import generate_step

from scheduler.request import SamplingParams
from tests.engine.engine_stage import Choice, Stage, assert_all_free, config, greedy, job, prompt, seeded
from tests.engine.model_zoo import zoo_model
from workers.backend import ChoiceProgress
from workers.engine.engine import Engine
from workers.engine.lane_choice import kv_bytes
from workers.engine.slot_lane import SlotLane

LONGEST_ANSWER = 48
PROMPTS = tuple(prompt(family, 60)[:length] for family in (1, 2) for length in (1, 9, 33, 60))
PARAMS = (
    greedy(LONGEST_ANSWER),
    seeded(3, LONGEST_ANSWER),
    msgspec.structs.replace(seeded(4, LONGEST_ANSWER, temperature=0.6), top_p=0.9),
    msgspec.structs.replace(seeded(5, LONGEST_ANSWER), repetition_penalty=1.3, frequency_penalty=0.4, min_p=0.02),
)


@cache
def answer(model: str, prompt_ids: tuple[int, ...], way: int) -> list[int]:
    """The longest answer by PARAMS[way]: mlx_lm's own where it is greedy, else the engine's with nobody else there."""
    if PARAMS[way].is_greedy:
        steps = generate_step(mx.array(prompt_ids), zoo_model(model).model, max_tokens=LONGEST_ANSWER)
        return [int(token) for token, _ in steps]
    on = Stage(Engine(zoo_model(model), config()))
    on.add(job("alone", prompt_ids, msgspec.structs.replace(PARAMS[way], ignore_eos=True)))
    on.run()
    return on.jobs["alone"].tokens


@dataclass(frozen=True)
class Order:
    """A job under way: what was asked, what earlier attempts showed, and what is left to say."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    rank: int
    shown: ChoiceProgress
    wanted: list[int]


class Schedule(RuleBasedStateMachine):
    """Jobs come, go and come back while the engine takes its steps."""

    model = ""

    def __init__(self) -> None:
        super().__init__()
        self.orders: dict[str, Order] = {}
        self.names = map("job-{}".format, count())

    @initialize(tight=st.booleans(), chunked=st.booleans())
    def start(self, tight: bool, chunked: bool) -> None:
        token_bytes, row_bytes = kv_bytes(zoo_model(self.model))
        room = 2 * (4 * row_bytes + 4 * 64 * token_bytes) if tight else 1 << 24
        settings = config(max_rows=4, kv_budget_bytes=room, prefill_stall_ms=1 if chunked else 120)
        self.on = Stage(Engine(zoo_model(self.model), settings))

    @rule(
        prompt_ids=st.sampled_from(PROMPTS),
        way=st.integers(0, len(PARAMS) - 1),
        limit=st.integers(1, LONGEST_ANSWER),
        rank=st.integers(0, 3),
    )
    def submit(self, prompt_ids: tuple[int, ...], way: int, limit: int, rank: int) -> None:
        wanted = answer(self.model, prompt_ids, way)[:limit]
        params = msgspec.structs.replace(PARAMS[way], max_tokens=limit, ignore_eos=True)
        self._add(Order(prompt_ids, params, rank, ChoiceProgress(0), wanted))

    @rule(steps=st.integers(1, 25))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.on.step()

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._stop(data)

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def hand_back_and_take_over(self, data: st.DataObject) -> None:
        """What becomes of a preempted job, or of one whose worker died: the same job with its tokens."""
        order, said = self._stop(data)
        tokens = (*order.shown.token_ids, *said.tokens)
        shown = ChoiceProgress(0, tokens, order.shown.text + said.text)
        self._add(Order(order.prompt_ids, order.params, order.rank, shown, order.wanted[len(said.tokens) :]))

    @invariant()
    def nothing_else_was_said(self) -> None:
        for name, order in self.orders.items():
            said = self.on.jobs[name].tokens
            assert said == order.wanted[: len(said)]

    def teardown(self) -> None:
        self.on.run()
        assert {name: self.on.jobs[name].tokens for name in self.orders} == {
            name: order.wanted for name, order in self.orders.items()
        }
        assert self.on.engine.busy_rows == self.on.engine.waiting == 0
        if isinstance(self.on.engine.lane, SlotLane):
            assert_all_free(self.on)

    @property
    def unfinished(self) -> list[str]:
        return [name for name in self.orders if self.on.jobs[name].usage is None]

    def _add(self, order: Order) -> None:
        name = next(self.names)
        self.orders[name] = order
        progress = (order.shown,) if order.shown.token_ids else ()
        self.on.add(job(name, order.prompt_ids, order.params, rank=order.rank, progress=progress))

    def _stop(self, data: st.DataObject) -> tuple[Order, Choice]:
        """Cancel one job; what was asked of it and what it said."""
        name = data.draw(st.sampled_from(self.unfinished))
        self.on.engine.cancel(name, 1)
        order = self.orders.pop(name)
        said = self.on.jobs[name].choices.get(0, Choice())
        assert said.tokens == order.wanted[: len(said.tokens)]
        return order, said


def _machine(name: str) -> type[unittest.TestCase]:
    """The machine for one model, with few and short runs: each step may cost a forward pass."""
    machine = type(f"{name.title()}Schedule", (Schedule,), {"model": name})
    case = machine.TestCase
    case.settings = settings(
        max_examples=12,
        stateful_step_count=12,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    return case


TestLlama = _machine("llama")  # plain KV: pages, prefix hits
TestGemma3 = _machine("gemma3")  # a sliding window
TestGranite = _machine("granitemoehybrid")  # recurrent states beside KV
