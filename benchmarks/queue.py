"""No-op jobs through Spillway's queue and its peers, one worker process each, one redis-server, in turns.

    python -m benchmarks.queue [--rounds 3] [--jobs 10000] [--trips 300] [--only spillway,saq]

Prints medians and ranges of jobs/s (first enqueue to last outcome) and of idle round trips (enqueue → start, enqueue →
result), and the ratio to the best peer of the same round. Every queue has its guarantees on, as listed below the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import redis

from benchmarks.queue_peers import PACKAGES, peers_python
from benchmarks.queue_process import Measured, system
from scheduler.queue.embedded import EmbeddedRedis

OURS = "spillway"
_TURN_S = 180.0


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[None]:
    output = None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL  # some say at their end how they ended
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=output)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _turn(name: str, url: str, jobs: int, trips: int) -> Measured:
    """One queue, alone on the machine, its Redis empty."""
    python = peers_python() if system(name).is_foreign else sys.executable
    own = [python, "-m", "benchmarks.queue_process"]
    with redis.Redis.from_url(url) as client:
        client.flushall()
    options = json.dumps({"jobs": jobs, "trips": trips, "within_s": 3.0})
    with contextlib.ExitStack() as stack:
        if name == OURS:
            stack.enter_context(_process([*own, "work", "drain", url]))
        stack.enter_context(_process(system(name).command(python, url) or [*own, "work", name, url]))
        said = subprocess.run(
            [*own, "produce", name, url, options], stdout=subprocess.PIPE, check=True, timeout=_TURN_S
        ).stdout
    return Measured(**json.loads(said.splitlines()[-1]))


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def _row(name: str, turns: list[Measured]) -> str:
    cells = [
        system(name).name,
        _spread([turn.jobs_per_s for turn in turns], 0),
        *(_spread([_quantile(turn.start_ms, q) for turn in turns], 2) for q in (0.5, 0.99)),
        *(_spread([_quantile(turn.result_ms, q) for turn in turns], 2) for q in (0.5, 0.99)),
    ]
    return "| " + " | ".join(cells) + " |"


def _print_table(results: dict[str, list[Measured]]) -> None:
    header = ("queue", "no-op jobs/s", "start p50 ms", "start p99 ms", "result p50 ms", "result p99 ms")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for name, turns in results.items():
        print(_row(name, turns))
    print("\nmedian (min–max) over the rounds\n")


def _print_ratios(results: dict[str, list[Measured]]) -> None:
    peers = [turns for name, turns in results.items() if name != OURS]
    if OURS not in results or not peers:
        return
    faster = [
        ours.jobs_per_s / max(one.jobs_per_s for one in others)
        for ours, *others in zip(results[OURS], *peers, strict=True)
    ]
    shorter = [
        min(statistics.median(one.result_ms) for one in others) / statistics.median(ours.result_ms)
        for ours, *others in zip(results[OURS], *peers, strict=True)
    ]
    print(f"jobs/s, Spillway / best peer of the round: {_spread(faster, 2)}")
    print(f"idle result p50, best peer of the round / Spillway: {_spread(shorter, 2)}")


def _print_setting(server: EmbeddedRedis, results: dict[str, list[Measured]], jobs: int) -> None:
    ours = ", ".join(f"{name} {version(name)}" for name in ("spillway", "arq", "redis", "hiredis", "uvloop"))
    served = "" if server.binary is None else server.binary.version_text
    print(f"\n{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {ours}")
    print(f"beside them, in an environment of their own: {', '.join(PACKAGES)}")
    print(f"redis-server {served}: AOF everysec, unix socket, one for all, emptied before each turn")
    for name in results:
        one = system(name)
        print(f"- {one.name}: {int(jobs * one.share):,} jobs a turn; {one.guarantees}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--trips", type=int, default=300)
    parser.add_argument("--only", default="spillway,arq,arq-default,saq,taskiq-list,taskiq-stream,celery-prefork")
    options = parser.parse_args()
    names = options.only.split(",")
    results: dict[str, list[Measured]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="spillway-bench-") as home:
        server = EmbeddedRedis(Path(home))
        server.start()
        try:
            for number in range(options.rounds):
                for name in names if number % 2 == 0 else reversed(names):
                    results[name].append(_turn(name, server.url, options.jobs, options.trips))
        finally:
            server.stop()
    _print_table(results)
    _print_ratios(results)
    _print_setting(server, results, options.jobs)


if __name__ == "__main__":
    main()
