"""Sampling in process: rows that each have other sampling parameters and seeds, the engine beside bare mlx_lm
BatchGenerator with one mlx_lm sampler per request; same weights, same BLAS, in turns.

    TMPDIR=/some/private/dir python -m benchmarks.engine_sampling [--vocab 1024,32768] [--rows 32] [--rounds 5]

Prints, per vocabulary and kind of parameters, the median tokens/s of each, and the median and range of the ratio round
by round. The model is a random llama (hidden 64, 2 layers), so its distributions are flat: the hard case for a search
of top_p's edge. `mixed`: eight kinds of parameters in turn, XTC among them; `penalised` adds repetition, presence and
frequency penalties, which mlx_lm applies to the last 20 tokens and the engine to the whole sequence.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.nn as nn
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from benchmarks.engine_decode import decode_rows
from benchmarks.engine_turns import Bare, Ours, arguments_of, compare, new_model, print_machine, warm_engine
from scheduler.request import SamplingParams
from workers.engine.engine import Engine

KINDS = ("greedy", "temperature", "top_k", "top_p", "min_p", "xtc", "mixed", "penalised")


def _options(kind: str, row: int) -> dict[str, Any]:
    """Sampling parameters of one row, under the names that SamplingParams and make_sampler share."""
    top_k, top_p, min_p = 10 + 2 * row, 0.7 + 0.009 * row, 0.02 + 0.002 * row
    xtc = {"xtc_probability": 0.3 + 0.01 * row, "xtc_threshold": 0.05}
    mixed: tuple[dict[str, Any], ...] = (
        {},
        {"top_p": top_p},
        {"top_k": top_k},
        {"min_p": min_p},
        {"top_k": top_k, "top_p": top_p},
        {"top_p": top_p, "min_p": min_p},
        {"top_k": top_k, "top_p": top_p, "min_p": min_p},
        {"min_p": min_p, **xtc},
    )
    match kind:
        case "top_k":
            return {"top_k": top_k}
        case "top_p":
            return {"top_p": top_p}
        case "min_p":
            return {"min_p": min_p}
        case "xtc":
            return xtc
        case "mixed" | "penalised":
            return mixed[row % len(mixed)]
        case _:
            return {}


def _penalties(kind: str, row: int) -> dict[str, Any]:
    if kind != "penalised":
        return {}
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    return {names[row % 3]: 1.05 + 0.01 * row}


def _temperature(kind: str, row: int) -> float:
    return 0.0 if kind == "greedy" else 0.5 + 0.03 * row


class BareSampling(Bare):
    """A sampler and processors of its own for each request."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__(model)
        self._kind, self._row = kind, -1

    def _choices(self) -> dict[str, Any]:
        self._row += 1
        sampler = make_sampler(_temperature(self._kind, self._row), **_options(self._kind, self._row))
        processors = make_logits_processors(**_penalties(self._kind, self._row))
        return {"samplers": [sampler], "logits_processors": [processors]}


class OurSampling(Ours):
    def __init__(self, engine: Engine, kind: str) -> None:
        super().__init__(engine)
        self._kind, self._row = kind, -1

    def _params(self, tokens: int) -> SamplingParams:
        self._row += 1
        return SamplingParams(
            temperature=_temperature(self._kind, self._row),
            seed=self._row,
            max_tokens=tokens,
            ignore_eos=True,
            **_options(self._kind, self._row),
            **_penalties(self._kind, self._row),
        )


def main() -> None:
    parser = arguments_of(__doc__, tokens=64)
    parser.add_argument("--vocab", default="1024,32768")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--kinds", default=",".join(KINDS))
    arguments = parser.parse_args()
    print_machine(arguments)
    for vocab in map(int, arguments.vocab.split(",")):
        loaded = new_model(arguments.model, vocab)
        engine = warm_engine(loaded, compile_steps=not arguments.no_compile)
        work = partial(decode_rows, arguments.rows, arguments.tokens)
        for kind in arguments.kinds.split(","):
            both = (partial(BareSampling, loaded.model, kind), partial(OurSampling, engine, kind))
            name = f"{vocab:>6} tokens in the vocabulary, {kind:<12}"
            print(compare(name, arguments.rounds, both, work, same_answers=kind == "greedy"), flush=True)


if __name__ == "__main__":
    main()
