"""Decode speed in process, rows of very different length: one row with a context of 4,096 beside 31 of about 100.

    TMPDIR=/some/private/dir python -m benchmarks.engine_mixed [--model tiny|small|demo] [--rounds 5]

The long row's prompt is done first, then the short ones join; speed counts from the step at which every row had its
first token to the end of the short ones. Also prints the bytes of slots beside what the rows' lengths need.
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
from workers.engine.engine import Engine

SHORT_ROWS, SHORT_PROMPT_TOKENS = 31, 68
_LONG_ANSWER_TOKENS = 1000


def _join(generator: Generator, context: int, tokens: int, turn: int) -> tuple[int, dict[int, list[int]]]:
    """The long request, and what all have said when every row has its first token."""
    long = generator.add(prompt(turn * 64, context), _LONG_ANSWER_TOKENS)
    said: dict[int, list[int]] = {long: []}
    while not said[long]:
        _step(generator, said)
    for row in range(SHORT_ROWS):
        said[generator.add(prompt(turn * 64 + row + 1, SHORT_PROMPT_TOKENS), tokens)] = []
    while not all(said.values()):
        _step(generator, said)
    return long, said


def _step(generator: Generator, said: dict[int, list[int]]) -> int:
    gained = generator.step()
    for request, token in gained:
        said[request].append(token)
    return len(gained)


def _work(context: int, tokens: int, generator: Generator, turn: int) -> Turn:
    long, said = _join(generator, context, tokens, turn)
    started_s, counted = time.perf_counter(), 0
    while any(len(answer) < tokens for request, answer in said.items() if request != long):
        counted += _step(generator, said)
    speed = counted / (time.perf_counter() - started_s)
    generator.cancel(long)
    return Turn(speed, [answer[:tokens] for answer in said.values()])


def _memory(engine: Engine, context: int, tokens: int) -> str:
    """Bytes of slots over bytes that the rows' lengths need, in the middle of the answers."""
    generator = Ours(engine)
    long, said = _join(generator, context, tokens, 0)
    while min(map(len, said.values())) < tokens // 2:
        _step(generator, said)
    stats = engine.stats()
    lengths = [len(said[long]) + context, *(len(a) + SHORT_PROMPT_TOKENS for r, a in said.items() if r != long)]
    generator.cancel(long)
    generator.close()
    needed = sum(lengths) / stats["slot_tokens"] * stats["slot_bytes"]
    rectangle = 32 * max(lengths) / sum(lengths)
    return (
        f"slots {stats['slot_bytes'] / 1e6:.1f} MB in {stats['slot_groups']:.0f} groups, rows {needed / 1e6:.1f} MB: "
        f"{stats['slot_bytes'] / needed:.2f} x; one rectangle would be {rectangle:.1f} x"
    )


def main() -> None:
    parser = arguments_of(__doc__, tokens=64)
    parser.add_argument("--context", type=int, default=4096)
    arguments = parser.parse_args()
    loaded = new_model(arguments.model)
    engine = warm_engine(loaded, compile_steps=not arguments.no_compile)
    print_machine(arguments)
    both = (partial(Bare, loaded.model), partial(Ours, engine))
    work = partial(_work, arguments.context, arguments.tokens)
    print(compare(f"1 x {arguments.context} + 31 x ~100", arguments.rounds, both, work))
    print(_memory(engine, arguments.context, arguments.tokens))


if __name__ == "__main__":
    main()
