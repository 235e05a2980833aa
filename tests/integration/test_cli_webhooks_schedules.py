"""`spillway webhooks` and `spillway schedules` against a running API."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner, Result

from api.cli.app import app
from tests import cli_call
from tests.api_stage import Stage, running_api
from tests.cli_call import Done

HOOK = "http://127.0.0.1:9/hook"


@pytest.fixture(scope="module")
def stage(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    home = tmp_path_factory.mktemp("cli")
    with running_api(redis_url, home, outbound_origins="http://127.0.0.1:9") as running:
        yield running


def spillway(stage: Stage, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--url", stage.url])


def on_terminal(stage: Stage, *words: str) -> Done:
    """Of 80 columns."""
    return cli_call.spillway(stage, *words, columns=80)


def said(stage: Stage, *words: str) -> str:
    result = spillway(stage, *words)
    assert result.exit_code == 0, (result.output, result.exception)
    # The API runs in this very process: its log lines are not the command's.
    return "\n".join(line for line in result.stdout.splitlines() if " [info " not in line).strip()


def test_a_webhook_endpoint_from_add_to_remove(stage: Stage) -> None:
    secret = said(stage, "webhooks", "add", HOOK, "--name", "ci", "--event", "job.failed")
    assert secret.startswith("whsec_")
    (endpoint,) = json.loads(said(stage, "webhooks", "list", "--json"))
    assert (endpoint["url"], endpoint["event_types"]) == (HOOK, ["job.failed"])
    table = said(stage, "webhooks", "list")
    assert endpoint["id"] in table and "enabled" in table and secret not in table
    assert endpoint["id"] in on_terminal(stage, "webhooks", "list").stdout
    assert said(stage, "webhooks", "rotate", endpoint["id"], "--drop-old") != secret
    assert said(stage, "webhooks", "deliveries", endpoint["id"]) == "No deliveries."
    assert spillway(stage, "webhooks", "add", "http://example.com/").exception is not None
    assert endpoint["id"] in said(stage, "webhooks", "remove", endpoint["id"])
    assert said(stage, "webhooks", "list") == "No webhook endpoints yet."


def test_a_schedule_from_add_to_remove(stage: Stage) -> None:
    schedule = said(stage, "schedules", "add", "0 3 * * *", "Good night", "--timezone", "Europe/Berlin")
    (listed,) = json.loads(said(stage, "schedules", "list", "--json"))
    assert (listed["id"], listed["body"]["messages"][0]["content"]) == (schedule, "Good night")
    assert said(stage, "schedules", "pause", schedule) == f"Paused {schedule}."
    assert "paused" in said(stage, "schedules", "list")
    resumed = said(stage, "schedules", "resume", schedule)
    assert resumed.endswith(" 03:00 Europe/Berlin.") and f"{schedule} runs next at" in resumed
    assert schedule in on_terminal(stage, "schedules", "list").stdout
    assert said(stage, "schedules", "run", schedule).startswith("job-")
    assert said(stage, "schedules", "remove", schedule) == f"Removed {schedule}."
    assert said(stage, "schedules", "list") == "No schedules yet."
    assert spillway(stage, "schedules", "add", "never", "x").exception is not None
    assert spillway(stage, "schedules", "add", "@daily").exception is not None
