"""Symbolic sizes: the ordinary count on fake tensors, its integers read as forms and its guards as conditions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from itertools import islice
from typing import Any

import msgspec
import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Mod, PythonMod

from flopprof.counting.closed_places import Inputs, Sizes
from flopprof.counting.closed_samples import CountAt, NotProved, Sample, Samples, rows_of
from flopprof.forms import Condition, Form

# Of an expression, its operators and operands: one size of a strided network has about ten.
_MOST_PARTS = 40

_RELATIONS = {sympy.Eq: "==", sympy.Ne: "!=", sympy.Le: "<=", sympy.Ge: ">=", sympy.Lt: "<", sympy.Gt: ">"}


def symbolic(count_at: CountAt, inputs: Inputs, hints: Sizes) -> tuple[tuple[Form, ...], tuple[Condition, ...]]:
    """(the distinct forms of the integers, where these hold) of a count with symbolic sizes.

    hints are the sizes by which the model's branches are decided; what it asked of them are the conditions. Raises
    NotProved where sizes are tied or fixed.
    """
    env = ShapeEnv(duck_shape=False)
    names: dict[sympy.Symbol, str] = {}
    integers = []
    for symbol, hint in zip(inputs.symbols, hints, strict=True):
        source = ConstantSource(symbol.name)
        named = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        names[named] = symbol.name
        integers.append(env.create_symintnode(named, hint=hint, source=source))
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor, sizes: dict[int, Any]) -> torch.Tensor:
        shape = [sizes.get(dimension, size) for dimension, size in enumerate(tensor.shape)]
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device).requires_grad_(tensor.requires_grad)

    try:
        with mode, enable_python_dispatcher(), _hashable(), _Bounded():
            args, kwargs = inputs.made(integers, fake)
            rows = rows_of(count_at(args, kwargs))
    except NotProved:
        raise
    except Exception as error:  # whatever a model does with sizes that are no numbers
        lines = str(error).strip().splitlines() or [""]
        raise NotProved(f"the model does not run: {type(error).__name__}: {lines[0][:200]}") from error
    _generic(env, names)
    expressions: dict[Any, None] = {}

    def note(value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            expressions[value.node.expr] = None
        elif isinstance(value, tuple):
            sizes = [note(item) for item in value]
            if any(isinstance(size, torch.SymInt) for size in sizes):  # a shape: how many elements it has
                expressions[sympy.Mul(*(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes))] = None
        elif isinstance(value, msgspec.Struct):
            for item in msgspec.structs.astuple(value):
                note(item)
        return value

    note(rows)
    reader = _Reader(names)
    forms: dict[Form, None] = {}
    for expression in expressions:
        with suppress(NotProved):  # the integers that it would have been then match no form
            forms[reader.form(env.replace(expression))] = None
    return tuple(forms), tuple(_conditions(env, names, reader))


def recognised(samples: Samples, forms: Sequence[Form], points: Sequence[Sizes]) -> tuple[Sample, tuple[Form, ...]]:
    """(a sample, the form of each of its integers): the one, up to a factor, that has its values at these sizes.

    The ordinary count runs some operators whole that a count with symbolic sizes sees in parts, or under other names:
    so it says what the rows are, and the symbolic one only which forms there can be. Raises NotProved.
    """
    names = [symbol.name for symbol in samples.inputs.symbols]
    counted = [samples.accepted(point) for point in points]
    if any(sample.structure != counted[0].structure for sample in counted):
        raise NotProved("not the same operators run at every size")
    exactly: dict[tuple[int, ...], Form] = {}
    scaled: dict[tuple[Fraction, ...], tuple[Form, int]] = {}
    for form in forms:
        values = tuple(form.at(dict(zip(names, point, strict=True))) for point in points)
        exactly.setdefault(values, form)
        if values[0]:
            scaled.setdefault(_shape(values), (form, values[0]))

    def named(values: tuple[int, ...]) -> Form:
        if len(set(values)) == 1:
            return Form.of(values[0])
        if values in exactly:
            return exactly[values]
        known = scaled.get(_shape(values)) if values[0] else None
        if known is None:
            raise NotProved("a count is no form of the symbolic sizes")
        return known[0] * Fraction(values[0], known[1])

    made: dict[tuple[int, ...], Form] = {}
    columns = list(zip(*(sample.values for sample in counted), strict=True))
    for column in columns:
        if column not in made:
            made[column] = named(column)
    return counted[0], tuple(made[column] for column in columns)


def _shape(values: tuple[int, ...]) -> tuple[Fraction, ...]:
    return tuple(Fraction(value, values[0]) for value in values)


class _Bounded(TorchFunctionMode):
    """Stops a model whose sizes grow more involved with every layer (windows padded again and again)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            for size in out.shape:
                if isinstance(size, torch.SymInt) and _parts(size.node.expr) > _MOST_PARTS:
                    raise NotProved("the sizes inside the model have no short form")
        return out


