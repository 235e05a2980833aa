"""The sampler against numpy: support sets of the filters, penalties, bias, frequencies, log-probabilities."""

from __future__ import annotations

import mlx.core as mx
import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from scheduler.request import SamplingParams
from tests.engine.engine_stage import VOCAB, job, prompt, run_alone, tiny_llama, tokenizer
from workers.engine.detokenizer import TextStream
from workers.engine.sampler import EditRows, build_sampling, edit_logits, sample
from workers.engine.sequence import Sequence

WIDTH = 50
Floats = npt.NDArray[np.float32]


def _row(params: SamplingParams, prompted: tuple[int, ...] = (1, 2, 3), emitted: tuple[int, ...] = ()) -> Sequence:
    return Sequence(
        job_id="job", attempt=1, index=0, prompt_ids=prompted, params=params, text=TextStream(tokenizer()),
        token_limit=100, stop_ids=frozenset({49}), emitted=list(emitted),
    )  # fmt: skip


def _draws(params: SamplingParams, logits: Floats, count: int) -> list[int]:
    """`count` draws from one distribution: one row per draw, each with a seed of its own."""
    rows = [_row(msgspec.structs.replace(params, seed=seed)) for seed in range(count)]
    sampling = build_sampling(rows, WIDTH)
    offsets = mx.full((count,), 2, dtype=mx.int32)
    tokens, _ = sample(sampling.variant, mx.array(np.tile(logits, (count, 1))), offsets, sampling.draw, sampling.edit)
    return tokens.tolist()  # pyright: ignore[reportReturnType]


@pytest.fixture
def logits() -> Floats:
    return (np.random.default_rng(3).standard_normal(WIDTH) * 2).astype(np.float32)


def _softmax(values: Floats) -> Floats:
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def test_draws_follow_the_distribution(logits: Floats) -> None:
    counts = np.bincount(_draws(SamplingParams(temperature=1.0), logits, 6000), minlength=WIDTH)
    expected = _softmax(logits) * 6000
    likely = expected > 5
    chi_square = float(((counts - expected) ** 2 / expected)[likely].sum())
    assert chi_square < 2 * likely.sum()


def test_temperature_sharpens(logits: Floats) -> None:
    counts = np.bincount(_draws(SamplingParams(temperature=0.25), logits, 2000), minlength=WIDTH)
    expected = _softmax(logits / 0.25)
    assert abs(counts[expected.argmax()] / 2000 - expected.max()) < 0.04


def test_a_temperature_near_zero_is_greedy(logits: Floats) -> None:
    assert set(_draws(SamplingParams(temperature=1e-38), logits, 200)) == {int(logits.argmax())}


def test_top_k_draws_from_the_k_best_only(logits: Floats) -> None:
    drawn = set(_draws(SamplingParams(top_k=5), logits, 2000))
    assert drawn == set(np.argsort(-logits)[:5].tolist())


def test_top_p_draws_from_the_smallest_set_that_has_the_mass(logits: Floats) -> None:
    order = np.argsort(-logits)
    mass = np.cumsum(_softmax(logits)[order])
    nucleus = set(order[: int(np.searchsorted(mass, 0.7)) + 1].tolist())
    assert set(_draws(SamplingParams(top_p=0.7), logits, 4000)) == nucleus


def test_min_p_draws_nothing_below_the_share_of_the_best(logits: Floats) -> None:
    probabilities = _softmax(logits)
    allowed = set(np.flatnonzero(probabilities >= 0.2 * probabilities.max()).tolist())
    assert set(_draws(SamplingParams(min_p=0.2), logits, 3000)) == allowed


def test_top_p_counts_the_mass_of_what_top_k_left(logits: Floats) -> None:
    order = np.argsort(-logits)[:6]
    mass = np.cumsum(_softmax(logits[order]))
    nucleus = set(order[: int(np.searchsorted(mass, 0.6)) + 1].tolist())
    assert set(_draws(SamplingParams(top_k=6, top_p=0.6), logits, 3000)) == nucleus


def test_filters_never_remove_the_best_token(logits: Floats) -> None:
    assert set(_draws(SamplingParams(top_p=0.0, min_p=1.0), logits, 50)) == {int(logits.argmax())}


def test_penalties_and_bias_are_those_of_the_formula(logits: Floats) -> None:
    params = SamplingParams(
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.25,
        logit_bias={7: 2.5, 11: -3.0},
        min_tokens=9,
    )
    prompted, emitted = (1, 2, 3, 20), (5, 5, 8, 3)
    sampling = build_sampling([_row(params, prompted, emitted)], WIDTH)
    offsets = mx.array([len(prompted) - 1 + len(emitted)], dtype=mx.int32)
    edited = np.array(edit_logits(mx.array(logits)[None], offsets, EditRows(*sampling.edit)))[0]

    expected = logits.copy()
    for token in {*prompted, *emitted}:
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token in emitted:
        expected[token] -= 0.25
    for token in set(emitted):
        expected[token] -= 0.4
    expected[7] += 2.5
    expected[11] -= 3.0
    expected[49] = -np.inf  # the row's stop token: four of nine tokens were emitted
    np.testing.assert_allclose(edited, expected, rtol=1e-5)


def test_counts_go_up_with_each_draw(logits: Floats) -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=1.5)
    sampling = build_sampling([_row(params)], WIDTH)
    drawn: list[int] = []
    for step in range(12):
        tokens, sampling.edit = sample(
            sampling.variant, mx.array(logits)[None], mx.array([2 + step], dtype=mx.int32), sampling.draw, sampling.edit
        )
        drawn.extend(tokens.tolist())  # pyright: ignore[reportArgumentType]
    expected, penalised = [], logits.copy()
    for _ in range(12):
        expected.append(int(penalised.argmax()))
        penalised[expected[-1]] -= 1.5
    assert drawn == expected


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


def test_rows_that_do_not_ask_get_no_logprobs() -> None:
    outcome = run_alone(tiny_llama(), job("job", prompt(3, 14), SamplingParams(temperature=0.0, max_tokens=3)))
    assert outcome.choices[0].logprobs == [] and VOCAB > WIDTH
