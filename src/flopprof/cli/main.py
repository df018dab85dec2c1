"""The `flopprof` command: its subcommands, and the one place where errors become a sentence and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import flopprof
from flopprof.cli.check import check
from flopprof.cli.compare import compare
from flopprof.cli.count import count
from flopprof.cli.crosscheck import crosscheck
from flopprof.cli.diff import diff
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


# Each command with examples of its use.
_COMMANDS: tuple[tuple[Callable[..., None], str, str], ...] = (
    (count, "flopprof count resnet50 --backward", "flopprof count net.py:build --input 1x128:int64"),
    (
        reconcile,
        "flopprof reconcile llama-3.1-8b --seq 8192 --backward",
        "flopprof reconcile vit_b_16 --backward --frozen 'encoder.layers.*'",
    ),
    (crosscheck, "flopprof crosscheck resnet50 --backward", "flopprof crosscheck gpt2 --seq 256 --json -"),
    (
        check,
        "flopprof check resnet50 --max-flops 8.2G --max-params 26M",
        "flopprof check net.py:build --baseline baseline.json --tolerance 0.5%",
    ),
    (
        compare,
        "flopprof compare resnet18 resnet50 vit_b_16 --hardware H100 --sort flops",
        "flopprof compare 'timm:convnext*' --resume rows.jsonl --csv convnext.csv",
    ),
    (
        diff,
        "flopprof diff before.json after.json",
        "flopprof count resnet50 --json - | flopprof diff resnet18.json -",
    ),
    (models, "flopprof models llama", "flopprof models 'qwen3-*' --json -"),
    (peaks, "flopprof peaks H100", "flopprof peaks --measure --dtype bf16"),
    (
        plan,
        "flopprof plan --params 7e9 --tokens 1e12 --hardware H100 --mfu 0.5 --price 2",
        "flopprof plan llama-3.1-70b --hardware H100 --zero 3 --devices 64",
    ),
    (report, "flopprof report run.jsonl", "flopprof report run.rank0.jsonl run.rank1.jsonl --json -"),
)
for _command, *_examples in _COMMANDS:
    app.command(epilog="\n\n".join(["Examples:", *_examples]))(_command)

app.command(
    context_settings={"allow_interspersed_args": False},
    epilog="Examples:\n\nflopprof run train.py --lr 3e-4\n\nflopprof run --records run.jsonl -m package.train\n\n"
    "torchrun --nproc-per-node 2 -m flopprof run train.py",
)(run)


def main() -> None:
    """Runs the command line and exits: 0 done, 1 a failed job, 2 wrong usage, 130 interrupted."""
    app()
