"""Draws the next token of every row in one call, each row by its own SamplingParams. Engine thread only.

Order, as in vLLM and text-generation-webui: penalties, logit_bias and bans (logit_edits), temperature, top_k, top_p
over what top_k left, min_p, XTC over what all of them left (token_draw). Rows are grouped by what they need, so that
nothing is computed for a row that did not ask: greedy rows take the best logit, rows with a top_k look at their
candidates alone, the others at the whole vocabulary. A row's randomness is a pure function of (seed, choice index,
output position), and its token does not depend on who else is in the batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from scheduler.request import SamplingParams
from workers.engine.logit_edits import (
    EditKinds,
    EditRows,
    build_edits,
    count_tokens,
    edit_kinds,
    edit_logits,
    is_edited,
    is_penalised,
)
from workers.engine.sequence import Sequence
from workers.engine.token_draw import UNIFORMS, Group, GroupRows, draw_group

Rows = Items[Sequence | None]
NO_TOKEN = -1  # drawn where the logits are not finite; the engine fails the row
_COLDEST = 1e-4  # colder is greedy in all but name
_CANDIDATE_COUNTS = (128, 1024)


class Variant(NamedTuple):
    """The static part of sampling one batch: a compiled step exists per variant. The default: all rows greedy."""

    greedy: int = 0  # rows, where others draw or are edited
    groups: tuple[Group, ...] = ()
    edits: EditKinds = EditKinds()


class DrawRows(NamedTuple):
    """The drawing rows [n] in the order of their groups; each group's `GroupRows` follow these arrays.

    `greedy` [greedy rows]: where their logits are, the edited ones behind the batch's. `place` [batch rows]: where each
    row's token is among those of the greedy rows, then the groups. `row`: the batch row; `origin`: the cache length
    before output 0; `key` [n, 2] uint32.
    """

    greedy: mx.array
    place: mx.array
    row: mx.array
    origin: mx.array
    key: mx.array


@dataclass(slots=True)
class Sampling:
    """The sampler's arrays for one composition of the batch; rebuilt when a row comes or goes."""

    variant: Variant
    draw: list[mx.array]
    edit: list[mx.array]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A sequence in its batch row."""

    row: int
    sequence: Sequence

    @property
    def params(self) -> SamplingParams:
        return self.sequence.params


def build_sampling(rows: Rows, vocab_size: int) -> Sampling:
    """Arrays for these rows in their present state; None is an empty row."""
    placed = [_Placed(at, row) for at, row in enumerate(rows) if row is not None]
    edited = sorted((one for one in placed if is_edited(one.sequence)), key=lambda one: not is_penalised(one.sequence))
    greedy = [one for one in placed if one.params.is_greedy]
    if len(greedy) == len(placed) and not edited:
        return Sampling(Variant(), [], [])
    groups = _grouped([one for one in placed if not one.params.is_greedy], vocab_size)
    sequences = [one.sequence for one in edited]
    kinds = edit_kinds(sequences)
    variant = Variant(len(greedy), tuple(_group_of(count, members) for count, members in groups), kinds)
    edit = list(build_edits([one.row for one in edited], sequences, vocab_size)) if edited else []
    return Sampling(variant, _draw_rows(len(rows), greedy, groups, edited, vocab_size), edit)


def sample(
    variant: Variant, logits: mx.array, offsets: mx.array, draw: list[mx.array], edit: list[mx.array]
) -> tuple[mx.array, list[mx.array]]:
    """Tokens [rows] int32 for logits [rows, vocab] f32, and the edit arrays with the drawn tokens counted.

    `offsets` [rows] are cache lengths. A row whose best logit is not finite gets NO_TOKEN.
    """
    if not draw:
        return _checked(*_best(logits)), edit
    rows = DrawRows(*draw[: len(DrawRows._fields)])
    if variant.edits.rows:
        logits = mx.concatenate([logits, edit_logits(variant.edits, logits, offsets, EditRows(*edit))])
    parts = [_best(logits[rows.greedy])] if variant.greedy else []
    for group, asked, uniforms in grouped_rows(variant, draw, offsets):
        parts.append(draw_group(group, logits[asked.source], asked, uniforms))
    tokens, best = (mx.concatenate(list(column)) for column in zip(*parts, strict=True))
    tokens = _checked(tokens, best)[rows.place]
    if not variant.edits.rows:
        return tokens, edit
    return tokens, list(count_tokens(variant.edits, mx.maximum(tokens, 0), EditRows(*edit)))


def grouped_rows(
    variant: Variant, draw: list[mx.array], offsets: mx.array
) -> Iterator[tuple[Group, GroupRows, mx.array]]:
    """Each group with its arrays and uniforms."""
    if not variant.groups:
        return
    at, start = len(DrawRows._fields), 0
    uniforms = _uniforms(DrawRows(*draw[:at]), offsets)
    for group in variant.groups:
        asked = GroupRows(*draw[at : at + len(GroupRows._fields)])
        yield group, asked, uniforms[start : start + group.rows]
        at, start = at + len(GroupRows._fields), start + group.rows


def row_key(seed: int, choice_index: int) -> tuple[int, int]:
    """Two uint32 that start the random stream of one choice; the output position is added to the second."""
    digest = hashlib.blake2b(f"{seed}:{choice_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _best(logits: mx.array) -> tuple[mx.array, mx.array]:
    """The best tokens and their logits, [rows, 1] each."""
    tokens = mx.argmax(logits, axis=-1, keepdims=True)
    return tokens, mx.take_along_axis(logits, tokens, axis=-1)


def _checked(tokens: mx.array, best: mx.array) -> mx.array:
    """Tokens [rows] int32, of [rows, 1] and the best logit of each."""
    return mx.where(mx.abs(best) < mx.inf, tokens.astype(mx.int32), NO_TOKEN)[:, 0]


def _uniforms(rows: DrawRows, offsets: mx.array) -> mx.array:
    """[n, UNIFORMS] in [0, 1), from each row's key and output position alone."""
    positions = (offsets[rows.row] - rows.origin).astype(mx.uint32)
    keys = mx.stack([rows.key[:, 0], rows.key[:, 1] + positions], axis=1)
    return mx.vmap(lambda key: mx.random.uniform(shape=(UNIFORMS,), key=key))(keys)


