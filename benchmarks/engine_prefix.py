"""Prefix reuse in process: time to first token on a known beginning, from memory and from disk, beside a miss and bare
mlx_lm BatchGenerator, which reuses nothing; then 32 requests at once that share a new beginning.

    TMPDIR=/some/private/dir python -m benchmarks.engine_prefix [--model tiny|small|demo] [--rounds 5] [--shared 1024]

Every round has a beginning of its own; the four take turns within it. The run fails where hits and misses differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from benchmarks.engine_turns import Bare, Generator, Ours, arguments_of, new_model, print_machine, prompt
from workers.engine.engine import Engine, EngineConfig
from workers.engine.loader import LoadedModel
from workers.engine.page_folder import DiskLimits
from workers.engine.page_setup import DiskTier
from workers.engine.slot_lane import SlotLane

TAIL_TOKENS, SHARERS = 16, 32
_SPEAKERS = ("BatchGenerator", "miss", "hit in memory", "hit on disk")


@dataclasses.dataclass(frozen=True, slots=True)
class First:
    """One request: milliseconds to its first token, tokens really prefilled, what it said."""

    ms: float
    prefilled: float
    said: list[int]


def _first(generator: Generator, ids: list[int], tokens: int, engine: Engine | None) -> First:
    before = 0.0 if engine is None else engine.stats()["prefill_tokens"]
    started_s, first_s = time.perf_counter(), 0.0
    request, said = generator.add(ids, tokens), list[int]()
    while len(said) < tokens:
        said += [token for uid, token in generator.step() if uid == request]
        first_s = first_s or (time.perf_counter() if said else 0.0)
    prefilled = float(len(ids)) if engine is None else engine.stats()["prefill_tokens"] - before
    return First(1000 * (first_s - started_s), prefilled, said)


def _settle(engine: Engine) -> None:
    """What an idle engine does until all pages worth keeping are on disk."""
    lane = engine.lane
    assert isinstance(lane, SlotLane)
    while engine.warm_next() or lane.pages.is_writing:
        time.sleep(0.001)


def _forget_memory(engine: Engine) -> None:
    lane = engine.lane
    assert isinstance(lane, SlotLane)
    lane.pages.cache.evict(lane.pages.table.total)


def _round(loaded: LoadedModel, engine: Engine, arguments: argparse.Namespace, turn: int) -> dict[str, First]:
    shared = prompt(1 + turn, arguments.shared)
    asked = shared + prompt(1000 + turn, TAIL_TOKENS)
    bare, ours, tokens = Bare(loaded.model), Ours(engine), arguments.tokens
    firsts = {"BatchGenerator": _first(bare, asked, tokens, None)}
    firsts["miss"] = _first(ours, asked, tokens, engine)
    _first(ours, shared + prompt(2000 + turn, TAIL_TOKENS), 1, engine)
    _forget_memory(engine)
    _first(ours, shared + prompt(3000 + turn, TAIL_TOKENS), 1, engine)
    firsts["hit in memory"] = _first(ours, asked, tokens, engine)
    _settle(engine)
    _forget_memory(engine)
    firsts["hit on disk"] = _first(ours, asked, tokens, engine)
    bare.close()
    ours.close()
    return firsts


def _sharers(generator: Generator, shared: list[int], tokens: int) -> float:
    """Seconds until all sharers have said everything."""
    started_s = time.perf_counter()
    left = {generator.add(shared + prompt(5000 + at, TAIL_TOKENS), tokens): tokens for at in range(SHARERS)}
    while any(left.values()):
        for request, _ in generator.step():
            left[request] -= 1
    return time.perf_counter() - started_s


def _compare_sharers(loaded: LoadedModel, engine: Engine, arguments: argparse.Namespace) -> str:
    lines: list[str] = []
    times: dict[str, list[float]] = {"BatchGenerator": [], "engine": []}
    for turn in range(arguments.rounds):
        shared = prompt(10_000 + turn, arguments.shared)
        bare, ours = Bare(loaded.model), Ours(engine)
        _forget_memory(engine)
        before = engine.stats()
        times["BatchGenerator"].append(_sharers(bare, shared, arguments.tokens))
        times["engine"].append(_sharers(ours, shared, arguments.tokens))
        after = engine.stats()
        pages = after["pages_used"] - before["pages_used"]
        prefilled = after["prefill_tokens"] - before["prefill_tokens"]
        lines = [f"pages held after it {pages:.0f}, tokens prefilled {prefilled:.0f}"]
        bare.close()
        ours.close()
    ratios = sorted(a / b for a, b in zip(times["BatchGenerator"], times["engine"], strict=True))
    medians = "  ".join(f"{name} {statistics.median(values):.2f} s" for name, values in times.items())
    ratio = f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    return f"{SHARERS} sharers of {arguments.shared} new tokens: {medians}  {ratio}; {lines[0]}"


def _print_firsts(rounds: list[dict[str, First]]) -> None:
    misses = [firsts["miss"].ms for firsts in rounds]
    for name in _SPEAKERS:
        values = [firsts[name].ms for firsts in rounds]
        ratios = sorted(miss / value for miss, value in zip(misses, values, strict=True))
        prefilled = statistics.median(firsts[name].prefilled for firsts in rounds)
        print(
            f"{name:<15} first token after {statistics.median(values):>7.1f} ms ({min(values):.1f}-{max(values):.1f})"
            f"  prefilled {prefilled:>5.0f} tokens  miss / this {statistics.median(ratios):.2f}"
            f" ({ratios[0]:.2f}-{ratios[-1]:.2f})",
            flush=True,
        )
        differing = sum(firsts[name].said != firsts["miss"].said for firsts in rounds)
        if differing:
            raise SystemExit(f"{name}: {differing} answers differ from a miss's")


def main() -> None:
    parser = arguments_of(__doc__, tokens=16)
    parser.add_argument("--shared", type=int, default=1024)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loaded = dataclasses.replace(new_model(arguments.model), path=Path(folder))
        weights = dict(tree_flatten(loaded.model.parameters()))
        mx.save_safetensors(str(Path(folder) / "model.safetensors"), weights)  # pyright: ignore[reportArgumentType]
        disk = DiskTier(Path(folder) / "kv", DiskLimits(4 << 30, 0))
        engine = Engine(loaded, EngineConfig(compile=not arguments.no_compile, disk=disk))
        engine.warm_up()
        _settle(engine)
        print_machine(arguments)
        _print_firsts([_round(loaded, engine, arguments, turn) for turn in range(arguments.rounds + 1)][1:])
        print(_compare_sharers(loaded, engine, arguments))
        engine.close()


if __name__ == "__main__":
    main()
