"""The first start waits for little: kernels share one precompiled header, and usual shapes are prepared while idle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.engine_stage import greedy, job, prompt, reference, stage, tiny_llama

_BUILD_A_KERNEL = """
from workers.engine import kernel_header
building = kernel_header.precompile()
assert building is not None
building.join()
import mlx.core as mx
fused = mx.compile(lambda a, b: mx.sigmoid(a) * b + a)
print(fused(mx.ones(3), mx.ones(3)).tolist())
assert kernel_header.precompile() is None, "with kernels there is nothing to prepare"
"""


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="kernels are built with g++ on Linux"
)
def test_mlx_builds_its_kernels_with_the_precompiled_header(tmp_path: Path) -> None:
    log, compiler = tmp_path / "headers", tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -H "$@" 2>>{log}\n')  # -H names the headers it reads
    compiler.chmod(0o700)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    path = f"{compiler.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "TMPDIR": str(temporary), "PATH": path}
    done = subprocess.run(
        [sys.executable, "-c", _BUILD_A_KERNEL],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith("[1.73")
    taken = [line for line in log.read_text().splitlines() if line.startswith("! ")]  # "!": a precompiled one, taken
    assert taken and all(line.startswith(f"! {temporary}/kernel-header-") for line in taken)


def test_usual_shapes_are_prepared_one_at_a_time_and_disturb_nobody() -> None:
    model = tiny_llama()
    on = stage(model)
    on.engine.warm_up()
    on.add(*(job(f"j{seed}", prompt(seed, 40), greedy(30)) for seed in range(3)))
    shapes = 0
    while on.engine.has_work:
        shapes += on.engine.warm_next()
        on.step()
    while on.engine.warm_next():
        shapes += 1
    assert shapes > 20, "every usual working set is prepared in the end"
    on.add(job("again", prompt(0, 40), greedy(30)))
    on.run()
    for name, seed in (("j0", 0), ("j1", 1), ("j2", 2), ("again", 0)):
        assert on.jobs[name].tokens == reference(model, prompt(seed, 40), 30)
    assert on.jobs["again"].usage is not None and on.jobs["again"].usage.cached_tokens == 32
