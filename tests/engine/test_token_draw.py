"""Filters and draws against their definitions; a row's draw never depends on who else is in the batch."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.request import SamplingParams
from tests.engine.sampling_cases import (
    PROMPTED,
    STOP,
    chi_square,
    draw,
    draw_often,
    edge_margin,
    random_logits,
    reference,
    row_of,
    softmax,
    weigh,
)
from workers.engine.sequence import Sequence
from workers.engine.token_draw import best_tokens

WIDTHS = (50, 640, 1000, 9001)  # drawn directly; in blocks; with a padded block; candidates found by blocks

FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 40},
    {"top_k": 200},
    {"top_k": 3000},
    {"top_p": 0.0},
    {"top_p": 0.05},
    {"top_p": 0.7},
    {"top_p": 0.95},
    {"top_p": 0.99},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 30, "top_p": 0.6},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 100, "top_p": 0.9, "min_p": 0.01},
    {"xtc_probability": 1.0, "xtc_threshold": 0.02},
    {"xtc_probability": 1.0, "xtc_threshold": 0.0, "min_p": 0.1},
    {"xtc_probability": 1.0, "xtc_threshold": 0.5},
    {"xtc_probability": 1.0, "xtc_threshold": 0.03, "top_k": 20, "top_p": 0.9},
    {"xtc_probability": 1.0, "xtc_threshold": 0.05, "top_p": 0.8, "temperature": 0.6},
)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("given_filters", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_every_filter_keeps_what_its_definition_keeps(width: int, given_filters: dict[str, Any], spread: float) -> None:
    params = SamplingParams(**given_filters)
    candidates = (random_logits(seed, 1, width, spread)[0] for seed in itertools.count())
    logits = next(one for one in candidates if params.top_p == 1 or edge_margin(params, one) > 1e-6)
    expected = reference(params, logits, xtc=params.xtc_probability > 0)
    got = weigh(params, logits)
    assert set(np.flatnonzero(got)) == set(np.flatnonzero(expected))
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.sampled_from(WIDTHS),
    spread=st.floats(0.01, 8),
    top_k=st.sampled_from([0, 0, 1, 7, 64, 65, 257, 1025, 10**6]),
    top_p=st.floats(0, 1),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.5]),
    temperature=st.floats(0.1, 2),
)
def test_any_filters_together_keep_what_a_full_sort_keeps(
    seed: int, width: int, spread: float, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(seed, 1, width, spread)[0]
    kept, expected = weigh(params, logits) > 0, reference(params, logits)
    disputed = np.flatnonzero(kept != (expected > 0))
    if len(disputed) == 0:
        return
    # Single precision may tell the edge of top_p, the border of min_p or the smallest weight from its neighbour.
    probabilities = softmax(logits.astype(np.float64) / temperature)
    relative = probabilities[disputed] / probabilities.max()
    near_edge = top_p < 1 and edge_margin(params, logits) < 1e-5
    near_border = min_p > 0 and bool(np.all(np.abs(relative / min_p - 1) < 1e-5))
    assert near_edge or near_border or float(relative.max()) < 1e-36


def test_ties_at_the_edge_of_top_p_stay_together_and_top_k_keeps_exactly_k() -> None:
    logits = np.zeros(1000, np.float32)
    assert np.count_nonzero(weigh(SamplingParams(top_p=0.5), logits)) == 1000
    for top_k in (1, 40, 200):
        assert np.count_nonzero(weigh(SamplingParams(top_k=top_k), logits)) == top_k


def test_xtc_spares_the_tokens_that_end_the_row() -> None:
    logits = random_logits(5, 1, 50, 0.1)[0]
    logits[[STOP, 7, 8]] = (9.0, 9.1, 8.9)
    kept = set(np.flatnonzero(weigh(SamplingParams(xtc_probability=1.0, xtc_threshold=0.1), logits)))
    assert kept == set(range(50)) - {7}


@pytest.mark.parametrize("count", [1, 20, 64, 256])
@pytest.mark.parametrize("width", [300, 9001, 40000])
def test_best_tokens_are_those_of_a_sort(count: int, width: int) -> None:
    logits = random_logits(count, 3, width)
    values, ids = (np.array(part) for part in best_tokens(mx.array(logits), count))
    np.testing.assert_array_equal(values, -np.sort(-logits, axis=1)[:, :count])
    np.testing.assert_array_equal(np.take_along_axis(logits, ids.astype(np.int64), axis=1), values)


def test_ties_among_best_tokens_are_told_apart() -> None:
    _, ids = best_tokens(mx.zeros((2, 9000)), 64)
    assert all(len(set(row)) == 64 and max(row) < 9000 for row in ids.tolist())  # pyright: ignore


DRAWN: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"top_k": 7},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.05, "temperature": 0.8},
)


def _assert_follows(drawn: list[int], expected: Any) -> None:
    statistic, freedom = chi_square(drawn, expected)
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("width", [50, 1000])
@pytest.mark.parametrize("given_filters", DRAWN, ids=str)
def test_draws_of_many_seeds_follow_the_distribution(width: int, given_filters: dict[str, Any]) -> None:
    params, logits = SamplingParams(**given_filters), random_logits(3, 1, width)[0]
    _assert_follows(draw_often(params, logits, 6000), reference(params, logits))


@pytest.mark.parametrize("given_filters", DRAWN[:4], ids=str)
def test_draws_of_one_seed_over_its_positions_follow_the_distribution(given_filters: dict[str, Any]) -> None:
    params, logits = SamplingParams(seed=11, **given_filters), random_logits(4, 1, 600)[0]
    rows: list[Sequence | None] = [row_of(params, emitted=(0,) * position) for position in range(6000)]
    _assert_follows(draw(rows, np.tile(logits, (6000, 1))), reference(params, logits))


def test_xtc_fires_as_often_as_asked() -> None:
    params, logits = SamplingParams(xtc_probability=0.3, xtc_threshold=0.05), random_logits(3, 1, 50)[0]
    expected = 0.7 * reference(params, logits) + 0.3 * reference(params, logits, xtc=True)
    _assert_follows(draw_often(params, logits, 6000), expected)


def test_whether_xtc_fires_says_nothing_about_the_draw() -> None:
    """Uniforms of one position are independent: where XTC has nothing to exclude, the draws stay as they were."""
    logits = np.zeros(50, np.float32)
    without = draw_often(SamplingParams(), logits, 500)
    assert draw_often(SamplingParams(xtc_probability=0.5, xtc_threshold=0.5), logits, 500) == without


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.4, 1.0, 1.6]),
    top_p=st.sampled_from([1.0, 1.0, 0.2, 0.9, 0.99]),
    top_k=st.sampled_from([0, 0, 3, 50, 100, 700]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
    xtc_probability=st.sampled_from([0.0, 0.0, 0.5]),
    xtc_threshold=st.sampled_from([0.01, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.4]),
    logit_bias=st.sampled_from([{}, {}, {4: 3.0}, {5: -100.0, 6: 1.5}]),
    min_tokens=st.sampled_from([0, 0, 3]),
    seed=st.integers(0, 2**63 - 1),
)
MEMBERS = st.one_of(st.none(), st.tuples(PARAMS, st.lists(st.integers(0, 49), max_size=5), st.integers(0, 99)))


@settings(max_examples=120, deadline=None)
@given(
    members=st.lists(MEMBERS, min_size=1, max_size=9),
    width=st.sampled_from(WIDTHS),
    spread=st.sampled_from([0.2, 3.0]),
)
def test_a_row_draws_the_same_alone_and_in_any_batch(members: list[Any], width: int, spread: float) -> None:
    rows: list[Sequence | None] = []
    logits = np.zeros((len(members), width), np.float32)
    for at, member in enumerate(members):
        if member is None:
            rows.append(None)
            continue
        params, emitted, logits_seed = member
        rows.append(row_of(params, PROMPTED, tuple(emitted)))
        logits[at] = random_logits(logits_seed, 1, width, spread)[0]
    together = draw(rows, logits)
    for at, row in enumerate(rows):
        if row is not None:
            assert draw([row], logits[at : at + 1]) == [together[at]]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("given_filters", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("width", [50, 9001])
def test_a_row_of_broken_logits_draws_nothing_and_harms_nobody(
    broken: float, given_filters: dict[str, Any], width: int
) -> None:
    params = [SamplingParams(**{"seed": seed, **given_filters}) for seed in range(3)]
    params[2] = msgspec.structs.replace(params[2], frequency_penalty=0.5, logit_bias={1: 1.0})
    logits = random_logits(3, 3, width)
    sane = draw([row_of(one) for one in params], logits)
    logits[1] = broken
    assert draw([row_of(one) for one in params], logits) == [sane[0], -1, sane[2]]
    if not np.isneginf(broken):
        logits[1] = random_logits(4, 1, width)[0]
        logits[1, 17] = broken
        assert draw([row_of(one) for one in params], logits)[1] == -1
