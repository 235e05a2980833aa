"""Who runs when: one step serves all rows, long prompts do not stop streams, room is bounded and given back."""

from __future__ import annotations

import mlx.nn as nn
import pytest

from tests.engine.engine_stage import Stage, assert_all_free, greedy, job, prompt, reference, stage, tiny_llama
from workers.backend import JobProgress

TOKEN_BYTES = 2 * 2 * 2 * 12 * 4  # layers, keys and values, heads, head size, fp32


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


def test_eight_rows_take_as_many_steps_as_the_longest(model: nn.Module) -> None:
    on = stage(model)
    on.add(*(job(f"job-{at}", prompt(2, 9), greedy(30)) for at in range(8)))
    on.run()
    assert on.engine.stats()["decode_steps"] == 30
    assert on.engine.stats()["decode_tokens"] == 240


def test_a_row_joins_while_others_are_in_the_middle(model: nn.Module) -> None:
    on = stage(model)
    on.add(job("early", prompt(2, 9), greedy(60)))
    on.run(until=lambda: len(on.jobs["early"].tokens) == 20)
    on.add(job("late", prompt(3, 9), greedy(5)))
    on.run(until=lambda: on.jobs["late"].usage is not None)
    assert 20 < len(on.jobs["early"].tokens) < 40
    on.run()
    assert on.engine.stats()["decode_steps"] == 60


def test_streams_get_a_step_between_any_two_chunks_of_a_long_prompt(model: nn.Module) -> None:
    on = stage(model, prefill_stall_ms=1)
    on.add(job("stream", prompt(2, 9), greedy(400)))
    on.run(until=lambda: len(on.jobs["stream"].tokens) > 3)
    chunks_before = on.engine.stats()["prefill_steps"]
    on.add(job("long", prompt(4, 700), greedy(5)))
    gained: list[int] = []
    while not on.jobs["long"].tokens:
        chunks = on.engine.stats()["prefill_steps"]
        said = len(on.jobs["stream"].tokens)
        on.run(until=lambda chunks=chunks: on.engine.stats()["prefill_steps"] > chunks or bool(on.jobs["long"].tokens))
        gained.append(len(on.jobs["stream"].tokens) - said)
    assert on.engine.stats()["prefill_steps"] - chunks_before >= 3
    assert all(gain >= 1 for gain in gained[1:])
    on.run()
    assert on.jobs["long"].tokens == reference(model, prompt(4, 700), 5)
    assert on.jobs["stream"].tokens == reference(model, prompt(2, 9), 400)


def test_a_short_prompt_overtakes_a_long_one(model: nn.Module) -> None:
    on = stage(model, prefill_stall_ms=1)
    on.add(job("stream", prompt(2, 9), greedy(400)))
    on.run(until=lambda: len(on.jobs["stream"].tokens) > 3)
    on.add(job("long", prompt(4, 900), greedy(5)), job("short", prompt(5, 12), greedy(5)))
    on.run(until=lambda: bool(on.jobs["short"].tokens))
    assert not on.jobs["long"].tokens


def test_a_cancelled_job_is_silent_and_its_row_and_pages_are_free_at_once(model: nn.Module) -> None:
    on = stage(model, max_rows=2)
    on.add(job("gone", prompt(2, 30), greedy(200)), job("stays", prompt(3, 9), greedy(60)))
    on.run(until=lambda: len(on.jobs["gone"].tokens) > 10)
    on.engine.cancel("gone", 1)
    on.engine.check_integrity()
    assert on.engine.free_rows == 1
    said = len(on.jobs["gone"].tokens)
    on.run()
    assert len(on.jobs["gone"].tokens) == said and on.jobs["gone"].usage is None
    assert on.jobs["stays"].tokens == reference(model, prompt(3, 9), 60)
    assert_all_free(on)


@pytest.mark.parametrize("steps", range(5))
def test_a_job_cancelled_at_any_early_step_leaves_nothing(model: nn.Module, steps: int) -> None:
    on = stage(model)
    on.add(job("gone", prompt(2, 90), greedy(50)))
    for _ in range(steps):
        on.step()
    on.engine.cancel("gone", 1)
    on.engine.cancel("gone", 1)
    on.engine.cancel("never seen", 1)
    on.run()
    assert_all_free(on)


def test_more_jobs_than_rows_wait_and_all_finish(model: nn.Module) -> None:
    on = stage(model, max_rows=3)
    on.add(*(job(f"job-{at}", prompt(at, 5), greedy(6)) for at in range(10)))
    assert on.engine.free_rows == 0
    on.step()
    assert (on.engine.busy_rows, on.engine.waiting) == (3, 7)
    on.run()
    assert all(on.jobs[f"job-{at}"].tokens == reference(model, prompt(at, 5), 6) for at in range(10))
    assert on.engine.free_rows == 3


def test_higher_classes_go_first(model: nn.Module) -> None:
    on = stage(model, max_rows=1)
    on.add(*(job(f"low-{at}", prompt(at, 5), greedy(4), rank=2) for at in range(3)))
    on.add(job("high", prompt(9, 5), greedy(4), rank=0))
    on.run(until=lambda: on.jobs["high"].usage is not None)
    assert sum(on.jobs[f"low-{at}"].usage is not None for at in range(3)) == 0


