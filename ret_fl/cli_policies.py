"""`ret-fl policies`: what can be named where own code may stand."""

from __future__ import annotations

from ret_fl.cli_options import wide_console


def policies() -> None:
    """All plug-ins: shard policies, gates, augmenters, redistribution policies, auditors, strategies; their settings.

    Built-in ones, and those of installed packages. Any that can be imported may be named as package.module:name, too.
    """
    from rich.markup import escape
    from rich.table import Table

    from ret_fl import aggregation, loading
    from ret_fl.plugins import AGGREGATION, POINTS

    console = wide_console()
    for point in (*POINTS, AGGREGATION):
        called = f"called with ({', '.join(point.parameters)}), {point.side}"
        describe = aggregation.described if point is AGGREGATION else loading.described
        console.print(f"[bold]{point.setting}[/]  {escape(called)}, entry points {point.group}", highlight=False)
        table = Table(box=None, pad_edge=False, show_header=False)
        for heading in ("name", "from", "what"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "name")
        for line in loading.overview(point, describe):
            settings = "".join(f"\n{point.options}: {told}" for told in line.settings)
            table.add_row(f"  {escape(line.name)}", escape(line.source), escape(line.about + settings))
        console.print(table)
