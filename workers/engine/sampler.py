"""Draws the next token of every row in one call, each row by its own SamplingParams. Engine thread only.

Order, as in vLLM and transformers: repetition, frequency and presence penalty, logit_bias, tokens banned below
min_tokens, temperature, then top_k, top_p (over what top_k left) and min_p. Repetition looks at prompt and output,
presence and frequency at the output only. A row's randomness is a pure function of (seed, choice index, output
position).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from workers.engine.sequence import Sequence

Rows = Items[Sequence | None]
_COLDEST = 1e-4  # colder is greedy in all but name, and logits over it would overflow


class Variant(NamedTuple):
    """Which parts of the sampler some row of the batch needs; a compiled step exists per variant."""

    draws: bool = False
    filters: bool = False
    edits: bool = False


class DrawRows(NamedTuple):
    """Per row: how to draw. Shapes [rows], key [rows, 2] uint32. `origin` is the cache length before output 0."""

    temperature: mx.array
    key: mx.array
    origin: mx.array
    top_k: mx.array
    top_p: mx.array
    min_p: mx.array


class EditRows(NamedTuple):
    """Per row: how logits are edited first. Shapes [rows] and [rows, vocab]; `counts` goes up each step."""

    repetition: mx.array
    presence: mx.array
    frequency: mx.array
    origin: mx.array
    min_tokens: mx.array
    bias: mx.array
    banned: mx.array
    prompted: mx.array
    counts: mx.array


@dataclass(slots=True)
class Sampling:
    """The sampler's arrays for one composition of the batch; rebuilt when a row comes or goes."""

    variant: Variant
    draw: list[mx.array]
    edit: list[mx.array]


def variant_of(rows: Rows) -> Variant:
    """The cheapest variant that is right for all rows."""
    active = [row for row in rows if row is not None]
    drawing = [row for row in active if not row.params.is_greedy]
    return Variant(
        draws=bool(drawing),
        filters=any(_filters(row) for row in drawing),
        edits=any(_edits(row) for row in active),
    )


def build_sampling(rows: Rows, vocab_size: int, variant: Variant | None = None) -> Sampling:
    """Arrays for these rows in their present state; None is an empty row. A given variant must cover all rows."""
    if variant is None:
        variant = variant_of(rows)
    return Sampling(
        variant,
        list(_draw_rows(rows, vocab_size)) if variant.draws else [],
        list(_edit_rows(rows, vocab_size)) if variant.edits else [],
    )


def sample(
    variant: Variant, logits: mx.array, offsets: mx.array, draw: list[mx.array], edit: list[mx.array]
) -> tuple[mx.array, list[mx.array]]:
    """Tokens [rows] int32 for logits [rows, vocab] f32, and the edit arrays with the drawn tokens counted."""
    edited = edit_logits(logits, offsets, EditRows(*edit)) if variant.edits else logits
    tokens = mx.argmax(edited, axis=-1).astype(mx.int32)
    if variant.draws:
        rows = DrawRows(*draw)
        tokens = mx.where(rows.temperature > 0, _draw(variant, edited, offsets, rows), tokens)
    if not variant.edits:
        return tokens, edit
    counts = edit[-1]
    drawn = mx.take_along_axis(counts, tokens[:, None], axis=1) + 1
    return tokens, [*edit[:-1], mx.put_along_axis(counts, tokens[:, None], drawn, axis=1)]


def edit_logits(logits: mx.array, offsets: mx.array, rows: EditRows) -> mx.array:
    """Penalties, bias and bans, as the module says."""
    repeated = rows.prompted | (rows.counts > 0)
    repetition = rows.repetition[:, None]
    penalised = mx.where(logits > 0, logits / repetition, logits * repetition)
    logits = mx.where(repeated, penalised, logits)
    counts = rows.counts.astype(logits.dtype)
    logits = logits - rows.frequency[:, None] * counts - rows.presence[:, None] * (counts > 0)
    too_early = (offsets - rows.origin < rows.min_tokens)[:, None] & rows.banned
    return mx.where(too_early, -mx.inf, logits + rows.bias)


