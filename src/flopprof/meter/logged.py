"""What a meter hands to its `log=`."""

from __future__ import annotations

from collections.abc import Mapping


class Logged(dict[str, float]):
    """Figures by name, and the step that they were taken after: 10 after the tenth one, restarts included."""

    def __init__(self, figures: Mapping[str, float], *, step: int) -> None:
        super().__init__(figures)
        self.step = step
