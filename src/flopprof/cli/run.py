"""`flopprof run`: an unmodified training script, and its MFU."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flopprof.cli.options import AttentionPairs, Traceback
from flopprof.cli.output import STDOUT, require_outputs, require_spared, require_writable, write_text
from flopprof.cli.program import end, execute, of_file, of_module, say
from flopprof.errors import FlopprofError, UsageError

if TYPE_CHECKING:
    from flopprof.meter.contiguous import Contiguous
    from flopprof.meter.script import Script
    from flopprof.meter.summary import Summary

_FIGURES = "What it is held against"
_REPORT = "What is printed"
_PATIENCE_S = 5.0
_SCHEMA = "flopprof.summary/1"
_RECORDS = "flopprof.run/"
_LONGEST_START = 1 << 20


def run(
    ctx: typer.Context,
    script: Annotated[
        str,
        typer.Argument(help="The script, or with -m the module, as Python takes it.", metavar="SCRIPT"),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="What follows is the script's own.", metavar="ARGS", show_default=False)
    ] = None,
    *,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as in python -m.")] = False,
    peak: Annotated[
        str | None,
        typer.Option(
            help="Dense peak in FLOP/s: 989T, 312e12; measure: what matrix products reach here, measured first in "
            "float32 and bfloat16. Default: the device's, from the table.",
            metavar="FLOP/s",
            rich_help_panel=_FIGURES,
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="The device whose peaks count, by name: H100, A100-40GB.", rich_help_panel=_FIGURES),
    ] = None,
    attention: AttentionPairs = "full",
    convention: Annotated[
        Literal["nanogpt", "palm", "megatron", "torchtitan"] | None,
        typer.Option(
            help="nanogpt, palm, megatron or torchtitan: what a script that follows it prints, beside ours.",
            metavar="NAME",
            rich_help_panel=_FIGURES,
        ),
    ] = None,
    records: Annotated[
        str | None,
        typer.Option(
            help="Append every finished step to this file, as a JSON line; of several ranks each to its own: "
            "run.rank1.jsonl.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            help="Write the summary as JSON at the end; - is standard output.", metavar="FILE", rich_help_panel=_REPORT
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            help="Write a page with charts of the recorded steps at the end, which works offline; needs --records.",
            metavar="FILE",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            help="A line on standard error every so many steps; default: every five seconds.",
            metavar="N",
            min=1,
            rich_help_panel=_REPORT,
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No lines while it runs; the summary comes.", rich_help_panel=_REPORT)
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Run a training script as it is, and tell the MFU of its steps: live and at the end, on standard error."""
    ctx.meta["flopprof.traceback"] = traceback
    if peak is not None and hardware is not None:
        raise UsageError("--peak and --hardware both say what 100 % is: give one of them.")
    if html is not None and records is None:
        raise UsageError("--html draws what --records writes: give --records FILE too.")
    require_outputs(records=records, json=json, html=html)
    program = (of_module if module else of_file)(script, arguments or [])
    require_spared(program.about["__file__"], records=records, json=json, html=html)
    from flopprof.meter.ranks import path_of_rank, place_of_process

    rank, size = place_of_process()
    if records is not None:
        _require_records(str(path_of_rank(records, rank, size)), program.about["__file__"])
    given = _peak(peak, hardware)
    records, json, html = _absolute(records), _absolute(json, STDOUT), _absolute(html, STDOUT)
    report = _Report(script, "" if size == 1 else f"rank {rank}: ", records=records, json=json, html=html)
    process = os.getpid()
    first = rank == 0  # of several ranks only this one speaks

    def make() -> Contiguous:
        from flopprof.meter.contiguous import Contiguous as Made

        try:
            return Made(peak=given, attention=attention, convention=convention, records=records)
        except UsageError as error:  # the script took the directory away
            made = Made(peak=given, attention=attention, convention=convention)
            made.trouble = str(error)
            return made

    from flopprof.meter.script import Script as Finder

    line = _Line(every) if first and not quiet else None
    found = Finder(make, line.finished if line is not None else None)
    ended = execute(program, before=found.install, after=lambda: report.attempt(found.remove))
    if os.getpid() == process:  # else in a child that the script forked and let come here: nothing of this is its own
        report.attempt(lambda: report.tell(found, speaks=first))
        report.tell_troubles(found)
    end(ended)


