"""Where a count's results go besides the terminal: one option a file format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import typer

from flopprof.cli.options import REPORT
from flopprof.cli.output import STDOUT, require_writable, write_text
from flopprof.errors import UsageError

if TYPE_CHECKING:
    from flopprof.profile import Profile


def _file(sentence: str) -> object:
    return typer.Option(help=f"{sentence}; - is standard output.", metavar="FILE", rich_help_panel=REPORT)


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files that are asked for, as the options say it; `taken` makes options of the fields."""

    json: Annotated[str | None, _file("Write the whole profile as JSON, for flopprof diff and check")] = None
    csv: Annotated[str | None, _file("Write one row per module and operator, in FLOPs")] = None
    markdown: Annotated[str | None, _file("Write the tables as Markdown")] = None
    speedscope: Annotated[str | None, _file("Write a flame graph weighted by FLOPs, for speedscope.app")] = None
    folded: Annotated[str | None, _file("Write folded stacks weighted by FLOPs, for flamegraph.pl")] = None
    save_routing: Annotated[
        str | None, _file("Write the tokens that each expert got in a run on real numbers, for --routing")
    ] = None

    def check(self) -> None:
        """Raises UsageError for files that cannot be written, and for two that want standard output."""
        if len([path for _name, path in self._given() if path == STDOUT]) > 1:
            raise UsageError("several options ask for standard output by -: give all but one of them a file.")
        for _name, path in self._given():
            require_writable(path)

    @property
    def take_stdout(self) -> bool:
        """Does one of them go to standard output, instead of the tables?"""
        return any(path == STDOUT for _name, path in self._given())

    def write(self, profile: Profile, *, heading: str, depth: int) -> None:
        """Write each file, whole or not at all."""
        for name, path in self._given():
            write_text(path, _WRITERS[name](profile, heading, depth))

    def _given(self) -> Iterator[tuple[str, str]]:
        for field in fields(self):
            path = getattr(self, field.name)
            if path is not None:
                yield field.name, path


def _json(profile: Profile, heading: str, depth: int) -> str:
    return profile.to_json()


def _csv(profile: Profile, heading: str, depth: int) -> str:
    from flopprof.report.csv import to_csv

    return to_csv(profile)


def _markdown(profile: Profile, heading: str, depth: int) -> str:
    from flopprof.report.markdown import to_markdown

    return to_markdown(profile, heading=heading, depth=depth)


def _speedscope(profile: Profile, heading: str, depth: int) -> str:
    from flopprof.report.stacks import to_speedscope

    return to_speedscope(profile)


def _folded(profile: Profile, heading: str, depth: int) -> str:
    from flopprof.report.stacks import to_folded

    return to_folded(profile)


def _save_routing(profile: Profile, heading: str, depth: int) -> str:
    from flopprof.models.routing import to_json

    return to_json(profile)


_WRITERS: dict[str, Callable[[Profile, str, int], str]] = {
    "json": _json,
    "csv": _csv,
    "markdown": _markdown,
    "speedscope": _speedscope,
    "folded": _folded,
    "save_routing": _save_routing,
}
