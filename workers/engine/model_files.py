"""Finds a model's files: the demo's, a directory's, those in the Hugging Face cache, or fetched from the hub.

Called by the engine process before anything is loaded. Whatever cannot be served is a StartupError with one line that
says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from scheduler.errors import StartupError
from scheduler.settings import Settings
from scheduler.telemetry import get_logger
from workers.demo_model import weights_path
from workers.engine.download import download

_log = get_logger(__name__)

DEMO = "demo"
# What mlx_lm itself asks of a repository (utils.DEFAULT_ALLOW_PATTERNS), less the Python files: they are never run.
MODEL_FILES = [
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")

OnProgress = Callable[[str], None]


def resolve(ref: str, settings: Settings, on_progress: OnProgress) -> Path:
    """The directory that holds the files of `ref`, downloaded if need be; raises StartupError."""
    if ref == DEMO:
        return _checked(weights_path(), ref)
    directory = Path(ref).expanduser()
    if directory.is_dir():
        return _checked(directory.absolute(), ref)
    if directory.exists() or ref.startswith(("/", "./", "../", "~")):
        raise StartupError(f"Model {ref!r} is not a directory. Give a directory in Hugging Face layout or a repo id.")
    return _from_hub(ref, settings, on_progress)


def name_of(ref: str, path: Path) -> str:
    """The model id that clients see: `demo`, a directory's own name, or the repo id."""
    if ref == DEMO:
        return DEMO
    return path.name if Path(ref).expanduser().is_dir() else ref


def _from_hub(ref: str, settings: Settings, on_progress: OnProgress) -> Path:
    cached = _cached(ref)
    if cached is not None:
        return cached
    if not settings.allow_download:
        raise StartupError(
            f"Model {ref!r} is neither a directory nor in the Hugging Face cache, and downloads are switched off "
            "(SPILLWAY_ALLOW_DOWNLOAD)."
        )
    return _checked(download(ref, MODEL_FILES, on_progress), ref)


def _cached(ref: str) -> Path | None:
    """The snapshot in the local cache if it is there and whole; asks no server."""
    try:
        path = Path(snapshot_download(ref, local_files_only=True, allow_patterns=MODEL_FILES))
    except HFValidationError as error:
        raise StartupError(
            f"Model {ref!r} is no directory and no Hugging Face repo id. "
            "Give `demo`, a directory in Hugging Face layout or an id like mlx-community/Qwen3-4B-4bit."
        ) from error
    except LocalEntryNotFoundError:
        return None
    missing = _what_is_missing(path)
    if missing is None:
        return path
    _log.info("cached model is not whole", model=ref, missing=missing)
    return None


def _checked(path: Path, ref: str) -> Path:
    missing = _what_is_missing(path)
    if missing is not None:
        raise StartupError(f"Model {ref!r} cannot be served from {path}: {missing}.")
    return path


def _what_is_missing(path: Path) -> str | None:
    """What keeps this directory from being a model in Hugging Face layout, or None."""
    if not (path / "config.json").is_file():
        return "there is no config.json"
    if "model_type" not in read_json(path / "config.json"):
        return "its config.json names no model_type"
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return "there is no tokenizer (tokenizer.json or tokenizer.model)"
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        absent = [shard for shard in shards if not (path / shard).is_file()]
        return f"{len(absent)} of its {len(shards)} weight files are missing, {absent[0]} first" if absent else None
    if not any(path.glob("model*.safetensors")):
        return "there are no weights (model*.safetensors; other formats must be converted with mlx_lm.convert)"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the model; raises StartupError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"Cannot read {path}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise StartupError(f"Cannot read {path}: it holds no JSON object.")
    return value


def one_line(error: BaseException) -> str:
    """What an error says, fit for one line of a log or a terminal."""
    return " ".join(str(error).split())[:400] or type(error).__name__
