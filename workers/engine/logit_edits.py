"""Edits of logits before a draw, for the rows that ask: penalties, logit_bias, tokens banned below min_tokens.

Order and meaning as in vLLM: repetition penalty over prompt and output, then frequency and presence penalty over the
output, then logit_bias. Called by sampler. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from workers.engine.sequence import Sequence


class EditKinds(NamedTuple):
    """What some row needs; static, so part of what a step is compiled for. `penalised` rows come first."""

    rows: int = 0
    penalised: int = 0
    repetition: bool = False
    additive: bool = False
    bias: bool = False
    bans: bool = False


class EditRows(NamedTuple):
    """Arrays of `rows` edited rows, the penalised ones first.

    `row` [rows]: their batch rows. `factor` [penalised, vocab]: the repetition penalty where the token was seen, else
    1; `counts` [penalised, vocab]: how often the output has it. Both go on with each step. Per bias and ban: the
    edited row and the token [n].
    """

    row: mx.array
    repetition: mx.array
    frequency: mx.array
    presence: mx.array
    bias_row: mx.array
    bias_token: mx.array
    bias: mx.array
    ban_row: mx.array
    ban_token: mx.array
    ban_until: mx.array
    factor: mx.array
    counts: mx.array


def is_edited(row: Sequence) -> bool:
    return is_penalised(row) or bool(row.params.logit_bias) or _is_early(row)


def is_penalised(row: Sequence) -> bool:
    params = row.params
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def edit_kinds(rows: Items[Sequence]) -> EditKinds:
    """For edited rows, the penalised ones first."""
    return EditKinds(
        rows=len(rows),
        penalised=sum(map(is_penalised, rows)),
        repetition=any(row.params.repetition_penalty != 1 for row in rows),
        additive=any(row.params.presence_penalty != 0 or row.params.frequency_penalty != 0 for row in rows),
        bias=any(row.params.logit_bias for row in rows),
        bans=any(map(_is_early, rows)),
    )


def build_edits(places: Items[int], rows: Items[Sequence], vocab_size: int) -> EditRows:
    """Arrays for edited rows, the penalised ones first, that sit in the batch rows `places`."""
    penalised = [row for row in rows if is_penalised(row)]
    values = [(r.params.repetition_penalty, r.params.frequency_penalty, r.params.presence_penalty) for r in penalised]
    repetition, frequency, presence = mx.array(np.array(values, np.float32).reshape(-1, 3)).split(3, axis=1)
    biases = [(at, token, value) for at, row in enumerate(rows) for token, value in row.params.logit_bias.items()]
    bans = [(at, token) for at, row in enumerate(rows) for token in _banned(row, vocab_size)]
    until = [len(rows[at].prompt_ids) - 1 + rows[at].params.min_tokens for at, _ in bans]
    factor, counts = _history(penalised, vocab_size)
    return EditRows(
        row=mx.array(list(places), dtype=mx.int32),
        repetition=repetition,
        frequency=frequency,
        presence=presence,
        bias_row=mx.array([at for at, _, _ in biases], dtype=mx.int32),
        bias_token=mx.array([token for _, token, _ in biases], dtype=mx.int32),
        bias=mx.array([value for _, _, value in biases], dtype=mx.float32),
        ban_row=mx.array([at for at, _ in bans], dtype=mx.int32),
        ban_token=mx.array([token for _, token in bans], dtype=mx.int32),
        ban_until=mx.array(until, dtype=mx.int32),
        factor=factor,
        counts=counts,
    )


def edit_logits(kinds: EditKinds, logits: mx.array, offsets: mx.array, rows: EditRows) -> mx.array:
    """Edited logits [edited rows, vocab] of logits [batch rows, vocab]; `offsets` [batch rows]: cache lengths."""
    edited = logits[rows.row]
    if kinds.penalised:
        edited = mx.concatenate([_penalise(kinds, edited[: kinds.penalised], rows), edited[kinds.penalised :]])
    if kinds.bias:
        edited = edited.at[rows.bias_row, rows.bias_token].add(rows.bias)
    if kinds.bans:
        early = offsets[rows.row][rows.ban_row] < rows.ban_until
        edited = edited.at[rows.ban_row, rows.ban_token].add(mx.where(early, -mx.inf, 0.0))
    return edited


def count_tokens(kinds: EditKinds, tokens: mx.array, rows: EditRows) -> EditRows:
    """The arrays after the batch rows drew `tokens` [batch rows]."""
    if not kinds.penalised:
        return rows
    drawn = tokens[rows.row[: kinds.penalised]][:, None]
    if kinds.repetition:
        rows = rows._replace(factor=mx.put_along_axis(rows.factor, drawn, rows.repetition, axis=1))
    if kinds.additive:
        counts = mx.take_along_axis(rows.counts, drawn, axis=1) + 1
        rows = rows._replace(counts=mx.put_along_axis(rows.counts, drawn, counts, axis=1))
    return rows


def _penalise(kinds: EditKinds, logits: mx.array, rows: EditRows) -> mx.array:
    if kinds.repetition:
        logits = mx.where(logits > 0, logits / rows.factor, logits * rows.factor)
    if kinds.additive:
        counts = rows.counts.astype(mx.float32)
        logits = logits - rows.frequency * counts - rows.presence * (counts > 0)
    return logits


def _history(rows: Items[Sequence], vocab_size: int) -> tuple[mx.array, mx.array]:
    factor = np.ones((len(rows), vocab_size), np.float32)
    counts = np.zeros((len(rows), vocab_size), np.int32)
    for at, row in enumerate(rows):
        factor[at, row.tokens] = row.params.repetition_penalty
        np.add.at(counts[at], row.emitted, 1)
    return mx.array(factor), mx.array(counts)


def _is_early(row: Sequence) -> bool:
    return row.params.min_tokens > len(row.emitted)


def _banned(row: Sequence, vocab_size: int) -> list[int]:
    return sorted(token for token in row.stop_ids if token < vocab_size) if _is_early(row) else []
