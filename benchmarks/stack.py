"""Whole stack, HTTP in to SSE out: Spillway beside mlx_lm.server and vllm-mlx, same model, same BLAS, in turns.

    python -m benchmarks.stack [--rounds 5] [--streams 1,8,32] [--workloads short,shared,shared-cold]
                               [--model tiny|small] [--only spillway,mlx_lm.server,vllm-mlx]

Prints, per workload and number of concurrent streams, the median and range over the rounds of tokens/s, time to first
token (TTFT) and gaps between events with text, and the ratio to the best peer of the same round. Greedy and streamed;
tokens are counted as generated (each server's usage), not by events. The model never says the end of its text, and a
run fails where an answer does not have exactly the tokens that were asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from benchmarks.servers import OPENBLAS, Server, mlx_lm_server, spillway, vllm_mlx
from benchmarks.stack_load import WORKLOADS, Prompts, Turn, run_turn
from benchmarks.stack_model import write_model
from benchmarks.stack_peers import PACKAGES, VLLM_MLX

OURS = "spillway"
_SERVERS: dict[str, Callable[[str], contextlib.AbstractContextManager[Server]]] = {
    OURS: spillway,
    "mlx_lm.server": mlx_lm_server,
    "vllm-mlx": vllm_mlx,
}
_COLUMNS = {
    "tokens_per_s": "tokens/s",
    "ttft_p50_ms": "TTFT p50 ms",
    "ttft_p99_ms": "TTFT p99 ms",
    "gap_p50_ms": "gap p50 ms",
    "gap_p99_ms": "gap p99 ms",
    "tokens_per_event": "tokens/event",
}


def _spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def _print_table(results: dict[str, list[Turn]]) -> None:
    print("| server | " + " | ".join(_COLUMNS.values()) + " |\n|" + "---|" * (len(_COLUMNS) + 1))
    for label, turns in results.items():
        cells = [_spread([getattr(turn, field) for turn in turns]) for field in _COLUMNS]
        print(f"| {label} | " + " | ".join(cells) + " |")
    print(flush=True)


def _print_ratios(results: dict[str, list[Turn]]) -> None:
    peers = [turns for label, turns in results.items() if label != OURS]
    if OURS not in results or not peers:
        return
    rounds = list(zip(results[OURS], *peers, strict=True))
    faster = [ours.tokens_per_s / max(one.tokens_per_s for one in others) for ours, *others in rounds]
    steadier = [min(one.gap_p99_ms for one in others) / ours.gap_p99_ms for ours, *others in rounds]
    sooner = [min(one.ttft_p50_ms for one in others) / ours.ttft_p50_ms for ours, *others in rounds]
    pairs = [pair for ours, *others in rounds for one in others for pair in zip(ours.said, one.said, strict=True)]
    differ = sum(ours != theirs for ours, theirs in pairs)
    print(f"tokens/s, Spillway / best peer of the round: {_spread(faster, 2)}")
    print(f"gap p99 and TTFT p50, best peer of the round / Spillway: {_spread(steadier, 2)}, {_spread(sooner, 2)}")
    print(f"answers that differ from a peer's: {differ} of {len(pairs)}\n")


def _print_setting(servers: list[Server], model: str) -> None:
    ours = ", ".join(f"{name} {version(name)}" for name in ("spillway", "mlx", "mlx-lm", "uvicorn", "redis"))
    blas = f"{OPENBLAS} preloaded" if OPENBLAS.exists() else "the wheel's BLAS"
    compiler = "g++ present" if shutil.which("g++") else "no g++"
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {ours}")
    print(f"vllm-mlx in an environment of its own: {', '.join((VLLM_MLX, *PACKAGES))}")
    print(f"model {model}, float32, random weights, greedy; for every server: {blas}; {compiler}; the load client,")
    print("one process, shares the CPUs; all servers run throughout, one is asked at a time")
    for server in servers:
        print(f"- {server.label}: {server.promises}")
    print(flush=True)


def _compare(servers: list[Server], workload: str, prompts: Prompts, streams: int, rounds: int) -> None:
    """The first round warms everybody up; the order changes from round to round."""
    results: dict[str, list[Turn]] = {server.label: [] for server in servers}
    for number in range(rounds + 1):
        first = number % len(servers)
        for server in servers[first:] + servers[:first]:
            turn = run_turn(server, WORKLOADS[workload], prompts, streams, number)
            if number:
                results[server.label].append(turn)
    print(f"{workload} ({WORKLOADS[workload].title}), {streams} stream(s): median (min–max)\n")
    _print_table(results)
    _print_ratios(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--model", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--only", default=",".join(_SERVERS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spillway-bench-") as folder, contextlib.ExitStack() as stack:
        prompts = Prompts(write_model(options.model, Path(folder)))
        servers = [stack.enter_context(_SERVERS[name](folder)) for name in options.only.split(",")]
        _print_setting(servers, options.model)
        for workload in options.workloads.split(","):
            for streams in map(int, options.streams.split(",")):
                _compare(servers, workload, prompts, streams, options.rounds)


if __name__ == "__main__":
    main()
