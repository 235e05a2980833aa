"""The files that install and start Spillway say the same as the program: locks, Makefile, compose, Procfile, image."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from api.cli.app import app
from scheduler.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
OURS = {name: service for name, service in COMPOSE["services"].items() if "build" in service}
LOCKS = ("requirements.lock", "requirements-dev.lock")
SETTINGS = {f"SPILLWAY_{name.upper()}" for name in Settings.model_fields}


def accepts(command: list[str]) -> bool:
    """Whether the CLI has this command with these options."""
    words = [word for word in command if not word.startswith("-")]
    options = {word for word in command if word.startswith("-")}
    result = CliRunner().invoke(app, [*_command_path(words), "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code == 0 and all(option in result.output for option in options)


def _command_path(words: list[str]) -> list[str]:
    return words[:2] if words[0] in {"worker", "keys"} else words[:1]


def pinned(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_hashes_and_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "://" not in text and "--index" not in text and "pypi" not in text.lower()
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert entries and all("--hash=sha256:" in entry for entry in entries)


def test_the_lock_covers_every_dependency_and_the_test_lock_agrees_with_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime, development = pinned(LOCKS[0]), pinned(LOCKS[1])

    def names(requirements: list[str]) -> set[str]:
        return {re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower() for requirement in requirements}  # type: ignore[index]

    assert names(project["project"]["dependencies"]) <= set(runtime)
    assert names(project["dependency-groups"]["dev"]) <= set(development)
    assert runtime.items() <= development.items()
    build = names(project["build-system"]["requires"])
    assert build <= set(runtime), "the project is installed without fetching build parts"


@pytest.mark.parametrize("service", OURS)
def test_compose_runs_commands_that_exist(service: str) -> None:
    command: list[str] = OURS[service]["command"]
    parts = " ".join(command[2:]).split(" && ") if command[:2] == ["sh", "-c"] else [shlex.join(command)]
    for part in parts:
        program, *arguments = shlex.split(part)
        assert program == "spillway" and accepts(arguments), part


def test_compose_sets_known_variables_and_waits_for_known_services() -> None:
    for name, service in OURS.items():
        assert set(service["environment"]) <= SETTINGS, name
        for other, condition in service["depends_on"].items():
            needs_check = condition["condition"] == "service_healthy"
            assert other in COMPOSE["services"] and (not needs_check or "healthcheck" in COMPOSE["services"][other])
    mounted = {
        volume.split(":")[0] for service in COMPOSE["services"].values() for volume in service.get("volumes", [])
    }
    assert mounted == set(COMPOSE["volumes"])


def test_compose_publishes_on_loopback_and_makes_a_key_before_the_api_listens() -> None:
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published == ["${SPILLWAY_PUBLISH:-127.0.0.1:8000}:8000"]
    assert OURS["api"]["environment"]["SPILLWAY_HOST"] == "0.0.0.0"
    assert OURS["api"]["depends_on"]["init"]["condition"] == "service_completed_successfully"
    assert "keys create --if-none" in OURS["init"]["command"][-1]


def test_redis_keeps_what_it_accepted_in_compose_and_procfile() -> None:
    lines = [" ".join(COMPOSE["services"]["redis"]["command"]), procfile()["redis"]]
    for line in lines:
        for option in ("--appendonly yes", "--appendfsync everysec", "--maxmemory-policy noeviction"):
            assert option in line


def procfile() -> dict[str, str]:
    lines = (ROOT / "Procfile").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines)


def test_the_procfile_runs_commands_that_exist() -> None:
    processes = procfile()
    assert list(processes) == ["redis", "api", "scheduler", "worker"]
    for name in ("api", "scheduler", "worker"):
        arguments = processes[name].partition(".venv/bin/spillway ")[2].split()
        assert arguments and accepts(arguments), name
        assert set(re.findall(r"SPILLWAY_[A-Z_]+", processes[name])) <= SETTINGS


def test_image_and_makefile_install_with_the_same_uv() -> None:
    makefile = re.search(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    image = re.search(r"uv==(\S+)", (ROOT / "Dockerfile").read_text())
    assert makefile is not None and image is not None and makefile[1] == image[1]
