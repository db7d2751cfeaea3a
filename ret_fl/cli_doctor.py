"""`ret-fl doctor`: would a run work here, and why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ret_fl.cli_options import PresetOption, SetOption, run_settings, stop, wide_console

if TYPE_CHECKING:
    from ret_fl.doctor import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}


def doctor(
    preset: PresetOption = None,
    changes: SetOption = None,
    fingerprint: Annotated[
        str, typer.Option(help="What this machine's data must have as fingerprint: what doctor says on another one.")
    ] = "",
    superlink: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Also check that this machine can reach and trust this SuperLink.")
    ] = "",
    root_certificates: Annotated[
        Path | None, typer.Option(metavar="CA", help="Certificate of its CA (the kit's ca.crt); none: no TLS.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option("--auth-supernode-private-key", metavar="KEY", help="Also check that this key is registered."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings as JSON.")] = False,
) -> None:
    """Check what a run with these settings needs of this machine, and say what to do; exit code 1 if anything fails.

    Where service.address is set (on a node without data) the sample service is asked in place of local data.
    Memory and disk are estimates. Not checked: other machines (run it there, too, with the same --fingerprint),
    whether another SuperNode uses the same key, and how fast anything is. The SuperLink is not changed.
    """
    from ret_fl.config import ConfigError, RunConfig
    from ret_fl.doctor import Verdict, examine_machine

    if not superlink and (root_certificates or key):
        raise stop("--root-certificates and --auth-supernode-private-key are checked against --superlink HOST:PORT")
    try:
        config = RunConfig.from_flat(run_settings(preset, changes))
    except ConfigError as error:
        raise stop(error) from None
    findings = examine_machine(config, fingerprint)
    if superlink:
        from ret_fl.superlink_checks import examine_superlink

        findings += examine_superlink(superlink, root_certificates, key)
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    if any(finding.verdict == Verdict.FAILURE for finding in findings):
        raise typer.Exit(1)


def _print(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found, and what to do", overflow="fold")
    for finding in findings:
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n-> {finding.advice}", style="bold")
        table.add_row(finding.check, Text(finding.verdict, style=_COLOURS[finding.verdict]), text)
    wide_console().print(table)
