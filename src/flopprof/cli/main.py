"""The `flopprof` command: its subcommands, and the one place where errors become a sentence and an exit code."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import flopprof
from flopprof.cli.check import check
from flopprof.cli.compare import compare
from flopprof.cli.count import count
from flopprof.cli.crosscheck import crosscheck
from flopprof.cli.diff import diff
from flopprof.cli.examples import epilog
from flopprof.cli.models import models
from flopprof.cli.peaks import peaks
from flopprof.cli.plan import plan
from flopprof.cli.reconcile import reconcile
from flopprof.cli.report import report
from flopprof.cli.run import run
from flopprof.errors import FlopprofError

_INTERRUPTED = 130


class _Commands(TyperGroup):
    """A command group that prints flopprof's own errors as one sentence."""

    def invoke(self, ctx: Any) -> Any:  # typer carries its own copy of click, whose types have no public name
        """The command's result; FlopprofError and Ctrl-C become an exit code."""
        try:
            return super().invoke(ctx)
        except FlopprofError as error:
            if ctx.meta.get("flopprof.traceback"):
                traceback.print_exception(error, file=sys.stderr)
            typer.echo(f"flopprof: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            typer.echo("flopprof: interrupted", err=True)
            raise typer.Exit(_INTERRUPTED) from error


app = typer.Typer(
    name="flopprof",
    cls=_Commands,
    help="How many FLOPs does this PyTorch model perform, where, and why not 6N?",
    epilog="Exit codes: 0 done, 1 a failed job (or a budget that is broken), 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flopprof {flopprof.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


for _command in (count, reconcile, crosscheck, check, compare, diff, models, peaks, plan, report):
    app.command(epilog=epilog(_command.__name__))(_command)

# What follows the script is its own.
app.command(context_settings={"allow_interspersed_args": False}, epilog=epilog("run"))(run)


def main() -> None:
    """Runs the command line and exits: 0 done, 1 a failed job, 2 wrong usage, 130 interrupted."""
    app()
