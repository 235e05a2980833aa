"""Every command of `spillway` with its options. Bodies import what they need, so that `--help` answers at once."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from api.cli import batch, dead, files, jobs, keys, queues, schedules, webhooks
from api.cli.options import ApiKey, Home, Host, Json, LogLevel, Model, Models, Port, Url, settings_with

app = typer.Typer(
    name="spillway",
    help="Serve models on your own machine; every request is a durable job.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
worker = typer.Typer(help="One worker process; it joins the others through Redis.", no_args_is_help=True)
app.add_typer(worker, name="worker", rich_help_panel="Single processes")
app.add_typer(keys.app, name="keys", rich_help_panel="Look after it")
app.add_typer(jobs.app, name="jobs", rich_help_panel="Talk to it")
app.add_typer(queues.app, name="queues", rich_help_panel="Look after it")
app.add_typer(dead.app, name="dead", rich_help_panel="Look after it")
app.add_typer(batch.app, name="batch", rich_help_panel="Talk to it")
app.add_typer(files.app, name="files", rich_help_panel="Talk to it")
app.add_typer(schedules.app, name="schedules", rich_help_panel="Talk to it")
app.add_typer(webhooks.app, name="webhooks", rich_help_panel="Talk to it")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spillway {version('spillway')}")
        raise typer.Exit


@app.callback()
def spillway(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Serve models on your own machine; every request is a durable job."""


@app.command(rich_help_panel="Run it")
def up(
    port: Port = None,
    host: Host = None,
    home: Home = None,
    model: Models = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=64, metavar="N", help="Worker processes. (default: 1)")
    ] = None,
    log_level: LogLevel = None,
) -> None:
    """Start everything on this machine; Ctrl-C stops it."""
    from api.cli.up import run_up

    models = ",".join(model) if model else None
    run_up(settings_with(port=port, host=host, home=home, models=models, workers=workers, log_level=log_level))


@app.command(rich_help_panel="Run it")
def status(home: Home = None, as_json: Json = False) -> None:
    """What runs on this machine, and how it does. Exit status 3: nothing runs."""
    from api.cli.running import show_status

    raise typer.Exit(show_status(settings_with(home=home), as_json=as_json))


@app.command(rich_help_panel="Run it")
def stop(home: Home = None) -> None:
    """Stop what `spillway up` started, and wait until it has ended."""
    from api.cli.running import stop_running

    stop_running(settings_with(home=home))


@app.command(rich_help_panel="Talk to it")
def chat(
    model: Model = "default",
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="The longest answer.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Chat in the terminal; with piped input, answer once."""
    from api.cli.chat import run_chat

    run_chat(settings_with(url=url, api_key=api_key, home=home), model, system, max_tokens)


@app.command(rich_help_panel="Talk to it")
def models(url: Url = None, api_key: ApiKey = None, home: Home = None, as_json: Json = False) -> None:
    """The models that are served; the first one is `default`."""
    from api.cli.models import show_models

    show_models(settings_with(url=url, api_key=api_key, home=home), as_json=as_json)


@app.command(rich_help_panel="Look after it")
def doctor(home: Home = None, as_json: Json = False) -> None:
    """What is installed, found and reachable, and how to mend what is not. Exit status 1: something is broken."""
    from api.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(settings_with(home=home), as_json=as_json))


@app.command(rich_help_panel="Look after it")
def migrate(home: Home = None) -> None:
    """Bring the database to this version; `up` does it by itself."""
    from api.cli.processes import run_migrate

    run_migrate(settings_with(home=home))


@app.command(rich_help_panel="Single processes")
def api(port: Port = None, host: Host = None, home: Home = None) -> None:
    """The HTTP server alone. Set SPILLWAY_REDIS_URL."""
    from api.cli.processes import run_api

    run_api(settings_with(port=port, host=host, home=home))


@app.command(rich_help_panel="Single processes")
def scheduler() -> None:
    """The scheduler alone. Set SPILLWAY_REDIS_URL."""
    from api.cli.processes import run_scheduler

    run_scheduler()


@worker.command("local")
def worker_local(model: Models = None) -> None:
    """Serve models on this machine's GPU or CPU. Set SPILLWAY_REDIS_URL."""
    from api.cli.processes import run_module

    run_module("workers", "local", *(part for ref in model or () for part in ("--model", ref)))
