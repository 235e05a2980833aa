"""Key names: one slot per shard, no two meanings for one name, every placeholder of the scripts known."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.queue import scripts
from scheduler.queue.keys import SINGLETONS, Keys, idempotency_part, lua_names, quoted, unquoted

ALL = [script for script in vars(scripts).values() if isinstance(script, scripts.Script)]


@given(st.text(min_size=1, max_size=40))
def test_quoting_is_reversible_and_leaves_no_separator(name: str) -> None:
    part = quoted(name)
    assert unquoted(part) == name
    assert not set(part) & set(":|{} \n")


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_two_tenants_never_share_an_idempotency_key(tenant: str, key: str, other: str, other_key: str) -> None:
    same = (tenant, key) == (other, other_key)
    assert (idempotency_part(tenant, key) == idempotency_part(other, other_key)) == same


def test_all_keys_of_a_shard_carry_its_hash_tag() -> None:
    keys = Keys("p1")
    for key in (keys.job("j"), keys.log("j"), keys.channel("j"), keys.bell("m"), keys.of("lease"), keys.of("own", "w")):
        assert key.startswith("sw:{p1}:")


def test_singletons_are_known_as_such_and_nothing_else_is() -> None:
    keys = Keys("p1")
    assert keys.is_singleton("sw:{p1}:lease") and keys.is_singleton("sw:{p1}:done")
    for other in ("sw:{p1}:j:lease", "sw:{p1}:nothing", "sw:{p2}:lease", "lease"):
        assert not keys.is_singleton(other)
    assert all(reason for reason in SINGLETONS.values())


@pytest.mark.parametrize("script", ALL, ids=lambda script: script.name)
def test_a_script_names_keys_only_by_placeholder(script: scripts.Script) -> None:
    own = script.text.split("\n")
    named = set(lua_names().values())
    for line in own:
        for literal in re.findall(r"P \.\. '[^']*'", line):
            assert literal in named, line
        assert "'sw:" not in line and '"sw:' not in line


@pytest.mark.parametrize("script", ALL, ids=lambda script: script.name)
def test_a_script_uses_only_commands_of_redis_6_2(script: scripts.Script) -> None:
    newer = {"XAUTOCLAIM", "LMPOP", "ZMPOP", "EXPIRETIME", "PEXPIRETIME", "FUNCTION", "FCALL", "HPEXPIRE", "HEXPIRE"}
    used = set(re.findall(r"redis\.p?call\('([A-Z]+)'", script.text))
    assert used and not used & newer
