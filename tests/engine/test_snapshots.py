"""Prefix reuse of models that keep more than plain KV: a hit says what a miss says, and prefills less."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest
from mlx_lm.models.cache import RotatingKVCache

from scheduler.request import SamplingParams
from tests.engine.engine_stage import Stage, config, greedy, job, prompt, seeded
from tests.engine.model_zoo import MODELS, zoo_model
from tests.engine.test_exactness_zoo import endless, mlx_lm_says
from workers.engine.cache_state import fill_states, take_states
from workers.engine.engine import Engine
from workers.engine.slot_lane import SlotLane

PAGE = 8


def _stage(name: str, **changes: int | bool) -> Stage:
    return Stage(Engine(zoo_model(name), config(**changes)))


def _has_snapshots(name: str) -> bool:
    return not isinstance(_stage(name).engine.lane, SlotLane)


HYBRIDS = tuple(name for name in MODELS if _has_snapshots(name))
DIFFERENT = tuple(name for name in HYBRIDS if name in ("gemma3", "gemma2", "mamba2", "llama4", "qwen3_next"))


def _ask(on: Stage, name: str, ids: tuple[int, ...], params: SamplingParams, isolation: str = "") -> tuple[int, ...]:
    on.add(dataclasses.replace(job(name, ids, endless(params)), isolation=isolation))
    on.run()
    return tuple(on.jobs[name].tokens)


def _cached(on: Stage, name: str) -> int:
    usage = on.jobs[name].usage
    assert usage is not None
    return usage.cached_tokens


def _known(on: Stage, tokens: int) -> int:
    """How many of the tokens a turn left known: all where there are snapshots, whole pages where KV is all there is."""
    return tokens if on.engine.stats()["snapshots"] else tokens // PAGE * PAGE


def test_the_zoo_has_models_of_every_such_kind() -> None:
    assert {"gemma3", "mamba2", "qwen3_next", "falcon_h1", "llama4"} <= set(HYBRIDS)


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_same_prompt_again_prefills_nothing_and_says_the_same(name: str) -> None:
    on, ids = _stage(name), prompt(1, 70)
    for turn in range(3):
        assert list(_ask(on, f"job-{turn}", ids, greedy(20))) == mlx_lm_says(name, ids, 20)
    known = _known(on, 69)
    assert [_cached(on, f"job-{turn}") for turn in range(3)] == [0, known, known]
    assert on.engine.stats()["prefill_tokens"] == 69 + 2 * (69 - known)


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_next_turn_begins_where_the_answer_ended(name: str) -> None:
    on, ids = _stage(name), prompt(2, 45)
    said = _ask(on, "turn-1", ids, greedy(40))
    ids = (*ids, *said, *prompt(9, 11))
    again = _ask(on, "turn-2", ids, greedy(20))
    assert list(again) == mlx_lm_says(name, ids, 20)
    assert _cached(on, "turn-2") >= _known(on, 45 + 40 - 1)
    ids = (*ids, *again, *prompt(7, 5))
    assert list(_ask(on, "turn-3", ids, greedy(10))) == mlx_lm_says(name, ids, 10)
    assert _cached(on, "turn-3") >= _known(on, 45 + 40 + 11 + 20 - 1)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_shared_beginning_is_known_from_the_third_prompt_on(name: str) -> None:
    on, common = _stage(name), prompt(3, 120)
    for turn in range(4):
        ids = common + prompt(20 + turn, 30)
        assert list(_ask(on, f"job-{turn}", ids, greedy(12))) == mlx_lm_says(name, ids, 12)
    assert [_cached(on, f"job-{turn}") >= 120 - PAGE for turn in range(4)][2:] == [True, True]


@pytest.mark.parametrize("name", DIFFERENT)
def test_seeded_hits_in_company_draw_what_they_draw_alone(name: str) -> None:
    ids = prompt(4, 60)
    alone = _ask(_stage(name), "alone", ids, seeded(3, 25))
    on = _stage(name, max_rows=4)
    _ask(on, "first", ids, seeded(8, 5))
    on.add(*(job(f"job-{at}", ids, endless(seeded(3, 25))) for at in range(2)))
    on.add(job("other", prompt(5, 33), endless(greedy(30))))
    on.run()
    assert tuple(on.jobs["job-0"].tokens) == tuple(on.jobs["job-1"].tokens) == alone
    assert _cached(on, "job-0") == _known(on, 59)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_reads_on_from_a_snapshot_leaves_it_as_it_was(name: str) -> None:
    on, ids = _stage(name), prompt(6, 61)
    for turn, asked in enumerate((ids, (*ids, 7), ids, (*ids[:58], 9, 9, 9), (*ids, 8), ids)):
        assert list(_ask(on, f"job-{turn}", asked, greedy(12))) == mlx_lm_says(name, asked, 12)


def test_tenants_do_not_share_snapshots() -> None:
    on, ids = _stage("mamba2"), prompt(1, 70)
    _ask(on, "one", ids, greedy(5), isolation="one")
    _ask(on, "two", ids, greedy(5), isolation="two")
    assert _cached(on, "two") == 0


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next", "llama4"])
def test_memory_is_bounded_and_old_snapshots_go_first(name: str) -> None:
    on = _stage(name, kv_budget_bytes=1 << 20)
    for turn in range(40):
        ids = prompt(100 + turn, 60 + turn)
        assert list(_ask(on, f"job-{turn}", ids, greedy(3))) == mlx_lm_says(name, ids, 3)
    stats = on.engine.stats()
    assert stats["snapshots_dropped"] > 0
    assert stats["snapshot_bytes"] <= (1 << 20) // 4
    assert _ask(on, "again", prompt(139, 99), greedy(3)) == tuple(on.jobs["job-39"].tokens)
    assert _cached(on, "again") == 98


def test_a_failed_step_gives_up_what_was_kept() -> None:
    on, ids = _stage("qwen3_next"), prompt(1, 70)
    _ask(on, "one", ids, greedy(5))
    on.engine.lane.reset()
    assert on.engine.stats()["snapshots"] == 0
    assert list(_ask(on, "two", ids, greedy(5))) == mlx_lm_says("qwen3_next", ids, 5)
    assert _cached(on, "two") == 0


def test_a_state_that_was_taken_does_not_follow_its_cache() -> None:
    window = RotatingKVCache(max_size=4)
    for token in range(9):
        window.update_and_fetch(mx.full((1, 1, 1, 2), token), mx.full((1, 1, 1, 2), token))
    taken = take_states([window])
    before = mx.array(taken[0][0].tolist())
    again = RotatingKVCache(max_size=4)
    fill_states([again], taken)
    for cache in (window, again):
        cache.update_and_fetch(mx.full((1, 1, 1, 2), 50), mx.full((1, 1, 1, 2), 50))
    assert mx.array_equal(taken[0][0], before)
