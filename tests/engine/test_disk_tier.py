"""The disk tier under an engine: a prompt known before the restart is read, not prefilled, or else computed right."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from scheduler.request import SamplingParams
from tests.engine.engine_stage import Stage, config, greedy, job, loaded, prompt, reference, slot_lane, tiny_llama
from workers.engine.engine import Engine
from workers.engine.page_folder import DiskLimits
from workers.engine.page_setup import DiskTier

PAGE = 8
PROMPT = prompt(1, 100)

Start = Callable[..., Stage]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def start(tmp_path: Path, model: nn.Module) -> Iterator[Start]:
    """Starts an engine over one model folder and one tree of pages, as a restart would."""
    stages: list[Stage] = []
    folder = tmp_path / "model"
    folder.mkdir()
    _save(model, folder)

    def start_engine(**changes: int | bool) -> Stage:
        files = dataclasses.replace(loaded(model), path=folder)
        disk = DiskTier(tmp_path / "kv", DiskLimits(64 << 20, 0))
        stages.append(Stage(Engine(files, dataclasses.replace(config(**changes), disk=disk))))
        _settle(stages[-1])
        return stages[-1]

    yield start_engine
    for on in stages:
        on.engine.close()


def _save(model: nn.Module, folder: Path) -> None:
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))  # pyright: ignore
    (folder / "config.json").write_text("{}")


def _settle(on: Stage) -> None:
    """What an idle engine does: hand pages to the disk, which writes them."""
    while on.engine.warm_next():
        pass
    disk = slot_lane(on).pages._disk  # pyright: ignore[reportPrivateUsage]
    assert disk is not None and disk.drain(20)


def _ask_twice(on: Stage, prompt_ids: tuple[int, ...] = PROMPT, isolation: str = "") -> None:
    for turn in range(2):
        _ask(on, f"job-{turn}", prompt_ids, isolation)
    _settle(on)


def _ask(on: Stage, name: str, prompt_ids: tuple[int, ...] = PROMPT, isolation: str = "") -> int:
    """Run the prompt; how many of its tokens were not prefilled."""
    params: SamplingParams = greedy(5)
    on.add(dataclasses.replace(job(name, prompt_ids, params), isolation=isolation))
    on.run()
    usage = on.jobs[name].usage
    assert usage is not None
    return usage.cached_tokens


def test_what_was_asked_for_again_survives_a_restart(start: Start, model: nn.Module) -> None:
    _ask_twice(start())
    on = start()
    assert _ask(on, "after") == 96
    stats = on.engine.stats()
    assert (stats["prefix_disk_pages"], stats["prefix_ram_pages"], stats["prefill_tokens"]) == (12, 0, 3)
    assert on.jobs["after"].tokens == reference(model, PROMPT, 5)
    assert _ask(on, "again") == 96 and on.engine.stats()["prefix_ram_pages"] == 12


def test_a_prompt_seen_once_is_not_written(start: Start) -> None:
    on = start()
    _ask(on, "once")
    _settle(on)
    assert on.engine.stats()["disk_pages_written"] == 0


def test_evicted_pages_that_were_asked_for_again_come_back_from_disk(start: Start, model: nn.Module) -> None:
    on = start(max_rows=2, kv_budget_bytes=1 << 18)
    for turn in range(2):
        _ask(on, f"job-{turn}")
    total = slot_lane(on).pages.table.total
    slot_lane(on).pages.cache.evict(total)
    _settle(on)
    assert on.engine.stats()["pages_evicted"] >= 12
    assert _ask(on, "after") == 96
    assert on.jobs["after"].tokens == reference(model, PROMPT, 5)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_pages_are_computed_again_and_deleted(
    start: Start, model: nn.Module, tmp_path: Path, seed: int
) -> None:
    _ask_twice(start())
    rng = random.Random(seed)
    files = sorted((tmp_path / "kv").glob("*/*.safetensors"))
    for path in rng.sample(files, 3):
        blob = bytearray(path.read_bytes())
        blob[rng.randrange(len(blob))] ^= rng.randrange(1, 256)
        path.write_bytes(blob[: rng.choice((len(blob), rng.randrange(len(blob))))])
    on = start()
    assert _ask(on, "after") < 96
    assert on.jobs["after"].tokens == reference(model, PROMPT, 5)
    assert on.engine.stats()["disk_pages_corrupt"] >= 1


def test_other_weights_of_the_same_size_find_nothing(start: Start, tmp_path: Path) -> None:
    _ask_twice(start())
    other = tiny_llama()
    other.apply(lambda weight: weight + 0.01)
    _save(other, tmp_path / "model")
    assert _ask(start(), "after") == 0


def test_another_tenant_finds_nothing_in_memory_or_on_disk(start: Start) -> None:
    on = start()
    _ask_twice(on, isolation="one")
    assert _ask(on, "other", isolation="two") == 0
    assert _ask(start(), "after", isolation="two") == 0
    assert _ask(start(), "same", isolation="one") == 96


def test_a_burst_reads_the_pages_once(start: Start, model: nn.Module) -> None:
    _ask_twice(start())
    on = start()
    prompts = [PROMPT + prompt(20 + at, 5) for at in range(6)]
    on.add(*(job(f"job-{at}", ids, greedy(4)) for at, ids in enumerate(prompts)))
    on.run()
    assert on.engine.stats()["prefix_disk_pages"] == 12
    for at, ids in enumerate(prompts):
        assert on.jobs[f"job-{at}"].tokens == reference(model, ids, 4)


def test_a_cancelled_job_gives_up_its_read(start: Start) -> None:
    _ask_twice(start())
    on = start()
    on.add(job("gone", PROMPT, greedy(5)))
    on.engine.cancel("gone", 1)
    on.run()
    assert _ask(on, "after") == 96


def test_a_failed_step_costs_memory_but_not_the_disk(start: Start) -> None:
    on = start()
    _ask_twice(on)
    on.engine.lane.reset()
    assert _ask(on, "after") == 96 and on.engine.stats()["prefix_disk_pages"] == 12
