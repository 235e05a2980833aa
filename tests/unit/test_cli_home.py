"""The home and the address: what a start refuses, in one line."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path

import pytest

from api.cli.home import STATE_FORMAT, check_room, check_state_format, make_home, prepare_home, write_atomically
from api.cli.home_lock import HomeLock, holder
from api.cli.preflight import address_of, check_port, is_loopback
from scheduler.errors import StartupError


def one_line(caught: pytest.ExceptionInfo[StartupError]) -> str:
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_new_home_is_private_and_marked_with_the_state_format(tmp_path: Path) -> None:
    home = tmp_path / "deep" / "home"
    prepare_home(home)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert json.loads((home / "state.json").read_text())["format"] == STATE_FORMAT
    prepare_home(home)


def test_an_existing_directory_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    make_home(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_file_in_the_place_of_the_home_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StartupError) as caught:
            make_home(path)
        assert str(path) in one_line(caught)


def test_a_full_disk_is_said_with_what_is_left_and_what_is_needed(tmp_path: Path) -> None:
    check_room(tmp_path, 1)
    with pytest.raises(StartupError) as caught:
        check_room(tmp_path, 2**70)
    assert "MB left" in one_line(caught)


def test_a_state_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"format": STATE_FORMAT + 1, "version": "9.0.0"}))
    with pytest.raises(StartupError) as caught:
        check_state_format(tmp_path)
    assert "newer Spillway (9.0.0" in one_line(caught)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "x"}', "\x00"])
def test_a_broken_state_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(StartupError) as caught:
        check_state_format(tmp_path)
    assert "state.json" in one_line(caught)


def test_a_failed_write_leaves_the_old_text_and_no_draft(tmp_path: Path) -> None:
    (tmp_path / "note").mkdir()
    with pytest.raises(StartupError):
        write_atomically(tmp_path / "note", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_the_lock_names_its_holder_and_is_free_after_release(tmp_path: Path) -> None:
    lock = HomeLock.acquire(tmp_path, "http://127.0.0.1:8123")
    with pytest.raises(StartupError) as caught:
        HomeLock.acquire(tmp_path, "http://127.0.0.1:9000")
    assert "http://127.0.0.1:8123" in one_line(caught)
    found = holder(tmp_path)
    assert found is not None
    assert found.address == "http://127.0.0.1:8123"
    lock.release()
    assert holder(tmp_path) is None
    HomeLock.acquire(tmp_path, "http://127.0.0.1:9000").release()


def test_the_note_of_a_killed_holder_is_no_holder(tmp_path: Path) -> None:
    (tmp_path / "spillway.lock").write_text('{"pid": 1, "address": "http://127.0.0.1:8123"}')
    assert holder(tmp_path) is None
    HomeLock.acquire(tmp_path, "http://127.0.0.1:8123").release()


def test_a_taken_port_is_named_and_a_free_one_is_not_held() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError) as caught:
            check_port("127.0.0.1", port)
        assert f"Port {port}" in one_line(caught)
    check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.77"])
def test_a_foreign_host_is_refused(host: str) -> None:
    with pytest.raises(StartupError) as caught:
        check_port(host, 8123)
    assert host in one_line(caught)


def test_the_address_is_one_that_this_machine_reaches() -> None:
    assert address_of("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert address_of("0.0.0.0", 8000) == "http://127.0.0.1:8000"
    assert address_of("::", 8000) == "http://[::1]:8000"
    assert [is_loopback(host) for host in ("127.0.0.5", "::1", "localhost", "10.0.0.1", "example.org")] == [
        True,
        True,
        True,
        False,
        False,
    ]
