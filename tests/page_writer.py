"""Writes pages of the disk tier without end, until it is killed: `python -m tests.page_writer TREE`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from workers.engine.disk_pages import DiskPages
from workers.engine.page_chain import PageName, chain, chain_root
from workers.engine.page_file import TensorLayout
from workers.engine.page_folder import DiskLimits

PAGE_TOKENS = 4
LAYOUT = (TensorLayout("F32", (8, 8, PAGE_TOKENS, 256), 8 * 8 * PAGE_TOKENS * 256 * 4),)
LIMITS = DiskLimits(1 << 30, 0)
ROOT = chain_root("written", PAGE_TOKENS, "")


def names(count: int) -> list[PageName]:
    return list(chain(ROOT, list(range(count * PAGE_TOKENS)), PAGE_TOKENS))


def content(name: PageName) -> list[np.ndarray]:
    """What only this page holds."""
    return [np.random.default_rng(list(name.key)).integers(0, 256, LAYOUT[0].nbytes, np.uint8)]


def main() -> None:
    tier = DiskPages(Path(sys.argv[1]), "written", LAYOUT, LIMITS)
    for name in names(10_000):
        tier.offer(ROOT, name, content(name))
        tier.drain(20)


if __name__ == "__main__":
    main()
