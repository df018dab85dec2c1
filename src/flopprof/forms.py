"""Closed forms: polynomials in named sizes with exact rational coefficients, and floors of them. No torch."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Literal

import msgspec

from flopprof.errors import UsageError

Powers = tuple[tuple["str | Floor", int], ...]  # ((batch, 1), (seq, 2)) is batch * seq**2


class Form(msgspec.Struct, frozen=True):
    """A polynomial in sizes and floors: the sum of the terms (coefficient, powers) over a common denominator.

    >>> tokens = Form.of("batch") * Form.of("seq")
    >>> print(tokens * 24 + tokens * Form.of("seq") * 4)
    24*batch*seq + 4*batch*seq**2
    >>> (tokens * 24).at({"batch": 2, "seq": 10})
    480
    """

    terms: tuple[tuple[int, Powers], ...] = ()
    denominator: int = 1

    def __post_init__(self) -> None:
        if self.denominator < 1 or any(power < 1 for _, powers in self.terms for _, power in powers):
            raise ValueError("a form has a positive denominator and positive exponents")

    @classmethod
    def of(cls, value: int | Fraction | str | Floor) -> Form:
        """A constant, or one size by its name."""
        if isinstance(value, int | Fraction):
            return _made({(): Fraction(value)})
        return _made({((value, 1),): Fraction(1)})

    @classmethod
    def made(cls, table: Mapping[Powers, Fraction]) -> Form:
        """The form of these coefficients; equal tables make equal forms."""
        return _made({_product(powers, ()): value for powers, value in table.items()})

    @classmethod
    def total(cls, forms: Iterable[Form]) -> Form:
        """The sum of forms, in one pass."""
        table: dict[Powers, Fraction] = {}
        for form in forms:
            for powers, coefficient in form.coefficients():
                table[powers] = table.get(powers, Fraction(0)) + coefficient
        return _made(table)

    @classmethod
    def parse(cls, text: str) -> Form:
        """The form that `24*batch*seq + 9*batch*(h//16)**2/4` writes. Raises UsageError."""
        try:
            return _read(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError) as error:
            raise UsageError(f"cannot read {text!r} as a form: write it as 24*batch*seq + 4*batch*seq**2.") from error

    def coefficients(self) -> Iterator[tuple[Powers, Fraction]]:
        """Each product of powers with its exact coefficient."""
        return ((powers, Fraction(coefficient, self.denominator)) for coefficient, powers in self.terms)

    def at(self, sizes: Mapping[str, int]) -> int:
        """Its value. Raises UsageError where that is no whole number, KeyError for a size that is not given."""
        total = 0
        for coefficient, powers in self.terms:
            for atom, power in powers:
                value = sizes[atom] if type(atom) is str else atom.at(sizes)  # type: ignore[union-attr]
                coefficient *= value if power == 1 else value**power
            total += coefficient
        if self.denominator == 1:
            return total
        whole, rest = divmod(total, self.denominator)
        if rest:
            given = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise UsageError(f"{self} is no whole number at {given}: the form does not hold there.")
        return whole

    def with_one(self, name: str) -> Form:
        """The form in the other sizes where this one is 1."""
        result = Form()
        for powers, coefficient in self.coefficients():
            factor = Form.of(coefficient)
            for atom, power in powers:
                if isinstance(atom, Floor):
                    factor *= (atom.numerator.with_one(name) // atom.divisor) ** power
                elif atom != name:
                    factor *= Form.of(atom) ** power
            result += factor
        return result

    def symbols(self) -> set[str]:
        """The names of the sizes in it, also inside floors."""
        names: set[str] = set()
        for _, powers in self.terms:
            for atom, _ in powers:
                names |= {atom} if isinstance(atom, str) else atom.numerator.symbols()
        return names

    def __add__(self, other: Form | int) -> Form:
        return Form.total((self, _form(other)))

    def __sub__(self, other: Form | int) -> Form:
        return self + _form(other) * -1

    def __mul__(self, other: Form | int | Fraction) -> Form:
        table: dict[Powers, Fraction] = {}
        for left, first in self.coefficients():
            for right, second in _form(other).coefficients():
                powers = _product(left, right)
                table[powers] = table.get(powers, Fraction(0)) + first * second
        return _made(table)

    def __pow__(self, exponent: int) -> Form:
        return math.prod([self] * exponent, start=Form.of(1))

    def __floordiv__(self, divisor: int) -> Form:
        """The floor of self / divisor. What divides evenly leaves the floor: (2 h + 5) // 2 is h + 2."""
        if divisor < 1:
            raise ValueError(f"a floor form divides by a positive integer, got {divisor}")
        divisor *= self.denominator
        outside, inside, constant = Form(), Form(), 0
        for coefficient, powers in self.terms:
            whole, rest = divmod(coefficient, divisor)
            outside += _made({powers: Fraction(whole)})
            if powers:
                inside += _made({powers: Fraction(rest)})
            else:
                constant = rest
        common = math.gcd(divisor, *(coefficient for coefficient, _ in inside.terms))
        # floor((g x + c) / (g d)) is floor((x + floor(c / g)) / d) for an integer x
        inside, divisor, constant = inside * Fraction(1, common), divisor // common, constant // common
        if divisor == 1 or not inside.terms:
            return outside + inside + constant // divisor
        if len(inside.terms) == 1 and inside.terms[0][0] == 1:
            ((atom, power),) = inside.terms[0][1] if len(inside.terms[0][1]) == 1 else (("", 0),)
            if isinstance(atom, Floor) and power == 1:
                # floor((floor(x / a) + c) / d) is floor((x + a c) / (a d))
                return outside + (atom.numerator + atom.divisor * constant) // (atom.divisor * divisor)
        return outside + Form.of(Floor(inside + constant, divisor))

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __str__(self) -> str:
        text = ""
        for powers, coefficient in self.coefficients():
            sign = "-" if coefficient < 0 else "+"
            text += f" {sign} {_term(abs(coefficient), powers)}" if text else f"{sign}{_term(abs(coefficient), powers)}"
        return text.removeprefix("+") or "0"


