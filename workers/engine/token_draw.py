"""Draws tokens for rows of equal needs: candidates, weights, top_p, min_p, XTC, and the draw itself. Called by sampler.

Works on weights, 2 ** ((logit - best logit) * scale): the best token weighs 1, so min_p is a plain bound and nothing
overflows at any temperature. No vocabulary is sorted: top_k rows go on with their candidates alone, and the edge of
top_p is found by halving. Every result of a row depends on that row's numbers only. Engine thread only.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

_BLOCK = 32
_DIRECT_DRAW_WIDTH = 512
# Metal sorts where the CPU would partition, so there halving would sort twice over.
_SORTED_AT_ONCE = 1 << 30 if mx.metal.is_available() else 256
UNIFORMS = 3


class Group(NamedTuple):
    """Rows drawn together; static, so part of what a step is compiled for.

    `candidates` is how many of the best tokens the rows look at, 0 for all. The first `nucleus` rows have a top_p,
    rows from `xtc_start` to `xtc_stop` may exclude top choices. `top_k` and `min_p`: whether some row has one.
    """

    rows: int
    candidates: int
    top_k: bool
    min_p: bool
    nucleus: int
    xtc_start: int
    xtc_stop: int


class GroupRows(NamedTuple):
    """What a group's rows ask for, [n, 1] each; `source` [n]: where their logits are; `guard` [XTC rows, vocab] bool:
    what XTC spares.
    """

    source: mx.array
    scale: mx.array
    top_k: mx.array
    top_p: mx.array
    min_p: mx.array
    xtc_probability: mx.array
    xtc_threshold: mx.array
    guard: mx.array


def draw_group(group: Group, logits: mx.array, rows: GroupRows, uniforms: mx.array) -> tuple[mx.array, mx.array]:
    """Tokens and best logits of each row [n, 1], for logits [n, vocab] and uniforms [n, UNIFORMS] in [0, 1)."""
    weights, ids, best = weigh_tokens(group, logits, rows, uniforms)
    places = _pick(weights, uniforms[:, 0:1], uniforms[:, 1:2])
    return places if ids is None else mx.take_along_axis(ids, places, axis=-1), best


def weigh_tokens(
    group: Group, logits: mx.array, rows: GroupRows, uniforms: mx.array
) -> tuple[mx.array, mx.array | None, mx.array]:
    """Weights [n, width] in proportion to which tokens are drawn, their ids (None: all tokens), best logits [n, 1]."""
    values, ids = (logits, None) if not group.candidates else best_tokens(logits, group.candidates)
    best = mx.max(values, axis=-1, keepdims=True)
    weights = mx.power(2.0, (values - best) * rows.scale)  # several times cheaper than exp on the CPU
    weights = _filter(group, weights, rows, is_sorted=ids is not None)
    start, stop = group.xtc_start, group.xtc_stop
    if start < stop:
        guard = rows.guard if ids is None else mx.take_along_axis(rows.guard, ids[start:stop], axis=-1)
        fires = uniforms[start:stop, 2:3] < rows.xtc_probability[start:stop]
        left = exclude_top_choices(weights[start:stop], rows.xtc_threshold[start:stop], fires & ~guard)
        weights = mx.concatenate([weights[:start], left, weights[stop:]])
    return weights, ids, best


def best_tokens(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The `count` best logits of each row, best first, and their ids: [n, count] each."""
    vocab = logits.shape[-1]
    if count * _BLOCK * 4 <= vocab:
        # The best tokens lie in the `count` columns of blocks whose best is best.
        blocks = _blocks(logits, -mx.inf)
        columns = mx.argpartition(mx.max(blocks, axis=1), -count, axis=-1)[:, None, -count:]
        places = mx.arange(_BLOCK, dtype=columns.dtype)[None, :, None] * blocks.shape[2] + columns
        values = mx.take_along_axis(blocks, columns, axis=2).reshape(len(logits), -1)
        ids = mx.minimum(places.reshape(len(logits), -1), vocab - 1)
    else:
        values, ids = logits, mx.broadcast_to(mx.arange(vocab, dtype=mx.uint32), logits.shape)
    if count < values.shape[-1]:
        places = mx.argpartition(values, -count, axis=-1)[:, -count:]
        values, ids = mx.take_along_axis(values, places, axis=-1), mx.take_along_axis(ids, places, axis=-1)
    order = mx.argsort(values, axis=-1)[:, ::-1]
    return mx.take_along_axis(values, order, axis=-1), mx.take_along_axis(ids, order, axis=-1)


