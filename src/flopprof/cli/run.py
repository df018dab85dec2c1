"""`flopprof run`: an unmodified training script, and its MFU."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from flopprof.cli.options import AttentionPairs, Traceback
from flopprof.cli.output import require_outputs, require_writable, write_text
from flopprof.errors import FlopprofError, UsageError

if TYPE_CHECKING:
    from flopprof.meter.contiguous import Contiguous
    from flopprof.meter.script import Script

_FIGURES = "What it is held against"
_REPORT = "What is printed"
_INTERRUPTED = 130
_PATIENCE_S = 5.0
_PACKAGE = str(Path(__file__).parents[1])
_SCHEMA = "flopprof.summary/1"


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
        typer.Option(help="What a script that follows it prints, beside ours.", rich_help_panel=_FIGURES),
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
    require_outputs(json=json, html=html)
    require_writable(records)
    program = _module(script, arguments or []) if module else _file(script, arguments or [])
    from flopprof.meter.ranks import place_of_process

    first = place_of_process()[0] == 0  # of several ranks only this one speaks
    given = _peak(peak, hardware)

    def make() -> Contiguous:
        from flopprof.meter.contiguous import Contiguous as Made

        return Made(peak=given, attention=attention, convention=convention, records=records)

    from flopprof.meter.script import Script as Finder

    line = _Line(every) if first and not quiet else None
    found = Finder(make, line.finished if line is not None else None)
    ended = _run(program, found)
    sys.stdout.flush()
    summary = found.summary()
    if first:
        _tell(str(summary) if summary is not None else _nothing(found), heading=script)
    if json is not None and first and summary is not None:
        import msgspec

        write_text(json, msgspec.json.format(msgspec.json.encode({"schema": _SCHEMA, **_plain(summary)})).decode())
    if html is not None and records is not None and first and summary is not None:
        _draw(html, records, title=script)
    if ended is not None:
        _end(ended)


def _draw(html: str, records: str, *, title: str) -> None:
    """The page of this rank's records, runs before this one included."""
    from flopprof.meter.ranks import path_of_rank, place_of_process
    from flopprof.meter.records import read
    from flopprof.meter.runs import run_of
    from flopprof.report.html.meter import render

    file = str(path_of_rank(Path(records), *place_of_process()))
    write_text(html, render([(file, run_of(file), read(file))], title=title))


@dataclass(frozen=True)
class _Program:
    """What is run as __main__."""

    code: types.CodeType
    arguments: list[str]
    directory: str
    about: dict[str, Any]


def _file(script: str, arguments: list[str]) -> _Program:
    path = Path(script)
    if path.is_dir():
        raise UsageError(f"{script!r} is a directory: give the script, or `-m` and the name of a package.")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the script {script!r}: {error.strerror or error}.") from error
    try:
        code = compile(source, script, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise FlopprofError(f"{script}{where} is not Python: {message}.") from error
    loader = importlib.machinery.SourceFileLoader("__main__", script)
    about = {"__file__": script, "__spec__": None, "__package__": None, "__loader__": loader, "__cached__": None}
    return _Program(code, [script, *arguments], str(path.resolve().parent), about)


def _module(name: str, arguments: list[str]) -> _Program:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UsageError(f"no module named {name!r} can be run: {error}.") from error
    finally:
        sys.path.remove(here)
    loader: Any = None if spec is None else spec.loader
    code = loader.get_code(name) if hasattr(loader, "get_code") else None
    if spec is None or code is None:
        raise UsageError(f"no module named {name!r} can be run: give the name that `python -m` takes.")
    about = {
        "__file__": spec.origin,
        "__spec__": spec,
        "__loader__": loader,
        "__cached__": spec.cached,
        "__package__": name.rpartition(".")[0],
    }
    return _Program(code, [spec.origin or name, *arguments], here, about)


def _run(program: _Program, found: Script) -> BaseException | None:
    """Runs it as Python would; what it raised. It stays __main__: what it pickles or leaves to run at exit needs it."""
    main = types.ModuleType("__main__")
    vars(main).update(program.about, __builtins__=__builtins__)
    sys.modules["__main__"] = main
    sys.argv[:] = program.arguments
    if not sys.flags.safe_path:
        sys.path[0] = program.directory
    found.install()
    try:
        exec(program.code, vars(main))
    except BaseException as error:
        ended: BaseException | None = error
    else:
        ended = None
    finally:
        found.remove()
    if ended is not None and not isinstance(ended, SystemExit):
        _without_us(ended, set())
        sys.excepthook(type(ended), ended, ended.__traceback__)
    return ended


def _end(ended: BaseException) -> NoReturn:
    if isinstance(ended, SystemExit):
        raise ended.with_traceback(None)
    raise SystemExit(_INTERRUPTED if isinstance(ended, KeyboardInterrupt) else 1)


def _without_us(error: BaseException, seen: set[int]) -> None:
    """Take our own frames out of what a script's traceback shows, here and in its causes."""
    seen.add(id(error))
    kept = []
    step = error.__traceback__
    while step is not None:
        if not step.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            kept.append(step)
        step = step.tb_next
    for one, following in zip(kept, [*kept[1:], None], strict=False):
        one.tb_next = following
    error.__traceback__ = kept[0] if kept else None
    for other in (error.__cause__, error.__context__):
        if other is not None and id(other) not in seen:
            _without_us(other, seen)


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
    """On standard error, where a bar of tqdm makes room for it."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is not None and getattr(tqdm, "_instances", None):
        tqdm.write(text, file=sys.stderr, end="")
    else:
        sys.stderr.write(text)
    sys.stderr.flush()


def _tell(text: str, *, heading: str) -> None:
    sys.stderr.write(f"\nflopprof: {heading}\n{text}\n")
    sys.stderr.flush()


def _nothing(found: Script) -> str:
    if found.meter is None and not found.stepped:
        return (
            "no step was found: no torch optimizer stepped in this process. Processes that the script starts are "
            "not seen; start those with torchrun."
        )
    return "no step was finished."


def _plain(summary: Any) -> dict[str, Any]:
    import msgspec

    return dict(msgspec.to_builtins(summary))
