"""Edits before the draw against their formulas, the groups rows are drawn in, and log-probabilities."""

from __future__ import annotations

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from scheduler.request import SamplingParams
from tests.engine.engine_stage import VOCAB, job, prompt, run_alone, tiny_llama
from tests.engine.sampling_cases import STOP, Floats, draw, draw_often, random_logits, row_of
from workers.engine.logit_edits import EditRows, edit_logits
from workers.engine.sampler import Variant, build_sampling, sample

WIDTH = 50


@pytest.fixture
def logits() -> Floats:
    return random_logits(3, 1, WIDTH)[0]


def _edited(params: SamplingParams, logits: Floats, prompted: tuple[int, ...], emitted: tuple[int, ...]) -> Floats:
    sampling = build_sampling([row_of(params, prompted, emitted)], len(logits))
    offsets = mx.array([len(prompted) - 1 + len(emitted)], dtype=mx.int32)
    return np.array(edit_logits(sampling.variant.edits, mx.array(logits)[None], offsets, EditRows(*sampling.edit)))[0]


def test_penalties_and_bias_are_those_of_the_formula(logits: Floats) -> None:
    params = SamplingParams(
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.25,
        logit_bias={7: 2.5, 11: -3.0},
        min_tokens=9,
    )
    prompted, emitted = (1, 2, 3, 20), (5, 5, 8, 3)
    expected = logits.copy()
    for token in {*prompted, *emitted}:
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token in emitted:
        expected[token] -= 0.25
    for token in set(emitted):
        expected[token] -= 0.4
    expected[7] += 2.5
    expected[11] -= 3.0
    expected[STOP] = -np.inf  # four of nine tokens were emitted
    np.testing.assert_allclose(_edited(params, logits, prompted, emitted), expected, rtol=1e-5)


def test_presence_and_frequency_look_at_the_output_and_repetition_at_the_prompt_too(logits: Floats) -> None:
    for params in (SamplingParams(presence_penalty=1.0), SamplingParams(frequency_penalty=1.0)):
        changed = _edited(params, logits, (1, 2, 2), (5,)) != logits
        assert np.flatnonzero(changed).tolist() == [5]
    changed = _edited(SamplingParams(repetition_penalty=2.0), logits, (1, 2, 2), (5,)) != logits
    assert np.flatnonzero(changed).tolist() == [1, 2, 5]


def test_negative_penalties_invite_repetition(logits: Floats) -> None:
    edited = _edited(SamplingParams(frequency_penalty=-0.5, presence_penalty=-1.0), logits, (1,), (5, 5))
    assert edited[5] == pytest.approx(logits[5] + 2.0)


def test_a_bias_of_100_decides_either_way(logits: Floats) -> None:
    worst, best = int(logits.argmin()), int(logits.argmax())
    for temperature in (0.0, 1.0, 2.0):
        wanted = SamplingParams(temperature=temperature, logit_bias={worst: 100.0})
        assert set(draw_often(wanted, logits, 300)) == {worst}
        banned = SamplingParams(temperature=temperature, logit_bias={best: -100.0})
        assert best not in draw_often(banned, logits, 300)


def test_a_temperature_near_zero_is_greedy(logits: Floats) -> None:
    assert set(draw_often(SamplingParams(temperature=1e-38), logits, 200)) == {int(logits.argmax())}


def test_filters_never_remove_the_best_token(logits: Floats) -> None:
    assert set(draw_often(SamplingParams(top_p=0.0, min_p=1.0), logits, 50)) == {int(logits.argmax())}


@pytest.mark.parametrize("kind", ["frequency_penalty", "presence_penalty", "repetition_penalty"])
def test_penalties_go_on_with_each_draw_as_if_the_row_had_come_later(logits: Floats, kind: str) -> None:
    params = msgspec.structs.replace(SamplingParams(temperature=0.0), **{kind: 4.0})
    sampling = build_sampling([row_of(params)], WIDTH)
    drawn: list[int] = []
    for step in range(12):
        offsets = mx.array([2 + step], dtype=mx.int32)
        tokens, sampling.edit = sample(sampling.variant, mx.array(logits)[None], offsets, sampling.draw, sampling.edit)
        assert tokens.tolist() == draw([row_of(params, emitted=tuple(drawn))], logits[None])
        drawn.extend(tokens.tolist())  # pyright: ignore[reportArgumentType]
    assert len(set(drawn)) > 1


def test_nothing_is_prepared_that_no_row_asked_for() -> None:
    greedy, plain = SamplingParams(temperature=0.0), SamplingParams()
    assert build_sampling([row_of(greedy), None], WIDTH).variant == Variant()
    (alone,) = build_sampling([row_of(plain)], WIDTH).variant.groups
    assert (alone.candidates, alone.min_p, alone.nucleus, alone.xtc_stop) == (0, False, 0, 0)
    rows = [row_of(one) for one in (greedy, plain, SamplingParams(top_k=5), SamplingParams(top_p=0.5))]
    mixed = build_sampling(rows, 1000)
    assert [(group.rows, group.candidates, group.nucleus) for group in mixed.variant.groups] == [(2, 0, 1), (1, 128, 0)]
    assert mixed.variant.greedy == 1 and mixed.edit == []
    one_edit = build_sampling([*rows, row_of(SamplingParams(temperature=0.0, frequency_penalty=1.0))], 1000)
    assert one_edit.variant.edits.rows == 1 and not one_edit.variant.edits.repetition


def test_logprobs_are_the_log_softmax_of_the_raw_logits() -> None:
    model = tiny_llama()
    ids = prompt(3, 14)
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=True, top_logprobs=4, frequency_penalty=1.0)
    outcome = run_alone(model, job("job", ids, params))
    assert len(outcome.tokens) == 6 and len(outcome.choices[0].logprobs) == 6
    for at, position in enumerate(outcome.choices[0].logprobs):
        raw = np.array(model(mx.array([[*ids, *outcome.tokens[:at]]])))[0, -1].astype(np.float64)
        expected = raw - raw.max() - np.log(np.exp(raw - raw.max()).sum())
        assert position.chosen.logprob == pytest.approx(expected[outcome.tokens[at]], abs=1e-4)
        assert [one.logprob for one in position.top] == pytest.approx(np.sort(expected)[::-1][:4].tolist(), abs=1e-4)
        assert bytes(position.chosen.bytes).decode("utf-8", errors="replace") == position.chosen.token


def test_logprobs_without_alternatives_name_none() -> None:
    params = SamplingParams(seed=3, max_tokens=4, ignore_eos=True, logprobs=True)
    said = run_alone(tiny_llama(), job("job", prompt(3, 14), params)).choices[0].logprobs
    assert len(said) == 4 and all(position.top == () and position.chosen.logprob < 0 for position in said)


def test_rows_that_do_not_ask_get_no_logprobs() -> None:
    outcome = run_alone(tiny_llama(), job("job", prompt(3, 14), SamplingParams(temperature=0.0, max_tokens=3)))
    assert outcome.choices[0].logprobs == [] and VOCAB > WIDTH
