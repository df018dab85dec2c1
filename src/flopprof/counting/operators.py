"""What to do with one torch operator: looked up once per overload, then a dictionary read by identity."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch

from flopprof.counting import questions
from flopprof.counting.refused import shaped
from flopprof.formulas import RULES
from flopprof.formulas.elementwise import ELEMENTWISE, Elementwise
from flopprof.formulas.free import FREE, FREE_NAMESPACES, UNCOUNTED
from flopprof.formulas.registry import Formula, generation


class Kind(IntEnum):
    """How an operator is treated."""

    FREE = 0
    ELEMENTWISE = 1
    COUNTED = 2
    OPAQUE = 3  # no table knows it: run it with the counter looking inside
    UNCOUNTED = 4
    HIGHER_ORDER = 5
    CHOICE = 6  # free or elementwise; routers choose experts by it


# In backward, these nodes spell their matrix-vector products as a broadcast multiplication.
PRODUCT_NODES = frozenset({"MvBackward0", "DotBackward0", "VdotBackward0", "AddmvBackward0"})

# Free operators that make new storage of one tensor's values: a copy of a parameter is the parameter still.
_COPIES = frozenset({"aten::_to_copy", "aten::clone", "aten::contiguous", "aten::copy", "aten::cat", "aten::stack"})
# The same among elementwise ones: a masked, scaled, normalised or merged parameter is the parameter still.
_REFORMS = frozenset(
    f"aten::{name}"
    for name in (
        *("_weight_norm_interface", "_weight_norm", "linalg_vector_norm", "norm", "sum", "mean", "var_mean", "std"),
        *("mul", "div", "add", "sub", "neg", "reciprocal", "pow", "sqrt", "rsqrt", "abs", "sign", "round", "where"),
        *("masked_fill", "clamp", "clamp_min", "native_batch_norm", "_native_batch_norm_legit", "batch_norm"),
        "_batch_norm_impl_index",
    )
)


# By their index, the last two tell which maximum was a choice.
_CHOICES = frozenset({"aten::topk", "aten::argmax", "aten::gather", "aten::scatter"})

# Whole under inference_mode; with complex operands they run three real convolutions, which are then counted.
_COMPLEX_INSIDE = frozenset(
    {f"aten::conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)} | {"aten::_convolution_mode"}
)


def is_product(left: Any, right: Any) -> bool:
    """Do these, multiplied in a node of PRODUCT_NODES, spell its product? A hook there scales by a like shape.

    The product is of a column, or for a dot of a number for each sample, and something wider.
    """
    if not isinstance(right, torch.Tensor) or not right.dim() or left.shape == right.shape:
        return False
    return not left.dim() or 1 in (left.shape[-1], right.shape[-1])


def _no_formula(*_: Any, **__: Any) -> int:
    raise LookupError("this operator has no formula")


# torch's generated bindings of these overloads read the same arguments in half the time that the interpreter of
# schemas takes, which `func._op` goes through. For a view that is most of what it costs.
_aten, _functions, _methods = torch.ops.aten, torch._C._VariableFunctions, torch._C.TensorBase
BINDINGS: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: _functions.add,
    _aten.add_.Tensor: _methods.add_,
    _aten.addmm.default: _functions.addmm,
    _aten.bmm.default: _functions.bmm,
    _aten.clone.default: _functions.clone,
    _aten.convolution.default: _functions.convolution,
    _aten.detach.default: _functions.detach,
    _aten.div.Tensor: _functions.div,
    _aten.embedding.default: _functions.embedding,
    _aten.expand.default: _methods.expand,
    _aten.mm.default: _functions.mm,
    _aten.mul.Tensor: _functions.mul,
    _aten.native_batch_norm.default: _functions.native_batch_norm,
    _aten.native_layer_norm.default: _functions.native_layer_norm,
    _aten.permute.default: _functions.permute,
    _aten.relu.default: _functions.relu,
    _aten.select.int: _functions.select,
    _aten.sum.dim_IntList: _functions.sum,
    _aten.t.default: _functions.t,
    _aten.transpose.int: _functions.transpose,
    _aten.unbind.int: _functions.unbind,
    _aten.unsqueeze.default: _functions.unsqueeze,
    _aten.view.default: _methods.view,
}


class Entry:
    """One operator overload and its treatment."""

    __slots__ = (
        "call", "complex_inside", "derives", "elementwise", "formula", "func", "kind", "makes_storage",
        "name", "optional", "per_in", "per_out", "positions", "product", "reason", "silent", "unit", "wanted",
    )  # fmt: skip

    def __init__(self, func: Any, name: str, kind: Kind) -> None:
        self.func = func  # also keeps id(func) from being taken by another operator
        self.name = name
        self.kind = kind
        self.call: Callable[..., Any] = BINDINGS.get(func) or shaped(name, getattr(func, "_op", func))
        if questions.asks(func):
            self.call = questions.watched(self.call)
        self.formula: Formula = _no_formula
        self.wanted = False
        self.elementwise: Elementwise | None = None
        self.unit = 0
        self.per_out = self.per_in = False
        self.derives = name in _COPIES or name in _REFORMS
        self.complex_inside = name in _COMPLEX_INSIDE
        self.product = name == "aten::mul"
        self.positions: tuple[int, ...] = (0, 1)
        self.optional: tuple[int, ...] = ()  # positions of tensors that may be left out
        self.makes_storage = not _is_view(func) and not name.startswith(("aten::empty", "aten::new_empty"))
        self.silent = kind is Kind.FREE and not self.makes_storage
        self.reason = ""


_entries: dict[int, Entry] = {}
_generation = -1


def entries() -> dict[int, Entry]:
    """The table by id(func), emptied when a formula was registered since."""
    global _generation  # noqa: PLW0603 - one table for the process
    if _generation != generation():
        _entries.clear()
        _generation = generation()
    return _entries


def base_name(func: Any) -> str:
    """`aten::add_.Tensor` -> `aten::add`: the name that tables use."""
    if isinstance(func, torch._ops.HigherOrderOperator):
        return f"higher_order::{func.name()}"
    name: str = func._schema.name
    if name.endswith("_") and not name.endswith("__") and func._schema.is_mutable:
        name = name[:-1]
    return name


def learn(func: Any) -> Entry:
    """The entry of an operator that was not seen before."""
    entry = _entries[id(func)] = _classify(func, base_name(func))
    return entry


def _classify(func: Any, name: str) -> Entry:
    if name in RULES:
        entry = Entry(func, name, Kind.COUNTED)
        rule = RULES[name]
        entry.formula, entry.positions, entry.wanted = rule.formula, rule.operands, rule.wanted
        entry.optional = _positions(func, "Optional[Tensor]")
    elif isinstance(func, torch._ops.HigherOrderOperator):
        entry = Entry(func, name, Kind.HIGHER_ORDER)
        entry.positions = (0, 1, 2)  # query, key, value of flex_attention: no other is counted by its arguments
    elif name in ELEMENTWISE:
        entry = Entry(func, name, Kind.ELEMENTWISE)
        cost = ELEMENTWISE[name]
        entry.elementwise = cost
        entry.unit = cost.cost
        entry.per_out = cost.per == "out" and cost.cost_of is None
        entry.per_in = cost.per == "in" and cost.cost_of is None and 0 in _positions(func, "Tensor")
        if func is _aten.max.dim or name in _CHOICES:
            entry.kind = Kind.CHOICE
    elif name in _CHOICES:
        entry = Entry(func, name, Kind.CHOICE)
    elif name in FREE or name.partition("::")[0] in FREE_NAMESPACES or not _has_tensor(func):
        entry = Entry(func, name, Kind.FREE)
    elif name in UNCOUNTED:
        entry = Entry(func, name, Kind.UNCOUNTED)
        entry.reason = UNCOUNTED[name]
    else:
        entry = Entry(func, name, Kind.OPAQUE)
    return entry


def _is_view(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    if schema is None:
        return False
    if not any(item.alias_info is not None and not item.alias_info.is_write for item in schema.returns):
        return False
    # reshape, contiguous, to ...: a view or a copy, as it comes
    return not _has_kernel(func, "CompositeImplicitAutograd")


def _has_kernel(func: Any, key: str) -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))
    except RuntimeError:  # a few operators (sym_size) live in Python alone
        return False


def is_composite(func: Any) -> bool:
    """Is the operator written in terms of other operators?"""
    return _has_kernel(func, "CompositeImplicitAutograd") or _has_kernel(func, "CompositeExplicitAutograd")


def _positions(func: Any, kind: str) -> tuple[int, ...]:
    """Where among the positional arguments those of a type are."""
    return tuple(i for i, item in enumerate(func._schema.arguments) if not item.kwarg_only and kind == str(item.type))


def _has_tensor(func: Any) -> bool:
    schema = func._schema
    return any("Tensor" in str(item.type) for item in (*schema.arguments, *schema.returns))


def keys_below_python(tensors: list[torch.Tensor]) -> torch._C.DispatchKeySet:
    """The dispatch keys that come after the Python key for these arguments, in this thread's state."""
    keys = torch._C._dispatch_tls_local_include_set()
    for tensor in tensors:
        keys = keys | torch._C._dispatch_keys(tensor)
    keys = keys - torch._C._dispatch_tls_local_exclude_set()
    keys = keys & torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.Python)
    return keys - torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
