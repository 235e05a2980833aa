"""Sealed secrets: keys, their file, rotation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from scheduler.db.vault import KEY_FILE, Vault
from scheduler.errors import StartupError, VaultLocked
from scheduler.settings import Settings


def test_what_is_sealed_opens_in_another_process_of_the_home(tmp_path: Path) -> None:
    sealed = Vault(Settings(home=tmp_path)).seal(b"secret")
    assert b"secret" not in sealed
    assert Vault(Settings(home=tmp_path)).open(sealed) == b"secret"
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_processes_that_start_at_once_share_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        vaults = list(pool.map(lambda _: Vault(Settings(home=tmp_path)), range(64)))
    sealed = vaults[0].seal(b"secret")
    assert all(vault.open(sealed) == b"secret" for vault in vaults)


def test_a_new_key_on_top_seals_and_the_old_one_still_opens(tmp_path: Path) -> None:
    old = Vault(Settings(home=tmp_path)).seal(b"old")
    path = tmp_path / KEY_FILE
    old_key, new_key = path.read_text().strip(), Fernet.generate_key().decode()
    path.write_text(f"{new_key}\n{old_key}\n")
    vault = Vault(Settings(home=tmp_path))
    assert vault.open(old) == b"old"
    assert Fernet(new_key).decrypt(vault.seal(b"new")) == b"new"


def test_a_key_of_the_environment_is_used_and_no_file_made(tmp_path: Path) -> None:
    first, second = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    sealed = Vault(Settings(home=tmp_path, secret_key=second)).seal(b"secret")
    assert Vault(Settings(home=tmp_path, secret_key=f"{first}, {second}")).open(sealed) == b"secret"
    assert list(tmp_path.iterdir()) == []


def test_another_key_opens_nothing_and_says_so(tmp_path: Path) -> None:
    sealed = Vault(Settings(home=tmp_path, secret_key=Fernet.generate_key().decode())).seal(b"secret")
    with pytest.raises(VaultLocked, match="another key"):
        Vault(Settings(home=tmp_path)).open(sealed)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_key_file_that_others_may_read_stops_the_start(tmp_path: Path, mode: int) -> None:
    Vault(Settings(home=tmp_path))
    (tmp_path / KEY_FILE).chmod(mode)
    with pytest.raises(StartupError, match="chmod 600"):
        Vault(Settings(home=tmp_path))


@pytest.mark.parametrize("content", ["", "\n", "not a key", "ä" * 44])
def test_a_damaged_key_file_stops_the_start_and_is_not_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / KEY_FILE
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(StartupError, match=KEY_FILE) as stopped:
        Vault(Settings(home=tmp_path))
    assert "not a key" not in str(stopped.value)
    assert path.read_text() == content


def test_a_bad_key_of_the_environment_is_named_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="SPILLWAY_SECRET_KEY") as stopped:
        Vault(Settings(home=tmp_path, secret_key="hunter2"))
    assert "hunter2" not in str(stopped.value)
