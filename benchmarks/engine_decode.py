"""Decode speed in process, rows of equal length: the engine beside bare mlx_lm BatchGenerator, in turns.

    TMPDIR=/some/private/dir python -m benchmarks.engine_decode [--model tiny|small|demo] [--rows 1,8,32] [--rounds 5]

Prints, per number of rows, the median tokens/s of each, and the median and range of the ratio round by round; speed
counts from the step at which every row had its first token. Greedy, unless a temperature is given.
"""

from __future__ import annotations

import time
from functools import partial

from benchmarks.engine_turns import (
    Bare,
    Generator,
    Ours,
    Turn,
    arguments_of,
    compare,
    new_model,
    print_machine,
    prompt,
    warm_engine,
)

PROMPT_TOKENS = 16


def decode_rows(rows: int, tokens: int, generator: Generator, turn: int) -> Turn:
    """All rows from short prompts to `tokens` tokens; counted once all have their first."""
    said = {generator.add(prompt(turn * 64 + row, PROMPT_TOKENS), tokens): list[int]() for row in range(rows)}
    started_s, counted = 0.0, 0
    while any(len(answer) < tokens for answer in said.values()):
        for request, token in generator.step():
            said[request].append(token)
            counted += 1
        if not started_s and all(said.values()):
            started_s, counted = time.perf_counter(), 0
    return Turn(counted / (time.perf_counter() - started_s), list(said.values()))


def main() -> None:
    parser = arguments_of(__doc__, tokens=100)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    loaded = new_model(arguments.model)
    engine = warm_engine(loaded, compile_steps=not arguments.no_compile)
    print_machine(arguments)
    both = (partial(Bare, loaded.model, arguments.temperature), partial(Ours, engine, arguments.temperature))
    for rows in map(int, arguments.rows.split(",")):
        print(
            compare(f"{rows:>4} rows", arguments.rounds, both, partial(decode_rows, rows, arguments.tokens)), flush=True
        )


if __name__ == "__main__":
    main()
