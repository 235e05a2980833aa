"""Which URLs and addresses this server calls for somebody else."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from scheduler.errors import StartupError
from scheduler.outbound_policy import OutboundPolicy, is_public
from scheduler.settings import Settings, load_settings


def policy(origins: str = "") -> OutboundPolicy:
    return OutboundPolicy(Settings(home=Path("/nowhere"), outbound_origins=origins))


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::200e"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.9.9.9", "169.254.169.254"),
        *("172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1"),
        *("198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
        *("::", "::1", "::ffff:127.0.0.1", "::ffff:1.1.1.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1"),
        *("2002:7f00:1::", "2001::1", "2001:db8::1", "3fff::1", "fc00::1", "fd12::1", "fe80::1", "fe80::1%eth0"),
        *("fec0::1", "ff02::1", "100::1", "5f00::1", "2606:4700::1111%eth0", "not an address", "", "127.1"),
    ],
)
def test_all_others_are_not(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "url", ["https://example.com/hook?a=b", "https://example.com:8443/", "https://[2606:4700::1]/"]
)
def test_https_elsewhere_is_called(url: str) -> None:
    assert policy().refusal(httpx2.URL(url)) is None


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/", "not https"),
        ("ftp://example.com/", "absolute http"),
        ("/hook", "absolute http"),
        ("https:///hook", "absolute http"),
        ("https://ann:secret@example.com/", "password"),
        ("https://token@example.com/", "password"),
        ("https://example.com:22/", "port 22"),
        ("https://example.com:80/", "port 80"),
        (f"https://example.com/{'x' * 2048}", "longer"),
        ("https://127.0.0.1/", "public address"),
        ("https://[::1]/", "public address"),
        ("https://[::ffff:10.0.0.1]/", "public address"),
        ("https://169.254.169.254/latest/meta-data", "public address"),
        ("https://2130706433/", "no host name"),
        ("https://0x7f000001/", "no host name"),
        ("https://0x7f.1/", "no host name"),
        ("https://127.1/", "no host name"),
        ("https://localhost/", "local name"),
        ("https://LOCALHOST./", "local name"),
        ("https://a.localhost/", "local name"),
        ("https://metadata.google.internal/", "local name"),
        ("https://printer.local/", "local name"),
    ],
)
def test_these_are_refused_with_a_reason(url: str, why: str) -> None:
    refusal = policy().refusal(httpx2.URL(url))
    assert refusal is not None and why in refusal


def test_a_listed_origin_may_be_local_and_plain_but_nothing_beside_it() -> None:
    listed = policy("http://127.0.0.1:9000, https://Mac.local")
    for url in ("http://127.0.0.1:9000/any/path", "https://mac.local/", "https://mac.local:443/"):
        assert listed.refusal(httpx2.URL(url)) is None
    for url in ("http://127.0.0.1:9001/", "https://127.0.0.1:9000/", "http://127.0.0.1/", "http://mac.local/"):
        assert listed.refusal(httpx2.URL(url)) is not None
    assert listed.refusal(httpx2.URL("http://ann:pw@127.0.0.1:9000/")) is not None


@pytest.mark.parametrize("origins", ["127.0.0.1:9000", "http://a/path", "http://a b", "ftp://a", "http://u@a"])
def test_what_is_no_origin_stops_the_start(origins: str) -> None:
    with pytest.raises(StartupError, match="SPILLWAY_OUTBOUND_ORIGINS"):
        load_settings(outbound_origins=origins)
