"""Which of a model's parameters and buffers one call reads, how much of each, and which of them are experts'."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flopprof.counting.refused import shaped
from flopprof.models.hf_quantised import STORED_BYTES

_LOOKUPS = frozenset({"aten::embedding", "aten::index_select", "aten::index", "aten::gather", "aten::embedding_bag"})
_SEQUENCES = (list, tuple)


@dataclass(frozen=True)
class Routed:
    """Weights of which each token takes `chosen` of `experts`, `n_bytes` each; `names` of their tensors."""

    experts: int
    chosen: int
    n_bytes: int
    names: frozenset[str]


@dataclass(frozen=True)
class Weights:
    """What a step reads of the model's own tensors: `n_bytes` whatever the batch, rows looked up, and experts.

    looked_up: bytes of the rows that each token of the batch looks up. steady: names of tables of which a step looks up
    as many rows whatever the batch; they are in n_bytes.
    """

    n_bytes: int
    looked_up: int
    routed: tuple[Routed, ...] = ()
    steady: frozenset[str] = frozenset()

    @property
    def stacks(self) -> frozenset[str]:
        """Names of the tensors of experts."""
        return frozenset(name for share in self.routed for name in share.names)


@dataclass
class Read:
    """Reads of one parameter: whole calls, slices of it by their place, rows, and rows of a grouped product."""

    shape: tuple[int, ...]
    itemsize: Fraction  # bytes of an element; of a quantised one, as it is stored, with its share of the scales
    whole: int = 0  # elements
    slices: dict[int, int] = field(default_factory=dict)  # place of the slice -> elements
    rows: int = 0  # elements
    grouped: list[int] = field(default_factory=list)  # rows of each grouped product

    @property
    def each(self) -> int:
        """Bytes of one row of a table, of one expert's share of a stack."""
        return int(self.itemsize * math.prod(self.shape[1:]))

    @property
    def lookups(self) -> int:
        """Rows, each counted as often as it was looked up."""
        return self.rows // math.prod(self.shape[1:])


