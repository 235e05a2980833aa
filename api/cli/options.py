"""The options that several commands share, and how they become settings: an option beats the environment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scheduler.settings import Settings, load_settings

if TYPE_CHECKING:
    from api.cli.api_client import ApiClient

Home = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where state lives. (default: $SPILLWAY_HOME or ~/.spillway)", show_default=False),
]
Port = Annotated[int | None, typer.Option(min=1, max=65535, metavar="PORT", help="Port of the API. (default: 8000)")]
Host = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Address that the API listens on. (default: 127.0.0.1)")
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"] | None,
    typer.Option(metavar="LEVEL", help="debug, info, warning or error: how much is logged. (default: info)"),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="REF",
        help="demo, a directory, or a Hugging Face repo id; repeat for more, the first is `default`.",
        show_default=False,
    ),
]
Model = Annotated[str, typer.Option(metavar="NAME", help="A name that `spillway models` shows.")]
Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Where Spillway answers. (default: the one running on this home)", show_default=False
    ),
]
ApiKey = Annotated[
    str | None, typer.Option(metavar="KEY", help="A key, where one is needed. (default: $SPILLWAY_API_KEY)")
]
PriorityName = Annotated[
    Literal["high", "normal", "low", "batch"] | None, typer.Option(metavar="CLASS", help="high, normal, low or batch.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def settings_with(**options: str | int | Path | None) -> Settings:
    """The settings of this process; an option that was not given leaves the environment's value."""
    return load_settings(**{name: value for name, value in options.items() if value is not None})


@contextlib.contextmanager
def connected(url: str | None, api_key: str | None, home: Path | None) -> Iterator[ApiClient]:
    """The running service that these options name."""
    from api.cli.api_client import ApiClient

    client = ApiClient(settings_with(url=url, api_key=api_key, home=home))
    try:
        yield client
    finally:
        client.close()
