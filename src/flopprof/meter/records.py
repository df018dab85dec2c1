"""Per-step records as JSON lines: every finished step is in the file, whatever happens to the process then."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import msgspec

from flopprof.errors import UsageError
from flopprof.meter.figures import Count, Rate, StepRecord

logger = logging.getLogger(__name__)

SCHEMA = "flopprof.run/1"


class RunStart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The line that a process begins with: a first start, or a restart.

    peaks: FLOP/s by rate, as they are known so far. attention: the convention of the counts. own_count: its steps are
    numbered from its own first one, whatever checkpoint it went on from.
    """

    started_at: float
    schema: str
    attention: str = "full"
    device: str = ""
    peak: str = ""
    peak_measured: bool = False
    peaks: dict[str, Rate] = {}
    bytes_per_s: Rate | None = None
    reason: str = ""
    rank: int = 0
    world_size: int = 1
    shared_data: bool = False
    own_count: bool = False
    skip: int = 0


class RunPeaks(msgspec.Struct, frozen=True, kw_only=True):
    """Peaks of rates that were not met before."""

    peaks: dict[str, Rate]
    reason: str = ""


class RunBetween(msgspec.Struct, frozen=True, kw_only=True):
    """Time between two steps, of which this is the number of the second: a pause's name, or evaluation."""

    between: str
    seconds: float
    step: Count
    ended_at: float


Line = RunStart | RunPeaks | RunBetween | StepRecord


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """What one process wrote."""

    start: RunStart
    records: tuple[StepRecord, ...]
    between: tuple[RunBetween, ...] = ()
    peaks: dict[str, float] = {}
    reason: str = ""


class RecordWriter:
    """Appends lines to a file, each whole and handed to the system at once: it survives the process."""

    def __init__(self, path: str | os.PathLike[str], start: RunStart) -> None:
        file = Path(path)
        try:
            torn = file.exists() and file.stat().st_size > 0 and not _ends_in_newline(file)
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UsageError(f"cannot write records to {str(path)!r}: {error.strerror or error}.") from error
        self._handle = handle
        self._close = weakref.finalize(self, os.close, handle)
        if torn:  # a line that a killed process did not finish
            os.write(handle, b"\n")
        self.write(start)

    def write(self, line: Line) -> None:
        """One more line."""
        if self._close.alive:
            try:
                os.write(self._handle, msgspec.json.encode(line) + b"\n")
            except OSError as error:  # a full disk ends the records, not the training
                logger.warning("no more records are written: %s", error.strerror or error)
                self._close()

    def close(self) -> None:
        """No more lines."""
        self._close()


def _ends_in_newline(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


def read(path: str | os.PathLike[str]) -> list[Process]:
    """The processes that wrote to a file, in order. A torn last line of a killed one is passed by.

    Raises UsageError for what is no such file, naming the line.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror or error}.") from error
    found: list[_Found] = []
    for number, line in enumerate(lines, 1):
        try:
            item = _decoded(line)
            if isinstance(item, RunStart):
                if item.schema != SCHEMA:
                    raise UsageError(f"{path}, line {number}: schema {item.schema!r}; this flopprof reads {SCHEMA!r}.")
                found.append(_Found(item))
            elif item is not None and found:
                found[-1].add(item)
            elif item is not None and number < len(lines):
                raise UsageError(
                    f"{path}, line {number} is no record of a flopprof.Meter: such a file begins with their schema."
                )
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if not _torn(lines, number):
                raise UsageError(f"{path}, line {number} is no record of a flopprof.Meter: {error}.") from error
    if not found:
        raise UsageError(f"{str(path)!r} holds no records of a flopprof.Meter.")
    return [process.whole() for process in found]


class _Found:
    """What one process wrote, so far."""

    def __init__(self, start: RunStart) -> None:
        self._start = start
        self._records: list[StepRecord] = []
        self._between: list[RunBetween] = []
        self._peaks, self._reason = dict(start.peaks), start.reason

    def add(self, line: RunPeaks | RunBetween | StepRecord) -> None:
        if isinstance(line, StepRecord):
            self._records.append(line)
        elif isinstance(line, RunBetween):
            self._between.append(line)
        else:
            self._peaks.update(line.peaks)
            self._reason = line.reason

    def whole(self) -> Process:
        return Process(
            start=self._start,
            records=tuple(self._records),
            between=tuple(self._between),
            peaks=self._peaks,
            reason=self._reason,
        )


class _Line(msgspec.Struct):
    """What tells a line from others: which of these it has."""

    schema: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    peaks: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    between: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def _decoded(line: bytes) -> Line | None:
    """What a line says; None for an empty one."""
    if not line.strip():
        return None
    has = msgspec.json.decode(line, type=_Line)
    if has.schema is not msgspec.UNSET:
        return msgspec.json.decode(line, type=RunStart)
    if has.peaks is not msgspec.UNSET:
        return msgspec.json.decode(line, type=RunPeaks)
    if has.between is not msgspec.UNSET:
        return msgspec.json.decode(line, type=RunBetween)
    return msgspec.json.decode(line, type=StepRecord)


def _torn(lines: Sequence[bytes], number: int) -> bool:
    """Was this line left unfinished? It is the last one, or the next process began behind it."""
    if number == len(lines):
        return True
    try:
        return number > 1 and isinstance(_decoded(lines[number]), RunStart)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
