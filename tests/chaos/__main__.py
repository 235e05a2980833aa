"""`python -m tests.chaos [--seconds 60] [--seed N] [--faults kill-worker,kill-redis] [--no-engine] [--home DIR]`.

The seed comes first on the screen; the same seed repeats the faults. A failed run keeps its home, with all logs.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.faults import KINDS
from tests.chaos.run import Options, run


def main() -> int:
    options = _options()
    print(f"seed {options.seed}", flush=True)
    report = asyncio.run(run(options))
    if report:
        print(report)
        print(f"everything is kept in {options.home}")
        return 1
    print("accepted = terminal, each once; every stream exact; no key without owner or TTL")
    shutil.rmtree(options.home)
    return 0


def _options() -> Options:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--faults", default=",".join(KINDS), help="some of: %(default)s; empty: none")
    parser.add_argument("--home", type=Path, help="an empty directory to work in; removed after a good run")
    parser.add_argument("--no-engine", action="store_true", help="scripted workers only: a quicker start")
    parser.add_argument("--quiet", action="store_true", help="the timeline only in its file")
    arguments = parser.parse_args()
    kinds = [kind for kind in arguments.faults.split(",") if kind]
    if unknown := set(kinds) - KINDS.keys():
        parser.error(f"unknown faults: {', '.join(sorted(unknown))}")
    home = arguments.home or Path(tempfile.mkdtemp(prefix="spillway-chaos-"))
    home.mkdir(parents=True, exist_ok=True)
    return Options(
        arguments.seed, arguments.seconds, kinds, home, show=not arguments.quiet, engine=not arguments.no_engine
    )


if __name__ == "__main__":
    sys.exit(main())
