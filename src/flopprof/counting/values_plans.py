"""What carrying values means for one torch operator, read once from its schema and tags."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from flopprof.counting.guesses import GUESSED
from flopprof.counting.values_store import Fact

_MOST_SPECIAL = 64  # labels are compared with this many tokens at most: not with a whole vocabulary
_SCALARS = ("bool", "int", "float", "number", "Scalar")

# Their result has the shape of a tensor whose values do not matter: value written, or where among the arguments it is.
_FILLED: dict[str, Any] = {
    "aten::zeros_like": 0, "aten::new_zeros": 0, "aten::ones_like": 1, "aten::new_ones": 1,
    "aten::full_like": (1,), "aten::new_full": (2,), "aten::empty_like": None, "aten::new_empty": None,
    "aten::new_empty_strided": None,
}  # fmt: skip
_LEAVING = frozenset({"aten::copy", "aten::_to_copy", "aten::masked_scatter_backward"})
_UNWRITTEN = frozenset({"aten::empty", "aten::empty_strided", "aten::empty_permuted"})

# They change which storage a tensor has, or its size: its values are not followed through them.
_MOVING = frozenset({"aten::set", "aten::resize", "aten::resize_as", "aten::_resize_output"})

# They move elements, and compute nothing from them: what is known of labels stays known.
# Their result does not depend on what the argument that they write to held before, as far as they write.
_OVERWRITING = frozenset(
    f"aten::{name}"
    for name in ("copy", "fill", "zero", "index_put", "_index_put_impl", "index_copy", "index_fill", "scatter",
                 "masked_fill", "masked_scatter")
)  # fmt: skip
_CARRYING_NAMES = """clone copy contiguous cat stack index _unsafe_index index_select gather take flip roll repeat
    slice_scatter select_scatter index_copy index_fill index_put _index_put_impl masked_fill masked_scatter
    masked_select where scatter constant_pad_nd fill lift_fresh_copy _to_copy view_copy expand_copy slice_copy
    select_copy unsqueeze_copy squeeze_copy permute_copy transpose_copy _unsafe_view"""
_CARRYING = frozenset(f"aten::{name}" for name in _CARRYING_NAMES.split())
_UNIQUE = frozenset({"aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"})
_EQUAL = frozenset({"aten::eq", "aten::ne", "aten::isin"})
_ORDERED = frozenset({"aten::gt", "aten::ge", "aten::lt", "aten::le"})


class Plan:
    """How to follow values through one overload.

    view      its results are views of its arguments: they share their storages, and so their values
    composite is written in terms of others, and reached this mode whole
    asks      its result's shape depends on values, or it is a Python number
    random    its result is not for us to know
    plain     on unknown operands it runs as it is: nothing is to be answered or refused
    writes    positions and names of the arguments that it writes to
    filled    (value or its position,) of results that only take an argument's shape
    """

    __slots__ = (
        "asks", "base", "carrying", "composite", "device", "equal", "filled", "guessed", "higher", "names",
        "ordered", "overwriting", "plain", "random", "unique", "unwritten", "view", "writes",
    )  # fmt: skip

    def __init__(self, func: Any, base: str) -> None:
        self.base = base
        self.higher = isinstance(func, torch._ops.HigherOrderOperator)
        schema = None if self.higher else func._schema
        arguments = schema.arguments if schema is not None else ()
        returns = schema.returns if schema is not None else ()
        self.names = tuple(item.name for item in arguments)
        self.writes = tuple(
            item.name if item.kwarg_only else position
            for position, item in enumerate(arguments)
            if item.alias_info is not None and item.alias_info.is_write
        )
        self.composite = not self.higher and _composite(func)
        self.view = (
            not self.composite
            and not self.writes
            and any(item.alias_info is not None for item in returns)
            and all("Tensor" in str(item.type) for item in returns)
        )
        tags = func.tags if schema is not None else ()
        self.asks = (
            torch.Tag.data_dependent_output in tags
            or torch.Tag.dynamic_output_shape in tags
            or (any(str(item.type) in _SCALARS for item in returns) and _takes_tensors(arguments))
        )
        self.random = torch.Tag.nondeterministic_seeded in tags or base in _MOVING
        self.device = next((i for i, item in enumerate(arguments) if item.name == "device"), None)
        self.filled = (_FILLED[base],) if base in _FILLED else None
        self.overwriting = base in _OVERWRITING and self.writes == (0,)
        self.unwritten = base in _UNWRITTEN
        self.guessed = base in GUESSED
        self.plain = not self.asks and base not in _LEAVING
        self.carrying, self.unique = base in _CARRYING, base in _UNIQUE
        self.equal, self.ordered = base in _EQUAL, base in _ORDERED

    def overwrites(self, tensor: torch.Tensor, args: Any, kwargs: Any) -> bool:
        """Does a call write to this tensor without a look at what it holds?"""
        return (self.overwriting and args[0] is tensor) or any(
            kwargs.get(place) is tensor for place in self.writes if isinstance(place, str)
        )

    def written(self, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
        """The tensors that a call writes to."""
        for place in self.writes:
            if isinstance(place, str):
                item = kwargs.get(place)
            else:
                item = args[place] if place < len(args) else kwargs.get(self.names[place])
            for tensor in item if isinstance(item, list | tuple) else (item,):
                if isinstance(tensor, torch.Tensor):
                    yield tensor


def _composite(func: Any) -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))
    except RuntimeError:  # a few operators live in Python alone
        return False


def _takes_tensors(arguments: Any) -> bool:
    return any("Tensor" in str(item.type) for item in arguments)


def labelled(plan: Plan, args: Any, kwargs: Any, fact_of: Callable[[torch.Tensor], Fact | None]) -> bool | None:
    """Of an operator on labels: are its results labels, or known as usual (False), or not known at all (None)?"""
    if plan.carrying:
        dtype = kwargs.get("dtype")
        return None if dtype is torch.bool or (dtype is not None and dtype.is_floating_point) else True
    if plan.unique:
        return True
    if not (plan.equal or plan.ordered) or len(args) < 2:
        return None
    left, right = args[0], args[1]
    if not isinstance(left, torch.Tensor):
        return None
    fact = fact_of(left)
    if fact is None or not fact.labels:
        left, right = right, left
    if isinstance(right, torch.Tensor):
        other = fact_of(right)
        if other is not None and other.labels:
            return False if plan.equal else None
        return False if plan.equal and right.numel() <= _MOST_SPECIAL else None
    return False if plan.equal or (isinstance(right, int | float) and right <= 0) else None


def leaves_meta(plan: Plan, args: Any, kwargs: Any) -> bool:
    """Does a call copy from meta to a real device?"""
    if plan.base == "aten::copy":
        return bool(args[1].is_meta and not args[0].is_meta)
    if plan.base == "aten::_to_copy" and args[0].is_meta:
        device = kwargs.get("device")
        return device is not None and torch.device(device).type != "meta"
    return False


def tensors_in(args: Any, kwargs: Any = None) -> Iterator[torch.Tensor]:
    """The tensors among an operator's arguments, and those in its lists."""
    for item in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(item, torch.Tensor):
            yield item
        elif type(item) in (list, tuple):
            for each in item:
                if isinstance(each, torch.Tensor):
                    yield each


def on_cpu(device: Any) -> Any:
    """An operator's device argument, the CPU where it says meta."""
    return "cpu" if device is not None and torch.device(device).type == "meta" else device
