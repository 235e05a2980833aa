"""A request that breaks the forward pass, its text or the rules fails alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import pytest
from mlx_lm.models import llama

from scheduler.request import SamplingParams
from tests.engine.engine_stage import (
    VOCAB,
    Stage,
    assert_all_free,
    config,
    greedy,
    job,
    loaded,
    prompt,
    reference,
    seeded,
    stage,
    tiny_llama,
)
from workers.backend import ChoiceProgress
from workers.engine.engine import Engine

POISON = 318


class FragileLlama(llama.Model):
    """Raises when it reads the poison token."""

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        if mx.any(inputs == POISON).item():
            raise RuntimeError("poisoned")
        return super().__call__(inputs, cache, input_embeddings)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


def _clean(seed: int, tokens: int) -> tuple[int, ...]:
    return tuple(token if token != POISON else 1 for token in prompt(seed, tokens))


@pytest.mark.parametrize("place", ["in the prompt", "as the last token"])
def test_only_the_request_that_breaks_a_step_fails(model: nn.Module, place: str) -> None:
    on = Stage(Engine(loaded(tiny_llama(kind=FragileLlama)), config()))
    no_poison = SamplingParams(temperature=0.0, max_tokens=40, logit_bias={POISON: -1000.0})
    for at in range(3):
        on.add(job(f"good-{at}", _clean(at, 10 + at), no_poison))
    on.run(until=lambda: len(on.jobs["good-0"].tokens) > 8)
    poisoned = (*_clean(7, 5), POISON, 4) if place == "in the prompt" else (*_clean(7, 5), POISON)
    on.add(job("bad", poisoned, no_poison))
    on.run()
    error = on.jobs["bad"].error
    assert error is not None and error.code == "engine_failure" and "poisoned" in error.message
    calm = stage(model)
    for at in range(3):
        calm.add(job(f"good-{at}", _clean(at, 10 + at), no_poison))
    calm.run()
    for at in range(3):
        assert on.jobs[f"good-{at}"].tokens == calm.jobs[f"good-{at}"].tokens
    assert_all_free(on)


def test_the_culprit_is_found_by_halving_and_no_prompt_is_tried_alone_before(model: nn.Module) -> None:
    on = Stage(Engine(loaded(tiny_llama(kind=FragileLlama)), config()))
    no_poison = SamplingParams(temperature=0.0, max_tokens=30, logit_bias={POISON: -1000.0})
    on.add(*(job(f"good-{at}", _clean(at, 10), no_poison) for at in range(7)))
    on.add(job("bad", (*_clean(7, 9), POISON), no_poison))
    on.run()
    stats = on.engine.stats()
    assert (stats["failed_steps"], stats["jobs_failed"]) == (4, 1)  # 8, 4, 2 and 1 rows
    assert on.jobs["bad"].error is not None
    calm = stage(model)
    for at in range(7):
        calm.add(job(f"good-{at}", _clean(at, 10), no_poison))
    calm.run()
    for at in range(7):
        assert on.jobs[f"good-{at}"].tokens == calm.jobs[f"good-{at}"].tokens
    assert_all_free(on)


def test_a_failed_job_takes_its_other_choices_along(model: nn.Module) -> None:
    on = Stage(Engine(loaded(tiny_llama(kind=FragileLlama)), config()))
    on.add(job("bad", (1, 2, POISON), greedy(5), n=3))
    on.run()
    assert on.jobs["bad"].error is not None
    assert_all_free(on)


class OverflowingLlama(llama.Model):
    """Computes no usable logits in the row that reads the poison token."""

    overflow = mx.nan

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        logits = super().__call__(inputs, cache, input_embeddings)
        return mx.where((inputs == POISON)[:, :, None], self.overflow, logits)


class InfiniteLlama(OverflowingLlama):
    overflow = mx.inf


@pytest.mark.parametrize("kind", [OverflowingLlama, InfiniteLlama])
@pytest.mark.parametrize("params", [greedy(40), seeded(5, 40), SamplingParams(top_k=9, max_tokens=40, logprobs=True)])
def test_a_row_without_finite_logits_fails_alone(
    model: nn.Module, kind: type[llama.Model], params: SamplingParams
) -> None:
    on = Stage(Engine(loaded(tiny_llama(kind=kind)), config()))
    calm = stage(model)
    for at in range(3):
        good = job(f"good-{at}", _clean(at, 10 + at), msgspec.structs.replace(params, logit_bias={POISON: -100.0}))
        on.add(good)
        calm.add(good)
    on.run(until=lambda: len(on.jobs["good-0"].tokens) > 8)
    on.add(job("bad", (*_clean(7, 5), POISON), params, n=2))
    on.run()
    error = on.jobs["bad"].error
    assert error is not None and error.code == "engine_failure" and "not finite" in error.message
    calm.run()
    for at in range(3):
        assert on.jobs[f"good-{at}"].tokens == calm.jobs[f"good-{at}"].tokens
    assert_all_free(on)


class BrokenTokenizer:
    """Fails on one token, as a tokenizer with a damaged vocabulary would; everything else is the real one."""

    def __init__(self, real: Any, broken: int) -> None:
        self._real, self._broken = real, broken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        if token_id == self._broken:
            raise KeyError(token_id)
        return self._real.convert_ids_to_tokens(token_id)


def test_a_row_whose_text_fails_fails_alone(model: nn.Module) -> None:
    said = reference(model, prompt(2, 20), 30)
    other = reference(model, prompt(3, 20), 30)
    broken = next(token for token in said[5:] if token not in other)
    kind = loaded(model)
    on = Stage(Engine(dataclasses.replace(kind, tokenizer=BrokenTokenizer(kind.tokenizer, broken)), config()))
    on.add(job("bad", prompt(2, 20), greedy(30)), job("good", prompt(3, 20), greedy(30)))
    on.run()
    assert on.jobs["bad"].error is not None and on.jobs["bad"].error.code == "engine_failure"
    assert on.jobs["good"].tokens == other
    assert_all_free(on)


def test_a_takeover_whose_text_cannot_be_replayed_fails_alone(model: nn.Module) -> None:
    kind = loaded(model)
    on = Stage(Engine(dataclasses.replace(kind, tokenizer=BrokenTokenizer(kind.tokenizer, 77)), config()))
    on.add(job("bad", prompt(2, 20), greedy(30), progress=(ChoiceProgress(0, (5, 77, 8), "x"),)))
    on.run()
    assert on.jobs["bad"].error is not None and on.jobs["bad"].error.code == "engine_failure"
    assert_all_free(on)


@pytest.mark.parametrize(
    ("ids", "params", "code"),
    [
        ((), greedy(5), "invalid_request"),
        ((1, VOCAB), greedy(5), "invalid_request"),
        (prompt(1, 1024), greedy(5), "context_length_exceeded"),
        ((1, 2), SamplingParams(logit_bias={VOCAB: 1.0}), "invalid_request"),
    ],
)
def test_what_can_never_run_is_refused(
    model: nn.Module, ids: tuple[int, ...], params: SamplingParams, code: str
) -> None:
    on = stage(model)
    on.add(job("bad", ids, params))
    on.run()
    assert on.jobs["bad"].error is not None and on.jobs["bad"].error.code == code
