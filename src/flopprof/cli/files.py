"""Where a count's results go besides the terminal: one option a file format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import typer

from flopprof.cli.options import REPORT
from flopprof.cli.output import STDOUT, require_outputs, require_spared, write_text
from flopprof.errors import UnknownDevice

if TYPE_CHECKING:
    from flopprof.hardware import Device
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
    html: Annotated[str | None, _file("Write one page of charts and tables, which works offline")] = None
    folded: Annotated[str | None, _file("Write folded stacks weighted by FLOPs, for flamegraph.pl")] = None
    save_routing: Annotated[
        str | None, _file("Write the tokens that each expert got in a run on real numbers, for --routing")
    ] = None

    def check(self) -> None:
        """Raises UsageError for files that cannot be written, and for two that want standard output."""
        require_outputs(**{field.name: getattr(self, field.name) for field in fields(self)})

    def spare(self, *read: str | None) -> None:
        """Raises UsageError for one in the place of a file that is read."""
        require_spared(*read, **{field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def take_stdout(self) -> bool:
        """Does one of them go to standard output, instead of the tables?"""
        return any(path == STDOUT for _name, path in self._given())

    def write(self, profile: Profile, *, heading: str, depth: int, hardware: Device | None = None) -> None:
        """Write each file, whole or not at all. hardware: whose roof the page of --html shows first."""
        about = _About(heading=heading, depth=depth, hardware=hardware)
        for name, path in self._given():
            write_text(path, _WRITERS[name](profile, about))

    def _given(self) -> Iterator[tuple[str, str]]:
        for field in fields(self):
            path = getattr(self, field.name)
            if path is not None:
                yield field.name, path


@dataclass(frozen=True, kw_only=True)
class _About:
    """What was run, and how much of it is shown."""

    heading: str
    depth: int
    hardware: Device | None


def _json(profile: Profile, about: _About) -> str:
    return profile.to_json()


def _csv(profile: Profile, about: _About) -> str:
    from flopprof.report.csv import to_csv

    return to_csv(profile)


def _markdown(profile: Profile, about: _About) -> str:
    from flopprof.report.markdown import to_markdown

    return to_markdown(profile, heading=about.heading, depth=about.depth)


def _speedscope(profile: Profile, about: _About) -> str:
    from flopprof.report.stacks import to_speedscope

    return to_speedscope(profile)


def _html(profile: Profile, about: _About) -> str:
    from flopprof.report.html.profile import render

    return render(profile, heading=about.heading, hardware=about.hardware or _here(profile))


def _here(profile: Profile) -> Device | None:
    """The table's row of the GPU that the profile was counted on; None where it was none, or is in no table."""
    from flopprof.hardware import device

    if not profile.device.startswith("cuda"):
        return None
    try:
        return device(profile.device)
    except UnknownDevice:
        return None


def _folded(profile: Profile, about: _About) -> str:
    from flopprof.report.stacks import to_folded

    return to_folded(profile)


def _save_routing(profile: Profile, about: _About) -> str:
    from flopprof.models.routing import to_json

    return to_json(profile)


_WRITERS: dict[str, Callable[[Profile, _About], str]] = {
    "json": _json,
    "csv": _csv,
    "markdown": _markdown,
    "speedscope": _speedscope,
    "html": _html,
    "folded": _folded,
    "save_routing": _save_routing,
}
