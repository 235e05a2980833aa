"""Pages: what is known is not prefilled again, choices share the prompt's pages, the oldest go when room is short."""

from __future__ import annotations

import mlx.nn as nn
import pytest

from tests.engine.engine_stage import (
    assert_all_free,
    greedy,
    job,
    prompt,
    reference,
    seeded,
    slot_lane,
    stage,
    tiny_llama,
)
from workers.engine.sequence import Sequence

PAGE = 8


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


def test_a_known_prompt_prefills_only_what_its_full_pages_lack(model: nn.Module) -> None:
    on = stage(model)
    on.add(job("first", prompt(1, 60), greedy(5)))
    on.run()
    assert on.engine.stats()["prefill_tokens"] == 59
    on.add(job("second", prompt(1, 60), greedy(5)))
    on.run()
    assert on.engine.stats()["prefill_tokens"] == 59 + 59 % PAGE
    assert on.jobs["second"].usage is not None and on.jobs["second"].usage.cached_tokens == 56
    assert on.jobs["first"].tokens == on.jobs["second"].tokens


def test_a_prompt_of_whole_pages_still_computes_its_last_token(model: nn.Module) -> None:
    on = stage(model)
    for name in ("first", "second"):
        on.add(job(name, prompt(1, 64), greedy(5)))
        on.run()
        assert on.jobs[name].tokens == reference(model, prompt(1, 64), 5)
    assert on.jobs["second"].usage is not None and on.jobs["second"].usage.cached_tokens == 56


def test_the_next_turn_finds_the_answer_of_the_turn_before(model: nn.Module) -> None:
    on = stage(model)
    on.add(job("turn-1", prompt(2, 20), greedy(40)))
    on.run()
    said = tuple(on.jobs["turn-1"].tokens)
    assert len(said) == 40
    next_prompt = (*prompt(2, 20), *said, *prompt(9, 6))
    on.add(job("turn-2", next_prompt, greedy(20)))
    on.run()
    assert on.jobs["turn-2"].usage is not None and on.jobs["turn-2"].usage.cached_tokens == 56
    assert on.jobs["turn-2"].tokens == reference(model, next_prompt, 20)


def test_choices_of_one_job_hold_the_same_prompt_pages(model: nn.Module) -> None:
    on = stage(model)
    on.add(job("job", prompt(3, 41), seeded(1, 30), n=4))
    on.run(until=lambda: on.engine.stats()["decode_steps"] > 0 and on.engine.busy_rows == 4 and not on.engine.waiting)
    on.run(until=lambda: len(_running(on.engine)) == 4)
    tables = [sequence.block_table[:5] for sequence in _running(on.engine)]
    assert len(tables) == 4 and all(table == tables[0] and len(table) == 5 for table in tables)
    assert [slot_lane(on).pages.table.references(page) for page in tables[0]] == [5] * 5  # four choices and the cache
    assert on.engine.stats()["prefill_tokens"] == 40
    on.run()
    assert_all_free(on)


def test_a_burst_with_a_long_common_beginning_prefills_it_once(model: nn.Module) -> None:
    on = stage(model)
    common = prompt(1, 200)
    on.add(*(job(f"job-{at}", common + prompt(20 + at, 5), greedy(4)) for at in range(5)))
    on.run()
    assert on.engine.stats()["prefill_tokens"] == 204 + 4 * 4
    for at in range(5):
        assert on.jobs[f"job-{at}"].tokens == reference(model, common + prompt(20 + at, 5), 4)


def _running(engine: object) -> list[Sequence]:
    return engine._scheduler.running  # type: ignore[attr-defined]  # pyright: ignore


def test_pages_in_use_survive_while_the_oldest_unused_make_room(model: nn.Module) -> None:
    on = stage(model, max_rows=2, kv_budget_bytes=1 << 18)
    total = slot_lane(on).pages.table.total
    on.add(job("keeper", prompt(1, 40), greedy(200)))
    for turn in range(3 * total // 10):
        on.add(job(f"job-{turn}", prompt(100 + turn, 80), greedy(2)))
        on.run(until=lambda turn=turn: on.jobs[f"job-{turn}"].usage is not None)
    on.run()
    assert slot_lane(on).pages.table.used <= total
    assert on.jobs["keeper"].tokens == reference(model, prompt(1, 40), 200)
    assert_all_free(on)
