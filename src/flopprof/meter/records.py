"""Per-step records as JSON lines: every finished step is in the file, whatever happens to the process then."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import msgspec

from flopprof.errors import UsageError
from flopprof.meter.figures import StepRecord

logger = logging.getLogger(__name__)

SCHEMA = "flopprof.run/1"


class RunStart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The line that a process begins with: a first start, or a restart.

    peaks: FLOP/s by rate, as they are known so far. attention: the convention of the counts.
    """

    started_at: float
    schema: str
    attention: str = "full"
    device: str = ""
    peak: str = ""
    peak_measured: bool = False
    peaks: dict[str, float] = {}
    bytes_per_s: float | None = None
    reason: str = ""
    rank: int = 0
    world_size: int = 1
    skip: int = 0


class RunPeaks(msgspec.Struct, frozen=True, kw_only=True):
    """Peaks of rates that were not met before."""

    peaks: dict[str, float]
    reason: str = ""


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """What one process wrote."""

    start: RunStart
    records: tuple[StepRecord, ...]
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

    def write(self, line: RunStart | RunPeaks | StepRecord) -> None:
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
    found: list[tuple[RunStart, list[StepRecord], dict[str, float], list[str]]] = []
    for number, line in enumerate(lines, 1):
        try:
            if b'"schema"' in line:
                start = msgspec.json.decode(line, type=RunStart)
                if start.schema != SCHEMA:
                    raise UsageError(f"{path}, line {number}: schema {start.schema!r}; this flopprof reads {SCHEMA!r}.")
                found.append((start, [], dict(start.peaks), [start.reason]))
            elif line.startswith(b'{"peaks"'):
                more = msgspec.json.decode(line, type=RunPeaks)
                found[-1][2].update(more.peaks)
                found[-1][3].append(more.reason)
            elif line.strip():
                found[-1][1].append(msgspec.json.decode(line, type=StepRecord))
        except (msgspec.DecodeError, UnicodeDecodeError, IndexError) as error:
            if not _torn(lines, number):
                raise UsageError(f"{path}, line {number} is no record of a flopprof.Meter: {error}.") from error
    if not found:
        raise UsageError(f"{str(path)!r} holds no records of a flopprof.Meter.")
    return [
        Process(start=start, records=tuple(records), peaks=peaks, reason=reasons[-1])
        for start, records, peaks, reasons in found
    ]


def _torn(lines: Sequence[bytes], number: int) -> bool:
    """Was this line left unfinished? It is the last one, or the next process began behind it."""
    return number == len(lines) or (number > 1 and b'"schema"' in lines[number])
