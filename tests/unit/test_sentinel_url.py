"""SPILLWAY_REDIS_URL for Sentinel: what it may say, and how a wrong one is told of."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.errors import StartupError
from scheduler.queue.connection import connect
from scheduler.queue.sentinel import SentinelUrl, parse_sentinel_url
from scheduler.settings import Settings


def test_hosts_service_and_database() -> None:
    assert parse_sentinel_url("sentinel://a:1,b,[::1]:3/main/2") == SentinelUrl(
        hosts=(("a", 1), ("b", 26379), ("::1", 3)), service="main", db=2
    )
    assert parse_sentinel_url("sentinel://a/main").db == 0


def test_logins_of_the_servers_and_of_the_sentinels() -> None:
    url = parse_sentinel_url("sentinel://ann:p%40ss@a,b/main?sentinel_password=x%2F")
    assert url.login == {"username": "ann", "password": "p@ss"}
    assert url.sentinel_login == {"password": "x/"}
    assert parse_sentinel_url("sentinel://:p@a/main").login == {"password": "p"}
    assert "p@ss" not in repr(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sentinel://a:1", "names no service"),
        ("sentinel://a:1/", "names no service"),
        ("sentinel://a:x/main", "'a:x' is no host:port"),
        ("sentinel://a:99999/main", "'a:99999' is no host:port"),
        ("sentinel:///main", "no host name"),
        ("sentinel://a,,b/main", "no host name"),
        ("sentinel://a/main/x", "database 'x'"),
        ("sentinel://:s3cret@a/main?ssl=1", "option 'ssl'"),
        ("sentinels://a/main", "scheme"),
    ],
)
def test_a_bad_url_stops_the_start_and_names_the_variable(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(StartupError) as error:
        connect(Settings(home=tmp_path, redis_url=url), "command")
    assert error.value.message.startswith("SPILLWAY_REDIS_URL: ")
    assert said in error.value.message and "s3cret" not in error.value.message
