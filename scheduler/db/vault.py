"""Seals secrets that SQL keeps: Fernet keys (AES-128-CBC and HMAC-SHA256) from a file of the home or the environment.

The first key seals, all of them open: a new key goes on top of the file, and the old ones stay until all is resealed.
Several machines share one database and hence one SPILLWAY_SECRET_KEY. Lost keys cannot be replaced by guessing: what
they sealed must be entered again.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from scheduler.errors import StartupError, VaultLocked
from scheduler.settings import Settings

KEY_FILE = "secret.key"  # below SPILLWAY_HOME; one key a line, the newest first


class Vault:
    """Sealing and opening; the key file is made when it is first needed."""

    def __init__(self, settings: Settings) -> None:
        self._fernet = MultiFernet([_key(text, source) for text, source in _keys(settings)])

    def seal(self, secret: bytes) -> bytes:
        """The secret as it may lie in a database."""
        return self._fernet.encrypt(secret)

    def open(self, sealed: bytes) -> bytes:
        """The inverse of `seal`. Raises VaultLocked where none of the keys sealed it."""
        try:
            return self._fernet.decrypt(sealed)
        except InvalidToken:
            raise VaultLocked(
                f"A stored secret cannot be opened: it was sealed with another key. Restore {KEY_FILE} or "
                "SPILLWAY_SECRET_KEY, or store the secret anew."
            ) from None


def _keys(settings: Settings) -> list[tuple[str, str]]:
    if settings.secret_key is not None:
        found = [part.strip() for part in settings.secret_key.split(",") if part.strip()]
        source = "SPILLWAY_SECRET_KEY"
    else:
        path = settings.home / KEY_FILE
        found, source = _read(path).split(), str(path)
    if not found:
        raise StartupError(f"{source} holds no key. Restore it; a new one would open nothing that was sealed before.")
    return [(key, source) for key in found]


def _key(text: str, source: str) -> Fernet:
    try:
        return Fernet(text)
    except ValueError:  # not chained: its text may repeat the key
        raise StartupError(
            f"{source} holds something that is no key; one is 32 random bytes in URL-safe base64 (44 characters)"
        ) from None


def _read(path: Path) -> str:
    try:
        try:
            return _checked(path)
        except FileNotFoundError:
            _create(path)
            return _checked(path)
    except OSError as error:
        raise StartupError(f"The key file {path} cannot be used: {error.strerror or error}.") from error


def _checked(path: Path) -> str:
    with path.open(encoding="ascii", errors="replace") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise StartupError(f"{path} may be read by others (mode {mode:04o}). Run: chmod 600 {path}")
        return file.read()


def _create(path: Path) -> None:
    """Whole or not at all, and never over an existing one: a reader sees no half-written key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(Fernet.generate_key() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return  # another process was first: its key counts
    finally:
        draft.unlink(missing_ok=True)
