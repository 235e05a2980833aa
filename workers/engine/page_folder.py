"""The files of the disk tier: SPILLWAY_HOME/kv/<model>/<page key>.safetensors, one page each, 0600 in folders of 0700.

All models' engines share the tree and its size limit; each writes only its own model's folder. Files appear by rename,
so none is ever seen half written under its name; whatever is not exactly the page that was asked for is deleted. Host
bytes only; one thread at a time.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scheduler.telemetry import get_logger
from workers.engine.page_file import (
    MAX_HEADER_BYTES,
    CorruptPage,
    PageIdentity,
    TensorLayout,
    belongs,
    decode_page,
    encode_page,
    file_bytes,
    read_header,
)

_log = get_logger(__name__)
_SUFFIX, _DRAFT = ".safetensors", ".draft"
_DRAFT_LIVES_S = 60.0
_TRIM_TO = 0.9
_CENSUS_EVERY = 16  # of the limit: other engines write too, so the tree is counted each time this share was written
_BLOCK_BYTES = 4096
_MOST_FILES = 1 << 16  # each is charged at least its share of the limit: reading headers at start stays short


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """`max_bytes` for all models together; `reserve_bytes` of the file system stay free."""

    max_bytes: int
    reserve_bytes: int


class PageFolder:
    """One model's pages. `keys` are those known to be there; another engine may add and delete at any time."""

    def __init__(self, tree: Path, salt: str, layout: Sequence[TensorLayout], limits: DiskLimits) -> None:
        self._tree = tree
        self._folder = tree / salt
        self._salt = salt
        self._layout = tuple(layout)
        self._limits = limits
        self._room = 0
        self._drafts = 0
        self.keys: set[bytes] = set()
        self.bytes_used = 0
        self.refused = 0

    def open(self) -> None:
        """Make the folder, read every file's header, delete what is not this model's; raises OSError."""
        for folder in (self._tree, self._folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
        for path in list(self._folder.iterdir()):
            if path.suffix == _SUFFIX and not self._is_ours(path):
                self._refuse(path, "its header is of no page of this model")
        self._census()

    def read(self, identity: PageIdentity) -> list[memoryview] | None:
        """The page's bytes, every one of them checked; None where it is not there, or was not right and is deleted."""
        path = self._path(identity.name.key)
        try:
            blob = _read_file(path)
            parts = decode_page(identity, blob)
            os.utime(path)  # the last use, for the size limit
            return parts
        except CorruptPage as error:
            self._refuse(path, str(error))
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("a KV page cannot be read", file=path.name, error=str(error))
        self.keys.discard(identity.name.key)
        return None

    def write(self, identity: PageIdentity, content: Sequence[bytes]) -> bool:
        """Keep the page; False where there is no room on this file system. Raises OSError."""
        blob = encode_page(identity, content)
        charge = self._charge(len(blob))
        if not self._make_room(charge):
            return False
        self._drafts += 1
        draft = self._folder / f"{os.getpid()}-{self._drafts}{_DRAFT}"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(blob)
            draft.replace(self._path(identity.name.key))
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        self.keys.add(identity.name.key)
        self._room -= charge
        self.bytes_used += charge
        return True

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}{_SUFFIX}"

    def _is_ours(self, path: Path) -> bool:
        try:
            key = bytes.fromhex(path.stem)
            header, metadata = read_header(_read_file(path, MAX_HEADER_BYTES))
            return (
                belongs(metadata, self._salt, key, self._layout)
                and file_bytes(header, self._layout) == path.stat().st_size
            )
        except (CorruptPage, ValueError, OSError):
            return False

    def _refuse(self, path: Path, reason: str) -> None:
        self.refused += 1
        _log.warning("a KV page on disk was not what it should be; deleted", file=path.name, reason=reason)
        _delete(path)

    def _make_room(self, needed: int) -> bool:
        if needed > self._limits.max_bytes * _TRIM_TO:
            return False
        if needed > self._room:
            self._census()
        return shutil.disk_usage(self._folder).free - needed >= self._limits.reserve_bytes

    def _charge(self, size: int) -> int:
        block = max(_BLOCK_BYTES, self._limits.max_bytes // _MOST_FILES)
        return -(-size // block) * block

    def _census(self) -> None:
        """Count the tree; when it is near the limit, delete what was used longest ago, whichever model's it is."""
        share = self._limits.max_bytes // _CENSUS_EVERY
        files = sorted((used_s, self._charge(size), path) for used_s, size, path in _files_of(self._tree))
        total = sum(size for _, size, _ in files)
        if total > self._limits.max_bytes - share:
            for _, size, path in files:
                if total <= self._limits.max_bytes * _TRIM_TO - share:
                    break
                _delete(path)
                total -= size
        self.bytes_used = total
        self._room = max(share, self._limits.max_bytes - share - total)
        self.keys = {bytes.fromhex(path.stem) for path in self._folder.glob(f"*{_SUFFIX}") if _is_hex(path.stem)}


def _files_of(tree: Path) -> Iterator[tuple[float, int, Path]]:
    """(last use, size, path) of all pages; drafts whose writer is gone are deleted."""
    for folder in tree.iterdir():
        if not folder.is_dir() or folder.is_symlink():
            continue
        for path in folder.iterdir():
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if path.suffix == _DRAFT and time.time() - status.st_mtime > _DRAFT_LIVES_S:
                _delete(path)
            elif path.suffix == _SUFFIX:
                yield status.st_mtime, status.st_size, path


def _read_file(path: Path, most: int = -1) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as stream:
        return stream.read(most)


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("a KV page cannot be deleted", file=path.name, error=str(error))


def _is_hex(text: str) -> bool:
    try:
        bytes.fromhex(text)
    except ValueError:
        return False
    return True
