"""The guarded transport against real servers: what it refuses, and that it never connects where it must not."""

from __future__ import annotations

import asyncio
import datetime
import ssl
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from scheduler.outbound import OutboundLimits, OutboundRefused, check_url, outbound_client, system_resolve
from scheduler.outbound_policy import OutboundPolicy
from scheduler.settings import Settings
from tests.http_receiver import cut, drip, raw, receiving, status

PUBLIC = "93.184.216.34"


class Dns:
    """A resolver whose answers change from one question to the next; the last one stays."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self._answers[0] if len(self._answers) == 1 else self._answers.pop(0)


@asynccontextmanager
async def calling(
    origins: str = "", *, resolve: Dns | None = None, tls: ssl.SSLContext | None = None, **limits: float
) -> AsyncIterator[httpx2.AsyncClient]:
    settings = Settings(home=Path("/nowhere"), outbound_origins=origins)
    bounds = OutboundLimits(**limits)  # pyright: ignore[reportArgumentType]
    client = outbound_client(settings, bounds, resolve=resolve or system_resolve, tls=tls)
    async with client:
        yield client


async def test_a_listed_origin_is_called_and_answers() -> None:
    async with receiving(status(200, b"thanks")) as receiver, calling(receiver.origin) as client:
        answer = await client.post(receiver.url, content=b"hello")
    assert (answer.status_code, answer.content) == (200, b"thanks")
    (request,) = receiver.received
    assert (request.method, request.path, request.body) == ("POST", "/hook", b"hello")
    assert request.headers["accept-encoding"] == "identity"


async def test_an_origin_that_is_not_listed_is_not_even_connected_to() -> None:
    async with receiving() as receiver, calling() as client:
        for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "127.1", "0x7f.1"):
            for scheme in ("http", "https"):
                with pytest.raises(OutboundRefused):
                    await client.get(f"{scheme}://{host}:{receiver.port}/")
        assert receiver.connections == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "10.0.0.1", "fe80::1"])
async def test_a_name_that_leads_inside_is_refused(address: str) -> None:
    async with receiving() as receiver, calling(resolve=Dns([address])) as client:
        with pytest.raises(OutboundRefused, match="no public address"):
            await client.get(f"https://rebound.example:{receiver.port}/")
        assert receiver.connections == 0


async def test_a_name_that_turns_inside_after_its_check_is_refused_at_the_connect() -> None:
    """DNS rebinding: public when the webhook was registered, loopback when it is called."""
    dns = Dns([PUBLIC], ["127.0.0.1"])
    policy = OutboundPolicy(Settings(home=Path("/nowhere")))
    async with receiving() as receiver, calling(resolve=dns) as client:
        url = f"https://rebound.example:{receiver.port}/"
        assert await check_url(url, policy, dns) is None
        with pytest.raises(OutboundRefused, match="no public address"):
            await client.get(url)
        assert receiver.connections == 0
    assert len(dns.asked) == 2


async def test_a_name_with_several_addresses_inside_is_refused() -> None:
    async with receiving() as receiver, calling(resolve=Dns(["127.0.0.1", "240.0.0.1", "100::1"])) as client:
        with pytest.raises(OutboundRefused, match="no public address"):
            await client.get(f"https://many.example:{receiver.port}/")
        assert receiver.connections == 0


async def test_the_connection_goes_to_the_resolved_address_and_keeps_the_name() -> None:
    """One question to the DNS per connection, SNI, certificate check and Host by name."""
    server, trusting = certificates("hooks.test")
    dns = Dns(["127.0.0.1"])
    async with receiving(tls=server) as receiver:
        origin = f"https://hooks.test:{receiver.port}"
        async with calling(origin, resolve=dns, tls=trusting) as client:
            for _ in range(2):
                assert (await client.get(f"{origin}/x")).status_code == 200
    assert dns.asked == ["hooks.test"]
    assert receiver.server_names == ["hooks.test"]
    assert receiver.received[0].headers["host"] == f"hooks.test:{receiver.port}"


async def test_a_certificate_of_another_name_is_refused() -> None:
    server, trusting = certificates("other.test")
    async with receiving(tls=server) as receiver:
        origin = f"https://hooks.test:{receiver.port}"
        async with calling(origin, resolve=Dns(["127.0.0.1"]), tls=trusting) as client:
            with pytest.raises(httpx2.ConnectError, match="certificate"):
                await client.get(origin)
    assert receiver.received == []


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed_even_by_a_client_that_would(code: int) -> None:
    async with receiving() as inside, receiving(status(code, location=inside.url)) as receiver:
        async with calling(f"{receiver.origin},{inside.origin}") as client:
            with pytest.raises(OutboundRefused, match="redirect"):
                await client.get(receiver.url, headers={"authorization": "secret"}, follow_redirects=True)
        assert inside.connections == 0


async def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as proxy, receiving() as receiver:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.origin)
        async with calling(receiver.origin) as client:
            assert (await client.get(receiver.url)).status_code == 200
        assert proxy.connections == 0


async def test_an_answer_that_drips_for_ever_ends_at_the_total_time() -> None:
    async with receiving(drip(b"x", 0.02)) as receiver, calling(receiver.origin, total_s=0.3) as client:
        with pytest.raises(httpx2.ReadTimeout):
            await client.get(receiver.url)


async def test_headers_that_drip_for_ever_end_at_the_total_time() -> None:
    async def headers(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            writer.write(b"x-more: y\r\n")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with receiving(headers) as receiver, calling(receiver.origin, total_s=0.3) as client:
        with pytest.raises(httpx2.TransportError):
            await client.get(receiver.url)


async def test_silence_ends_at_the_read_timeout_whatever_the_client_asks_for() -> None:
    async with receiving(raw(b"")) as receiver, calling(receiver.origin, read_s=0.1) as client:
        with pytest.raises(httpx2.ReadTimeout):
            await client.get(receiver.url, timeout=60)


@pytest.mark.parametrize("behaviour", [drip(b"x" * 10_000, 0), status(200, b"x" * 200_001)])
async def test_a_huge_body_is_cut_off(behaviour: object) -> None:
    async with receiving(behaviour) as receiver, calling(receiver.origin, body_bytes=200_000) as client:  # type: ignore[arg-type]
        with pytest.raises(OutboundRefused, match="larger than"):
            await client.get(receiver.url)


async def test_a_compressed_answer_is_refused() -> None:
    zipped = status(200, b"\x1f\x8b", content_encoding="gzip")
    async with receiving(zipped) as receiver, calling(receiver.origin) as client:
        with pytest.raises(OutboundRefused, match="compressed"):
            await client.get(receiver.url)


async def test_a_cut_connection_is_a_transport_error_and_the_next_call_works() -> None:
    async with receiving(cut(b"HTTP/1.1 200 OK\r\n"), status(204)) as receiver, calling(receiver.origin) as client:
        with pytest.raises(httpx2.TransportError):
            await client.get(receiver.url)
        assert (await client.get(receiver.url)).status_code == 204


async def test_a_failure_names_the_host_and_no_secret() -> None:
    async with calling() as client:
        with pytest.raises(OutboundRefused) as refused:
            await client.get("https://ann:hunter2@example.com/token-1234?key=5678")
    for secret in ("hunter2", "1234", "5678"):
        assert secret not in str(refused.value)


async def test_a_registration_is_checked_without_a_connection() -> None:
    policy = OutboundPolicy(Settings(home=Path("/nowhere"), outbound_origins="http://127.0.0.1:1"))
    assert await check_url("https://a.example/", policy, Dns([PUBLIC])) is None
    assert await check_url("http://127.0.0.1:1/", policy, Dns([])) is None
    inside = await check_url("https://a.example/", policy, Dns(["10.0.0.1"]))
    assert inside == "'a.example' has no public address"
    assert "not a URL" in (await check_url("https://[::", policy) or "")

    async def broken(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    assert await check_url("https://not-yet.example/", policy, broken) is None


@pytest.mark.parametrize("host", ["a" * 70 + ".example", "a..example"])
async def test_what_no_name_server_can_be_asked_for_is_a_name_that_does_not_resolve(host: str) -> None:
    policy = OutboundPolicy(Settings(home=Path("/nowhere")))
    assert await check_url(f"https://{host}/", policy) is None
    async with outbound_client(Settings(home=Path("/nowhere")), OutboundLimits()) as client:
        with pytest.raises(httpx2.ConnectError, match="cannot be resolved"):
            await client.get(f"https://{host}/")


def certificates(name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context for this name, and a client's that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _server_context(certificate, key), _client_context(certificate)


def _server_context(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> ssl.SSLContext:
    pem = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)
    return context


def _client_context(certificate: x509.Certificate) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=certificate.public_bytes(serialization.Encoding.PEM).decode())
