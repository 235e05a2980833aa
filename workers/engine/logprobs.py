"""Log-probabilities for the rows that ask: log-softmax of the model's raw logits, before penalties and temperature.

That is what vLLM reports by default: a token drawn at temperature 2 still shows what the model thought of it.
Computed on the device with the step, read on the host while the next step runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from scheduler.tokens import PositionLogprobs, TokenLogprob
from workers.engine.detokenizer import token_bytes
from workers.engine.token_draw import best_tokens


@dataclass(frozen=True, slots=True)
class LogprobFlight:
    """Device results of one step for the asking rows; `places` maps a batch row to its row in the arrays."""

    places: dict[int, int]
    chosen: mx.array
    top_ids: mx.array
    top_values: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        return [self.chosen, self.top_ids, self.top_values]


def launch_logprobs(logits: mx.array, tokens: mx.array, rows: Iterable[int], top: int) -> LogprobFlight:
    """Chosen [n], top ids [n, top] and top values [n, top] for the batch rows `rows` of logits [rows, vocab]."""
    indices = list(rows)
    picked = mx.array(indices)
    asked = logits[picked].astype(mx.float32)
    total = mx.logsumexp(asked, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(asked, mx.maximum(tokens[picked], 0)[:, None], axis=-1) - total
    if top:
        values, ids = best_tokens(asked, min(top, asked.shape[-1]))
    else:
        values, ids = mx.zeros((len(indices), 0)), mx.zeros((len(indices), 0), mx.uint32)
    return LogprobFlight({row: place for place, row in enumerate(indices)}, chosen[:, 0], ids, values - total)


class LogprobReader:
    """Host copy of one step's log-probabilities, as wire structs."""

    def __init__(self, flight: LogprobFlight, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._places = flight.places
        self._chosen: list[float] = flight.chosen.tolist()  # pyright: ignore[reportAttributeAccessIssue]
        self._top_ids: list[list[int]] = flight.top_ids.tolist()  # pyright: ignore[reportAttributeAccessIssue]
        self._top_values: list[list[float]] = flight.top_values.tolist()  # pyright: ignore[reportAttributeAccessIssue]

    def read(self, row: int, token: int, top: int) -> PositionLogprobs:
        """The position's log-probabilities for the token that batch row `row` drew, with `top` candidates."""
        place = self._places[row]
        best = list(zip(self._top_ids[place], self._top_values[place], strict=True))[:top]
        return PositionLogprobs(
            self._candidate(token, self._chosen[place]), tuple(self._candidate(i, value) for i, value in best)
        )

    def _candidate(self, token: int, value: float) -> TokenLogprob:
        raw = token_bytes(self._tokenizer, token)
        return TokenLogprob(raw.decode("utf-8", errors="replace"), value, tuple(raw))
