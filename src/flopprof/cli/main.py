"""The `flopprof` command: its subcommands, and the one place where errors become a sentence and an exit code."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import flopprof
from flopprof.cli.check import check
from flopprof.cli.count import count
from flopprof.cli.crosscheck import crosscheck
from flopprof.cli.diff import diff
from flopprof.cli.models import models
from flopprof.cli.peaks import peaks
from flopprof.cli.plan import plan
from flopprof.cli.reconcile import reconcile
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


_EXAMPLES = "Examples:\n\nflopprof count resnet50 --backward\n\nflopprof count net.py:build --input 1x128:int64"
app.command(epilog=_EXAMPLES)(count)
app.command(epilog="Example:\n\nflopprof reconcile vit_b_16 --backward --frozen 'encoder.layers.*'")(reconcile)
app.command(epilog="Example:\n\nflopprof crosscheck resnet50 --backward")(crosscheck)
app.command(
    epilog="Examples:\n\nflopprof check resnet50 --max-flops 8.2G --max-params 26M\n\n"
    "flopprof check net.py:build --baseline baseline.json --tolerance 0.5%"
)(check)
app.command(
    epilog="Examples:\n\nflopprof diff before.json after.json\n\n"
    "flopprof count resnet50 --json - | flopprof diff resnet18.json -"
)(diff)
app.command(epilog="Example:\n\nflopprof models llama")(models)
app.command(epilog="Examples:\n\nflopprof peaks H100\n\nflopprof peaks --measure --dtype bf16")(peaks)
_PLANS = "Examples:\n\nflopprof plan --params 7e9 --tokens 1e12 --hardware H100 --mfu 0.5 --price 2"
app.command(epilog=f"{_PLANS}\n\nflopprof plan llama-3.1-70b --hardware H100 --zero 3 --devices 64")(plan)


def main() -> None:
    """Runs the command line and exits: 0 done, 1 a failed job, 2 wrong usage, 130 interrupted."""
    app()
