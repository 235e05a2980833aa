"""What clients get wrong, down to the socket: each gets its status and OpenAI's error object, and disturbs nobody."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api_stage import Stage, running_api_alone, wait_until

CHAT = "/v1/chat/completions"
LIMIT = 200_000


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_api_alone(tmp_path_factory.mktemp("bad"), max_body_bytes=LIMIT) as stage:
        yield stage


@pytest.fixture(autouse=True)
def nothing_else_is_disturbed(stage: Stage) -> Iterator[None]:
    yield
    assert stage.live_jobs() == []
    assert (
        stage.request("POST", CHAT, stage.chat("still here")).json["choices"][0]["message"]["content"] == "still here "
    )


def send(stage: Stage, raw: bytes) -> tuple[int, dict[str, Any]]:
    """Send raw bytes; the status and error object of the answer."""
    with stage.connect() as connection:
        connection.sendall(raw)
        return read_answer(connection)


def read_answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    reader = connection.makefile("rb")
    status = int(reader.readline().split()[1])
    headers = {}
    while (line := reader.readline().strip()) != b"":
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip()
    assert headers[b"x-request-id"].startswith(b"req_")
    body = json.loads(reader.read(int(headers[b"content-length"])))
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return status, body["error"]


def head(*lines: str) -> bytes:
    return "\r\n".join([f"POST {CHAT} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[1]", None),
        (b"", None),
        (b'{"model":"demo","messages":[{"role":"user","content":"\xff\xfe"}]}', None),
        (b'{"model":"demo","messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}", None),
        (b'{"model":"demo","messages":[]}', "messages"),
        (b'{"model":"demo","messages":[{"role":"wizard","content":"x"}]}', "messages[0].role"),
        (b'{"model":"demo","messages":[{"role":"user","content":"x"}],"max_tokens":0}', "max_tokens"),
        (b'{"model":"demo","messages":[{"role":"user","content":"x"}],"max_tokens":-1}', "max_tokens"),
        (b'{"model":"demo","messages":[{"role":"user","content":"x"}],"temperature":NaN}', None),
        (b'{"model":"demo","messages":[{"role":"user","content":"x"}],"temperature":1e308}', "temperature"),
        (b'{"model":"demo","messages":[{"role":"user","content":"x"}],"temperature":1e999}', "temperature"),
        (b'{"model":"demo","messages":[{"role":"user","content":"x"}],"n":' + b"9" * 5000 + b"}", "n"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_bodies_are_400(stage: Stage, body: bytes, param: str | None, stream: bool) -> None:
    if stream and body.startswith(b'{"model"'):
        body = body[:-1] + b',"stream":true}'
    answer = stage.request("POST", CHAT, body)
    assert (answer.status, answer.error["type"], answer.error["param"]) == (400, "invalid_request_error", param)
    assert "spillway-job" not in answer.headers


def test_an_announced_body_over_the_limit_is_413_before_it_is_sent(stage: Stage) -> None:
    status, error = send(stage, head("Expect: 100-continue", f"Content-Length: {LIMIT + 1}"))
    assert (status, error["code"]) == (413, "request_too_large")
    assert str(LIMIT) in error["message"]


def test_a_client_that_sends_all_of_a_too_large_body_still_reads_413(stage: Stage) -> None:
    answer = stage.request("POST", CHAT, b"x" * (40 * LIMIT))
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")


def test_a_chunked_body_over_the_limit_is_413(stage: Stage) -> None:
    piece = b"%x\r\n%b\r\n" % (50_000, b"x" * 50_000)
    status, error = send(stage, head("Transfer-Encoding: chunked") + piece * 5)
    assert (status, error["code"]) == (413, "request_too_large")


def test_a_chunked_body_under_the_limit_is_read(stage: Stage) -> None:
    body = json.dumps(stage.chat("a b")).encode()
    with stage.connect() as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        for byte in body:
            connection.sendall(b"1\r\n%b\r\n" % bytes([byte]))
        connection.sendall(b"0\r\n\r\n")
        seen = connection.recv(65536)
    assert seen.startswith(b"HTTP/1.1 200")


def closed_requests(stage: Stage) -> int:
    """How many requests ended because their client went, as /metrics counts them."""
    lines = stage.request("GET", "/metrics").body.decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if "requests_total" in line and 'status="499"' in line)


@pytest.mark.parametrize("reset", [False, True])
def test_a_socket_closed_in_mid_body_leaves_no_job(stage: Stage, reset: bool) -> None:
    body = json.dumps(stage.chat("never")).encode()
    before, closed = set(stage.workers[0].requests), closed_requests(stage)
    connection = stage.connect()
    connection.sendall(head(f"Content-Length: {len(body)}") + body[:-1])
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    wait_until(lambda: closed_requests(stage) == closed + 1)
    assert set(stage.workers[0].requests) == before


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd, gzip"])
def test_unknown_content_encodings_are_415(stage: Stage, encoding: str) -> None:
    answer = stage.request("POST", CHAT, b"\x1f\x8b", Content_Encoding=encoding)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_content_encoding")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"])
def test_any_content_type_will_do_for_json(stage: Stage, kind: str) -> None:
    assert stage.request("POST", CHAT, stage.chat("ok"), Content_Type=kind).status == 200


@pytest.mark.parametrize("path", ["/nope", "/v1/nope", "/v1/chat/completions/", "/", "/%00", "/v1/jobs/a%2Fb/c"])
def test_unknown_urls_are_404(stage: Stage, path: str) -> None:
    answer = stage.request("GET", path)
    assert (answer.status, answer.error["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize(("method", "path"), [("GET", CHAT), ("POST", "/v1/models"), ("PUT", "/v1/jobs")])
def test_wrong_methods_are_405(stage: Stage, method: str, path: str) -> None:
    answer = stage.request(method, path)
    assert (answer.status, answer.error["type"]) == (405, "invalid_request_error")
    assert answer.headers["allow"]


def test_what_is_not_http_is_400_and_closed(stage: Stage) -> None:
    with stage.connect() as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 what\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_a_client_request_id_comes_back_and_is_never_a_header_of_its_own(stage: Stage) -> None:
    answer = stage.request("GET", "/livez", X_Client_Request_Id="trace-7")
    assert answer.headers["x-client-request-id"] == "trace-7"
    odd = stage.request("GET", "/livez", X_Client_Request_Id="a b\tc")
    assert "x-client-request-id" not in odd.headers
    assert odd.headers["x-request-id"] != answer.headers["x-request-id"]


@pytest.mark.parametrize("text", ["0", "-1", "x", "99999999999999999999", "1.5"])
def test_bad_limits_are_400(stage: Stage, text: str) -> None:
    for path in ("/v1/jobs", "/v1/models"):
        answer = stage.request("GET", f"{path}?limit={text}")
        assert (answer.status, answer.error["param"]) == (400, "limit")
