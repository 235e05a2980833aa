"""Whole stack, HTTP in to SSE out: Spillway beside mlx_lm.server, same model, same BLAS, in turns.

    python -m benchmarks.stack [--rounds 5] [--streams 1,8,32] [--tokens 192]

Prints, per number of concurrent streams, the median and range over the rounds of tokens/s, time to first token and
gaps between text events, and the ratio Spillway / mlx_lm.server round by round. Greedy, so both say the same text;
the run fails where an answer is not whole.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import platform
import shutil
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version

from benchmarks.servers import OPENBLAS, Server, mlx_lm_server, spillway
from benchmarks.sse_client import StreamTiming, stream_chat
from workers.demo_model import weights_path


@dataclass(frozen=True, slots=True)
class Round:
    """One server, one number of streams, once. Times in milliseconds."""

    tokens_per_s: float
    ttft_p50_ms: float
    ttft_max_ms: float
    gap_p50_ms: float
    gap_p99_ms: float


def _percentile(values: Iterable[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


def _summarise(timings: list[StreamTiming], wall_s: float) -> Round:
    ttft = [1000 * timing.ttft_s for timing in timings]
    gaps = [1000 * gap for timing in timings for gap in timing.gaps_s]
    return Round(
        tokens_per_s=sum(timing.completion_tokens for timing in timings) / wall_s,
        ttft_p50_ms=statistics.median(ttft),
        ttft_max_ms=max(ttft),
        gap_p50_ms=_percentile(gaps, 0.5),
        gap_p99_ms=_percentile(gaps, 0.99),
    )


_first_number = itertools.count(1)


def _body(server: Server, tokens: int) -> dict[str, object]:
    start = next(_first_number) % 700 + 100  # a prompt that no cache has seen whole
    messages = [{"role": "user", "content": f"Count from {start} to {start + 99}"}]
    return {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": tokens}


async def _run_round(server: Server, streams: int, tokens: int) -> Round:
    bodies = [_body(server, tokens) for _ in range(streams)]
    started = time.perf_counter()
    timings = await asyncio.gather(*(stream_chat("127.0.0.1", server.port, body) for body in bodies))
    wall_s = time.perf_counter() - started
    for timing in timings:
        if timing.error or not timing.done or not timing.text_at_s:
            raise RuntimeError(f"{server.label}: a stream of {streams} failed: {timing.error or 'no [DONE]'}")
    return _summarise(list(timings), wall_s)


def _spread(values: list[float], digits: int = 1) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _print_machine() -> None:
    blas = "Debian OpenBLAS preloaded for both" if OPENBLAS.exists() else "the wheel's BLAS for both"
    compiler = "g++ present" if shutil.which("g++") else "no g++"
    packages = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "spillway"))
    print(f"{platform.platform()}, Python {platform.python_version()}, {packages}; {blas}; {compiler}\n")


def _print_table(streams: int, results: dict[str, list[Round]]) -> None:
    print(f"{streams} stream(s): median (min–max)")
    header = ("", "tokens/s", "TTFT p50 ms", "TTFT max ms", "gap p50 ms", "gap p99 ms")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    fields = ("tokens_per_s", "ttft_p50_ms", "ttft_max_ms", "gap_p50_ms", "gap_p99_ms")
    for label, rounds in results.items():
        cells = [_spread([getattr(one, field) for one in rounds]) for field in fields]
        print(f"| {label} | " + " | ".join(cells) + " |")
    ours, peer = results.values()
    ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, peer, strict=True)]
    print(f"\nratio of tokens/s, ours / peer, round by round: {_spread(ratios, 2)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=192)
    options = parser.parse_args()
    _print_machine()
    path = str(weights_path())
    with spillway("demo") as ours, mlx_lm_server(path) as peer:
        for streams in (int(text) for text in options.streams.split(",")):
            results: dict[str, list[Round]] = {ours.label: [], peer.label: []}
            for number in range(options.rounds + 1):
                for server in (ours, peer) if number % 2 else (peer, ours):
                    outcome = asyncio.run(_run_round(server, streams, options.tokens))
                    if number:  # round 0 warms both up
                        results[server.label].append(outcome)
            _print_table(streams, results)


if __name__ == "__main__":
    main()