def _tight_stage(model: nn.Module) -> Stage:
    """Room for 1,024 tokens of working set: 8 rows of 128, or 6 of 160."""
    return stage(model, kv_budget_bytes=2 * 1024 * TOKEN_BYTES)


def test_jobs_beyond_the_kv_budget_wait(model: nn.Module) -> None:
    on = _tight_stage(model)
    assert on.engine.kv_budget_tokens == 1024
    on.add(*(job(f"job-{at}", prompt(at, 150), greedy(6)) for at in range(8)))
    on.step()
    assert (on.engine.busy_rows, on.engine.waiting) == (6, 2)
    assert on.engine.free_kv_tokens == 0
    on.run()
    assert on.engine.free_kv_tokens == 1024
    assert all(on.jobs[f"job-{at}"].tokens == reference(model, prompt(at, 150), 6) for at in (0, 5, 7))


def test_a_row_that_outgrows_the_budget_sends_the_least_one_back_and_both_stay_exact(model: nn.Module) -> None:
    on = _tight_stage(model)
    on.add(*(job(f"job-{at}", prompt(10 + at, 9), greedy(200), rank=at // 4) for at in range(8)))
    on.run()
    assert on.engine.stats()["preemptions"] > 0
    assert all(on.jobs[f"job-{at}"].finish_reason is not None for at in range(8))
    for at in (0, 4, 7):
        assert on.jobs[f"job-{at}"].tokens == reference(model, prompt(10 + at, 9), 200)
    assert_all_free(on)


def test_a_preempted_row_resumes_after_less_than_a_page_of_prefill(model: nn.Module) -> None:
    on = stage(model, max_rows=1)
    on.add(job("batch", prompt(2, 50), greedy(100), rank=3))
    on.run(until=lambda: len(on.jobs["batch"].tokens) == 30)
    before = on.engine.stats()
    on.add(job("high", prompt(3, 20), greedy(5), rank=0))
    on.run(until=lambda: on.jobs["high"].usage is not None)
    assert 30 <= len(on.jobs["batch"].tokens) <= 32
    on.run()
    after = on.engine.stats()
    assert after["preemptions"] - before["preemptions"] == 1
    again = after["prefill_tokens"] - before["prefill_tokens"] - 19
    assert 0 <= again < 8  # of a page
    assert on.jobs["batch"].tokens == reference(model, prompt(2, 50), 100)
    assert on.jobs["high"].tokens == reference(model, prompt(3, 20), 5)
    assert_all_free(on)


def test_a_row_that_fills_the_whole_budget_ends_by_length(model: nn.Module) -> None:
    on = stage(model, kv_budget_bytes=2 * 256 * TOKEN_BYTES)
    assert (on.engine.kv_budget_tokens, on.engine.context_tokens) == (256, 256)
    on.add(job("long", prompt(2, 200), greedy(1000)), job("longer", prompt(3, 256), greedy(5)))
    most = 0.0
    while on.engine.has_work:
        on.step()
        most = max(most, on.engine.stats()["slot_tokens"])
    assert most <= 256
    assert (on.jobs["long"].finish_reason, len(on.jobs["long"].tokens)) == ("length", 56)
    assert on.jobs["long"].tokens == reference(model, prompt(2, 200), 56)
    error = on.jobs["longer"].error
    assert error is not None and error.code == "context_length_exceeded"
    assert_all_free(on)


def test_what_the_engine_measures_adds_up(model: nn.Module) -> None:
    on = stage(model, max_rows=4)
    on.add(*(job(f"job-{at}", prompt(at, 9), greedy(20)) for at in range(3)))
    on.run(until=lambda: len(on.jobs["job-2"].tokens) > 2)
    on.add(job("late", prompt(8, 40), greedy(20), n=2), job("waits", prompt(9, 9), greedy(5), rank=3))
    on.step()
    stats = on.engine.stats()
    assert stats["waiting_age_s_batch"] > 0 == stats["waiting_age_s_high"]
    on.run()
    stats, histograms = on.engine.stats(), on.engine.histograms()
    assert sum(histograms["batch_rows"].counts) == stats["decode_steps"]
    assert histograms["batch_rows"].total == stats["decode_tokens"] == 3 * 20 + 2 * 20 + 5
    assert sum(histograms["token_gaps"].counts) == stats["decode_tokens"] - 6  # a row's first token follows none
    assert 0 < sum(histograms["prefill_stalls"].counts) < stats["prefill_steps"]
    assert stats["waiting_age_s_batch"] == 0


def test_an_event_carries_the_gains_of_all_choices_of_a_job(model: nn.Module) -> None:
    on = stage(model)
    on.add(job("job", prompt(2, 9), greedy(20), n=2))
    widths: list[int] = []
    while on.engine.has_work:
        widths += [len(event.choices) for event in on.step() if isinstance(event, JobProgress)]
    assert max(widths) == 2
    assert on.jobs["job"].choices[0].tokens == on.jobs["job"].choices[1].tokens
    assert on.jobs["job"].usage is not None and on.jobs["job"].usage.completion_tokens == 40
