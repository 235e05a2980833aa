"""`spillway webhooks`: where you are told that jobs and batches have ended, over the HTTP API."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from api.cli.job_tables import plain_table
from api.cli.options import ApiKey, Home, Json, Url, connected
from api.cli.plain_text import age_of, day_of, printable
from api.cli.record_tables import print_list
from scheduler.errors import ClientError

app = typer.Typer(help="Webhooks: be told when jobs and batches have ended.", no_args_is_help=True)
EndpointId = Annotated[str, typer.Argument(help="From `add` or the list.", metavar="ID")]
PATH = "/v1/webhook_endpoints"
_STYLES = {"delivered": "green", "dead": "red", "pending": "cyan"}


@app.command()
def add(
    hook_url: Annotated[str, typer.Argument(help="Where events are posted to.", metavar="URL")],
    name: Annotated[str, typer.Option(help="What for.")] = "",
    event: Annotated[
        list[str] | None, typer.Option("--event", metavar="TYPE", help="Only these, as job.failed; repeat.")
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Register an endpoint. Its secret is shown once; piped, only the secret is printed."""
    with connected(url, api_key, home) as client:
        made = client.post(PATH, {"url": hook_url, "name": name, "event_types": event or []})
    _show_secret(made)


@app.command("list")
def list_endpoints(as_json: Json = False, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """All endpoints."""
    with connected(url, api_key, home) as client:
        found = client.get(PATH)["data"]
    print_list(found, _endpoints, kept=2, none="No webhook endpoints yet.", as_json=as_json)


@app.command()
def test(endpoint: EndpointId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Send a sample event now. Exit status 1: the receiver did not take it."""
    with connected(url, api_key, home) as client:
        tested = client.post(f"{PATH}/{endpoint}/test")
    if not tested["success"]:
        raise ClientError(f"Not delivered: {tested['delivery']['last_error'] or 'no scheduler tried it yet'}.")
    typer.echo(f"Delivered: the receiver answered {tested['status_code']}.")


@app.command()
def rotate(
    endpoint: EndpointId,
    drop_old: Annotated[bool, typer.Option("--drop-old", help="The old secret signs no more, from now on.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Make a new secret; the old one signs along for a day."""
    with connected(url, api_key, home) as client:
        body = {"keep_old_secret_active_for_24_hours": not drop_old}
        rotated = client.post(f"{PATH}/{endpoint}/rotate_secret", body)
    _show_secret(rotated)


@app.command()
def enable(endpoint: EndpointId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Send events again, those that wait first."""
    with connected(url, api_key, home) as client:
        client.post(f"{PATH}/{endpoint}", {"enabled": True})
    typer.echo(f"Enabled {endpoint}.")


@app.command()
def remove(endpoint: EndpointId, url: Url = None, api_key: ApiKey = None, home: Home = None) -> None:
    """Remove an endpoint and what was on its way to it."""
    with connected(url, api_key, home) as client:
        client.send("DELETE", f"{PATH}/{endpoint}")
    typer.echo(f"Removed {endpoint}.")


@app.command()
def deliveries(
    endpoint: EndpointId,
    status: Annotated[str | None, typer.Option(metavar="STATUS", help="pending, delivered or dead.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="At most so many.")] = 20,
    as_json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """The newest events for an endpoint, with their tries."""
    chosen = "" if status is None else f"&status={status}"
    with connected(url, api_key, home) as client:
        found = client.get(f"{PATH}/{endpoint}/deliveries?limit={limit}{chosen}")["data"]
    print_list(found, _deliveries, kept=5, none="No deliveries.", as_json=as_json)


@app.command()
def retry(
    delivery: Annotated[str, typer.Argument(help="From `deliveries`.", metavar="ID")],
    url: Url = None,
    api_key: ApiKey = None,
    home: Home = None,
) -> None:
    """Try a dead delivery anew."""
    with connected(url, api_key, home) as client:
        client.post(f"/v1/webhook_deliveries/{delivery}/retry")
    typer.echo(f"Trying {delivery} again.")


def _endpoints(found: Sequence[dict[str, Any]]) -> Table:
    table = plain_table("id", "state", "url", "events", "name", "created")
    for one in found:
        state = Text("enabled") if one["enabled"] else Text(f"disabled {one['disabled_reason']}", "red")
        events = ", ".join(one["event_types"]) or "all"
        url_shown, name = printable(one["url"]), printable(one["name"])
        table.add_row(one["id"], state, url_shown, events, name, day_of(one["created_at"]))
    return table


def _deliveries(found: Sequence[dict[str, Any]]) -> Table:
    table = plain_table("delivery", "state", "tries", "age", "event", "error", "of")
    for one in found:
        state = Text(one["status"], _STYLES.get(one["status"], ""))
        tried = (str(one["attempts"]), age_of(one["created_ms"] // 1000))
        subject, error = one["event"]["data"]["id"], printable(one["last_error"] or "")
        table.add_row(one["id"], state, *tried, one["type"], error, subject)
    return table


def _show_secret(endpoint: dict[str, Any]) -> None:
    if not sys.stdout.isatty():
        typer.echo(endpoint["signing_secret"])
        return
    typer.echo(f"{endpoint['id']} is told at {printable(endpoint['url'])}. Its secret, shown only now:\n")
    typer.echo(f"  {endpoint['signing_secret']}\n")
    typer.echo("Verify webhook-signature with it, as standardwebhooks or openai's webhooks.unwrap do.")
