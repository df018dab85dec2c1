"""A table of aligned columns whose numbers are never cut: only names give way when the terminal is narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from flopprof.report.facts import Facts

_GAP = 2
_NARROWEST = 10
_READABLE = 14


@dataclass(frozen=True)
class Column:
    """One column: `head` may have two lines, the second usually the unit.

    elastic: text that may be elided in its middle; optional: left out, the last
    such column first, and named below, before names are squeezed under a readable width.
    """

    head: str
    number: bool = True
    elastic: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Grid:
    """Rows of cells under their columns, rendered to the width at hand; a row of one cell goes across all columns."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines of the table, each no wider than the console as long as its numbers fit."""
        ellipsis = "..." if options.ascii_only else "…"
        kept, widths = self._layout(options.max_width)
        heads = [column.head.split("\n") for column in self.columns]
        for line in range(max(map(len, heads), default=0)):
            yield self._line([head[line] if line < len(head) else "" for head in heads], kept, widths, ellipsis, "bold")
        yield _one_line("-" * (sum(widths[i] for i in kept) + _GAP * (len(kept) - 1)), "dim")
        for row in self.rows:
            if len(row) == 1:  # a remark across all columns
                yield _one_line(elide(row[0], options.max_width, ellipsis), "dim")
            else:
                yield self._line(row, kept, widths, ellipsis, "")
        left_out = [self.columns[i].head.replace("\n", " ") for i in range(len(self.columns)) if i not in kept]
        if left_out:
            yield Facts([("", f"(not shown for want of width: {', '.join(left_out)})")])

    def _layout(self, available: int) -> tuple[list[int], dict[int, int]]:
        """Which columns are kept, and how wide each is."""
        natural = [
            max(
                [cell_len(line) for line in column.head.split("\n")]
                + [cell_len(row[i]) for row in self.rows if len(row) > 1]
            )
            for i, column in enumerate(self.columns)
        ]
        kept = list(range(len(self.columns)))
        for i in [i for i in reversed(kept) if self.columns[i].optional]:
            if self._room(kept, natural, available) < sum(
                min(natural[k], _READABLE) for k in kept if self.columns[k].elastic
            ):
                kept.remove(i)
        elastic = [i for i in kept if self.columns[i].elastic]
        room = self._room(kept, natural, available)
        widths = dict(enumerate(natural)) | _share(room, {i: natural[i] for i in elastic})
        return kept, widths

    def _room(self, kept: Sequence[int], natural: Sequence[int], available: int) -> int:
        rigid = sum(natural[i] for i in kept if not self.columns[i].elastic)
        return available - rigid - _GAP * (len(kept) - 1)

    def _line(
        self, cells: Sequence[str], kept: Sequence[int], widths: dict[int, int], ellipsis: str, style: str
    ) -> Text:
        parts = []
        for i in kept:
            text = elide(cells[i], widths[i], ellipsis) if self.columns[i].elastic else cells[i]
            padding = " " * (widths[i] - cell_len(text))
            parts.append(padding + text if self.columns[i].number else text + padding)
        return _one_line((" " * _GAP).join(parts).rstrip(), style)


def elide(text: str, width: int, ellipsis: str = "…") -> str:
    """`text` in at most `width` cells, its middle replaced by an ellipsis; indentation is kept."""
    if cell_len(text) <= width:
        return text
    body = text.lstrip(" ")
    indent = text[: min(len(text) - len(body), max(width - _NARROWEST, 0))]
    room = max(width - len(indent) - len(ellipsis), 2)
    return indent + body[: room - room // 2] + ellipsis + body[len(body) - room // 2 :]


def _share(room: int, wanted: dict[int, int]) -> dict[int, int]:
    """`room` among columns: each what it wants, the first of them first, but none squeezed under _NARROWEST."""
    widths: dict[int, int] = {}
    least = {i: min(width, _NARROWEST) for i, width in wanted.items()}
    for i, width in wanted.items():
        others = sum(widths.get(k, least[k]) for k in wanted if k != i)
        widths[i] = max(min(width, room - others), least[i])
    return widths


def _one_line(text: str, style: str) -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ignore")
