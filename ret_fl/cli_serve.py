"""`ret-fl serve-samples`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ret_fl.cli_options import PresetOption, SetOption, stop

if TYPE_CHECKING:
    from rich.console import Console

    from ret_fl.config import Scalar
    from ret_fl.samples.server import SampleServer, Tls


def serve_samples(
    preset: PresetOption = None,
    changes: SetOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 9443,
    verify_key: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Public key of the server that signs the orders; needed.", show_default=False),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="PEM", help="TLS certificate of this host, with its chain.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="PEM", help="Private key of --certificate.")] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Only for nodes whose certificate this CA signed (their sample-certificate)."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain text: for one machine, or a network that nobody else hears.")
    ] = False,
    streams: Annotated[
        int, typer.Option(min=1, max=1000, help="Clients served at once; more are told to come back.")
    ] = 16,
    make_key: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Serve nothing: write signing-key.pem and verify-key.pem into DIR."),
    ] = None,
) -> None:
    """Serve a run's training samples to clients that do not have the data.

    Give the run's own data settings (--preset, --set data...): the fingerprint must be the run's. A client may read the
    samples of its current order and no others: the server signs each order with signing-key.pem, and this service
    checks it with verify-key.pem. For several machines `ret-fl deploy init` makes keys, certificate and start script.

    \b
    ret-fl serve-samples --make-key keys
    ret-fl serve-samples --preset my.toml --verify-key keys/verify-key.pem --certificate host.pem --key host.key
    ret-fl run --preset my.toml --set service.signing-key=keys/signing-key.pem \\
      --set service.address=localhost:9443 --set service.ca=ca.pem
    """
    from ret_fl.config import ConfigError
    from ret_fl.settings import from_options

    try:
        if make_key:
            _make_key(make_key)
            return
        settings = from_options(preset, changes)
        tls = _tls(certificate, key, client_ca, insecure)
        if verify_key is None:
            raise ConfigError("--verify-key PEM is needed: without it anyone could ask for any sample (--make-key)")
        server, console = _server(settings, verify_key, tls, host, port, streams)
    except (ConfigError, OSError) as error:
        raise stop(error) from None
    _serve(server, console)


def _make_key(folder: Path) -> None:
    from ret_fl.samples.grants import make_key_pair

    private, public = make_key_pair(folder)
    typer.echo(f"{private}  stays on the server's host, secret: --set service.signing-key={private}")
    typer.echo(f"{public}  for the sample service: ret-fl serve-samples --verify-key {public}")


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None, insecure: bool) -> Tls | None:
    from ret_fl.config import ConfigError
    from ret_fl.samples.server import Tls

    if insecure:
        if certificate or key or client_ca:
            raise ConfigError("--insecure has no use for --certificate, --key and --client-ca: leave it or them out")
        return None
    if not (certificate and key):
        raise ConfigError("--certificate and --key are needed for TLS (--insecure serves in plain text)")
    return Tls(certificate, key, client_ca)


def _server(
    settings: dict[str, Scalar], verify_key: Path, tls: Tls | None, host: str, port: int, streams: int
) -> tuple[SampleServer, Console]:
    from rich.console import Console
    from rich.markup import escape

    from ret_fl.config import ConfigError, RunConfig
    from ret_fl.data.sources import load_splits
    from ret_fl.diffusion.text_to_image import data_read
    from ret_fl.samples.grants import Verifier
    from ret_fl.samples.records import Description, DescriptionError
    from ret_fl.samples.server import SampleServer

    console = Console()
    with console.status("reading the data ..."):
        data = load_splits(data_read(RunConfig.from_flat(settings)))
        try:
            known = Description.of(data.train, data.kind)
        except DescriptionError as error:
            raise ConfigError(f"this data cannot be served: {error}") from None
    verifier = Verifier(verify_key, known.fingerprint)
    server = SampleServer(data.train, known, verifier, host=host, port=port, tls=tls, streams=streams)
    security = "plain text" if tls is None else "TLS" + (", known nodes only" if tls.client_ca else "")
    console.print(f"[bold]{escape(data.describe())}")
    console.print(f"fingerprint {known.fingerprint[:16]}, {security}, {streams} streams")
    console.print(f"[green]serving on {host}:{server.port}[/]  (Ctrl-C ends it)", highlight=False)
    return server, console


def _serve(server: SampleServer, console: Console) -> None:
    """Until Ctrl-C or SIGTERM; each stream is a line."""
    import logging
    import signal
    import threading

    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    service_log = logging.getLogger("ret_fl.samples.server")
    service_log.addHandler(handler)
    service_log.setLevel(logging.INFO)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    server.start()
    ended.wait()
    console.print("ending; streams in progress have 5 s")
    server.stop()
