"""Probes, metrics, the workers list, and how the server stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.api_stage import Stage, running_api, running_api_alone, running_redis, wait_until
from tests.integration.test_api_chat import open_stream
from tests.service import free_port

CHAT = "/v1/chat/completions"
CLIENT_WAITS_S = 7.0  # less than a worker waits for Redis


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with running_api_alone(tmp_path_factory.mktemp("health")) as stage:
        yield stage


def test_ready_with_redis_sql_and_a_model(stage: Stage) -> None:
    assert stage.request("GET", "/livez").json == {"status": "ok"}
    answer = stage.request("GET", "/readyz")
    assert (answer.status, answer.json["missing"]) == (200, [])


def test_not_ready_names_what_is_missing(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("missing")
    with running_redis(folder / "redis") as url, running_api(url, folder / "home", workers=0) as stage:
        answer = stage.request("GET", "/readyz")
        assert (answer.status, answer.json["missing"]) == (503, ["models"])
        for stream in (False, True):
            refused = stage.request("POST", CHAT, stage.chat("hi", stream=stream))
            assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "no_model_yet", "2")
        (stage.settings.home / "spillway.db").unlink()
        (stage.settings.home / "spillway.db").mkdir()
        stage.call(stage.services.database.engine.dispose())
        assert stage.request("GET", "/readyz").json["missing"] == ["database", "models"]
        assert stage.request("GET", "/livez").status == 200
        wait_until(lambda: stage.request("GET", "/v1/models").status == 503)  # are there keys? it cannot tell
        assert stage.request("GET", "/v1/models").headers["retry-after"] == "1"


def test_without_redis_requests_fail_at_once_and_the_probe_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("no-redis")
    with running_redis(folder / "redis") as url, running_api(url, folder / "home", workers=0) as stage:
        pid = stage.call(redis_pid(stage))
        os.kill(pid, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor() as clients:
                probing = clients.submit(stage.request, "GET", "/readyz")
                asking = [
                    clients.submit(stage.request_within, CLIENT_WAITS_S, "GET", "/v1/models"),
                    clients.submit(stage.request_within, CLIENT_WAITS_S, "POST", CHAT, stage.chat("hi")),
                    clients.submit(stage.request_within, CLIENT_WAITS_S, "POST", CHAT, stage.chat("hi", stream=True)),
                ]
            probe, answers = probing.result(), [asked.result() for asked in asking]
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (probe.status, "redis" in probe.json["missing"]) == (503, True)
        assert {(answer.status, answer.error["code"]) for answer in answers} == {(503, "queue_unavailable")}
        assert all(answer.headers["retry-after"] == "1" for answer in answers)


def test_workers_are_listed(stage: Stage) -> None:
    (worker,) = stage.request("GET", "/admin/workers").json["data"]
    assert (worker["id"], worker["pid"], worker["engine_pid"], worker["host"]) == ("scripted-0", 1, 2, "here")
    assert (worker["kind"], worker["models"], worker["busy_rows"]) == ("local", ["demo"], 1)
    assert worker["age_s"] >= 5


def test_metrics_count_requests_tokens_queue_and_engines(stage: Stage) -> None:
    def metrics() -> dict[str, float]:
        lines = stage.request("GET", "/metrics").body.decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    assert stage.request("POST", CHAT, stage.chat("a b c")).status == 200
    answered = 'spillway_http_requests_total{method="POST",route="/v1/chat/completions",status="200"}'
    wait_until(lambda: metrics().get(answered, 0) >= 1)
    found = metrics()
    assert found['spillway_tokens_total{kind="completion",model="demo"}'] >= 3
    assert found['spillway_time_to_first_token_seconds_count{model="demo"}'] >= 1
    assert found['spillway_time_per_output_token_seconds_count{model="demo"}'] >= 1
    assert found['spillway_worker_busy_rows{kind="local",worker="scripted-0"}'] == 1
    assert found['spillway_queue_age_seconds{pool="demo",priority="batch"}'] == 0
    assert found['spillway_model_info{compiled="1",dtype="",groups="",lane="slots",model="demo",model_type=""}'] == 1


def test_metrics_tell_what_engines_report(stage: Stage) -> None:
    lines = stage.request("GET", "/metrics").body.decode().splitlines()
    assert "# TYPE spillway_engine_steps_total counter" in lines or "# TYPE spillway_engine_steps counter" in lines
    who = 'model="demo"', 'worker="scripted-0"'

    def value(name: str, *labels: str) -> float:
        series = f"spillway_engine{name}{{{','.join(sorted((*who, *labels)))}}} "
        return float(next(line for line in lines if line.startswith(series)).removeprefix(series))

    assert (value("_steps_total"), value("_decode_tokens_total")) == (3, 7)
    assert value("_jobs_total", 'outcome="failed"') == 1
    assert value("_waiting_age_seconds", 'priority="low"') == 2.5
    assert [value("_prefix_hit_pages_total", f'tier="{tier}"') for tier in ("ram", "disk")] == [4, 2]
    assert [value("_inter_token_seconds_bucket", f'le="{le}"') for le in ("0.01", "0.1", "+Inf")] == [5, 6, 8]
    assert (value("_inter_token_seconds_count"), value("_inter_token_seconds_sum")) == (8, 3.5)
    assert value("", 'stat="shoes"') == 9


def test_metrics_labels_do_not_grow_with_what_clients_send(stage: Stage) -> None:
    for number in range(30):
        stage.request("GET", f"/nope/{number}")
        stage.request("GET", f"/v1/jobs/job-0-{number}")
        stage.request("POST", CHAT, stage.chat("x", model=f"made-up-{number}"))
        stage.request(f"M{number}", "/v1/models")
    wait_until(lambda: b"other" in stage.request("GET", "/metrics").body)
    text = stage.request("GET", "/metrics").body.decode()
    assert "nope" not in text and "made-up" not in text and "M7" not in text


def test_models_have_both_sdks_shapes_and_page(stage: Stage) -> None:
    page = stage.request("GET", "/v1/models").json
    assert [model["id"] for model in page["data"]] == ["demo", "org/other-model"]
    assert (page["object"], page["has_more"], page["first_id"], page["last_id"]) == (
        "list",
        False,
        "demo",
        "org/other-model",
    )
    model = page["data"][1]
    assert (model["object"], model["type"], model["context_length"]) == ("model", "model", 4096)
    first = stage.request("GET", "/v1/models?limit=1").json
    assert ([model["id"] for model in first["data"]], first["has_more"]) == (["demo"], True)
    second = stage.request("GET", "/v1/models?limit=1&after_id=demo").json
    assert ([model["id"] for model in second["data"]], second["has_more"]) == (["org/other-model"], False)
    assert stage.request("GET", "/v1/models/org/other-model").json == model
    assert stage.request("GET", "/v1/models/default").json["id"] == "demo"
    assert stage.request("GET", "/v1/models/org/none").error["code"] == "model_not_found"


def test_a_drain_lets_streams_finish(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("drain")
    with running_api_alone(folder, drain_s=20) as stage:
        script = {"say": [f"w{number} " for number in range(30)], "pause_s": 0.02}
        connection, seen, _ = open_stream(stage, stage.chat(script, stream=True), until=b"w1 ")
        stage.stop()
        while piece := connection.recv(65536):
            seen += piece
        connection.close()
        assert b"w29 " in seen and b"data: [DONE]" in seen


def test_a_stream_that_outlives_the_drain_ends_with_an_error_and_its_job_is_cancelled(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("overdue")
    with (
        running_redis(folder / "redis") as url,
        running_api(url, folder / "other") as other,  # its worker outlives the API that stops
        running_api(url, folder / "home", workers=0, shard=other.settings.shard, drain_s=0.3) as stage,
    ):
        body = stage.chat({"say": ["a "], "hold": True}, stream=True)
        connection, seen, job_id = open_stream(stage, body, until=b"a ")
        stage.stop()
        while piece := connection.recv(65536):
            seen += piece
        connection.close()
        assert b'"code":"shutting_down"' in seen and b"[DONE]" not in seen
        wait_until(lambda: other.cancelled(job_id))


def test_sigterm_ends_the_process_cleanly_after_its_streams(tmp_path: Path) -> None:
    with running_redis(tmp_path / "redis") as url, running_api(url, tmp_path / "home") as helper:
        settings = helper.settings.model_copy(update={"home": tmp_path / "other", "port": free_port(), "drain_s": 20})
        code = "from api.main import serve; from scheduler.settings import Settings; serve(Settings())"
        environment = {**os.environ, **settings.as_environment(), "SPILLWAY_LOG_FORMAT": "json"}
        del environment["SPILLWAY_PARENT_PIPE"]
        with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) as process:
            process_stage = replace(helper, settings=settings)
            wait_until(lambda: answers(process_stage), within_s=60)
            script = {"say": [f"w{number} " for number in range(25)], "pause_s": 0.02}
            connection, seen, _ = open_stream(process_stage, helper.chat(script, stream=True), until=b"w1 ")
            process.send_signal(signal.SIGTERM)
            while piece := connection.recv(65536):
                seen += piece
            connection.close()
            assert process.wait(timeout=30) == 0
            assert process.stderr is not None
            log = process.stderr.read().decode()
    assert b"w24 " in seen and b"data: [DONE]" in seen
    lines = [json.loads(line) for line in log.splitlines()]
    assert any(line["event"] == "request" and line.get("job", "").startswith("job-") for line in lines)
    assert not [line for line in lines if line["level"] in ("warning", "error", "critical")]


async def redis_pid(stage: Stage) -> int:
    return int((await stage.services.redis.info("server"))["process_id"])


def answers(stage: Stage) -> bool:
    try:
        return stage.request("GET", "/readyz").status == 200
    except OSError:
        return False
