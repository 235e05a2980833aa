"""A seeded choice draws the same tokens alone, in any batch, after a takeover; other seeds and choices draw others."""

from __future__ import annotations

import mlx.nn as nn
import msgspec
import pytest

from scheduler.request import SamplingParams
from tests.engine.engine_stage import EOS, Stage, greedy, job, loaded, prompt, run_alone, seeded, stage, tiny_llama
from workers.engine.engine import Engine, EngineConfig

PARAMS = (
    seeded(11, 40),
    seeded(12, 40, temperature=0.7),
    msgspec.structs.replace(seeded(13, 40), top_p=0.8),
    msgspec.structs.replace(seeded(14, 40), top_k=20, min_p=0.01),
    msgspec.structs.replace(seeded(15, 40), repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.2),
    msgspec.structs.replace(seeded(16, 40), logit_bias={5: 4.0, 9: -100.0}, min_tokens=30),
    msgspec.structs.replace(seeded(17, 40), xtc_probability=0.5, xtc_threshold=0.02),
    msgspec.structs.replace(seeded(18, 40), xtc_probability=0.5, xtc_threshold=0.02, top_k=90, top_p=0.95),
    greedy(40),
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


def test_rows_of_different_sampling_do_not_change_each_other(model: nn.Module) -> None:
    on = stage(model)
    for at, params in enumerate(PARAMS):
        on.add(job(f"job-{at}", prompt(at, 9 + at), params))
        on.step()
    on.run()
    for at, params in enumerate(PARAMS):
        alone = run_alone(model, job("alone", prompt(at, 9 + at), params))
        assert on.jobs[f"job-{at}"].tokens == alone.tokens, params


def test_compiled_sampling_draws_the_same(model: nn.Module) -> None:
    on = Stage(Engine(loaded(model), EngineConfig(max_rows=2, page_tokens=8, compile=True, kv_budget_bytes=1 << 24)))
    on.add(job("compiled", prompt(1, 9), seeded(11, 30)))
    on.run()
    assert on.jobs["compiled"].tokens == run_alone(model, job("plain", prompt(1, 9), seeded(11, 30))).tokens


@pytest.mark.parametrize("at", range(len(PARAMS)))
def test_a_takeover_draws_what_the_first_attempt_would_have_drawn(model: nn.Module, at: int) -> None:
    params = PARAMS[at]
    whole = run_alone(model, job("job", prompt(at, 12), params))
    first = stage(model)
    first.add(job("job", prompt(at, 12), params), job("other", prompt(9, 4), seeded(1, 30)))
    first.run(until=lambda: len(first.jobs["job"].tokens) >= 10)
    before = first.jobs["job"].choices[0]
    second = run_alone(model, job("job", prompt(at, 12), params, progress=(before.progress(0),), attempt=2))
    assert before.tokens + second.tokens == whole.tokens


def test_choices_of_one_job_differ_and_each_is_reproducible(model: nn.Module) -> None:
    many = run_alone(model, job("job", prompt(3, 20), seeded(5, 25), n=3))
    again = run_alone(model, job("job", prompt(3, 20), seeded(5, 25), n=3), max_rows=2)
    said = [tuple(many.choices[index].tokens) for index in range(3)]
    assert len(set(said)) == 3
    assert said == [tuple(again.choices[index].tokens) for index in range(3)]


def test_finished_choices_of_an_earlier_attempt_are_counted_and_not_rerun(model: nn.Module) -> None:
    prepared = job("job", prompt(3, 20), seeded(5, 25), n=2)
    whole = run_alone(model, prepared)
    progress = (whole.choices[0].progress(0),)
    second = run_alone(model, job("job", prompt(3, 20), seeded(5, 25), n=2, progress=progress, attempt=2))
    assert list(second.choices) == [1]
    assert second.choices[1].tokens == whole.choices[1].tokens
    assert second.usage is not None and whole.usage is not None
    assert second.usage.completion_tokens == whole.usage.completion_tokens


def test_other_seeds_draw_other_tokens(model: nn.Module) -> None:
    said = {tuple(run_alone(model, job("job", prompt(3, 20), seeded(seed, 20))).tokens) for seed in range(4)}
    assert len(said) == 4


def test_min_tokens_keeps_the_end_away(model: nn.Module) -> None:
    always_end = SamplingParams(temperature=0.0, max_tokens=30, logit_bias={EOS: 1000.0})
    ended = run_alone(model, job("job", prompt(3, 20), always_end))
    assert (ended.tokens, ended.finish_reason) == ([], "stop")
    late = msgspec.structs.replace(always_end, min_tokens=12)
    kept = run_alone(model, job("job", prompt(3, 20), late))
    assert len(kept.tokens) == 12 and kept.finish_reason == "stop"
