"""`authz-server`: run the server, or look at its settings."""

import asyncio
import importlib.metadata
import json
from pathlib import Path
from typing import Annotated

import typer

from authz_server.build import hot_path
from authz_server.logs import set_up_logging
from authz_server.settings import CONFIG_VARIABLE, Settings, SettingsError, load_settings
from authz_server.store.redis_store import RedisStore

EXIT_NOT_SERVING = 1
EXIT_BAD_SETTINGS = 2

app = typer.Typer(
    help="External authorization (ext_authz v3) for Envoy and Istio: who is asking, may they, where do they go.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Settings are AUTHZ_... variables, or names in a YAML file; a variable beats the file.",
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help=f"YAML file of settings. Default: what {CONFIG_VARIABLE} names."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("authz-server")
        except importlib.metadata.PackageNotFoundError:
            version = "(run from its source, not installed)"
        typer.echo(f"authz-server {version}, hot path: {hot_path()}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Hold the options that come before a command."""


@app.command()
def serve(config: ConfigOption = None) -> None:
    """Serve until SIGTERM or SIGINT.

    The server listens at once and becomes ready by itself when the store is there and initialised. At the first signal
    it says that it is not ready, goes on answering for drain_seconds, finishes what is in flight and leaves.

    Exit codes: 0 stopped by a signal; 1 could not start, a part failed, or a second signal came; 2 bad settings.
    """
    settings = _load(config)
    standard_error = set_up_logging(settings.log_level, settings.log_format)
    from authz_server import server  # noqa: PLC0415 - gRPC takes long to import, and only this command needs it

    with standard_error.in_the_background():
        exit_code = asyncio.run(server.serve(settings))
    raise typer.Exit(exit_code)


@app.command()
def check_config(config: ConfigOption = None) -> None:
    """Check the settings with the server's own loader: OK, or every problem there is.

    Connects to nothing. Exit codes: 0 the server would take them; 2 it would not.
    """
    _load(config)
    typer.echo("OK")


@app.command()
def print_config(config: ConfigOption = None) -> None:
    """Print every setting with where it comes from, as a YAML file that can be used again; secrets as ***."""
    settings = _load(config)
    for name, (value, origin) in settings.shown().items():
        typer.echo(f"{name}: {json.dumps(value, ensure_ascii=False)}  # {origin}")  # JSON is YAML


@app.command("probe")
def probe_server(
    *,
    target: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the server's gRPC port is.")],
    client_address: Annotated[
        str, typer.Option(help="The client that the check is about; the default is of a network for documentation.")
    ] = "192.0.2.1",
    tls_ca: Annotated[Path | None, typer.Option(help="PEM file of the server's authorities: asks by TLS.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file of an own certificate (mutual TLS).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of that certificate's key.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds for each of the two questions.")] = 10.0,
) -> None:
    """Ask a server as a gateway does: whether it is ready, and for one decision. Reads no settings.

    Exit codes: 0 it decided, allowed or denied; 1 it did not; 2 bad usage.
    """
    from authz_server.ext_authz.probe import ClientTlsFiles, ProbeError, probe  # noqa: PLC0415 - gRPC imports slowly

    if (tls_certificate is None) != (tls_key is None) or (tls_certificate and not tls_ca):
        raise typer.BadParameter("--tls-certificate, --tls-key and --tls-ca go together")
    tls = ClientTlsFiles(tls_ca, tls_certificate, tls_key) if tls_ca else None
    try:
        probed = asyncio.run(probe(target, client_address=client_address, tls=tls, timeout_seconds=timeout))
    except ProbeError as error:
        typer.secho(f"{target}: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(EXIT_NOT_SERVING) from None
    typer.echo(f"{target}: ready; {client_address} is {'allowed' if probed.allowed else 'denied'} ({probed.reason})")


def _load(config: Path | None) -> Settings:
    try:
        settings = load_settings(config)
        try:
            RedisStore(settings.store_address(), prefix=settings.redis_prefix)  # connects to nothing yet
        except ValueError as error:
            raise SettingsError([f"{settings.written_as('redis_url')}: {error}"]) from None
    except SettingsError as error:
        for problem in error.problems:
            typer.secho(problem, err=True, fg=typer.colors.RED)
        raise typer.Exit(EXIT_BAD_SETTINGS) from None
    return settings


if __name__ == "__main__":
    app()
