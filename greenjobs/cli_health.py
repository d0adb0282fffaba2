"""`greenjobs health`: ask a runner how it is, where there is no curl, as in most containers."""

from __future__ import annotations

import sys

import click

from greenjobs.address import Address
from greenjobs.cli_options import configure, plain_errors, setting_options
from greenjobs.errors import ConfigError
from greenjobs.http_client import fetch

QUESTIONS = ("livez", "readyz", "jobs", "metrics")

EXIT_UNHEALTHY = 1


@click.command("health")
@click.argument("question", type=click.Choice(QUESTIONS), default="livez")
@setting_options("http")
@click.option("--timeout", type=click.FloatRange(0.01, 3600), default=5.0, help="Seconds to wait for the answer.")
def health_command(question: str, timeout: float, **arguments: str | None) -> None:
    """Ask the runner that answers at --http how it is, and print the answer.

    The exit status is 0 when it is well, 1 when it is not or does not answer in time, 2 when it is not known where to
    ask. Without a QUESTION it is asked whether it lives (livez).
    """
    with plain_errors():
        settings = configure(arguments)
        if settings.http is None:
            raise ConfigError(
                "it is not known where the runner answers: say it with --http or GREENJOBS_HTTP, as the runner was told"
            )
        address = Address.parse(settings.http)
        if address.path is None and address.port == 0:
            raise ConfigError(f"http is {address}; to ask there, name the port that the runner got, which its log says")
    try:
        status, _, body = fetch(address, f"/{question}", timeout=timeout)
    except OSError as error:
        click.echo(f"greenjobs: nobody answers at {address}: {error}", err=True)
        sys.exit(EXIT_UNHEALTHY)
    click.echo(body.decode(errors="replace"), nl=False)
    sys.exit(0 if status == 200 else EXIT_UNHEALTHY)