def filter_logits(scaled: mx.array, rows: DrawRows) -> mx.array:
    """-inf outside top_k, top_p and min_p; `scaled` are logits over temperature. The best token always stays."""
    ordered = -mx.sort(-scaled, axis=-1)
    in_top_k = mx.arange(scaled.shape[-1])[None] < rows.top_k[:, None]
    probabilities = mx.softmax(mx.where(in_top_k, ordered, -mx.inf), axis=-1)
    mass_before = mx.cumsum(probabilities, axis=-1) - probabilities
    in_top_p = (mass_before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1)
    in_min_p = ordered >= ordered[:, :1] + mx.log(rows.min_p)[:, None]
    kept = mx.sum(in_top_k & in_top_p & in_min_p, axis=-1, keepdims=True)
    threshold = mx.take_along_axis(ordered, mx.maximum(kept, 1) - 1, axis=-1)
    return mx.where(scaled < threshold, -mx.inf, scaled)


def _draw(variant: Variant, logits: mx.array, offsets: mx.array, rows: DrawRows) -> mx.array:
    """Gumbel-max: exact, one pass, and never a token that was ruled out."""
    scaled = logits / mx.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    if variant.filters:
        scaled = filter_logits(scaled, rows)
    positions = (offsets - rows.origin).astype(mx.uint32)
    keys = mx.stack([rows.key[:, 0], rows.key[:, 1] + positions], axis=1)
    uniform = mx.vmap(lambda key: mx.random.uniform(shape=logits.shape[1:], key=key))(keys)
    return mx.argmax(scaled - mx.log(-mx.log(uniform)), axis=-1).astype(mx.int32)


def row_key(seed: int, choice_index: int) -> tuple[int, int]:
    """Two uint32 that start the random stream of one choice; the output position is added to the second."""
    digest = hashlib.blake2b(f"{seed}:{choice_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _filters(row: Sequence) -> bool:
    return row.params.top_k > 0 or row.params.top_p < 1 or row.params.min_p > 0


def _edits(row: Sequence) -> bool:
    params = row.params
    penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return penalised or bool(params.logit_bias) or params.min_tokens > len(row.emitted)


def _draw_rows(rows: Rows, vocab_size: int) -> DrawRows:
    values = np.zeros((len(rows), 4), np.float32)
    keys = np.zeros((len(rows), 2), np.uint32)
    values[:, 1:] = (vocab_size, 1, 0)
    for at, row in enumerate(rows):
        if row is not None:
            params = row.params
            temperature = 0.0 if params.is_greedy else max(params.temperature, _COLDEST)
            values[at] = (temperature, params.top_k or vocab_size, params.top_p, params.min_p)
            keys[at] = row_key(params.seed, row.index)
    return DrawRows(
        temperature=mx.array(values[:, 0]),
        key=mx.array(keys),
        origin=_origins(rows),
        top_k=mx.array(values[:, 1]),
        top_p=mx.array(values[:, 2]),
        min_p=mx.array(values[:, 3]),
    )


def _edit_rows(rows: Rows, vocab_size: int) -> EditRows:
    values = np.zeros((len(rows), 3), np.float32)
    values[:, 0] = 1
    min_tokens = np.zeros(len(rows), np.int32)
    bias = np.zeros((len(rows), vocab_size), np.float32)
    banned, prompted = np.zeros((2, len(rows), vocab_size), np.uint8)
    counts = np.zeros((len(rows), vocab_size), np.int32)
    for at, row in enumerate(rows):
        if row is None or not _edits(row):
            continue
        params = row.params
        values[at] = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        min_tokens[at] = params.min_tokens
        for token, value in params.logit_bias.items():
            bias[at, token] = value
        banned[at, [token for token in row.stop_ids if token < vocab_size]] = True
        prompted[at, list(row.prompt_ids)] = True
        np.add.at(counts[at], row.emitted, 1)
    return EditRows(
        repetition=mx.array(values[:, 0]),
        presence=mx.array(values[:, 1]),
        frequency=mx.array(values[:, 2]),
        origin=_origins(rows),
        min_tokens=mx.array(min_tokens),
        bias=mx.array(bias),
        banned=mx.array(banned).astype(mx.bool_),
        prompted=mx.array(prompted).astype(mx.bool_),
        counts=mx.array(counts),
    )


def _origins(rows: Rows) -> mx.array:
    return mx.array([0 if row is None else len(row.prompt_ids) - 1 for row in rows], dtype=mx.int32)
