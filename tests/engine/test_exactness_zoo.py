"""Every kind of cache says in company what it says alone: greedy what mlx_lm says, seeded what it drew before.

fp32 and MLX's own BLAS; token for token. Windows and chunks are shorter than the prompts, prompts go in by pieces.
"""

from __future__ import annotations

import random
from functools import cache

import mlx.core as mx
import msgspec
import pytest
from mlx_lm.generate import generate_step

from scheduler.request import SamplingParams
from tests.engine.engine_stage import Stage, config, greedy, job, prompt, seeded
from tests.engine.model_zoo import MODELS, zoo_model
from workers.backend import ChoiceProgress
from workers.engine.engine import Engine
from workers.engine.lane_choice import kv_bytes

PROMPT_TOKENS = (1, 2, 23, 30, 70)
ANSWER_TOKENS = 36


def endless(params: SamplingParams) -> SamplingParams:
    return msgspec.structs.replace(params, ignore_eos=True)


@cache
def mlx_lm_says(name: str, prompt_ids: tuple[int, ...], tokens: int) -> list[int]:
    steps = generate_step(mx.array(prompt_ids), zoo_model(name).model, max_tokens=tokens)
    return [int(token) for token, _ in steps]


def zoo_stage(name: str, **changes: int | bool) -> Stage:
    """An engine whose prompts go in by small pieces wherever something else is running."""
    return Stage(Engine(zoo_model(name), config(prefill_stall_ms=1, **changes)))


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_join_and_leave_say_what_mlx_lm_says(name: str) -> None:
    on = zoo_stage(name, max_rows=4)
    expected: dict[str, list[int]] = {}
    for at, length in enumerate(PROMPT_TOKENS):
        limit = ANSWER_TOKENS - 7 * at
        expected[f"job-{at}"] = mlx_lm_says(name, prompt(at, length), ANSWER_TOKENS)[:limit]
        on.add(job(f"job-{at}", prompt(at, length), endless(greedy(limit))))
        for _ in range(2 * at):
            on.step()
        if at == 2:
            on.add(job("gone", prompt(9, 30), endless(greedy(90))))
    on.engine.cancel("gone", 1)
    on.run()
    said = {name: outcome.tokens for name, outcome in on.jobs.items() if name != "gone"}
    assert said == expected
    assert len(set(expected["job-0"])) > 5, "a model that repeats itself proves nothing"
    assert on.engine.busy_rows == 0 and on.engine.waiting == 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("params", [greedy(ANSWER_TOKENS), seeded(5, ANSWER_TOKENS)], ids=["greedy", "seeded"])
def test_a_takeover_at_any_token_goes_on_as_if_nothing_had_happened(name: str, params: SamplingParams) -> None:
    params = endless(params)
    alone = zoo_stage(name)
    alone.add(job("job", prompt(3, 30), params))
    shown = [ChoiceProgress(0)]
    while alone.engine.has_work:
        alone.step()
        if alone.jobs["job"].choices:
            shown.append(alone.jobs["job"].choices[0].progress(0))
    whole = alone.jobs["job"].tokens
    assert len(whole) == ANSWER_TOKENS
    cuts = [progress for progress in shown if progress.finish_reason is None]
    on = zoo_stage(name)
    chosen = random.Random(name).sample(cuts, 2)
    for at, progress in enumerate(chosen):
        on.add(job(f"job-{at}", prompt(3, 30), params, progress=(progress,), attempt=2))
        on.step()
    on.add(job("other", prompt(4, 12), endless(seeded(6, 20))))
    on.run()
    for at, progress in enumerate(chosen):
        assert list(progress.token_ids) + on.jobs[f"job-{at}"].tokens == whole


@pytest.mark.parametrize("name", MODELS)
def test_a_seeded_row_draws_in_company_what_it_draws_alone(name: str) -> None:
    jobs = [
        job(f"job-{at}", prompt(at, 8 + 40 * at), endless(seeded(at, 25, temperature=0.5 + at / 2))) for at in range(2)
    ]
    together, alone = zoo_stage(name), zoo_stage(name)
    for prepared in jobs:
        together.add(prepared)
        together.step()
        alone.add(prepared)
        alone.run()
    together.run()
    for prepared in jobs:
        assert together.jobs[prepared.job_id].tokens == alone.jobs[prepared.job_id].tokens


@pytest.mark.parametrize("name", ["llama", "gemma3", "granitemoehybrid", "llama4"])
def test_choices_and_log_probabilities_do_not_depend_on_company(name: str) -> None:
    params = msgspec.structs.replace(endless(seeded(8, 12)), logprobs=True, top_logprobs=3)
    asked = job("asked", prompt(5, 40), params, n=2)
    alone, together = zoo_stage(name), zoo_stage(name)
    alone.add(asked)
    together.add(job("other", prompt(6, 9), endless(greedy(30))), asked, job("third", prompt(7, 3), endless(greedy(9))))
    alone.run()
    together.run()
    for index, choice in alone.jobs["asked"].choices.items():
        same = together.jobs["asked"].choices[index]
        assert same.tokens == choice.tokens and len(same.logprobs) == 12
        for here, there in zip(choice.logprobs, same.logprobs, strict=True):
            assert len(here.top) == 3
            assert here.chosen.logprob == pytest.approx(there.chosen.logprob, abs=1e-4)
    assert alone.jobs["asked"].choices[0].tokens != alone.jobs["asked"].choices[1].tokens


@pytest.mark.parametrize("name", MODELS)
def test_the_next_turn_says_what_mlx_lm_says_to_the_whole_conversation(name: str) -> None:
    on = zoo_stage(name)
    talk = prompt(7, 40)
    for turn in range(3):
        on.add(job(f"turn-{turn}", talk, endless(greedy(20))))
        on.run()
        assert on.jobs[f"turn-{turn}"].tokens == mlx_lm_says(name, talk, 20)
        talk = (*talk, *on.jobs[f"turn-{turn}"].tokens, *prompt(20 + turn, 7))
    usage = on.jobs["turn-2"].usage
    assert usage is not None and usage.cached_tokens >= 80


@pytest.mark.parametrize("name", [name for name in MODELS if kv_bytes(zoo_model(name))[0] > 0])
def test_rows_sent_back_for_want_of_room_come_back_and_say_the_same(name: str) -> None:
    token_bytes, row_bytes = kv_bytes(zoo_model(name))
    each_tokens = max(48, row_bytes // token_bytes)
    on = zoo_stage(name, max_rows=2, kv_budget_bytes=4 * (row_bytes + each_tokens * token_bytes))
    for at in range(2):
        on.add(job(f"job-{at}", prompt(at, 20), endless(greedy(each_tokens))))
    on.run()
    assert on.engine.stats()["preemptions"] > 0
    for at in range(2):
        assert on.jobs[f"job-{at}"].tokens == mlx_lm_says(name, prompt(at, 20), each_tokens)