class _Report:
    """What is told at the end, on the standard streams of the start; nothing of it changes how the script ends."""

    def __init__(self, script: str, who: str, *, records: str | None, json: str | None, html: str | None) -> None:
        self._script, self._who = script, who
        self._records, self._json, self._html = records, json, html
        self._output, self._errors = sys.stdout, sys.stderr
        self._troubles: list[str] = []

    def attempt(self, what: Callable[[], object]) -> None:
        """Does it, or keeps why it cannot be done."""
        try:
            what()
        except Exception as error:
            name = "" if isinstance(error, FlopprofError) else f"{type(error).__name__}: "
            self._troubles.append(f"{name}{error}")

    def tell(self, found: Script, *, speaks: bool) -> None:
        """The summary, and the files."""
        summary = found.summary()
        if not speaks:
            return
        say(f"\nflopprof: {self._script}\n{found.nothing() if summary is None else summary}\n", self._errors, 2)
        json, html, records = self._json, self._html, self._records
        if summary is None:
            self._troubles += [_unwritten(path) for path in (json, html) if path is not None]
        if summary is not None and json is not None:
            self.attempt(lambda: self._put(json, _as_json(summary)))
        if summary is not None and html is not None and records is not None:
            self.attempt(lambda: self._put(html, _page(records, title=self._script)))

    def tell_troubles(self, found: Script) -> None:
        """What could not be done."""
        of_records = [found.meter.trouble] if found.meter is not None and found.meter.trouble else []
        for trouble in of_records + self._troubles:
            say(f"flopprof: {self._who}{trouble}\n", self._errors, 2)

    def _put(self, path: str, text: str) -> None:
        if path == STDOUT:
            why = say(f"{text}\n", self._output, 1)
            if why:
                raise FlopprofError(f"cannot write to standard output: {why}.")
        else:
            write_text(path, text)


def _unwritten(path: str) -> str:
    """What is said of a file that there is nothing to write into."""
    if path == STDOUT:
        return "no step, so nothing is written to standard output."
    left = "; what is there is of an earlier run" if Path(path).exists() else ""
    return f"no step, so {path!r} is not written{left}."


def _absolute(path: str | None, *but: str) -> str | None:
    return path if path is None or path in but else str(Path(path).absolute())


def _require_records(path: str, script: str | None) -> None:
    """Raises UsageError where no records can be appended to a rank's file: it is the script, or holds other things."""
    require_writable(path)
    require_spared(script, records=path)
    file = Path(path)
    if not file.is_file():
        return
    try:
        with file.open("rb") as stream:
            line = stream.readline(_LONGEST_START)
    except OSError as error:
        raise UsageError(f"cannot read {path!r}: {error.strerror or error}.") from error
    import msgspec

    from flopprof.meter.records import RunStart

    try:
        theirs = msgspec.json.decode(line, type=RunStart).schema.startswith(_RECORDS)
    except (msgspec.DecodeError, UnicodeDecodeError):
        theirs = line.startswith(b'{"started_at"') and not line.endswith(b"\n")  # torn: its process was killed
    if line and not theirs:
        raise UsageError(f"{path!r} is no file of records: give --records a file of its own.")


def _as_json(summary: Summary) -> str:
    import msgspec

    plain = {"schema": _SCHEMA, **msgspec.to_builtins(summary)}
    return msgspec.json.format(msgspec.json.encode(plain)).decode()


def _page(records: str, *, title: str) -> str:
    """Of this rank's records, runs before this one included."""
    from flopprof.meter.ranks import path_of_rank, place_of_process
    from flopprof.meter.records import read
    from flopprof.meter.runs import run_of
    from flopprof.report.html.meter import render

    file = str(path_of_rank(records, *place_of_process()))
    return render([(file, run_of(file), read(file))], title=title)


def _peak(peak: str | None, hardware: str | None) -> Any:
    if hardware is not None:
        from flopprof.hardware import device

        device(hardware)
        return hardware
    if peak is None:
        return None
    if peak != "measure":
        from flopprof.units import parse_count

        flops_per_s = parse_count(peak)
        if flops_per_s == 0:
            raise UsageError("--peak is the dense peak in FLOP/s, and more than 0.")
        return flops_per_s
    from flopprof.errors import NoPeak
    from flopprof.hardware import measure_peak

    found = []
    for dtype in ("float32", "bfloat16"):
        try:
            found.append(measure_peak(dtype=dtype, seconds=0.5))
        except NoPeak:
            continue
    return found


class _Line:
    """The lines while it runs."""

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._steps = 0
        self._last = 0.0

    def finished(self, meter: Contiguous) -> None:
        """One more step."""
        self._steps += 1
        if self._every is not None:
            if self._steps % self._every:
                return
        else:
            now = time.monotonic()
            self._last = self._last or now
            if now - self._last < _PATIENCE_S:
                return
            self._last = now
        from flopprof.meter.progress import line

        _write(f"{line(self._steps, meter.figures())}\n")


def _write(text: str) -> None:
    """On standard error, where a bar of tqdm makes room for it; nowhere, where the script has none."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with contextlib.suppress(Exception):
        if tqdm is not None and getattr(tqdm, "_instances", None):
            tqdm.write(text, file=sys.stderr, end="")
        else:
            sys.stderr.write(text)
        sys.stderr.flush()
