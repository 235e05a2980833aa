"""What an engine process is given: settings, threads, BLAS, a directory of its own, and kernels built before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.settings import Settings
from workers import kernel_cache
from workers.engine_environment import engine_environment, make_temporary, system_openblas


def test_settings_reach_the_engine_but_the_parents_pipe_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPILLWAY_PARENT_PIPE", "7")
    settings = Settings(home=tmp_path, max_rows=5, compile=False, system_blas=False)
    environment = engine_environment(settings, tmp_path / "t", engines=1)
    code = "from scheduler.settings import Settings as S; s = S(); print(s.max_rows, s.compile, s.parent_pipe, s.home)"
    seen = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)
    assert seen.stdout.split() == ["5", "False", "None", str(tmp_path)]


def test_engines_share_the_cores_unless_threads_are_set(tmp_path: Path) -> None:
    cores = os.cpu_count() or 1
    shared = engine_environment(Settings(system_blas=False), tmp_path, engines=2)
    assert shared["OPENBLAS_NUM_THREADS"] == str(max(1, cores // 2))
    chosen = engine_environment(Settings(system_blas=False, engine_threads=3), tmp_path, engines=2)
    assert chosen["OPENBLAS_NUM_THREADS"] == "3"


@pytest.mark.skipif(system_openblas() is None, reason="this machine has no OpenBLAS")
def test_a_system_openblas_is_preloaded_before_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/lib/other.so")
    with_blas = engine_environment(Settings(), tmp_path, engines=1)
    assert with_blas["LD_PRELOAD"] == f"{system_openblas()}:/lib/other.so"
    without = engine_environment(Settings(system_blas=False), tmp_path, engines=1)
    assert without["LD_PRELOAD"] == "/lib/other.so"


def test_directories_of_dead_workers_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=30)
    left = tmp_path / "tmp" / f"engine-{gone.pid}-abc"
    living = tmp_path / "tmp" / f"engine-{os.getppid()}-abc"
    for folder in (left, living):
        folder.mkdir(parents=True)
        (folder / "x").touch()
    fresh = make_temporary(tmp_path)
    assert fresh.is_dir() and fresh.stat().st_mode & 0o077 == 0
    assert not left.exists() and living.exists()


def _library(folder: Path, name: str, content: bytes = b"elf") -> Path:
    path = folder / "mlx" / "1.2.3" / "cpu" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_kernels_that_one_engine_built_are_there_for_the_next(tmp_path: Path) -> None:
    home, first, second = tmp_path / "home", tmp_path / "first", tmp_path / "second"
    longest = "lib" + "k" * (255 - 6) + ".so"
    _library(first, "libone.so")
    _library(first, longest)
    _library(first, "one.cpp")
    assert kernel_cache.keep(home, first) == 2
    assert kernel_cache.seed(home, second) == 2
    assert sorted(path.name for path in second.rglob("*") if path.is_file()) == sorted(["libone.so", longest])
    assert kernel_cache.keep(home, second) == 0
    assert not list(home.rglob("partial-*"))


def test_a_cache_that_cannot_be_written_costs_only_speed(tmp_path: Path) -> None:
    built = tmp_path / "built"
    _library(built, "libone.so")
    home = tmp_path / "home"
    home.mkdir()
    (home / "cache").write_text("a file where the directory should be")
    assert kernel_cache.keep(home, built) == 0
