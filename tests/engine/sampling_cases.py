"""What the sampler is compared with: the definitions in numpy, in double precision, one row at a time."""

from __future__ import annotations

from collections.abc import Sequence as Items

import mlx.core as mx
import msgspec
import numpy as np
import numpy.typing as npt

from scheduler.request import SamplingParams
from tests.engine.engine_stage import tokenizer
from workers.engine.detokenizer import TextStream
from workers.engine.sampler import build_sampling, grouped_rows, sample
from workers.engine.sequence import Sequence
from workers.engine.token_draw import weigh_tokens

PROMPTED = (1, 2, 3)
STOP = 49
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def row_of(params: SamplingParams, prompted: tuple[int, ...] = PROMPTED, emitted: tuple[int, ...] = ()) -> Sequence:
    return Sequence(
        job_id="job", attempt=1, index=0, prompt_ids=prompted, params=params, text=TextStream(tokenizer()),
        token_limit=100, stop_ids=frozenset({STOP}), emitted=list(emitted),
    )  # fmt: skip


def random_logits(seed: int, rows: int, width: int, spread: float = 2.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * spread).astype(np.float32)


def draw(rows: Items[Sequence | None], logits: Floats) -> list[int]:
    """One step's tokens for these rows in their present state."""
    offsets = mx.array([0 if row is None else row.length - 1 for row in rows], dtype=mx.int32)
    sampling = build_sampling(rows, logits.shape[1])
    tokens, _ = sample(sampling.variant, mx.array(logits), offsets, sampling.draw, sampling.edit)
    return tokens.tolist()  # pyright: ignore[reportReturnType]


def draw_often(params: SamplingParams, logits: Floats, count: int) -> list[int]:
    """`count` draws from one distribution: one row per draw, each with a seed of its own."""
    rows = [row_of(msgspec.structs.replace(params, seed=seed)) for seed in range(count)]
    return draw(rows, np.tile(logits, (count, 1)))


def weigh(params: SamplingParams, logits: Floats) -> Doubles:
    """The probabilities [width] that the sampler draws one row with."""
    sampling = build_sampling([row_of(params)], len(logits))
    offsets = mx.array([len(PROMPTED) - 1], dtype=mx.int32)
    ((group, asked, uniforms),) = grouped_rows(sampling.variant, sampling.draw, offsets)
    weights, ids, _ = weigh_tokens(group, mx.array(logits)[None][asked.source], asked, uniforms)
    dense = np.zeros(len(logits))
    places = np.arange(len(logits)) if ids is None else np.array(ids)[0]
    np.add.at(dense, places, np.array(weights, dtype=np.float64)[0])
    return dense / dense.sum()


def softmax(values: Doubles | Floats) -> Doubles:
    shifted = np.exp(values.astype(np.float64) - values.max())
    return shifted / shifted.sum()


def reference(params: SamplingParams, logits: Floats, *, xtc: bool = False) -> Doubles:
    """Probabilities by a full sort: temperature, top_k, top_p, min_p, then XTC if it fires."""
    probabilities = softmax(logits.astype(np.float64) / params.temperature)
    order = np.argsort(-probabilities, kind="stable")
    kept = probabilities[order]
    if params.top_k:
        kept[params.top_k :] = 0
    kept = kept / kept.sum()
    if params.top_p < 1:
        before = np.cumsum(kept) - kept
        kept[1:][before[1:] >= params.top_p] = 0
    kept[kept < params.min_p * kept[0]] = 0
    kept = kept / kept.sum()
    if xtc:
        above = np.flatnonzero((kept >= params.xtc_threshold) & (kept > 0))
        kept[[at for at in above[:-1] if order[at] != STOP]] = 0
    result = np.zeros(len(logits))
    result[order] = kept / kept.sum()
    return result


def edge_margin(params: SamplingParams, logits: Floats) -> float:
    """How near the mass before some token comes to top_p: below float precision the edge may fall either way."""
    open_end = msgspec.structs.replace(params, top_p=1.0, min_p=0.0)
    ordered = np.sort(reference(open_end, logits))[::-1]
    return float(np.abs(np.cumsum(ordered) - params.top_p).min())


def chi_square(drawn: Items[int], expected: Doubles) -> tuple[float, int]:
    """Pearson's statistic over the tokens expected at least five times (the rest in one bin), degrees of freedom."""
    counts, wanted = np.bincount(drawn, minlength=len(expected)), expected * len(drawn)
    assert counts[expected == 0].sum() == 0, "drew what was ruled out"
    likely = wanted >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    hoped = np.append(wanted[likely], wanted[~likely].sum())
    some = hoped > 0
    return float(((observed - hoped)[some] ** 2 / hoped[some]).sum()), int(some.sum()) - 1
