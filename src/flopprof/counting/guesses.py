"""What is taken for values that nobody gave: of inputs by their names, of routing by its shapes. Each is a sentence.

A guess is a choice under which as much runs as usually does: nothing masked, no padding, an even share for each
expert. Where no such choice is honest (lengths, sizes, scores above a threshold) there is no guess.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from flopprof.counting.routing import MOST_EXPERTS, TOLD, laid_out

FINITE = "no value is taken to be infinite or not a number"
UNEQUAL = "no number that is not known is taken to equal a given one exactly: no picture is blank"
EVEN = "the choice of the largest scores is taken to be even: each expert gets the same share of the tokens"

# Beyond every vocabulary, so that no label equals a token that a model names.
_FIRST_LABEL = 1 << 20
_LABELS = re.compile(r"(^|_)(ids|tokens?|labels?|idx|inputs?|x|src|tgt|source|target|targets|text)$")

Tokens = Callable[[int, int, int], tuple[int, ...] | None]

_aten = torch.ops.aten


class Guess(NamedTuple):
    """Values on the CPU, and the sentence that owns up to them; labels: only that they differ is known."""

    values: torch.Tensor
    sentence: str
    labels: bool = False


def named(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that a call gives, by the names of the parameters that take them."""
    try:
        taken = inspect.signature(getattr(model, "forward", model)).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a call that fails, or a callable written in C
        taken = dict(kwargs)
    found = dict(taken)
    for held in taken.values():
        if isinstance(held, Mapping):  # **kwargs, or a batch as a dictionary
            found.update({str(name): value for name, value in held.items()})
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def of_input(name: str, tensor: torch.Tensor) -> Guess | None:
    """What an input on meta is taken to hold, by its name; None where nothing can be said."""
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if dtype is torch.bool or (_is_whole(dtype) and "mask" in name):
        nothing = dtype is torch.bool and "padding" in name  # there True marks what is left out
        values = _aten.full.default(shape, not nothing, dtype=dtype, device="cpu")
        what = "False" if nothing else "True" if dtype is torch.bool else "1"
        return Guess(values, f"every element of {name} is taken to be {what}: its values were not given")
    if dtype not in (torch.int32, torch.int64) or not shape:
        return None
    if "position_ids" in name:
        values = _aten.expand.default(_aten.arange.default(shape[-1], dtype=dtype, device="cpu"), shape)
        return Guess(values, f"{name} is taken to count 0, 1, 2, ...: its values were not given")
    if "type_ids" in name:
        values = _aten.zeros.default(shape, dtype=dtype, device="cpu")
        return Guess(values, f"every element of {name} is taken to be 0: its values were not given")
    if _LABELS.search(name):
        flat = _aten.arange.start(_FIRST_LABEL, _FIRST_LABEL + math.prod(shape), dtype=dtype, device="cpu")
        return Guess(
            _aten.view.default(flat, shape),
            f"the values of {name} are taken to differ from each other and from every special token "
            "(padding, end, image): they were not given",
            labels=True,
        )
    return None


def of_operator(base: str, args: Any, out: Any, told: Tokens | None = None) -> tuple[torch.Tensor, Guess] | None:
    """(result, what it is taken to hold) of an operator on unknown floats: even routing, and finite numbers.

    told: tokens for each expert of so many rows, choices a row and experts, where they are known.
    """
    source = args[0] if args else None
    if not isinstance(source, torch.Tensor) or not source.is_floating_point():
        return None
    if base in _ODD:
        return out, Guess(_aten.zeros.default(out.shape, dtype=torch.bool, device="cpu"), FINITE)
    if (base == "aten::eq" and args[1] is source) or (base == "aten::ne" and _is_infinite(args[1])):  # torch.isfinite
        return out, Guess(_aten.ones.default(out.shape, dtype=torch.bool, device="cpu"), FINITE)
    if base in ("aten::eq", "aten::ne") and not isinstance(args[1], torch.Tensor):
        return out, Guess(_aten.full.default(out.shape, base == "aten::ne", dtype=torch.bool, device="cpu"), UNEQUAL)
    if base in _CHOICES:
        chosen = out if isinstance(out, torch.Tensor) else out[1]
        return _even(base, args, source, chosen, told)
    return None


_CHOICES = frozenset({"aten::topk", "aten::sort", "aten::argmax", "aten::max"})
_ODD = frozenset({"aten::isnan", "aten::isinf", "aten::isneginf", "aten::isposinf"})
GUESSED = _CHOICES | _ODD | {"aten::eq", "aten::ne"}  # the operators that of_operator has something to say of


def _even(
    base: str, args: Any, scores: torch.Tensor, chosen: torch.Tensor, told: Tokens | None
) -> tuple[torch.Tensor, Guess] | None:
    """Row after row takes the next ones, round and round; or what was told."""
    if scores.dim() < 2 or chosen.dim() not in (scores.dim(), scores.dim() - 1):
        return None
    dim = _dimension(base, args)
    if dim is None:
        return None
    dim %= scores.dim()
    experts = scores.shape[dim]
    kept = chosen.dim() == scores.dim()
    width = chosen.shape[dim] if kept else 1
    if not 1 < experts <= MOST_EXPERTS or width > experts or not chosen.numel():
        return None
    rows = chosen.numel() // width
    tokens = told(rows, width, experts) if told is not None and width < experts else None
    sentence = EVEN if tokens is None else TOLD
    step = 1 if base == "aten::sort" else width  # the first k of a sorted row are that row's choice
    row = _aten.mul.Scalar(_aten.arange.default(rows, dtype=torch.int64, device="cpu"), step)
    place = _aten.arange.default(width, dtype=torch.int64, device="cpu")
    choice = _aten.remainder.Scalar(_aten.add.Tensor(_aten.unsqueeze.default(row, 1), place), experts)
    if tokens is not None:
        choice = laid_out(tokens, rows, width)
    others = [size for position, size in enumerate(scores.shape) if position != dim]
    if not kept:
        return chosen, Guess(_aten.view.default(choice, others), sentence)
    order = [*range(dim), scores.dim() - 1, *range(dim, scores.dim() - 1)]
    return chosen, Guess(_aten.permute.default(_aten.view.default(choice, [*others, width]), order), sentence)


def _dimension(base: str, args: Any) -> int | None:
    if base == "aten::topk":
        return args[2] if len(args) > 2 else -1
    position = next((i for i, item in enumerate(args) if i and type(item) is int), None)
    if position is not None:
        return int(args[position])
    return -1 if base == "aten::sort" else None


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)


def _is_whole(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex
