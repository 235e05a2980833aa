"""Where this server may connect to on somebody's behalf. Pure: URLs and addresses in, a refusal in words out.

Only https, and only public addresses, unless the owner listed the exact origin in SPILLWAY_OUTBOUND_ORIGINS.
"""

from __future__ import annotations

import ipaddress
import re

import httpx2

from scheduler.settings import Settings

MAX_URL_CHARS = 2048
HTTPS_PORT = 443
FIRST_USER_PORT = 1024  # below it, https speaks on 443 alone
DEFAULT_PORTS = {"http": 80, "https": 443}

# The IANA special-purpose registries (RFC 6890 and later), spelled out: `is_global` differs between Python versions.
_SPECIAL_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's metadata and DNS, a public address by number only
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")  # outside it: mapped IPv4, NAT64, unique local, link-local, multicast
_SPECIAL_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")  # Teredo and ORCHID, 6to4, documentation
)
_NUMERIC_HOST = re.compile(
    r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?", re.IGNORECASE
)  # inet_aton reads 127.1, 0x7f.1, 2130706433
_LOCAL_NAME = re.compile(r"(?:.*\.)?(?:localhost|local|internal|localdomain|home\.arpa)\.?", re.IGNORECASE)

Origin = tuple[str, str, int]


class OutboundPolicy:
    """The owner's list of origins, and what holds for all others."""

    def __init__(self, settings: Settings) -> None:
        listed = (entry.strip() for entry in settings.outbound_origins.split(","))
        self._trusted = frozenset(origin_of(httpx2.URL(entry)) for entry in listed if entry)

    def trusts(self, url: httpx2.URL) -> bool:
        """Whether the owner listed this origin: any address and plain http are meant, then."""
        return origin_of(url) in self._trusted

    def refusal(self, url: httpx2.URL) -> str | None:
        """Why this URL is not called, whatever its name resolves to; None where its address decides."""
        if url.scheme not in DEFAULT_PORTS or not url.host:
            return "it is not an absolute http(s) URL"
        if url.userinfo:
            return "it carries a user name or password"
        if len(str(url)) > MAX_URL_CHARS:
            return f"it is longer than {MAX_URL_CHARS} characters"
        if self.trusts(url):
            return None
        if url.scheme != "https":
            return "it is not https (the owner may list its origin in SPILLWAY_OUTBOUND_ORIGINS)"
        port = origin_of(url)[2]
        if port != HTTPS_PORT and port < FIRST_USER_PORT:
            return f"port {port} is not used for https"
        return _refused_host(url.host)


def origin_of(url: httpx2.URL) -> Origin:
    """Scheme, host and port, comparable."""
    port = DEFAULT_PORTS.get(url.scheme, 0) if url.port is None else url.port
    return url.scheme, url.raw_host.decode("ascii").removesuffix("."), port


def is_public(text: str) -> bool:
    """Whether an address is one that the whole Internet routes to a single host."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not any(address in network for network in _SPECIAL_V4)
    return (
        address.scope_id is None
        and address in _UNICAST_V6
        and address.is_global
        and not any(address in network for network in _SPECIAL_V6)
    )


def _refused_host(host: str) -> str | None:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if _NUMERIC_HOST.fullmatch(host) or "%" in host:
            return f"'{host[:80]}' is no host name"
        return f"'{host[:80]}' is a local name" if _LOCAL_NAME.fullmatch(host) else None
    return None if is_public(host) else f"{host} is not a public address"
