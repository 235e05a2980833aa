"""The disk tier of KV pages: one thread that reads and writes them, and bounded queues to it. No MLX here: host bytes.

The engine thread offers pages (it never waits: what finds no room in the queue is dropped and counted) and asks for
pages ahead of a join; reads go before writes. What is handed back was checked byte by byte, see page_file.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scheduler.telemetry import get_logger
from workers.engine.page_chain import PageName
from workers.engine.page_file import PageIdentity, TensorLayout
from workers.engine.page_folder import DiskLimits, PageFolder

_log = get_logger(__name__)

LONGEST_WAIT_S = 0.25  # a join takes what was read by then
MAX_QUEUED_BYTES = 64 << 20
MAX_READ_BYTES = 512 << 20  # read and not yet taken, all joins together

PageContent = list[np.ndarray]


@dataclass(eq=False, slots=True)
class PageRead:
    """Pages asked for, in order; `contents` grows from another thread until `done`."""

    root: bytes
    names: list[PageName]
    deadline_s: float
    contents: list[PageContent] = field(default_factory=list[PageContent])
    done: threading.Event = field(default_factory=threading.Event)
    cancelled: bool = False

    @property
    def is_ready(self) -> bool:
        return self.done.is_set() or time.monotonic() >= self.deadline_s


@dataclass(frozen=True, slots=True)
class _PageWrite:
    root: bytes
    name: PageName
    content: PageContent


class DiskPages:
    """All methods on the engine thread, but for those of the thread itself; `_lock` guards what both touch."""

    def __init__(self, tree: Path, salt: str, layout: Sequence[TensorLayout], limits: DiskLimits) -> None:
        self._salt = salt
        self._layout = tuple(layout)
        self._page_bytes = max(1, sum(tensor.nbytes for tensor in layout))
        self._folder = PageFolder(tree, salt, layout, limits)
        self._lock = threading.Condition()
        self._reads: deque[PageRead] = deque()
        self._writes: deque[_PageWrite] = deque()
        self._queued: set[bytes] = set()
        self._outstanding_bytes = 0
        self._opened = self._closed = False
        self.written = self.dropped = self.failed = 0
        self._thread = threading.Thread(target=self._run, name="disk-pages", daemon=True)
        self._thread.start()

    def has(self, key: bytes) -> bool:
        """Whether the page is on disk, or on its way there."""
        with self._lock:
            return key in self._queued or key in self._folder.keys

    @property
    def room(self) -> int:
        """How many pages may be offered now."""
        with self._lock:
            if self._closed:
                return 0
            return max(0, max(1, MAX_QUEUED_BYTES // self._page_bytes) - len(self._writes))

    @property
    def is_writing(self) -> bool:
        with self._lock:
            return bool(self._queued)

    def offer(self, root: bytes, name: PageName, content: PageContent) -> None:
        """Write the page some time soon; dropped and counted where the queue is full."""
        if self.room == 0:
            self.dropped += 1
            return
        with self._lock:
            self._queued.add(name.key)
            self._writes.append(_PageWrite(root, name, content))
            self._lock.notify_all()

    def ask(self, root: bytes, names: Sequence[PageName]) -> PageRead | None:
        """Begin to read the pages, up to the first that is missing; None where there is nothing to wait for."""
        with self._lock:
            most = (MAX_READ_BYTES - self._outstanding_bytes) // self._page_bytes
            if self._closed or not names or most < 1:
                return None
            if self._opened and names[0].key not in self._folder.keys:
                return None
            read = PageRead(root, list(names[:most]), time.monotonic() + LONGEST_WAIT_S)
            self._outstanding_bytes += len(read.names) * self._page_bytes
            self._reads.append(read)
            self._lock.notify_all()
            return read

    def take(self, read: PageRead) -> list[PageContent]:
        """What was read so far, in order from the first page; the rest is given up."""
        with self._lock:
            if not read.cancelled:
                read.cancelled = True
                self._outstanding_bytes -= len(read.names) * self._page_bytes
            contents, read.contents = read.contents, []
            return contents

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is queued; False where that took too long."""
        with self._lock:
            return self._lock.wait_for(lambda: self._opened and not self._queued and not self._reads, timeout_s)

    def close(self) -> None:
        """End the thread; what is queued is given up."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._thread.join()

    def stats(self) -> dict[str, float]:
        return {
            "disk_pages": len(self._folder.keys),
            "disk_bytes": self._folder.bytes_used,
            "disk_pages_written": self.written,
            "disk_pages_dropped": self.dropped,
            "disk_pages_corrupt": self._folder.refused,
            "disk_errors": self.failed,
        }

    def _run(self) -> None:
        try:
            self._folder.open()
        except OSError as error:
            _log.warning("the disk tier for KV pages is off", error=str(error))
            self._give_up()
            return
        with self._lock:
            self._opened = True
            self._lock.notify_all()
        while (work := self._next()) is not None:
            try:
                self._do(work)
            except Exception as error:  # the loop's top: a page is lost, the tier goes on
                self.failed += 1
                if self.failed & (self.failed - 1) == 0:
                    _log.warning("a KV page could not be stored or read", error=repr(error), failures=self.failed)

    def _next(self) -> PageRead | _PageWrite | None:
        with self._lock:
            self._lock.wait_for(lambda: self._closed or self._reads or self._writes)
            if self._closed:
                self._end_reads()
                return None
            return self._reads[0] if self._reads else self._writes[0]

    def _do(self, work: PageRead | _PageWrite) -> None:
        match work:
            case PageRead():
                try:
                    self._read(work)
                finally:
                    self._finish(work)
            case _PageWrite():
                try:
                    content = [part.tobytes() for part in work.content]
                    self.written += self._folder.write(self._identity(work.root, work.name), content)
                finally:
                    self._finish(work)

    def _read(self, read: PageRead) -> None:
        for name in read.names:
            parts = None if read.cancelled else self._folder.read(self._identity(read.root, name))
            if parts is None:
                return
            with self._lock:
                if read.cancelled:
                    return
                read.contents.append([np.frombuffer(part, np.uint8) for part in parts])

    def _finish(self, work: PageRead | _PageWrite) -> None:
        with self._lock:
            match work:
                case PageRead():
                    self._reads.popleft()
                    work.done.set()
                case _PageWrite():
                    self._writes.popleft()
                    self._queued.discard(work.name.key)
            self._lock.notify_all()

    def _identity(self, root: bytes, name: PageName) -> PageIdentity:
        return PageIdentity(self._salt, root, name, self._layout)

    def _give_up(self) -> None:
        with self._lock:
            self._closed = True
            self._writes.clear()
            self._queued.clear()
            self._end_reads()

    def _end_reads(self) -> None:
        while self._reads:
            self._reads.popleft().done.set()
        self._lock.notify_all()
