"""Who sits in which row of the next decode step, what the step reads for them, and the draw that ends it.

For lanes whose forward pass is not compiled together with its inputs. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from workers.engine.flight import DecodeFlight
from workers.engine.logprobs import LogprobFlight, launch_logprobs
from workers.engine.sampler import Sampling, build_sampling, sample
from workers.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class RowSizes:
    """Sizes of a lane without pages, fixed at start-up; `slot_tokens` bounds rows x columns."""

    max_rows: int
    slot_tokens: int
    vocab_size: int


@dataclass(slots=True)
class StepInputs:
    """Per row, fed by each step's outputs: tokens, their offsets and 1 for rows in use, all [rows] int32."""

    tokens: mx.array
    offsets: mx.array
    live: mx.array
    sampling: Sampling


class DecodeRows:
    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: list[Sequence | None] = []
        self._inputs: StepInputs | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._rows

    @property
    def seated(self) -> list[tuple[int, Sequence]]:
        return [(row, sequence) for row, sequence in enumerate(self._rows) if sequence is not None]

    def seat(self, sequence: Sequence) -> int:
        """Take the first free row, which must exist."""
        row = self._rows.index(None)
        self._rows[row] = sequence
        self._inputs = None
        return row

    def leave(self, sequence: Sequence) -> None:
        self._rows[self._rows.index(sequence)] = None
        self._inputs = None

    def arrange(self, rows: int) -> list[int]:
        """Have `rows` rows, the seated ones first and in order; returns their old rows."""
        seated = self.seated
        self._rows = [*(sequence for _, sequence in seated), *[None] * (rows - len(seated))]
        self._inputs = None
        return [row for row, _ in seated]

    def inputs(self) -> StepInputs:
        if self._inputs is None:
            values = np.zeros((3, len(self._rows)), np.int32)
            for row, sequence in self.seated:
                last = sequence.emitted[-1] if sequence.emitted else sequence.prompt_ids[-1]
                values[:, row] = (last, sequence.length - 1, 1)
            tokens, offsets, live = (mx.array(value) for value in values)
            self._inputs = StepInputs(tokens, offsets, live, build_sampling(self._rows, self._vocab_size))
        return self._inputs

    def draw(self, logits: mx.array, states: Iterable[mx.array]) -> DecodeFlight:
        """Launch the step that ends in `logits` [rows, vocab] and leaves `states` behind."""
        inputs = self.inputs()
        logits = logits.astype(mx.float32)
        sampling = inputs.sampling
        inputs.tokens, sampling.edit = sample(sampling.variant, logits, inputs.offsets, sampling.draw, sampling.edit)
        inputs.offsets = inputs.offsets + inputs.live
        logprobs = self._ask_logprobs(logits, inputs.tokens)
        others = (*states, inputs.offsets, *sampling.edit)
        mx.async_eval(inputs.tokens, list(others), [] if logprobs is None else logprobs.arrays)
        return DecodeFlight(tuple(self.seated), inputs.tokens, logprobs, others)

    def _ask_logprobs(self, logits: mx.array, tokens: mx.array) -> LogprobFlight | None:
        asking = [(row, sequence.params.top_logprobs) for row, sequence in self.seated if sequence.params.logprobs]
        if not asking:
            return None
        return launch_logprobs(logits, tokens, [row for row, _ in asking], max(top for _, top in asking))
