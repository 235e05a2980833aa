"""A model reference becomes files and a loaded model, or one line that says why not. The hub is a real local server."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from scheduler.errors import StartupError
from scheduler.settings import Settings
from tests.tiny_model import write_tiny_model
from workers.engine.loader import load
from workers.engine.model_files import resolve

COMMIT = "1234567890" * 4
REPO = "somebody/tiny"


def _silent(_: str) -> None:
    pass


def _resolve(ref: str, **settings: Any) -> Path:
    return resolve(ref, Settings(**settings), _silent)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", context_tokens=96)


def test_a_directory_is_served_under_its_own_name(tiny: Path) -> None:
    model = load(_resolve(str(tiny)), str(tiny))
    assert (model.name, model.context_tokens, model.dtype) == ("tiny-llama", 96, mx.float32)
    assert model.eos_ids == {1, 2}
    logits = model.model(mx.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, model.vocab_size)


def test_a_trailing_slash_or_a_relative_path_is_the_same_directory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    assert _resolve("tiny-llama/") == tiny
    assert load(tiny, "./tiny-llama").name == "tiny-llama"


@pytest.mark.parametrize(
    ("remove", "reason"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no weights"),
    ],
)
def test_an_incomplete_directory_names_what_is_missing(tmp_path: Path, remove: str, reason: str) -> None:
    path = write_tiny_model(tmp_path / "tiny")
    (path / remove).unlink()
    with pytest.raises(StartupError, match=reason):
        _resolve(str(path))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(StartupError, match="1 of its 2 weight files are missing, model-00001"):
        _resolve(str(path))


@pytest.mark.parametrize("ref", ["/nowhere/at/all", "./nowhere", "not a repo id!", "a/b/c"])
def test_a_reference_that_can_be_nothing_is_one_clear_line(ref: str) -> None:
    with pytest.raises(StartupError) as caught:
        _resolve(ref)
    assert repr(ref) in caught.value.message and "\n" not in caught.value.message


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny")
    config = json.loads((path / "config.json").read_text())
    proof = tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(proof)!r}, 'w')")
    (path / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    with pytest.raises(StartupError, match="does not run such code"):
        load(path, str(path))
    assert not proof.exists()


def test_weights_that_do_not_fit_the_configuration_are_one_clear_line(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(StartupError, match="cannot be loaded"):
        load(path, str(path))
    (path / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(StartupError, match="unheard_of"):
        load(path, str(path))


@dataclass
class Hub:
    """A model hub on loopback that knows one repository."""

    files: dict[str, bytes]
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path, _, _ = path.partition("?")
        if path.startswith("/api/models/somebody/gated/"):
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if path == f"/api/models/{REPO}/revision/main" or path == f"/api/models/{REPO}":
            siblings = [{"rfilename": name} for name in self.files]
            return 200, {}, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
        if path == f"/api/models/{REPO}/tree/{COMMIT}":
            return 200, {}, json.dumps([self._entry(name) for name in self.files]).encode()
        prefix = f"/{REPO}/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if path.startswith(prefix) and name in self.files:
            return 200, {"ETag": f'"{self._oid(name)}"', "X-Repo-Commit": COMMIT}, self.files[name]
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": self._oid(name)}

    def _oid(self, name: str) -> str:
        return hashlib.sha1(self.files[name]).hexdigest()


@contextmanager
def _serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


_SCRIPT = """
import json, sys
from scheduler.errors import StartupError
from scheduler.settings import Settings
from workers.engine.model_files import name_of, resolve
for ref in sys.argv[1:]:
    said = []
    try:
        path = resolve(ref, Settings(), said.append)
        print(json.dumps({"path": str(path), "said": said, "name": name_of(ref, path)}))
    except StartupError as error:
        print(json.dumps({"error": error.message, "said": said}))
"""


def _resolve_in_a_process(cache: Path, endpoint: str, *refs: str, **environment: str) -> list[dict[str, Any]]:
    """huggingface_hub reads its environment on import: so each case is a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SPILLWAY_"))}
    settings = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *refs], env={**clean, **settings}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_repository_is_downloaded_once_and_then_works_without_the_hub(tiny: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    surplus = {"pytorch_model.bin": b"x" * 1000, "evil.py": b"raise SystemExit", "README.md": b"# tiny"}
    with _serving(Hub({**files, **surplus})) as hub:
        first, second = _resolve_in_a_process(tmp_path, hub.url, REPO, REPO)
        asked = list(hub.requests)
    assert first["name"] == second["name"] == REPO
    assert any("Downloading" in line and "MB" in line for line in first["said"])
    assert second["said"] == []
    assert {path.name for path in Path(first["path"]).iterdir()} == set(files)
    assert sum("GET" in line and "/model.safetensors" in line for line in asked) == 1
    assert not any(name in line for name in surplus for line in asked)

    (offline,) = _resolve_in_a_process(tmp_path, hub.url, REPO)
    assert offline["name"] == REPO and offline["said"] == []


def test_a_download_cut_short_is_taken_up_again(tiny: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    with _serving(Hub(files)) as hub:
        (first,) = _resolve_in_a_process(tmp_path, hub.url, REPO)
        (Path(first["path"]) / "model.safetensors").unlink()
        (again,) = _resolve_in_a_process(tmp_path, hub.url, REPO)
    assert again["name"] == REPO


def test_what_the_hub_refuses_is_said_in_one_line(tmp_path: Path) -> None:
    with _serving(Hub({})) as hub:
        missing, gated = _resolve_in_a_process(tmp_path, hub.url, "somebody/else", "somebody/gated")
    assert "'somebody/else' is no directory here and no repository at http://127.0.0.1" in missing["error"]
    assert "gated" in gated["error"] and "HF_TOKEN" in gated["error"]


def test_an_unreachable_hub_is_said_in_one_line(tmp_path: Path) -> None:
    (outcome,) = _resolve_in_a_process(tmp_path, "http://127.0.0.1:9", REPO)
    assert f"'{REPO}' is not in the Hugging Face cache, and http://127.0.0.1:9 cannot be reached" in outcome["error"]


def test_offline_mode_and_switched_off_downloads_ask_nobody(tmp_path: Path) -> None:
    with _serving(Hub({})) as hub:
        (offline,) = _resolve_in_a_process(tmp_path, hub.url, REPO, HF_HUB_OFFLINE="1")
        (forbidden,) = _resolve_in_a_process(tmp_path, hub.url, REPO, SPILLWAY_ALLOW_DOWNLOAD="false")
        assert hub.requests == []
    assert "HF_HUB_OFFLINE is set" in offline["error"]
    assert "SPILLWAY_ALLOW_DOWNLOAD" in forbidden["error"]
