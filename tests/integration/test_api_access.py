"""Who may use the API: keys, the open API on loopback, foreign Host and Origin headers; where it will not start."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api import server
from api.main import create_app
from scheduler.db.keys import KeyStore
from scheduler.db.schema import migrate
from scheduler.errors import StartupError
from scheduler.settings import Settings
from tests.api_stage import Stage, running_api, running_redis, wait_until

ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/demo"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/jobs/job-0-1"),
    ("GET", "/v1/jobs/job-0-1/events"),
    ("POST", "/v1/jobs/job-0-1/cancel"),
    ("GET", "/admin/workers"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def redis_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def open_stage(redis_of_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    home = tmp_path_factory.mktemp("open") / "home"
    listed: dict[str, Any] = {"allowed_hosts": "studio.local, box.lan:9000", "allowed_origins": "https://ui.example"}
    with running_api(redis_of_module, home, **listed) as stage:
        yield stage


@pytest.fixture(scope="module")
def locked_stage(redis_of_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    home = tmp_path_factory.mktemp("locked") / "home"
    with running_api(redis_of_module, home) as stage:
        stage.call(KeyStore(stage.services.database).create("first"))
        wait_until(lambda: stage.request("GET", "/v1/models").status == 401)
        yield stage


def new_key(stage: Stage, name: str) -> tuple[str, str]:
    record, secret = stage.call(KeyStore(stage.services.database).create(name))
    return record.id, secret


def test_without_any_key_loopback_is_open_to_any_key_or_none(open_stage: Stage) -> None:
    assert open_stage.request("GET", "/v1/models").status == 200
    assert open_stage.request("GET", "/v1/models", Authorization="Bearer sk-anything").status == 200


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_once_a_key_exists_every_route_needs_one(locked_stage: Stage, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"X_Api_Key": "sk-spw-" + "x" * 43}):
        answer = locked_stage.request(method, path, **headers)
        assert (answer.status, answer.error["type"]) == (401, "invalid_request_error")
        assert answer.error["code"] == "invalid_api_key"
        assert "xxx" not in answer.error["message"]


def test_both_key_headers_work(locked_stage: Stage) -> None:
    _, secret = new_key(locked_stage, "both")
    assert locked_stage.request("GET", "/v1/models", Authorization=f"Bearer {secret}").status == 200
    assert locked_stage.request("GET", "/v1/models", Authorization=f"bearer  {secret}").status == 200
    assert locked_stage.request("GET", "/v1/models", X_Api_Key=secret).status == 200
    both = locked_stage.request("GET", "/v1/models", X_Api_Key="wrong", Authorization=f"Bearer {secret}")
    assert both.status == 401  # x-api-key counts


def test_a_revoked_key_stops_working(locked_stage: Stage) -> None:
    key_id, secret = new_key(locked_stage, "short")
    assert locked_stage.request("GET", "/v1/models", X_Api_Key=secret).status == 200
    locked_stage.call(KeyStore(locked_stage.services.database).revoke(key_id))
    wait_until(lambda: locked_stage.request("GET", "/v1/models", X_Api_Key=secret).status == 401, within_s=5)


def test_probes_need_no_key(locked_stage: Stage) -> None:
    assert locked_stage.request("GET", "/livez").status == 200
    assert locked_stage.request("GET", "/readyz").status == 200


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:{port}",
        "127.0.0.1:{port}",
        "[::1]:{port}",
        "studio.local",
        "studio.local:5",
        "box.lan:9000",
    ],
)
def test_loopback_names_and_listed_hosts_pass(open_stage: Stage, host: str) -> None:
    answer = open_stage.request("GET", "/v1/models", Host=host.format(port=open_stage.settings.port))
    assert answer.status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "localhost:1",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "10.0.0.5",
        "",
        "[::1",
        "box.lan",
    ],
)
def test_foreign_hosts_are_403(open_stage: Stage, host: str) -> None:
    answer = open_stage.request(
        "POST", "/v1/chat/completions", open_stage.chat("hi"), Host=host.format(port=open_stage.settings.port)
    )
    assert (answer.status, answer.error["code"]) == (403, "forbidden")


@pytest.mark.parametrize("origin", ["http://localhost:{port}", "http://127.0.0.1:{port}", "https://ui.example"])
def test_own_and_listed_origins_pass_without_cors_headers(open_stage: Stage, origin: str) -> None:
    answer = open_stage.request("GET", "/v1/models", Origin=origin.format(port=open_stage.settings.port))
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost:3000", "null", "file://", "http://localhost"]
)
def test_foreign_origins_are_403(open_stage: Stage, origin: str) -> None:
    before = set(open_stage.workers[0].requests)
    answer = open_stage.request("POST", "/v1/chat/completions", open_stage.chat("hi"), Origin=origin)
    assert (answer.status, answer.error["code"]) == (403, "forbidden")
    assert set(open_stage.workers[0].requests) == before


def test_with_keys_in_use_the_key_is_the_guard(locked_stage: Stage) -> None:
    _, secret = new_key(locked_stage, "proxy")
    answer = locked_stage.request(
        "GET", "/v1/models", Host="gpu.example", Origin="https://ui.example", X_Api_Key=secret
    )
    assert answer.status == 200


def start(settings: Settings) -> None:
    settings.home.mkdir(parents=True, exist_ok=True)
    migrate(settings)
    asyncio.run(server.run(create_app(settings), settings))


def test_another_address_without_a_key_is_refused(redis_of_module: str, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", redis_url=redis_of_module, host="0.0.0.0", port=1)
    with pytest.raises(StartupError, match=r"Refusing to listen on 0\.0\.0\.0 without an API key.*keys create"):
        start(settings)


def test_a_taken_port_is_one_clear_line(redis_of_module: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = Settings(home=tmp_path / "home", redis_url=redis_of_module, port=port)
        with pytest.raises(StartupError, match=f"Port {port} on 127.0.0.1 is in use"):
            start(settings)


def test_an_unreachable_redis_is_one_clear_line(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", redis_url=f"unix://{tmp_path}/none.sock", redis_wait_s=0)
    with pytest.raises(StartupError, match="Redis"):
        start(settings)


def test_an_address_that_is_not_ours_is_one_clear_line() -> None:
    with pytest.raises(StartupError, match=r"192\.0\.2\.1"), server.listening_socket("192.0.2.1", 8000):
        pass
