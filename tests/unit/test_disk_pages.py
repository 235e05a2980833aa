"""The disk tier: pages survive a restart, and nothing is served but the page that was asked for."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from workers.engine.disk_pages import MAX_QUEUED_BYTES, DiskPages, PageContent, PageRead
from workers.engine.page_chain import PageName, chain, chain_root
from workers.engine.page_file import TensorLayout
from workers.engine.page_folder import DiskLimits

PAGE = 4
LAYOUT = (TensorLayout("F32", (2, 1, PAGE, 8), 256),)
LIMITS = DiskLimits(64 << 20, 0)
ROOT = chain_root("model", PAGE, "")

Open = Callable[..., DiskPages]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens tiers below one tree; each one's thread has read the folder when it is handed out."""
    tiers: list[DiskPages] = []

    def open_tier(
        salt: str = "model", layout: tuple[TensorLayout, ...] = LAYOUT, limits: DiskLimits = LIMITS
    ) -> DiskPages:
        tiers.append(DiskPages(tmp_path / "kv", salt, layout, limits))
        assert tiers[-1].drain(20)
        return tiers[-1]

    yield open_tier
    for tier in tiers:
        tier.close()


def _names(tokens: list[int], root: bytes = ROOT) -> list[PageName]:
    return list(chain(root, tokens, PAGE))


def _content(name: PageName, layout: tuple[TensorLayout, ...] = LAYOUT) -> PageContent:
    """What only this page holds."""
    drawn = np.random.default_rng(list(name.key))
    return [drawn.integers(0, 256, tensor.nbytes, np.uint8) for tensor in layout]


def _store(tier: DiskPages, tokens: list[int], root: bytes = ROOT) -> list[PageName]:
    names = _names(tokens, root)
    for name in names:
        tier.offer(root, name, _content(name))
    assert tier.drain(20)
    return names


def _read(tier: DiskPages, names: list[PageName], root: bytes = ROOT) -> int:
    """How many of the pages are served; each must be right."""
    read: PageRead | None = tier.ask(root, names)
    if read is None:
        return 0
    assert read.done.wait(20)
    contents = tier.take(read)
    for name, content in zip(names, contents, strict=False):
        assert all(np.array_equal(a, b) for a, b in zip(content, _content(name), strict=True)), "wrong KV served"
    return len(contents)


def _files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "kv").glob("*/*"))


def test_pages_survive_a_restart(opened: Open) -> None:
    names = _store(opened(), list(range(20)))
    again = opened()
    assert all(again.has(name.key) for name in names)
    assert _read(again, names) == 5
    assert _read(again, [*names[:2], *_names([7] * 4)]) == 2


def test_files_are_the_owners_alone(opened: Open, tmp_path: Path) -> None:
    _store(opened(), list(range(8)))
    assert [stat.S_IMODE(path.stat().st_mode) for path in _files(tmp_path)] == [0o600, 0o600]
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "kv" / "model").stat().st_mode) == 0o700


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_page_ends_the_hit_is_counted_and_deleted(
    opened: Open, tmp_path: Path, restart: bool, seed: int
) -> None:
    tier, rng = opened(), random.Random(seed)
    names = _store(tier, list(range(16)))
    victim = tmp_path / "kv" / "model" / f"{names[2].key.hex()}.safetensors"
    blob = bytearray(victim.read_bytes())
    if seed % 2:
        blob[rng.randrange(len(blob))] ^= rng.randrange(1, 256)
    else:
        del blob[rng.randrange(len(blob)) :]
    victim.write_bytes(blob)
    tier = opened() if restart else tier
    assert _read(tier, names) == 2
    assert tier.stats()["disk_pages_corrupt"] == 1
    assert not victim.exists() and not tier.has(names[2].key)


def test_one_page_under_the_name_of_another_is_not_served(opened: Open, tmp_path: Path) -> None:
    tier = opened()
    ours, theirs = _store(tier, [1, 2, 3, 4]), _store(tier, [5, 6, 7, 8])
    folder = tmp_path / "kv" / "model"
    (folder / f"{theirs[0].key.hex()}.safetensors").rename(folder / f"{ours[0].key.hex()}.safetensors")
    assert _read(tier, ours) == 0 and tier.stats()["disk_pages_corrupt"] == 1


