"""Speed in process while requests come and go: 16 rows, and every few steps one leaves and another joins.

    TMPDIR=/some/private/dir python -m benchmarks.engine_churn [--model tiny|small|demo] [--rounds 5] [--every 3]

Every request is taken at the moment another ends. Speed counts all tokens from the step at which the first 16 had
their first token, prefill of the later ones included, to the end of the last one taken.
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

ROWS = 16
_PROMPT_TOKENS = (24, 31, 45, 18, 60, 37)


def _work(every: int, requests: int, generator: Generator, turn: int) -> Turn:
    wanted: dict[int, int] = {}
    said: dict[int, list[int]] = {}

    def take(number: int) -> None:
        """The first 16 end `every` steps apart; every later one runs for 16 times as many."""
        tokens = every * (number + 1) if number < ROWS else every * ROWS
        request = generator.add(prompt(turn * 1000 + number, _PROMPT_TOKENS[number % len(_PROMPT_TOKENS)]), tokens)
        wanted[request], said[request] = tokens, []

    for number in range(ROWS):
        take(number)
    started_s, counted = 0.0, 0
    while any(len(said[request]) < tokens for request, tokens in wanted.items()):
        gained = generator.step()
        for request, token in gained:
            said[request].append(token)
            if len(said[request]) == wanted[request] and len(wanted) < requests:
                take(len(wanted))
        counted += len(gained)
        if not started_s and all(said.values()):
            started_s, counted = time.perf_counter(), 0
    return Turn(counted / (time.perf_counter() - started_s), list(said.values()))


def main() -> None:
    parser = arguments_of(__doc__, tokens=0)
    parser.add_argument("--every", type=int, default=3, help="steps between two leaves")
    parser.add_argument("--requests", type=int, default=100)
    arguments = parser.parse_args()
    arguments.tokens = ROWS * arguments.every
    loaded = new_model(arguments.model)
    engine = warm_engine(loaded, compile_steps=not arguments.no_compile)
    print_machine(arguments)
    both = (partial(Bare, loaded.model), partial(Ours, engine))
    name = f"{ROWS} rows, one comes and goes every {arguments.every} steps"
    print(compare(name, arguments.rounds, both, partial(_work, arguments.every, arguments.requests)))


if __name__ == "__main__":
    main()
