"""The Files API through the official openai SDK, and by hand where the SDK cannot misbehave."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai import OpenAI

from scheduler.db.file_bytes import DRAFT
from scheduler.db.files import BATCH_FILE_LIFE_MS, STRAY_AGE_S, FileStore
from scheduler.db.keys import KeyStore
from tests.api_stage import Answer, Stage, running_api_alone, wait_until

MB = 10**6


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_api_alone(tmp_path_factory.mktemp("files"), workers=0) as stage:
        yield stage


@pytest.fixture
def client(stage: Stage) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stage.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        yield client
        for file in client.files.list():
            client.files.delete(file.id)
        assert stored(stage) == []


def stored(stage: Stage) -> list[str]:
    folder = stage.settings.home / "files"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def multipart(*parts: tuple[str, bytes], boundary: str = "b0undary") -> dict[str, Any]:
    """A form of these parts: the text behind `form-data; `, and the content."""
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"
        for head, content in parts
    )
    return {
        "body": body + f"--{boundary}--\r\n".encode(),
        "Content_Type": f"multipart/form-data; boundary={boundary}",
    }


def upload(stage: Stage, *parts: tuple[str, bytes]) -> Answer:
    return stage.request("POST", "/v1/files", **multipart(*parts))


def test_a_file_comes_back_as_it_went(client: OpenAI, stage: Stage) -> None:
    content = bytes(range(256)) * 9000 + b"\r\n--b0undary\r\n"
    made = client.files.create(file=("naïve 日本.bin", content), purpose="user_data")
    assert (made.bytes, made.filename, made.purpose, made.expires_at) == (
        len(content), "naïve 日本.bin", "user_data", None,
    )  # fmt: skip
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content
    assert client.files.wait_for_processing(made.id).status == "processed"
    path = stage.settings.home / "files" / made.id
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(made.id)
    assert caught.value.code == "file_not_found"


def test_lists_page_through_in_both_orders(client: OpenAI) -> None:
    ids = [client.files.create(file=(f"{n}", b"x"), purpose="batch" if n % 2 else "evals").id for n in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == ids
    assert [file.id for file in client.files.list(purpose="batch", limit=1)] == [ids[3], ids[1]]
    page = client.files.list(limit=2)
    assert page.has_more and len(page.data) == 2


def test_files_of_batches_expire_after_30_days_and_others_when_asked(client: OpenAI) -> None:
    batch = client.files.create(file=("b", b"{}"), purpose="batch")
    assert batch.expires_at == batch.created_at + BATCH_FILE_LIFE_MS // 1000
    short = client.files.create(
        file=("s", b"{}"), purpose="assistants", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert short.expires_at == short.created_at + 3600


def test_expired_files_are_gone_before_and_after_they_are_swept(client: OpenAI, stage: Stage) -> None:
    kept = client.files.create(file=("k", b"kept"), purpose="evals")
    short = client.files.create(
        file=("s", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    later_ms = (int(time.time()) + 3601) * 1000
    files: FileStore = stage.services.files
    assert stage.call(files.get(short.id, later_ms)) is None
    assert [file.id for file in stage.call(files.list(None, later_ms))] == [kept.id]
    assert stage.call(files.sweep(later_ms)) == 1
    assert stored(stage) == [kept.id]


def test_a_file_whose_bytes_are_gone_is_not_found(client: OpenAI, stage: Stage) -> None:
    file = client.files.create(file=("a.txt", b"x"), purpose="user_data")
    (stage.settings.home / "files" / file.id).unlink()
    with pytest.raises(openai.NotFoundError, match="not on this server"):
        client.files.content(file.id)


def test_bytes_that_no_row_names_are_swept_when_they_are_old(client: OpenAI, stage: Stage) -> None:
    kept = client.files.create(file=("k", b"kept"), purpose="evals")
    folder = stage.settings.home / "files"
    for name in (f"aa{DRAFT}", "file-lost"):
        (folder / name).write_bytes(b"x")
    now_ms = int(time.time() * 1000)
    assert stage.call(stage.services.files.sweep(now_ms)) == 0
    assert stage.call(stage.services.files.sweep(now_ms + (STRAY_AGE_S + 60) * 1000)) == 2
    assert stored(stage) == [kept.id]


def test_a_tenant_sees_its_own_files_only(tmp_path: Path) -> None:
    with running_api_alone(tmp_path, workers=0) as stage:
        keys = KeyStore(stage.services.database)
        secrets = [stage.call(keys.create(name, tenant=name))[1] for name in ("ours", "theirs")]
        ours, theirs = (OpenAI(base_url=f"{stage.url}/v1", api_key=key, max_retries=0) for key in secrets)
        with ours, theirs:
            file = ours.files.create(file=("a", b"secret"), purpose="batch")
            assert [found.id for found in ours.files.list()] == [file.id] and list(theirs.files.list()) == []
            for act in (theirs.files.retrieve, theirs.files.content, theirs.files.delete):
                with pytest.raises(openai.NotFoundError):
                    act(file.id)
            assert ours.files.content(file.id).read() == b"secret"


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\dir\\a.jsonl", "a.jsonl"),
        ("a\x00\x1b[31mb\u0085.txt", "a[31mb.txt"),
        ("..", "file"),
        ("", "file"),
        ("x" * 400, "x" * 255),
    ],
)
def test_file_names_lose_directories_and_control_characters(
    client: OpenAI, stage: Stage, given: str, clean: str
) -> None:
    parts = (('name="purpose"', b"evals"), (f'name="file"; filename="{given}"', b"x"))
    answer = upload(stage, *parts)
    assert answer.status == 200 and answer.json["filename"] == clean
    answer = stage.request("GET", f"/v1/files/{answer.json['id']}/content")
    assert answer.body == b"x" and answer.headers["content-disposition"].startswith("attachment;")


@pytest.mark.parametrize(
    ("parts", "param", "code"),
    [
        ([('name="file"; filename="a"', b"x")], "purpose", "missing_required_parameter"),
        ([('name="purpose"', b"batch")], "file", "missing_required_parameter"),
        ([('name="purpose"', b"batch_output"), ('name="file"; filename="a"', b"x")], "purpose", "invalid_value"),
        ([('name="purpose"', b"x" * 9000), ('name="file"; filename="a"', b"x")], None, "invalid_form"),
        ([('name="purpose"', b"evals"), ('name="file"', b"x"), ('name="file"', b"y")], "file", "invalid_value"),
        (
            [('name="purpose"', b"evals"), ('name="expires_after[seconds]"', b"3600"), ('name="file"', b"y")],
            "expires_after",
            "invalid_value",
        ),
        ([('filename="a"', b"x")], None, "invalid_form"),
        ([(f'name="f{n}"', b"x") for n in range(40)], None, "invalid_form"),
    ],
)
def test_a_bad_form_is_told_precisely_and_stores_nothing(
    client: OpenAI, stage: Stage, parts: list[tuple[str, bytes]], param: str | None, code: str
) -> None:
    answer = upload(stage, *parts)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, code)
    assert stored(stage) == []


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nhalf'),
        ("multipart/form-data; boundary=x", b"no boundary at all"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=" + "x" * 5000, b"--"),
    ],
)
def test_a_body_that_is_no_whole_form_is_refused(client: OpenAI, stage: Stage, kind: str, body: bytes) -> None:
    answer = stage.request("POST", "/v1/files", body, Content_Type=kind)
    assert (answer.status, answer.error["code"]) == (400, "invalid_form")
    assert stored(stage) == []


def test_limits_of_size_are_kept_and_leave_nothing_behind(tmp_path: Path) -> None:
    with running_api_alone(tmp_path, workers=0, max_file_bytes=3 * MB, max_batch_file_bytes=MB) as stage:
        for purpose, size in ((b"evals", 3 * MB + 1), (b"batch", MB + 1), (b"evals", 9 * MB)):
            answer = upload(stage, ('name="purpose"', purpose), ('name="file"; filename="a"', b"x" * size))
            assert (answer.status, answer.error["code"]) == (413, "request_too_large")
            assert stored(stage) == []
        assert upload(stage, ('name="purpose"', b"batch"), ('name="file"', b"x" * MB)).status == 200


def test_a_full_disk_is_said_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with running_api_alone(tmp_path, workers=0, disk_reserve_bytes=1 << 60) as stage:
        answer = upload(stage, ('name="purpose"', b"batch"), ('name="file"', b"x" * 100))
        assert (answer.status, answer.error["code"]) == (507, "storage_full")
        assert answer.headers["x-should-retry"] == "false"
        assert stored(stage) == []


def test_a_client_that_goes_in_mid_upload_leaves_nothing_behind(client: OpenAI, stage: Stage) -> None:
    form = multipart(('name="purpose"', b"evals"), ('name="file"; filename="a"', b"x" * 3 * MB))
    half = form["body"][: 2 * MB]
    head = f"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {form['Content_Type']}\r\n"
    with socket.create_connection(("127.0.0.1", stage.settings.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(form['body'])}\r\n\r\n".encode() + half)
        wait_until(lambda: stored(stage))
    wait_until(lambda: not stored(stage))


def test_an_upload_takes_bounded_memory(client: OpenAI, stage: Stage) -> None:
    """60 MB through this very process; it may not hold them."""
    before = psutil.Process().memory_info().rss
    connection = http.client.HTTPConnection("127.0.0.1", stage.settings.port, timeout=30)
    form = multipart(('name="purpose"', b"evals"), ('name="file"; filename="big"', b"@"))
    head, _, tail = form["body"].partition(b"@")
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Content-Type", form["Content_Type"])
    connection.putheader("Content-Length", str(len(head) + 60 * MB + len(tail)))
    connection.endheaders(head)
    piece, highest = b"y" * MB, 0
    for _ in range(60):
        connection.send(piece)
        highest = max(highest, psutil.Process().memory_info().rss)
    connection.send(tail)
    assert connection.getresponse().status == 200
    connection.close()
    assert highest - before < 30 * MB
