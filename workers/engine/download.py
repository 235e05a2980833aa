"""Fetches a model repository from the Hugging Face hub, reporting progress, and explains what went wrong.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN are huggingface_hub's own and are honoured by it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from tqdm.auto import tqdm

from scheduler.errors import StartupError

_REPORT_EVERY_S = 1.0


def download(repo_id: str, patterns: list[str], on_progress: Callable[[str], None]) -> Path:
    """Download the files of `repo_id` into the Hugging Face cache; raises StartupError with one line."""
    on_progress(f"Looking up {repo_id} at {constants.ENDPOINT}")
    try:
        path = snapshot_download(repo_id, allow_patterns=patterns, tqdm_class=_progress_class(repo_id, on_progress))
    except GatedRepoError as error:
        raise StartupError(
            f"Model {repo_id!r} is gated: accept its terms at {constants.ENDPOINT}/{repo_id} and set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise StartupError(
            f"Model {repo_id!r} is no directory here and no repository at {constants.ENDPOINT} (or it is private: "
            "then set HF_TOKEN)."
        ) from error
    except LocalEntryNotFoundError as error:
        raise StartupError(_unreachable(repo_id, error)) from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
        raise StartupError(f"The download of {repo_id!r} failed: {_one_line(error)}") from error
    return Path(path)


def _unreachable(repo_id: str, error: LocalEntryNotFoundError) -> str:
    if constants.HF_HUB_OFFLINE:
        return f"Model {repo_id!r} is not in the Hugging Face cache, and HF_HUB_OFFLINE is set."
    reason = _one_line(error.__cause__ if error.__cause__ is not None else error)
    return f"Model {repo_id!r} is not in the Hugging Face cache, and {constants.ENDPOINT} cannot be reached: {reason}"


def _progress_class(repo_id: str, on_progress: Callable[[str], None]) -> type[tqdm]:
    """A progress bar that draws nothing and reports the bytes written, at most once a second."""
    throttle = _Throttle(on_progress)

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": True})
            self.n, self.total = options.get("initial", 0), options.get("total")
            # A second bar counts what comes over the wire; its total is a guess.
            self._reports = options.get("unit") == "B" and not str(options.get("desc")).startswith("Downloading")

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            if self._reports and self.total:
                throttle(f"Downloading {repo_id}: {self.n / 1e6:,.1f} of {self.total / 1e6:,.1f} MB")
            return None

    return Bar


class _Throttle:
    """Passes on one message a second at most; called from huggingface_hub's download threads."""

    def __init__(self, on_progress: Callable[[str], None]) -> None:
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._next_s = 0.0

    def __call__(self, message: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._next_s:
                return
            self._next_s = now + _REPORT_EVERY_S
        self._on_progress(message)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
