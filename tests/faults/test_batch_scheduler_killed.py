"""The scheduler is killed with -9 while a batch runs: every line ends once, and its files are whole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.batch_stage import count, ended, jsonl, line, read, running_batches, sdk, submit, text_of, until

LINES = 150


@pytest.mark.timeout(180)
def test_a_batch_survives_the_death_of_its_scheduler(tmp_path: Path) -> None:
    rng = random.Random(9)
    with running_batches(tmp_path, batch_window=64) as (stage, scheduler), sdk(stage) as client:
        lines = [line(f"n{n}", {"say": [f"{n} ", "x"], "pause_s": 0.02}) for n in range(LINES)]
        batch = submit(client, jsonl(lines))
        for goal in sorted(rng.sample(range(20, LINES // 2), 1)):
            until(client, batch, lambda now, goal=goal: count(now)[1] > goal, within_s=60)
            scheduler.kill()
            scheduler.start()
        batch = ended(client, batch, within_s=90)
        assert (batch.status, count(batch)) == ("completed", (LINES, LINES, 0))
        found = read(client, batch.output_file_id)
        assert {name: text_of(entry) for name, entry in found.items()} == {f"n{n}": f"{n} x" for n in range(LINES)}
        assert len({entry["id"] for entry in found.values()}) == LINES
        assert len(stage.workers[0].requests) == LINES, "a line ran twice"
