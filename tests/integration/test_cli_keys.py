"""`spillway keys` on a database of its own, and what the commands make of an API that wants a key."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli_call import Done, call


def keys(home: Path, *arguments: str) -> Done:
    return call("keys", *arguments, "--home", home)


def test_a_key_is_shown_once_listed_by_its_beginning_and_revoked(tmp_path: Path) -> None:
    home = tmp_path / "home"
    made = keys(home, "create", "--name", "laptop", "--tenant", "team-a")
    secret = made.stdout.strip()
    assert made.returncode == 0, made.stderr
    assert secret.startswith("sk-spw-")

    assert keys(home, "create", "--if-none").stdout == ""

    (record,) = json.loads(keys(home, "list", "--json").stdout)
    assert (record["name"], record["tenant"], record["revoked_ms"]) == ("laptop", "team-a", None)
    assert secret.startswith(record["prefix"])
    everything = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
    assert secret.encode() not in everything

    assert keys(home, "revoke", record["id"]).returncode == 0
    assert json.loads(keys(home, "list", "--json").stdout)[0]["revoked_ms"] is not None
    table = keys(home, "list").stdout
    assert record["id"] in table
    assert secret not in table


def test_an_unknown_key_cannot_be_revoked(tmp_path: Path) -> None:
    done = keys(tmp_path, "revoke", "key-nope")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "spillway: No such key. `spillway keys list` shows them all.\n"


def test_a_bad_tenant_is_refused_in_one_line(tmp_path: Path) -> None:
    done = keys(tmp_path, "create", "--tenant", "two words")
    assert done.returncode == 1
    assert done.stderr.startswith("spillway: A tenant has")
