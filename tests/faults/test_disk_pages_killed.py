"""An engine killed in the middle of writing a page: what the next one finds is whole."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.page_writer import LAYOUT, LIMITS, ROOT, content, names
from workers.engine.disk_pages import DiskPages


def test_a_kill_in_mid_write_leaves_nothing_wrong(tmp_path: Path) -> None:
    for pages in (1, 8):
        _write_until(tmp_path / "kv", pages)
    drafts = list((tmp_path / "kv" / "written").glob("*.draft"))
    tier = DiskPages(tmp_path / "kv", "written", LAYOUT, LIMITS)
    assert tier.drain(20)
    chain = names(40)
    read = tier.ask(ROOT, chain)
    assert read is not None and read.done.wait(20)
    contents = tier.take(read)
    assert len(contents) >= 8, f"{len(drafts)} drafts"
    for name, found in zip(chain, contents, strict=False):
        assert np.array_equal(found[0], content(name)[0])
    assert tier.stats()["disk_pages_corrupt"] == 0
    tier.close()


def _write_until(tree: Path, pages: int) -> None:
    """Run a writer until so many pages are there and another is being written, then kill it."""
    writer = subprocess.Popen([sys.executable, "-m", "tests.page_writer", str(tree)])
    folder = tree / "written"
    try:
        give_up_s = time.monotonic() + 60
        while len(list(folder.glob("*.safetensors"))) < pages or not list(folder.glob(f"{writer.pid}-*.draft")):
            assert time.monotonic() < give_up_s and writer.poll() is None
    finally:
        writer.kill()
        writer.wait()
