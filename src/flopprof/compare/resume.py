"""A file of finished rows, one JSON object a line: what an interrupted comparison goes on from."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec
import torch

from flopprof.compare.comparison import Row
from flopprof.compare.models import Job
from flopprof.errors import UsageError

SCHEMA = "flopprof.row/1"


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """One finished row, and what it is of."""

    job: Job
    row: Row
    flopprof: str
    torch: str
    schema: str = SCHEMA


class Finished:
    """The rows of a file, by job; rows added to it are on the disk when `add` returns."""

    def __init__(self, stream: IO[bytes] | None, rows: dict[bytes, Row]) -> None:
        self._stream, self._rows = stream, rows

    def get(self, job: Job) -> Row | None:
        """The finished row of exactly this job; None where there is none, or one that failed: it is tried again."""
        return self._rows.get(_key(job))

    def add(self, job: Job, row: Row) -> None:
        """Keeps a row."""
        if self._stream is None:
            return
        line = _Line(job=job, row=row, flopprof=_version(), torch=str(torch.__version__))
        self._stream.write(msgspec.json.encode(line) + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


@contextmanager
def finished(path: str | None) -> Iterator[Finished]:
    """The finished rows of a file, which is made where it is missing; None: of nothing.

    Rows of other versions of flopprof or torch are not taken. A last line that was cut off is dropped. Raises
    UsageError for a file that holds anything else.
    """
    if path is None:
        yield Finished(None, {})
        return
    stream, rows = _opened(path)
    with stream:
        yield Finished(stream, rows)


def _opened(path: str) -> tuple[IO[bytes], dict[bytes, Row]]:
    file = Path(path)
    try:
        stream = file.open("r+b" if file.exists() else "x+b")
    except OSError as error:
        raise UsageError(f"cannot write {path!r}: {error.strerror or error}.") from error
    try:
        text = stream.read()
        whole, _newline, cut = text.rpartition(b"\n")
        if not whole and cut and not cut.startswith(b'{"job"'):
            raise UsageError(f"{path} is no file of finished rows: give --resume a file of its own.")
        rows = _read(whole, path) if whole else {}
        stream.truncate(len(text) - len(cut))
        stream.seek(0, os.SEEK_END)
    except BaseException:
        stream.close()
        raise
    return stream, rows


def _read(text: bytes, path: str) -> dict[bytes, Row]:
    rows: dict[bytes, Row] = {}
    for number, line in enumerate(text.split(b"\n"), 1):
        try:
            kept = msgspec.json.decode(line, type=_Line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{path}, line {number}, is no finished row ({error}): give --resume a file of its own."
            ) from error
        if kept.schema != SCHEMA:
            raise UsageError(f"{path}, line {number}: schema {kept.schema!r}, this flopprof reads {SCHEMA!r}.")
        if not kept.row.failed and (kept.flopprof, kept.torch) == (_version(), str(torch.__version__)):
            rows[_key(kept.job)] = kept.row
    return rows


def _key(job: Job) -> bytes:
    return msgspec.json.encode(job, order="deterministic")


def _version() -> str:
    return importlib.metadata.version("flopprof")
