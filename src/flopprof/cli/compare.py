"""`flopprof compare`: several models, or variants of one, side by side."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated

import typer

from flopprof.cli.options import REPORT, RUN, AttentionPairs, Wanted, taken
from flopprof.cli.output import STDOUT, apart, console, file_of, progress, read_bytes, require_outputs, show, write_text
from flopprof.errors import FlopprofError, UsageError

if TYPE_CHECKING:
    from flopprof.compare.comparison import Comparison
    from flopprof.compare.models import Job
    from flopprof.profile import Profile

_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Several(Wanted):
    """What is to be run of several targets."""

    target: Annotated[  # type: ignore[assignment]  # many where a command for one model has one
        list[str],
        typer.Argument(
            help="As for flopprof count; globs too ('torchvision:*', 'timm:convnext*', 'resnet*'), the file of a saved "
            "profile (a.json), and a target with options of its own: 'vit_b_16 --lora r=8,targets=out_proj'.",
            metavar="TARGET...",
            show_default=False,
        ),
    ]


@taken
def compare(
    ctx: typer.Context,
    wanted: Several,
    *,
    at: Annotated[
        list[str] | None,
        typer.Option(
            help="What to run every model on: input=1x3x288x288, or batch=8,image_size=288 (also seq, images, "
            "audio_seconds, dtype). Repeat for several rows of each model.",
            metavar="NAME=VALUE,...",
            rich_help_panel=RUN,
        ),
    ] = None,
    attention: AttentionPairs = "full",
    workers: Annotated[
        int | None,
        typer.Option(help="Worker processes; default: as many as pay; 0: none.", min=0, rich_help_panel=RUN),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Keep finished rows in this file, one a line, and go on from those it has.",
            metavar="FILE",
            rich_help_panel=RUN,
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also run each model on real numbers here (--device, else a GPU, else the CPU): median, p95.",
            rich_help_panel=REPORT,
        ),
    ] = False,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="A device of flopprof peaks: its roofline's ideal latency.", metavar="NAME", rich_help_panel=REPORT
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            help="name, params, flops, training, macs, elementwise, activations, memory, bytes, intensity, size, "
            "accuracy, ideal, latency, p95 or throughput: least first, of accuracy, intensity, throughput most.",
            metavar="FIGURE",
            rich_help_panel=REPORT,
        ),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write every row whole as JSON; - is standard output, instead of the tables.",
            metavar="FILE",
            rich_help_panel=REPORT,
        ),
    ] = None,
    csv: Annotated[
        str | None,
        typer.Option(help="Write exact figures as CSV; - as above.", metavar="FILE", rich_help_panel=REPORT),
    ] = None,
    markdown: Annotated[
        str | None,
        typer.Option(help="Write the tables as Markdown; - as above.", metavar="FILE", rich_help_panel=REPORT),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            help="Write one page with a chart of any two figures, which works offline; - as above.",
            metavar="FILE",
            rich_help_panel=REPORT,
        ),
    ] = None,
) -> None:
    """Compare models, or variants of one: FLOPs, memory, sizes, accuracy, ideal and real latency, side by side."""
    files = _Files(json=json, csv=csv, markdown=markdown, html=html)
    files.check(*(file_of(typed.partition(" --")[0]) for typed in wanted.target), wanted.routing, resume=resume)
    with progress("Loading"):
        from flopprof.compare.run import Interrupted
        from flopprof.compare.run import compare as run
        from flopprof.compare.targets import jobs_of, parse_at

        for text in at or ():
            parse_at(text)
        targets: dict[str, list[Job] | Profile] = {}
        for typed in wanted.target:
            profile = _saved(typed)
            if profile is None:
                chosen = _own_options(typed, wanted)
                found = jobs_of(chosen.target, chosen.options(), at or (), name=_name(typed), attention=attention)
                targets[typed] = found
            else:
                targets[typed] = profile
    things = [one for thing in targets.values() for one in (thing if isinstance(thing, list) else [thing])]
    try:
        with apart(), _bar(len(things)) as note:
            comparison = run(
                things,
                attention=attention,
                hardware=hardware,
                measure=measure,
                sort=sort,
                workers=workers,
                resume=resume,
                progress=note,
            )
    except Interrupted as stop:
        files.write(stop.comparison)
        kept = f"kept in {resume}: the same command goes on" if resume else "--resume FILE would keep them"
        typer.echo(f"flopprof: interrupted; {len(stop.comparison)} of {len(things)} rows, {kept}.", err=True)
        raise typer.Exit(_INTERRUPTED) from stop
    files.write(comparison)
    failures = [row for row in comparison.rows if row.failed]
    if failures and len(failures) == len(comparison):
        first = failures[0]
        raise FlopprofError(first.failed if len(failures) == 1 else f"every model failed; {first.name}: {first.failed}")


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The files that are asked for."""

    json: str | None
    csv: str | None
    markdown: str | None
    html: str | None

    def check(self, *read: str | None, resume: str | None) -> None:
        """Raises UsageError for files that cannot be written, two of one name, and those that are read."""
        require_outputs(*read, json=self.json, csv=self.csv, markdown=self.markdown, html=self.html, resume=resume)

    def write(self, comparison: Comparison) -> None:
        """Write each file, and print the tables unless a file goes to standard output."""
        from flopprof.report.comparison import render
        from flopprof.report.comparison_files import to_csv, to_markdown

        if self.json is not None:
            write_text(self.json, comparison.to_json())
        if self.csv is not None:
            write_text(self.csv, to_csv(comparison))
        if self.markdown is not None:
            write_text(self.markdown, to_markdown(comparison))
        if self.html is not None:
            from flopprof.report.html.comparison import render as page

            write_text(self.html, page(comparison))
        if STDOUT not in (self.json, self.csv, self.markdown, self.html):
            show(render(comparison))


def _saved(typed: str) -> Profile | None:
    """The profile that a target names by its file; None: it names something else."""
    if not typed.endswith(".json"):
        return None
    from flopprof.profile import Profile

    return Profile.from_json(read_bytes(typed), name=typed)


def _name(typed: str) -> str:
    """What a row is called where it is not the target itself: the target with its options."""
    return typed if " --" in typed else ""


def _own_options(typed: str, common: Several) -> Wanted:
    """What is to be run of one target: options in its own text go before the common ones. Raises UsageError."""
    names = [field.name for field in fields(Wanted) if field.name != "target"]
    shared = Wanted(target=typed, **{name: getattr(common, name) for name in names})
    if " --" not in typed:
        return shared
    found: list[Wanted] = []

    @taken
    def one(ctx: typer.Context, wanted: Wanted) -> None:
        found.append(wanted)

    app = typer.Typer(add_completion=False)
    app.command()(one)
    try:
        typer.main.get_command(app).main(shlex.split(typed), standalone_mode=False)
    except FlopprofError:
        raise
    except Exception as error:  # typer's and shlex's, which say what is wrong
        told = error.format_message() if hasattr(error, "format_message") else error
        raise UsageError(f"cannot read {typed!r}: {told}") from error
    if not found:
        raise UsageError(f"cannot read {typed!r}: write a target and options as of flopprof count behind it.")
    plain = Wanted(target=found[0].target)
    own = {name: getattr(found[0], name) for name in names if getattr(found[0], name) != getattr(plain, name)}
    return replace(shared, target=found[0].target, **own)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int, int, str], object] | None]:
    """A progress bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda done, _all, name: shown.update(task, completed=done, description=name)