def _filter(group: Group, weights: mx.array, rows: GroupRows, *, is_sorted: bool) -> mx.array:
    """Weights [n, width] with 0 for what top_k, then top_p over the rest, and min_p rule out."""
    if group.top_k:
        weights = weights * (mx.arange(weights.shape[-1]) < rows.top_k)
    floor = rows.min_p
    if group.nucleus:
        inside = weights[: group.nucleus]
        target = rows.top_p[: group.nucleus] * mx.sum(inside, axis=-1, keepdims=True)
        edge = _edge_of_sorted(inside, target) if is_sorted else nucleus_edge(inside, target)
        floor = mx.maximum(floor, mx.pad(edge, [(0, group.rows - group.nucleus), (0, 0)]))
    return weights * (weights >= floor) if group.nucleus or group.min_p else weights


def nucleus_edge(weights: mx.array, target: mx.array) -> mx.array:
    """The least weight [n, 1] that top_p keeps: heavier tokens alone weigh less than `target` [n, 1].

    Halves the rows at their median until few enough are left to sort: the edge is in the heavy half if that reaches
    the target, else in the light one, which has to reach the rest.
    """
    while (width := weights.shape[-1]) > _SORTED_AT_ONCE:
        if width % 2:
            weights, width = mx.pad(weights, [(0, 0), (1, 0)]), width + 1
        light, heavy = mx.split(mx.partition(weights, width // 2, axis=-1), 2, axis=-1)
        mass = mx.sum(heavy, axis=-1, keepdims=True)
        is_light = mass < target
        weights = heavy * ~is_light + light * is_light
        target = target - mass * is_light
    return _edge_of_sorted(mx.sort(weights, axis=-1)[:, ::-1], target)


def _edge_of_sorted(weights: mx.array, target: mx.array) -> mx.array:
    """`nucleus_edge` of weights in falling order."""
    before = mx.cumsum(weights, axis=-1, inclusive=False)
    kept = mx.sum(before < target, axis=-1, keepdims=True)
    return mx.take_along_axis(weights, mx.maximum(kept, 1) - 1, axis=-1)


def exclude_top_choices(weights: mx.array, threshold: mx.array, may_go: mx.array) -> mx.array:
    """XTC: of the tokens whose share reaches `threshold` [n, 1], all but the least go, where `may_go` [n, width].

    As in text-generation-webui, where it was proposed (PR 6335), llama.cpp and mlx_lm.
    """
    over = (weights >= threshold * mx.sum(weights, axis=-1, keepdims=True)) & (weights > 0)
    least = mx.min(mx.where(over, weights, mx.inf), axis=-1, keepdims=True)
    return mx.where(over & (weights > least) & may_go, 0.0, weights)


def _pick(weights: mx.array, first: mx.array, second: mx.array) -> mx.array:
    """A place [n, 1] per row with probability in proportion to its weight, never one that weighs nothing."""
    if weights.shape[-1] <= _DIRECT_DRAW_WIDTH:
        return _pick_directly(weights, first)
    blocks = _blocks(weights, 0.0)
    column = _pick_directly(mx.sum(blocks, axis=1), first)
    inner = _pick_directly(mx.take_along_axis(blocks, column[:, None], axis=2)[:, :, 0], second)
    return inner * blocks.shape[2] + column


def _pick_directly(weights: mx.array, uniform: mx.array) -> mx.array:
    """By the inverse of the cumulative sum."""
    some = weights > 0
    sums = mx.cumsum(weights, axis=-1) * some
    return mx.argmax((sums > uniform * mx.max(sums, axis=-1, keepdims=True)) & some, axis=-1, keepdims=True)


def _blocks(rows: mx.array, fill: float) -> mx.array:
    """[n, width] as [n, block, columns]: a block is a column, so that reductions over it run over whole columns."""
    count, width = rows.shape
    if width % _BLOCK:
        rows = mx.pad(rows, [(0, 0), (0, -width % _BLOCK)], constant_values=mx.array(fill))
    return rows.reshape(count, _BLOCK, -1)
