"""/v1/webhook_endpoints through OpenAI's SDK and by hand; with a real control plane where something is delivered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from scheduler.db.session import Database
from scheduler.loops.control_plane import ControlPlane
from scheduler.loops.webhook_jobs import webhook_jobs
from scheduler.settings import Settings
from tests.api_stage import Answer, Stage, running_api, wait_until
from tests.http_receiver import Receiver, receiving, status


@pytest.fixture(scope="module")
def stage(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with receiver_thread() as receiver:
        home = tmp_path_factory.mktemp("webhooks")
        with (
            running_api(redis_url, home, workers=0, outbound_origins=receiver.origin) as running,
            control_plane(running.settings),
        ):
            RECEIVERS[running.settings.port] = receiver
            yield running


RECEIVERS: dict[int, Receiver] = {}


@contextmanager
def receiver_thread() -> Iterator[Receiver]:
    """A receiver on a loop of its own."""
    ready: list[Receiver] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with receiving() as receiver:
            ready.append(receiver)
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    wait_until(lambda: ready)
    yield ready[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


@contextmanager
def control_plane(settings: Settings) -> Iterator[None]:
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def run() -> None:
        database = Database(settings)
        control = ControlPlane(settings)
        async with webhook_jobs(control, settings, database):
            task = asyncio.create_task(control.run())
            await stop.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await database.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    yield
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)
    loop.close()


def receiver_of(stage: Stage) -> Receiver:
    return RECEIVERS[stage.settings.port]


def create(stage: Stage, **fields: Any) -> Answer:
    body = {"url": receiver_of(stage).url, "name": "ci"} | fields
    return stage.request("POST", "/v1/webhook_endpoints", body)


def test_openais_sdk_registers_changes_tests_and_removes_an_endpoint(stage: Stage) -> None:
    client = openai.OpenAI(api_key="none", base_url=f"{stage.url}/v1", max_retries=0)
    made = client.webhooks.create(event_types=["batch.completed"], name="mine", url=receiver_of(stage).url)
    assert made.signing_secret.startswith("whsec_")
    changed = client.webhooks.update(made.id, name="ours", event_types=["batch.failed"])
    assert (changed.name, changed.event_types, changed.url) == ("ours", ["batch.failed"], made.url)
    assert client.webhooks.retrieve(made.id).name == "ours"
    assert made.id in [endpoint.id for endpoint in client.webhooks.list().data]
    tested = client.webhooks.test(made.id, event_type="batch.completed")
    assert (tested.status_code, tested.success) == (200, True)
    request = receiver_of(stage).received[-1]
    event = client.webhooks.unwrap(request.body, request.headers, secret=made.signing_secret)
    assert (event.type, event.id) == ("batch.completed", request.headers["webhook-id"])
    rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=False)
    assert rotated.signing_secret != made.signing_secret
    assert client.webhooks.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)


def test_the_secret_is_shown_once(stage: Stage) -> None:
    made = create(stage).json
    shown = stage.request("GET", f"/v1/webhook_endpoints/{made['id']}")
    assert "secret" not in shown.body.decode()
    assert shown.json == {name: value for name, value in made.items() if name != "signing_secret"}


def test_a_test_tells_what_the_receiver_answered_and_a_dead_delivery_can_be_tried_again(stage: Stage) -> None:
    made = create(stage, event_types=["job.failed"]).json
    path = f"/v1/webhook_endpoints/{made['id']}"
    receiver_of(stage).script[:] = [status(410), status(200)]
    answer = stage.request("POST", f"{path}/test").json
    assert (answer["status_code"], answer["success"]) == (410, False)
    assert stage.request("GET", path).json["disabled_reason"] == "the receiver answered 410 Gone"
    conflict = stage.request("POST", f"{path}/test")
    assert (conflict.status, conflict.error["code"]) == (409, "webhook_conflict")
    (dead,) = stage.request("GET", f"{path}/deliveries?status=dead").json["data"]
    assert (dead["last_status"], dead["type"], dead["event"]["id"]) == (410, "webhook.test", dead["event_id"])
    assert stage.request("POST", path, {"enabled": True}).json["enabled"] is True
    assert stage.request("POST", f"/v1/webhook_deliveries/{dead['id']}/retry").status == 200
    wait_until(lambda: stage.request("GET", f"{path}/deliveries?status=delivered").json["data"])
    again = stage.request("POST", f"/v1/webhook_deliveries/{dead['id']}/retry")
    assert (again.status, again.error["code"]) == (409, "webhook_conflict")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"url": "http://example.com/"}, "url", "not https"),
        ({"url": "https://127.0.0.1/"}, "url", "public address"),
        ({"url": "https://169.254.169.254/latest"}, "url", "public address"),
        ({"url": "https://ann:pw@example.com/"}, "url", "password"),
        ({"url": "nonsense"}, "url", "absolute"),
        ({"url": 5}, "url", "string"),
        ({"event_types": ["job.exploded"]}, "event_types", "job.exploded"),
        ({"name": "x" * 129}, "name", "too long"),
        ({"evnt_types": []}, "evnt_types", "event_types"),
    ],
)
def test_bad_endpoints_are_refused_by_name(stage: Stage, fields: dict[str, Any], param: str, said: str) -> None:
    refused = create(stage, **fields)
    assert (refused.status, refused.error["param"]) == (400, param)
    assert said in refused.error["message"]


def test_an_unknown_endpoint_or_delivery_is_404(stage: Stage) -> None:
    for method, path in [
        ("GET", "/v1/webhook_endpoints/whe_none"),
        ("POST", "/v1/webhook_endpoints/whe_none"),
        ("DELETE", "/v1/webhook_endpoints/whe_none"),
        ("POST", "/v1/webhook_endpoints/whe_none/test"),
        ("POST", "/v1/webhook_endpoints/whe_none/rotate_secret"),
        ("GET", "/v1/webhook_endpoints/whe_none/deliveries"),
        ("POST", "/v1/webhook_deliveries/whd_none/retry"),
    ]:
        answer = stage.request(method, path, None if method == "GET" else {})
        assert (answer.status, answer.error["code"]) == (404, "webhook_not_found")


def test_a_key_sees_the_endpoints_of_its_tenant_only(redis_url: str, tmp_path: Path) -> None:
    from scheduler.db.keys import KeyStore

    with running_api(redis_url, tmp_path, workers=0, outbound_origins="http://127.0.0.1:9") as stage:
        keys = KeyStore(stage.services.database)
        ann, bob = (f"Bearer {stage.call(keys.create(name, name))[1]}" for name in ("ann", "bob"))
        made = stage.request(
            "POST", "/v1/webhook_endpoints", {"url": "http://127.0.0.1:9/hook"}, authorization=ann
        ).json
        path = f"/v1/webhook_endpoints/{made['id']}"
        assert stage.request("GET", path, authorization=ann).status == 200
        assert stage.request("GET", path, authorization=bob).status == 404
        assert stage.request("DELETE", path, authorization=bob).status == 404
        assert stage.request("GET", "/v1/webhook_endpoints", authorization=bob).json["data"] == []
