"""A minute of everything at once: producers, workers of both kinds, two APIs, and every fault of the chaos run."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tests.chaos.faults import KINDS, plan
from tests.chaos.run import Options, run

SECONDS = 60.0


@pytest.mark.timeout(420)  # start, storm and quiet take 90 s where the machine is free
async def test_every_accepted_job_ends_once_and_every_stream_is_exact_under_random_faults(tmp_path: Path) -> None:
    seed = secrets.randbelow(10**6)
    print(f"seed {seed}")
    report = await run(Options(seed=seed, seconds=SECONDS, kinds=list(KINDS), home=tmp_path))
    assert not report, report


def test_a_seed_repeats_its_faults_and_a_longer_run_begins_with_the_same() -> None:
    short, long = plan(7, 60, list(KINDS)), plan(7, 600, list(KINDS))
    assert short == plan(7, 60, list(KINDS))
    assert long[: len(short)] == short
    assert {fault.kind for fault in long} == KINDS.keys()
