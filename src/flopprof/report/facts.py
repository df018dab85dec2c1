"""Labelled lines under a table: `forward  8.178 GFLOPs`, long sentences wrapped under themselves."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from flopprof.profile import Profile

_NARROWEST = 20


def idle_experts(profile: Profile) -> str:
    """What ran in vain: `1 of 16 experts a token; the code multiplies all of them`; empty where nothing did."""
    kinds = dict.fromkeys(f"{row.chosen} of {row.experts}" for row in profile.experts)
    return f"{' or '.join(kinds)} experts a token; the code multiplies all of them" if kinds else ""


@dataclass(frozen=True)
class Facts:
    """(label, text) pairs; an empty label continues the fact above. Without any label, plain sentences."""

    lines: Sequence[tuple[str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Labels in one column, the text wrapped at spaces beside them."""
        longest = max((len(label) for label, _ in self.lines), default=0)
        indent = longest + 2 if longest else 0
        room = max(options.max_width - indent, _NARROWEST)
        for label, text in self.lines:
            wrapped = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
            for start, line in zip([label, *[""] * len(wrapped)], wrapped, strict=False):
                fact = Text(no_wrap=True, overflow="ignore").append(start.ljust(indent), style="bold").append(line)
                fact.rstrip()
                yield fact
