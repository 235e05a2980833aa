"""`make bench`: every benchmark with its defaults, one after the other, each beside its peer. `make bench ARGS=queue`
runs the named one, with the options that follow it.
"""

from __future__ import annotations

import subprocess
import sys

SCRIPTS = (
    "engine_decode",
    "engine_mixed",
    "engine_churn",
    "engine_sampling",
    "engine_stall",
    "engine_prefix",
    "stack",
    "takeover",
    "queue",
    "queue_scale",
)


def main() -> int:
    chosen, options = sys.argv[1:2], sys.argv[2:]
    if not set(chosen) <= set(SCRIPTS):
        print(f"no benchmark {chosen[0]!r}; there are {', '.join(SCRIPTS)}", file=sys.stderr)
        return 2
    for script in chosen or SCRIPTS:
        print(f"\n== benchmarks.{script}\n", flush=True)
        if status := subprocess.run([sys.executable, "-m", f"benchmarks.{script}", *options], check=False).returncode:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
