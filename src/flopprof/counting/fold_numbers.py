"""Numbers that tell what they were used for: does a block's index, or its own probability, decide what the block does?

Siblings that differ only in numbers (`layer_idx`, the rate of a stochastic depth) do the same work unless that number
is looked at. While a template runs, such numbers are replaced by `Told`s: every comparison is noted with its outcome,
and repeated later with a sibling's numbers. What cannot be repeated (hashing, printing, conversion) is opaque.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

Values = Sequence[int | float]


class Log:
    """What a template asked of its numbers."""

    def __init__(self) -> None:
        self.answers: list[tuple[Callable[[Values], Any], Any]] = []
        self.indices: list[Callable[[Values], Any]] = []  # every integer derived, which may pick from a table
        self.opaque = False

    def agrees(self, values: Values) -> bool:
        """Would every comparison have the same outcome with these numbers?"""
        try:
            return not self.opaque and all(ask(values) is answer for ask, answer in self.answers)
        except Exception:  # a division by a sibling's zero, an overflow: another course of things
            return False


class _Told:
    """What TellingInt and TellingFloat share."""

    log: Log
    ask: Callable[[Values], Any]


class TellingInt(int, _Told):
    """An int that notes its uses."""


class TellingFloat(float, _Told):
    """A float that notes its uses."""


def telling(value: int | float, log: Log, ask: Callable[[Values], Any]) -> Any:
    """`value`, noting in `log`; `ask` computes the sibling's from the sibling's numbers."""
    told: Any = TellingInt(value) if type(value) is int else TellingFloat(value)
    told.log, told.ask = log, ask
    if type(value) is int:
        log.indices.append(ask)
    return told


def _plain(value: Any) -> Any:
    if type(value) is TellingInt:
        return int.__int__(value)
    return float.__float__(value) if type(value) is TellingFloat else value


def _asker(value: Any) -> Callable[[Values], Any]:
    if isinstance(value, _Told):
        return value.ask
    return lambda values: value


def _arithmetic(compute: Callable[..., Any], *, swapped: bool) -> Callable[..., Any]:
    def method(self: Any, *others: Any) -> Any:
        if not all(isinstance(other, int | float) for other in others):
            self.log.opaque = self.log.opaque or any(isinstance(other, complex | str) for other in others)
            return NotImplemented
        operands = [*others, self] if swapped else [self, *others]
        asks = [_asker(operand) for operand in operands]
        result = compute(*map(_plain, operands))
        if type(result) not in (int, float):
            self.log.opaque = True
            return result
        return telling(result, self.log, lambda values: compute(*(ask(values) for ask in asks)))

    return method


def _comparison(compute: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        asks = _asker(self), _asker(other)
        answer = compute(_plain(self), _plain(other))
        self.log.answers.append((lambda values: compute(asks[0](values), asks[1](values)), answer))
        return answer

    return method


def _truth(self: Any) -> bool:
    answer = bool(_plain(self))
    ask = self.ask
    self.log.answers.append((lambda values: bool(ask(values)), answer))
    return answer


def _opaque(name: str, base: type) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        self.log.opaque = True
        return getattr(base, name)(self, *args)

    return method


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_BITWISE = ("and", "or", "xor", "lshift", "rshift")
_OPAQUE = ("hash", "str", "repr", "format", "round", "trunc", "floor", "ceil", "divmod", "rdivmod", "int", "float",
           "reduce_ex", "getnewargs")  # fmt: skip
_OPAQUE_METHODS = {
    int: ("bit_length", "bit_count", "to_bytes", "as_integer_ratio", "conjugate", "is_integer"),
    float: ("is_integer", "hex", "as_integer_ratio", "conjugate"),
}

for _cls, _base in ((TellingInt, int), (TellingFloat, float)):
    for _name in _ARITHMETIC + (_BITWISE if _base is int else ()):
        _function = getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
        setattr(_cls, f"__{_name}__", _arithmetic(_function, swapped=False))
        setattr(_cls, f"__r{_name}__", _arithmetic(_function, swapped=True))
    for _name in ("neg", "pos", "abs") + (("invert",) if _base is int else ()):
        setattr(_cls, f"__{_name}__", _arithmetic(getattr(operator, _name), swapped=False))
    for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(_cls, f"__{_name}__", _comparison(getattr(operator, _name)))
    _cls.__bool__ = _truth  # type: ignore[method-assign]
    for _name in [f"__{_name}__" for _name in _OPAQUE] + list(_OPAQUE_METHODS[_base]):
        if hasattr(_base, _name):
            setattr(_cls, _name, _opaque(_name, _base))


class Watched(list[Any]):
    """A list with one place per sibling: notes whether anything but the running sibling's own place was touched."""

    def __init__(self, items: list[Any], place: Callable[[Values], Any]) -> None:
        super().__init__(items)
        self.place = place
        self.touched_elsewhere = False

    def __getitem__(self, key: Any) -> Any:
        if type(key) is TellingInt:  # its own place by its own number, with a sibling's numbers the sibling's
            key.log.answers.append((lambda values: bool(key.ask(values) == self.place(values)), True))
        else:  # a constant, which happens to be the same or not
            self.touched_elsewhere = True
        return super().__getitem__(_plain(key))


def _elsewhere(name: str) -> Callable[..., Any]:
    original = getattr(list, name)

    def method(self: Watched, *args: Any, **kwargs: Any) -> Any:
        self.touched_elsewhere = True
        return original(self, *args, **kwargs)

    return method


for _name in (
    "__setitem__", "__delitem__", "__iter__", "__reversed__", "__contains__", "__add__", "__iadd__", "__mul__",
    "__imul__", "__eq__", "append", "extend", "insert", "pop", "remove", "clear", "copy", "index", "count", "sort",
    "reverse",
):  # fmt: skip
    setattr(Watched, _name, _elsewhere(_name))