class Floor(msgspec.Struct, frozen=True):
    """The floor of numerator / divisor: what strides and padding make of a size."""

    numerator: Form
    divisor: int

    def __post_init__(self) -> None:
        if self.divisor < 1:
            raise ValueError("a floor has a positive divisor")

    def at(self, sizes: Mapping[str, int]) -> int:
        """Its value."""
        return self.numerator.at(sizes) // self.divisor

    def __str__(self) -> str:
        text = str(self.numerator)
        return f"({text if text.isidentifier() else f'({text})'}//{self.divisor})"


class Condition(msgspec.Struct, frozen=True):
    """Where a form holds: `seq <= 512`, `h - 16*(h//16) == 0`."""

    left: Form
    relation: Literal["<=", ">=", "==", "!="]
    right: int = 0

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Is it so at these sizes?"""
        left = self.left.at(sizes)
        match self.relation:
            case "<=":
                return left <= self.right
            case ">=":
                return left >= self.right
            case "==":
                return left == self.right
        return left != self.right

    def __str__(self) -> str:
        return f"{self.left} {self.relation} {self.right}"


def _made(table: Mapping[Powers, Fraction]) -> Form:
    """The one form of these coefficients: no zeros, lowest terms, in the order in which it prints."""
    kept = sorted(((powers, value) for powers, value in table.items() if value), key=lambda item: _order(item[0]))
    denominator = math.lcm(*(value.denominator for _, value in kept))
    terms = tuple((value.numerator * (denominator // value.denominator), powers) for powers, value in kept)
    return Form(terms, denominator)


def _order(powers: Powers) -> tuple[bool, int, list[tuple[int, str, int]]]:
    # By degree; among equals, higher powers of the earlier names first. A constant comes last: h + 1.
    return not powers, sum(power for _, power in powers), [(*_rank(atom), -power) for atom, power in powers]


def _rank(atom: str | Floor) -> tuple[int, str]:
    return (0, atom) if isinstance(atom, str) else (atom.divisor, str(atom))


def _product(left: Powers, right: Powers) -> Powers:
    table = dict(left)
    for atom, power in right:
        table[atom] = table.get(atom, 0) + power
    return tuple(sorted(table.items(), key=lambda item: _rank(item[0])))


def _form(value: Form | int | Fraction) -> Form:
    return value if isinstance(value, Form) else Form.of(value)


def _term(coefficient: Fraction, powers: Powers) -> str:
    factors = [f"{atom}**{power}" if power > 1 else str(atom) for atom, power in powers]
    if coefficient.numerator != 1 or not factors:
        factors.insert(0, str(coefficient.numerator))
    return "*".join(factors) + (f"/{coefficient.denominator}" if coefficient.denominator > 1 else "")


def _read(node: ast.expr) -> Form:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return Form.of(value)
        case ast.Name(id=name):
            return Form.of(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _read(operand) * -1
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _read(left) + _read(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _read(left) - _read(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _read(left) * _read(right)
        case ast.BinOp(left=left, op=ast.Div(), right=ast.Constant(value=int(divisor))) if divisor:
            return _read(left) * Fraction(1, divisor)
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=ast.Constant(value=int(divisor))):
            return _read(left) // divisor
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(exponent))) if 0 <= exponent <= 64:
            return _read(left) ** exponent
    raise ValueError("not a polynomial with floors")
