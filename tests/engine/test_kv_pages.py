"""Both tiers under random schedules: the books always balance, and no lookup finds KV but that of its tokens."""

from __future__ import annotations

import random
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.disk_pages import DiskPages
from workers.engine.kv_pages import KvPages, page_layout
from workers.engine.page_folder import DiskLimits
from workers.engine.slot_cache import LayerShape

PAGE = 2
SHAPES = (LayerShape(1, 2, 2, mx.float32), LayerShape(1, 2, 2, mx.float32))


def _row(tokens: tuple[int, ...], isolation: str) -> list[mx.array]:
    """KV that depends on everything before each token, and on whose it is."""
    if not tokens:
        return [mx.zeros((1, 1, 0, 2))] * 4
    seen = [zlib.crc32(f"{isolation}{tokens[: at + 1]}".encode()) % 1_000_003 for at in range(len(tokens))]
    columns = mx.array(seen, dtype=mx.float32)[None, None, :, None]
    return [mx.concatenate([columns, columns + at], axis=3) for at in range(4)]


@dataclass
class _World:
    """Pages over a disk tree, restarted now and then, and the block tables of sequences that are under way."""

    tree: Path
    pages: int
    held: list[tuple[tuple[int, ...], str, list[int]]] = field(default_factory=list)
    served_from_disk: int = 0

    def start(self) -> None:
        layout = page_layout(SHAPES, PAGE)
        assert layout is not None
        self.disk = DiskPages(self.tree, "model", layout, DiskLimits(1 << 20, 0))
        assert self.disk.drain(20)
        self.kv = KvPages(SHAPES, self.pages, PAGE, "model", self.disk)

    def restart(self) -> None:
        self.stop()
        self.held = []
        self.start()

    def stop(self) -> None:
        assert self.disk.drain(20)
        self.served_from_disk += self.kv.disk_hits
        self.kv.close()

    def join(self, tokens: tuple[int, ...], isolation: str, computed_meanwhile: int = 0) -> None:
        """What a sequence does from its wait to the end of its prompt, each thing found compared.

        While it waits, somebody else computes its first tokens.
        """
        owner = object()
        self.kv.expect(owner, tokens, isolation)
        while not self.kv.is_ready(owner):
            self.kv.await_pages(1)
        begun, table = tokens[:computed_meanwhile], list[int]()
        self.kv.keep(begun, table, _row(begun, isolation), 0, len(begun), isolation)
        self.kv.release(table)
        table = self.kv.find(owner, tokens, isolation)
        self.kv.check_integrity([*(held for *_, held in self.held), table])
        self.compare(table, tokens, isolation)
        self.kv.keep(tokens, table, _row(tokens, isolation), 0, len(tokens), isolation)
        self.held.append((tokens, isolation, table))

    def compare(self, table: list[int], tokens: tuple[int, ...], isolation: str) -> None:
        if table:
            for found, row in zip(self.kv.gather(table), _row(tokens, isolation), strict=True):
                assert mx.array_equal(found, row[:, :, : len(table) * PAGE]), "KV of other tokens"

    def leave(self, number: int) -> None:
        if self.held:
            *_, table = self.held.pop(number % len(self.held))
            self.kv.release(table)

    def damage(self, number: int) -> None:
        files = sorted(self.tree.glob("*/*.safetensors"))
        if files:
            path = files[number % len(files)]
            blob, rng = bytearray(path.read_bytes()), random.Random(number)
            blob[rng.randrange(len(blob))] ^= rng.randrange(1, 256)
            path.write_bytes(blob[: len(blob) - rng.choice((0, 1, len(blob) // 2))])


@contextmanager
def _world(pages: int) -> Iterator[_World]:
    folder = Path(tempfile.mkdtemp(prefix="spillway-kv-"))
    world = _World(folder / "kv", pages)
    world.start()
    try:
        yield world
    finally:
        world.stop()
        shutil.rmtree(folder)


def _act(world: _World, action: str, tokens: list[int], number: int) -> None:
    match action:
        case "join":
            world.join(tuple(tokens), "ab"[number % 2], computed_meanwhile=number // 2)
        case "leave":
            world.leave(number)
        case "evict":
            world.kv.cache.evict(number)
        case "idle":
            while world.kv.spill():
                pass
        case "restart":
            world.restart()
        case "damage":
            world.damage(number)
        case _:
            world.kv.reset()
            world.held.clear()


ACTIONS = st.tuples(
    st.sampled_from(["join"] * 6 + ["leave"] * 3 + ["evict", "idle", "idle", "restart", "damage", "reset"]),
    st.lists(st.integers(0, 1), min_size=1, max_size=14),
    st.integers(0, 30),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ACTIONS, max_size=30), st.integers(1, 24))
def test_any_schedule_balances_and_serves_only_what_was_asked(
    actions: list[tuple[str, list[int], int]], pages: int
) -> None:
    with _world(pages) as world:
        for action, tokens, number in actions:
            _act(world, action, tokens, number)
            world.kv.check_integrity([table for *_, table in world.held])
        while world.held:
            world.leave(0)
        world.kv.cache.evict(pages)
        assert (len(world.kv.cache), world.kv.table.free) == (0, pages)


def test_the_schedules_do_reach_the_disk() -> None:
    """The property above would hold for a tier that never serves; this history makes it serve, and refuse."""
    with _world(24) as world:
        tokens = [0, 1] * 7
        for _ in range(2):
            _act(world, "join", tokens, 0)
        _act(world, "idle", [], 0)
        _act(world, "restart", [], 0)
        _act(world, "join", tokens, 0)
        assert world.kv.disk_hits == 7
        _act(world, "reset", [], 0)
        _act(world, "join", tokens, 8)  # four tokens are computed meanwhile
        assert world.kv.disk_hits == 7 + 5
        _act(world, "restart", [], 0)
        _act(world, "damage", [], 3)
        _act(world, "join", tokens, 0)
        assert world.kv.disk_hits < 7 and world.disk.stats()["disk_pages_corrupt"] == 1


def test_two_that_begin_alike_and_wait_together_get_each_their_own_pages() -> None:
    longer, shorter = (0, 1) * 5, (0, 1, 1, 1, 0, 0)
    with _world(24) as world:
        for tokens in (longer, shorter) * 2:
            world.join(tokens, "a")
        while world.kv.spill():
            pass
        world.restart()
        for first, second in ((longer, shorter), (shorter, longer)):
            world.kv.expect("first", first, "a")
            world.kv.expect("second", second, "a")
            world.kv.await_pages(5)
            for owner, tokens in (("second", second), ("first", first)):
                table = world.kv.find(owner, tokens, "a")
                assert len(table) >= 1
                world.compare(table, tokens, "a")
                world.kv.release(table)
            world.restart()
