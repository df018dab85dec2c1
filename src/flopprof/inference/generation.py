"""The steps of a generation: each run, or most of them told from a few on straight lines that others prove."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from flopprof.models.hf_decode import Generator
from flopprof.models.hf_reads import Weights, plain
from flopprof.models.hf_steps import Step

_RUN_ALL = 10  # so few are run one after the other
# A cache of a class that is not transformers' own may do something every so many tokens (as compressing 128 of them).
_IN_A_ROW = 136
_KNOWN = frozenset({"DynamicCache", "EncoderDecoderCache"})


class Amounts(NamedTuple):
    """Of one step of one sequence: FLOPs; bytes of its cache, read and written; of weights; of rows looked up."""

    flops: int
    read: int
    written: int
    weights: int
    rows: int


def amounts(step: Step, known: Weights) -> Amounts:
    """What a step of a batch of 1 takes. known: which of the model's own tensors are experts', and so apart."""
    weights, rows = plain(step.reads, known.stacks, known.steady)
    return Amounts(
        step.profile.forward_flops,
        sum(item.n_bytes for item in step.kept),
        sum(item.written for item in step.kept),
        weights,
        rows,
    )


class Walk:
    """Amounts of the steps of one sequence after each context from `first` to `last`; `counted`: how many were run."""

    def __init__(self, generator: Generator, first: int, last: int, *, source: int | None, known: Weights) -> None:
        self._generator, self._source, self._weights = generator, source, known
        self._known: dict[int, Amounts] = {}
        self._bends: tuple[int, ...] = ()
        self.all = self._straight(first, last) if self._regular(first, last) else self._every(range(first, last + 1))

    @property
    def counted(self) -> int:
        """Steps that were run."""
        return len(self._known)

    def _every(self, contexts: Iterable[int]) -> list[Amounts]:
        """Of each of these contexts, run where it was not."""
        contexts = list(contexts)
        missing = sorted(set(contexts) - self._known.keys())
        if missing:
            for step in self._generator.steps(1, missing, self._source):
                self._known[step.context] = amounts(step, self._weights)
        return [self._known[context] for context in contexts]

    def _regular(self, first: int, last: int) -> bool:
        """Can steps be told from others? Of a cache of a kind of its own only where many in a row lie on a line."""
        if last - first < _RUN_ALL:
            return False
        step = self._generator.steps(1, [first], self._source)[0]
        self._bends = tuple(window - 1 for window in step.windows)  # then the new token is the last that fits
        if step.cache in _KNOWN and all(layer.startswith("transformers.cache_utils.") for layer in step.layers):
            return True
        row = self._every(range(first, min(last + 1, first + _IN_A_ROW)))
        return all(_on_line(row[0], row[-1], some, place, len(row) - 1) for place, some in enumerate(row))

    def _straight(self, first: int, last: int) -> list[Amounts]:
        """On the line between the first and the last where steps between them lie on it; else each half alike."""
        count = last - first
        if count < _RUN_ALL:
            return self._every(range(first, last + 1))
        bend = next((window for window in self._bends if first < window < last), None)
        if bend is None:
            probes = (
                0,
                1,
                count // 7,
                2 * count // 5,
                count // 2,
                5 * count // 8,
                6 * count // 7 + 1,
                count - 1,
                count,
            )
            found = self._every(first + place for place in probes)
            start, end = found[0], found[-1]
            if all(_on_line(start, end, some, place, count) for some, place in zip(found, probes, strict=True)):
                return [
                    Amounts(*(a + (b - a) * place // count for a, b in zip(start, end, strict=True)))
                    for place in range(count + 1)
                ]
            bend = first + count // 2
        return [*self._straight(first, bend), *self._straight(bend + 1, last)]


def _on_line(start: Amounts, end: Amounts, found: Amounts, place: int, count: int) -> bool:
    return all((x - a) * count == (b - a) * place for a, b, x in zip(start, end, found, strict=True))
