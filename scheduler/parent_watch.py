"""Notices that the process that started this one is gone: its end of a pipe closes, however it died.

`spillway up` keeps the writing end and names the reading end in SPILLWAY_PARENT_PIPE; API, scheduler and worker watch.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable


async def watch(fd: int, on_death: Callable[[], None]) -> None:
    """Wait until the pipe's writing end is closed, then call `on_death` once. Owns `fd` and closes it."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    os.set_blocking(fd, False)
    os.set_inheritable(fd, False)
    loop.add_reader(fd, _read, fd, gone)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    on_death()


def _read(fd: int, gone: asyncio.Event) -> None:
    try:
        at_end = os.read(fd, 1024) == b""
    except BlockingIOError:
        return
    except OSError:
        at_end = True
    if at_end:
        gone.set()
