"""The command line `hotspare`. Exit codes: 0 done, 1 failed, 2 wrong use.

Every command imports what it needs when it runs: a node that adopts a sealed segment is ready within a second.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from app.cli import failure
from app.cli.commands import demo, inspect, restore, segments, serve, status, synth
from app.terminal import streams

cli = typer.Typer(
    help="Keeps a mixture-of-experts model's expert weights hot in host memory, and brings them back from there.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from app.version import VERSION

        typer.echo(f"hotspare {VERSION}")
        raise typer.Exit


@cli.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


cli.command(short_help="Run a node.")(serve.serve)
cli.command(short_help="Node, peers, coverage, restores.")(status.status)
cli.command(short_help="Start a restore and watch it.")(restore.restore)
cli.command(short_help="List this host's segments.")(segments.ls)
cli.command(short_help="Remove segments that nobody owns.")(segments.rm)
cli.command(short_help="Check every block against its checksum.")(segments.verify)
cli.command(short_help="Say what a checkpoint has, and what of it is left out.")(inspect.inspect)
cli.command(short_help="Write a checkpoint to try things with.")(synth.synth)
cli.command(short_help="Three nodes, a kill, a restore: all on this machine.")(demo.demo)


def main() -> None:
    """Run the command line and exit. An error is a line or several on stderr, never a traceback unless asked for."""
    streams.open_all()
    code: int | str | None = 0
    try:
        cli()
    except SystemExit as ended:
        code = ended.code
    except Exception as error:
        code = failure.tell(error)
    if (unwritten := streams.flush()) is not None and not code:
        code = failure.FAILED
        streams.say(f"hotspare: what it printed could not be written: {unwritten.strerror}", err=True)
        streams.flush()
    sys.exit(code)