class Reads(TorchDispatchMode):
    """Notes, while it is active, which elements of a model's parameters and buffers operators read."""

    supports_higher_order_operators = True

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names: dict[int, str] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.numel():
                self._names.setdefault(tensor.untyped_storage()._cdata, name)
                self._tensors.setdefault(name, tensor)
        self.reads: dict[str, Read] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all that can be read."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True, as for the counter."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = getattr(func, "_schema", None)
        name = schema.name if schema is not None else ""
        out = shaped(name, func)(*args, **(kwargs or {}))
        if not _is_view(func) and not _is_empty(out):
            self._note(name, args, kwargs or {}, out)
        return out

    def _note(self, name: str, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        for tensor in _tensors((*args, *kwargs.values())):
            try:
                key = self._names.get(tensor.untyped_storage()._cdata)
            except (RuntimeError, NotImplementedError):  # sparse, nested
                continue
            if key is None:
                continue
            own = self._tensors[key]
            read = self.reads.setdefault(key, Read(tuple(own.shape), _itemsize(own)))
            if name in _LOOKUPS:
                read.rows += out.numel() if isinstance(out, torch.Tensor) else tensor.numel()
            elif "grouped_mm" in name and tensor.dim() == 3:
                read.grouped.append(args[0].shape[0])
            elif own.dim() == 3 and _elements(tensor) * own.shape[0] == own.numel():
                read.slices[int(tensor.storage_offset())] = _elements(tensor)
            else:
                read.whole += _elements(tensor)


def weights(one: Mapping[str, Read], many: Mapping[str, Read], shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """What a step reads, told from one of a single token and one of more tokens, of which each takes its experts.

    shapes  of all that the model has. Experts are stacks of which a grouped product or a lookup takes some, slices of
            a stack of which not all were used, and siblings (`experts.0`, `experts.1`) of which more tokens used more;
            and tables of as many rows (their biases), of which as many are looked up.
    """
    routed: dict[tuple[int, int], dict[str, int]] = {}

    def route(experts: int, chosen: int, n_bytes: int, name: str) -> None:
        names = routed.setdefault((experts, chosen), {})
        names[name] = names.get(name, 0) + n_bytes

    for names in _siblings(one, many, shapes):
        used = [name for name in names if name in one]
        for name in names:  # each is one share of the group
            route(len(names), len(used), int(one[name].whole * one[name].itemsize) if name == used[0] else 0, name)
    apart = {name for names in routed.values() for name in names}
    rest = {name: read for name, read in one.items() if name not in apart}
    for name, read in rest.items():
        if 0 < len(read.slices) < read.shape[0]:
            route(read.shape[0], len(read.slices), read.each, name)
        for rows in read.grouped:
            route(read.shape[0], min(rows, read.shape[0]), read.each, name)
        if read.rows and len(read.shape) == 3:
            route(read.shape[0], min(read.lookups, read.shape[0]), read.each, name)
    for name, read in rest.items():
        if read.rows and len(read.shape) == 2 and (read.shape[0], read.lookups) in routed:
            route(read.shape[0], read.lookups, read.each, name)
    shares = tuple(
        Routed(experts, chosen, sum(names.values()), frozenset(names))
        for (experts, chosen), names in sorted(routed.items())
    )
    steady = frozenset(name for name, read in rest.items() if name in many and many[name].rows == read.rows > 0)
    stacks = frozenset(name for share in shares for name in share.names)
    return Weights(*plain(one, stacks, steady), shares, steady)


def lengthened(least: Mapping[str, Read], more: Mapping[str, Read], steps: Fraction) -> dict[str, Read]:
    """Reads of a longer text: what a text read more than a shorter one is read `steps` times again."""

    def longer(few: int, some: int) -> int:
        return int(some + (some - few) * steps)

    pairs = ((name, least.get(name, read), read) for name, read in more.items())
    return {
        name: replace(read, whole=longer(before.whole, read.whole), rows=longer(before.rows, read.rows))
        for name, before, read in pairs
    }


def plain(reads: Mapping[str, Read], stacks: Collection[str], steady: Collection[str]) -> tuple[int, int]:
    """(bytes, bytes of rows looked up for each token) of everything but the experts' stacks."""
    kept = {name: read for name, read in reads.items() if name not in stacks}
    fixed = sum(int((read.whole + sum(read.slices.values())) * read.itemsize) for read in kept.values())
    rows = {name: int(read.rows * read.itemsize) for name, read in kept.items()}
    always = sum(n_bytes for name, n_bytes in rows.items() if name in steady)
    return fixed + always, sum(rows.values()) - always


def _siblings(
    one: Mapping[str, Read], many: Mapping[str, Read], shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, ...]]:
    """Names that differ in one number only, of one shape, some of which a token used, and more of which more tokens."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        for place, part in enumerate(parts):
            pattern = re.sub(r"\d+", "*", part, count=1)
            if pattern != part:
                groups.setdefault((*parts[:place], pattern, *parts[place + 1 :]), []).append(name)
    found = []
    for names in groups.values():
        used, more = ([name for name in names if name in reads] for reads in (one, many))
        if 0 < len(used) < len(more) and len({shapes[name] for name in names}) == 1:
            found.append(tuple(names))
    return found


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) in _SEQUENCES:
            yield from _tensors(value)


def _itemsize(tensor: torch.Tensor) -> Fraction:
    return Fraction(getattr(tensor, STORED_BYTES, tensor.numel() * tensor.element_size()), tensor.numel())


def _elements(tensor: torch.Tensor) -> int:
    """Elements that lie in memory: an expanded dimension reads the same ones again."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


def _is_empty(out: Any) -> bool:
    """Is there no element in the result? An expert that no token takes is multiplied by nothing, and is not read."""
    return isinstance(out, torch.Tensor) and not out.numel()


def _is_view(func: Any) -> bool:
    """Does it only look at its operand another way?"""
    if getattr(func, "is_view", False):
        return True
    returns = getattr(getattr(func, "_schema", None), "returns", ())
    return bool(returns) and all(item.alias_info is not None and not item.alias_info.is_write for item in returns)