def test_another_model_layout_or_tenant_gets_nothing(opened: Open, tmp_path: Path) -> None:
    names = _store(opened(), list(range(8)))
    assert _read(opened("other"), names) == 0
    for path in _files(tmp_path):  # someone copies a model's folder over another's
        if path.is_file():
            (tmp_path / "kv" / "other" / path.name).write_bytes(path.read_bytes())
    copied = opened("other")
    assert _read(copied, names) == 0 and copied.stats()["disk_pages_corrupt"] == 2
    tenant = chain_root("model", PAGE, "tenant")
    assert _read(opened(), _names(list(range(8)), tenant), tenant) == 0
    assert _read(opened(), names, tenant) == 0
    halved = opened("model", (TensorLayout("F16", (2, 1, PAGE, 8), 128),))
    assert _read(halved, names) == 0 and halved.stats()["disk_pages_corrupt"] > 0


def test_the_oldest_pages_of_any_model_make_room(opened: Open, tmp_path: Path) -> None:
    limits = DiskLimits(40 * 4096, 0)
    first = opened("first", limits=limits)
    old = _store(first, list(range(80)), ROOT)
    for at, path in enumerate(_files(tmp_path)):
        os.utime(path, (1000 + at, 1000 + at))
    second = opened("second", limits=limits)
    new = _store(second, list(range(100, 180)), ROOT)
    assert len(list((tmp_path / "kv").glob("*/*.safetensors"))) <= 40
    assert _read(second, new) == 20
    assert len(list((tmp_path / "kv" / "first").iterdir())) < len(old)
    third = _store(second, list(range(200, 320)), ROOT)
    assert len(list((tmp_path / "kv").glob("*/*.safetensors"))) <= 40
    assert _read(second, third[-1:]) == 1


def test_a_page_read_is_a_page_used(opened: Open, tmp_path: Path) -> None:
    tier = opened()
    names = _store(tier, list(range(8)))
    for path in _files(tmp_path):
        os.utime(path, (1000, 1000))
    assert _read(tier, names[:1]) == 1
    used = {path.stem: path.stat().st_mtime for path in _files(tmp_path)}
    assert used[names[0].key.hex()] > used[names[1].key.hex()] == 1000


def test_what_the_file_system_needs_stays_free(opened: Open, tmp_path: Path) -> None:
    tier = opened(limits=DiskLimits(64 << 20, 1 << 60))
    _store(tier, [1, 2, 3, 4])
    assert tier.stats()["disk_pages_written"] == 0 and not _files(tmp_path)


def test_a_full_queue_drops_and_counts_and_never_waits(tmp_path: Path) -> None:
    layout = (TensorLayout("F32", (1, 1, PAGE, 1 << 20), MAX_QUEUED_BYTES // 4),)
    tier = DiskPages(tmp_path / "kv", "model", layout, LIMITS)
    name = _names([1, 2, 3, 4])[0]
    content = [np.zeros(layout[0].nbytes, np.uint8)]
    for _ in range(40):
        tier.offer(ROOT, name, content)
    assert tier.dropped >= 30 and tier.room <= 4
    tier.close()


def test_no_folder_means_no_tier_and_no_failure(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("a file in the way")
    tier = DiskPages(tmp_path / "kv", "model", LAYOUT, LIMITS)
    read = tier.ask(ROOT, _names([1, 2, 3, 4]))
    assert read is None or read.done.wait(20)
    tier.close()
    tier.offer(ROOT, _names([1, 2, 3, 4])[0], _content(_names([1, 2, 3, 4])[0]))
    assert tier.dropped == 1 and tier.ask(ROOT, _names([1, 2, 3, 4])) is None


def test_two_engines_of_one_model_share_a_folder(opened: Open) -> None:
    one, two = opened(), opened()
    names = _store(one, list(range(16)))
    _store(two, list(range(16)))
    assert _read(one, names) == _read(two, names) == 4
    assert two.stats()["disk_pages_corrupt"] == 0


def test_drafts_of_writers_that_died_are_cleared_away(opened: Open, tmp_path: Path) -> None:
    opened()
    draft = tmp_path / "kv" / "model" / "12345-1.draft"
    draft.write_bytes(b"half a page")
    os.utime(draft, (1000, 1000))
    opened()
    assert not draft.exists()


def test_a_read_that_is_given_up_leaves_no_debt(opened: Open) -> None:
    tier = opened()
    names = _store(tier, list(range(40)))
    for _ in range(50):
        read = tier.ask(ROOT, names)
        assert read is not None
        tier.take(read)
    assert tier.drain(20) and _read(tier, names) == 10
    assert tier._outstanding_bytes == 0  # pyright: ignore[reportPrivateUsage]