def _candidates(params: SamplingParams, vocab_size: int) -> int:
    """How many of the best tokens a row looks at; by its own top_k only, so that its draws depend on nobody else."""
    if not 0 < params.top_k < vocab_size:
        return 0
    return next((count for count in _CANDIDATE_COUNTS if params.top_k <= count < vocab_size), vocab_size)


def _grouped(placed: Items[_Placed], vocab_size: int) -> list[tuple[int, list[_Placed]]]:
    """Rows by candidate count; in each group first those with a top_p, and those with XTC side by side."""
    order = {(True, False): 0, (True, True): 1, (False, True): 2, (False, False): 3}
    groups: dict[int, list[_Placed]] = {}
    for one in sorted(placed, key=lambda one: order[_has_nucleus(one.params), _has_xtc(one.params)]):
        groups.setdefault(_candidates(one.params, vocab_size), []).append(one)
    return sorted(groups.items())


def _group_of(candidates: int, members: Items[_Placed]) -> Group:
    with_xtc = [at for at, one in enumerate(members) if _has_xtc(one.params)]
    return Group(
        rows=len(members),
        candidates=candidates,
        top_k=candidates > 0,
        min_p=any(one.params.min_p > 0 for one in members),
        nucleus=sum(_has_nucleus(one.params) for one in members),
        xtc_start=with_xtc[0] if with_xtc else 0,
        xtc_stop=with_xtc[-1] + 1 if with_xtc else 0,
    )


def _has_nucleus(params: SamplingParams) -> bool:
    return params.top_p < 1


def _has_xtc(params: SamplingParams) -> bool:
    return params.xtc_probability > 0


def _draw_rows(
    batch_rows: int,
    greedy: Items[_Placed],
    groups: Items[tuple[int, list[_Placed]]],
    edited: Items[_Placed],
    vocab_size: int,
) -> list[mx.array]:
    """The arrays of DrawRows, then of each group's GroupRows."""
    source = np.arange(batch_rows, dtype=np.int32)
    source[[one.row for one in edited]] = batch_rows + np.arange(len(edited))
    place = np.zeros(batch_rows, np.int32)
    drawing = [one for _, members in groups for one in members]
    everyone = [one.row for one in (*greedy, *drawing)]
    place[everyone] = np.arange(len(everyone))
    keys = [row_key(one.params.seed, one.sequence.index) for one in drawing]
    rows = DrawRows(
        greedy=mx.array(source[[one.row for one in greedy]]),
        place=mx.array(place),
        row=mx.array([one.row for one in drawing], dtype=mx.int32),
        origin=mx.array([len(one.sequence.prompt_ids) - 1 for one in drawing], dtype=mx.int32),
        key=mx.array(np.array(keys, np.uint32).reshape(-1, 2)),
    )
    asked = [_group_rows(mx.array(source[[one.row for one in members]]), members, vocab_size) for _, members in groups]
    return [*rows, *(array for group in asked for array in group)]


def _group_rows(source: mx.array, members: Items[_Placed], vocab_size: int) -> GroupRows:
    values = np.array([_numbers(one.params, vocab_size) for one in members], np.float32)
    guard = _guards([one for one in members if _has_xtc(one.params)], vocab_size)
    columns = [mx.array(values[:, at : at + 1]) for at in range(values.shape[1])]
    return GroupRows(*[source, *columns, guard])


def _numbers(params: SamplingParams, vocab_size: int) -> tuple[float, ...]:
    return (
        math.log2(math.e) / max(params.temperature, _COLDEST),
        params.top_k or vocab_size,
        params.top_p,
        params.min_p,
        params.xtc_probability,
        params.xtc_threshold,
    )


def _guards(placed: Items[_Placed], vocab_size: int) -> mx.array:
    """Tokens that XTC never excludes: those that end the row, or it would run on."""
    guard = np.zeros((len(placed), vocab_size), np.uint8)
    for at, one in enumerate(placed):
        guard[at, [token for token in one.sequence.stop_ids if token < vocab_size]] = True
    return mx.array(guard).astype(mx.bool_)
