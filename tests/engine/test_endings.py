"""How a choice ends, what is visible then, and what is counted."""

from __future__ import annotations

import mlx.nn as nn
import pytest

from scheduler.request import SamplingParams
from tests.engine.engine_stage import (
    EOS,
    Stage,
    config,
    greedy,
    job,
    loaded,
    prompt,
    reference,
    run_alone,
    stage,
    tiny_llama,
    tokenizer,
)
from workers.engine.detokenizer import TextStream
from workers.engine.engine import Engine

ENDS_AT_EOS = prompt(1, 20)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


def _text_of(tokens: list[int]) -> str:
    stream = TextStream(tokenizer())
    return "".join([stream.push(token) for token in tokens]) + stream.flush()


def test_the_end_token_ends_the_choice_unseen_and_uncounted(model: nn.Module) -> None:
    expected = reference(model, ENDS_AT_EOS, 60)
    assert len(expected) < 60
    outcome = run_alone(model, job("job", ENDS_AT_EOS, greedy(60)))
    assert (outcome.tokens, outcome.finish_reason) == (expected, "stop")
    assert outcome.usage is not None and outcome.usage.completion_tokens == len(expected)
    assert outcome.usage.prompt_tokens == 20
    assert outcome.text == _text_of(expected)


def test_ignore_eos_goes_on_and_shows_the_token(model: nn.Module) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    outcome = run_alone(model, job("job", ENDS_AT_EOS, params))
    assert len(outcome.tokens) == 60 and EOS in outcome.tokens and outcome.finish_reason == "length"


def test_stop_token_ids_end_the_choice(model: nn.Module) -> None:
    whole = reference(model, prompt(2, 20), 40)
    params = SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=(whole[10],))
    outcome = run_alone(model, job("job", prompt(2, 20), params))
    assert outcome.tokens == whole[: whole.index(whole[10])] and outcome.finish_reason == "stop"


def test_max_tokens_ends_with_length_and_takes_no_further_step(model: nn.Module) -> None:
    on = stage(model)
    on.add(job("job", prompt(2, 20), greedy(7)))
    on.run()
    assert (len(on.jobs["job"].tokens), on.jobs["job"].finish_reason) == (7, "length")
    assert on.engine.stats()["decode_steps"] == 7
    assert on.jobs["job"].text == _text_of(on.jobs["job"].tokens)


def test_the_context_ends_a_choice_without_max_tokens(model: nn.Module) -> None:
    on = Stage(Engine(loaded(model, context_tokens=64, eos_ids=frozenset()), config()))
    on.add(job("job", prompt(2, 20), SamplingParams(temperature=0.0)))
    on.run()
    assert (len(on.jobs["job"].tokens), on.jobs["job"].finish_reason) == (44, "length")


def test_a_stop_string_cuts_the_text_before_it(model: nn.Module) -> None:
    whole = _text_of(reference(model, prompt(2, 20), 60))
    stop = whole[25:28]
    params = SamplingParams(temperature=0.0, max_tokens=60, stop=(stop,))
    on = stage(model)
    on.add(job("job", prompt(2, 20), params), job("other", prompt(3, 20), greedy(60)))
    on.run()
    assert on.jobs["job"].text == whole[: whole.index(stop)]
    assert on.jobs["job"].finish_reason == "stop"
    assert on.jobs["other"].tokens == reference(model, prompt(3, 20), 60)


@pytest.mark.parametrize("shown", [1, 5, 9, 14])
def test_a_stop_string_is_found_across_a_takeover(model: nn.Module, shown: int) -> None:
    whole = _text_of(reference(model, prompt(2, 20), 60))
    params = SamplingParams(temperature=0.0, max_tokens=60, stop=(whole[25:28],))
    alone = run_alone(model, job("job", prompt(2, 20), params))
    first = stage(model)
    first.add(job("job", prompt(2, 20), params))
    first.run(until=lambda: len(first.jobs["job"].tokens) >= shown)
    before = first.jobs["job"].choices[0]
    after = run_alone(model, job("job", prompt(2, 20), params, progress=(before.progress(0),), attempt=2))
    assert before.text + after.text == alone.text
    assert before.tokens + after.tokens == alone.tokens


def test_a_takeover_of_a_choice_that_had_only_its_end_left_ends(model: nn.Module) -> None:
    alone = run_alone(model, job("job", prompt(2, 20), greedy(8)))
    progress = alone.choices[0].progress(0)
    unfinished = type(progress)(0, progress.token_ids, progress.text, None)
    after = run_alone(model, job("job", prompt(2, 20), greedy(8), progress=(unfinished,), attempt=2))
    assert after.tokens == [] and after.finish_reason == "length"
    assert after.usage is not None and after.usage.completion_tokens == 8


def test_a_job_whose_choices_all_finished_before_is_done_at_once(model: nn.Module) -> None:
    alone = run_alone(model, job("job", prompt(2, 20), greedy(8)))
    after = run_alone(model, job("job", prompt(2, 20), greedy(8), progress=(alone.choices[0].progress(0),), attempt=2))
    assert after.choices == {} and after.usage == alone.usage
