"""`make bench`: every benchmark with its defaults, one after the other, each beside its peer."""

from __future__ import annotations

import subprocess
import sys

SCRIPTS = ("benchmarks.engine_decode", "benchmarks.stack", "benchmarks.takeover")


def main() -> int:
    for script in SCRIPTS:
        print(f"\n== {script}\n", flush=True)
        if status := subprocess.run([sys.executable, "-m", script], check=False).returncode:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
