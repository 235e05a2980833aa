"""A short request while a long prompt prefills: what the running streams and the short one feel, the engine beside bare
mlx_lm BatchGenerator, in turns.

    TMPDIR=/some/private/dir python -m benchmarks.engine_stall [--model tiny|small|demo] [--rounds 5] [--streams 4]

Streams run; then a prompt of 4,096 tokens and, as soon as its prefill has begun, a short one arrive. Prints medians
and ranges of the longest gap between two tokens of a stream, of the short request's time to its first token, and of
the long one's. Each generator prefills with its defaults: ours for 120 ms at a time, BatchGenerator 2,048 tokens.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from functools import partial

from benchmarks.engine_turns import (
    Bare,
    Generator,
    Ours,
    arguments_of,
    new_model,
    print_machine,
    prompt,
    warm_engine,
)
from workers.engine.engine_config import EngineConfig

SHORT_PROMPT_TOKENS, SHORT_ANSWER_TOKENS = 32, 8
_STREAM_PROMPT_TOKENS = 24
_TOKENS_BEFORE, _TOKENS_AFTER = 24, 8


@dataclass(slots=True)
class _Watch:
    """When tokens came, and what was said."""

    streams: list[int]
    last_s: dict[int, float] = field(default_factory=dict[int, float])
    said: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    first_s: dict[int, float] = field(default_factory=dict[int, float])
    worst_gap_s: float = 0.0

    def step(self, generator: Generator) -> None:
        gained = generator.step()
        now_s = time.perf_counter()
        for request, token in gained:
            self.said.setdefault(request, []).append(token)
            self.first_s.setdefault(request, now_s)
            if request in self.streams:
                self.worst_gap_s = max(self.worst_gap_s, now_s - self.last_s.get(request, now_s))
                self.last_s[request] = now_s


@dataclass(frozen=True, slots=True)
class _Felt:
    """Seconds, and the answers of short and long."""

    gap_s: float
    short_s: float
    long_s: float
    said: tuple[list[int], list[int]]


def _turn(streams: int, context: int, tokens: int, generator: Generator, turn: int) -> _Felt:
    running = [generator.add(prompt(turn * 64 + at, _STREAM_PROMPT_TOKENS), tokens) for at in range(streams)]
    watch = _Watch(running)
    while any(len(watch.said.get(request, ())) < _TOKENS_BEFORE for request in running):
        watch.step(generator)
    watch.worst_gap_s = 0.0
    started_s = time.perf_counter()
    long = generator.add(prompt(turn * 64 + 50, context), SHORT_ANSWER_TOKENS)
    watch.step(generator)
    short_started_s = time.perf_counter()
    short = generator.add(prompt(turn * 64 + 51, SHORT_PROMPT_TOKENS), SHORT_ANSWER_TOKENS)
    while any(len(watch.said.get(request, ())) < _TOKENS_AFTER for request in (long, short)):
        watch.step(generator)
    assert all(len(watch.said[request]) < tokens for request in running), "a stream ended too early: more --tokens"
    for request in running:
        generator.cancel(request)
    said = watch.said[short], watch.said[long]
    return _Felt(watch.worst_gap_s, watch.first_s[short] - short_started_s, watch.first_s[long] - started_s, said)


def _line(name: str, theirs: list[float], ours: list[float]) -> str:
    ratios = sorted(bare / mine for bare, mine in zip(theirs, ours, strict=True))
    return (
        f"{name:<34} BatchGenerator {_ms(theirs)}  engine {_ms(ours)}"
        f"  ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    )


def _ms(seconds: list[float]) -> str:
    low, middle, high = min(seconds) * 1e3, statistics.median(seconds) * 1e3, max(seconds) * 1e3
    return f"{middle:>6.0f} ms ({low:.0f}-{high:.0f})"


def main() -> None:
    parser = arguments_of(__doc__, tokens=1500)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--context", type=int, default=4096)
    arguments = parser.parse_args()
    loaded = new_model(arguments.model)
    engine = warm_engine(loaded, compile_steps=not arguments.no_compile)
    print_machine(arguments)
    felt: tuple[list[_Felt], list[_Felt]] = ([], [])
    differ = 0
    for turn in range(arguments.rounds + 1):
        for who, make in enumerate((partial(Bare, loaded.model), partial(Ours, engine))):
            generator = make()
            felt[who].append(_turn(arguments.streams, arguments.context, arguments.tokens, generator, turn))
            generator.close()
        differ += sum(one != other for one, other in zip(felt[0][-1].said, felt[1][-1].said, strict=True))
    theirs, ours = (one[1:] for one in felt)  # the first turn warms both up
    print(f"{arguments.streams} streams, then a prompt of {arguments.context} and one of {SHORT_PROMPT_TOKENS} tokens:")
    print(_line("longest gap of a running stream", [one.gap_s for one in theirs], [one.gap_s for one in ours]))
    print(_line("first token of the short request", [one.short_s for one in theirs], [one.short_s for one in ours]))
    print(_line("first token of the long request", [one.long_s for one in theirs], [one.long_s for one in ours]))
    print(f"stall target {EngineConfig().prefill_stall_ms} ms; {differ} answers differ")


if __name__ == "__main__":
    main()