def _parts(expression: Any) -> int:
    return sum(1 for _ in islice(sympy.preorder_traversal(expression), _MOST_PARTS + 1))


@contextmanager
def _hashable() -> Iterator[None]:
    """Symbolic sizes can be keys: a tally tells rows apart by their shapes. Equal expressions have one hash."""
    plain = torch.SymInt.__hash__
    with ExitStack() as stack:
        stack.callback(setattr, torch.SymInt, "__hash__", plain)
        torch.SymInt.__hash__ = lambda self: hash(self.node.expr)  # type: ignore[method-assign]
        yield


def _generic(env: ShapeEnv, names: dict[sympy.Symbol, str]) -> None:
    """Raises NotProved where the model fixed a size, or tied it to another."""
    for symbol, name in names.items():
        value = env.replace(symbol)
        if value == symbol:
            continue
        if value.is_number:
            raise NotProved(f"the model runs only where {name} is {value}")
        spelled = value.subs({other: sympy.Symbol(known) for other, known in names.items()})
        raise NotProved(f"the model runs only where {name} is {spelled}")


def _conditions(env: ShapeEnv, names: dict[sympy.Symbol, str], reader: _Reader) -> Iterator[Condition]:
    for guard in env.guards:
        expression = env.replace(guard.expr)
        if expression is not sympy.true:
            yield from _condition(expression, reader)
    yield from reader.conditions
    for symbol, name in names.items():
        bounds = env.var_to_range[symbol]
        if bounds.upper.is_number and bounds.upper.is_finite and bounds.upper < 2**31:
            yield Condition(Form.of(name), "<=", int(bounds.upper))
        if bounds.lower > 2:  # smaller sizes are tried one by one
            yield Condition(Form.of(name), ">=", int(bounds.lower))


def _condition(expression: Any, reader: _Reader) -> Iterator[Condition]:
    if isinstance(expression, sympy.And):
        for part in expression.args:
            yield from _condition(part, reader)
        return
    relation = _RELATIONS.get(type(expression))
    if relation is None:
        raise NotProved(f"the model asks whether {expression}")
    left = reader.form(expression.lhs) - reader.form(expression.rhs)
    left *= left.denominator  # its sign stays
    constant = sum(coefficient for coefficient, powers in left.terms if not powers)
    left, right = left - constant, -constant
    if relation == "<":
        relation, right = "<=", right - 1
    elif relation == ">":
        relation, right = ">=", right + 1
    if all(coefficient < 0 for coefficient, _ in left.terms):  # -seq >= -512 reads as seq <= 512
        left, right = left * -1, -right
        relation = {"<=": ">=", ">=": "<="}.get(relation, relation)
    yield Condition(left, relation, right)  # type: ignore[arg-type]


class _Reader:
    """sympy expressions as forms, under the conditions that it notes."""

    def __init__(self, names: dict[sympy.Symbol, str]) -> None:
        self._names = names
        self.conditions: dict[Condition, None] = {}

    def form(self, expression: Any) -> Form:
        """The form that an expression is. Raises NotProved for one that is none."""
        match expression:
            case sympy.Integer():
                return Form.of(int(expression))
            case sympy.Rational():
                return Form.of(Fraction(int(expression.p), int(expression.q)))
            case sympy.Symbol() if expression in self._names:
                return Form.of(self._names[expression])
            case sympy.Add():
                return Form.total(map(self.form, expression.args))
            case sympy.Mul():
                return math.prod(map(self.form, expression.args), start=Form.of(1))
            case sympy.Pow(args=(base, exponent)) if exponent.is_Integer and exponent > 0:
                return self.form(base) ** int(exponent)
            case FloorDiv(args=(base, divisor)) | CleanDiv(args=(base, divisor)) if _whole(divisor):
                return self.form(base) // int(divisor)
            case Mod(args=(base, divisor)) | PythonMod(args=(base, divisor)) if _whole(divisor):
                return self.form(base) - self.form(base) // int(divisor) * int(divisor)
            case sympy.floor(args=(inner,)):
                return self.form(inner) // 1
            case Max(args=(least, inner)) if _whole(least):  # of a stride: of a dimension that is empty it is 1
                form = self.form(inner)
                self.conditions[Condition(form, ">=", int(least))] = None
                return form
        raise NotProved(f"{expression} is no polynomial with floors")


def _whole(number: Any) -> bool:
    return bool(number.is_Integer and number > 0)
