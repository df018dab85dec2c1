"""Every operator of the installed torch is in exactly one table: counted, elementwise, free, uncounted or composite."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache

import pytest
import torch
import torchvision  # noqa: F401 - registers torchvision's operators

from flopprof.formulas import RULES, SEEN_THROUGH
from flopprof.formulas.elementwise import ELEMENTWISE
from flopprof.formulas.free import FREE, FREE_GROUPS, FREE_NAMESPACES, UNCOUNTED
from releases import RELEASE, WRITTEN_FOR

NAMESPACES = frozenset({"aten", "torchvision", "quantized", "_quantized", "mkldnn", "onednn", "mkl", "prims"})

PRODUCT = re.compile("mm|conv|attention|lstm|gru|rnn|matmul|bilinear")

# Names that say a product and are none: name -> why. Free ones need no waiver.
WAIVED = {
    "aten::upsample_bilinear2d": "interpolation",
    "aten::upsample_bilinear2d_backward": "interpolation",
    "aten::_upsample_bilinear2d_aa": "interpolation",
    "aten::_upsample_bilinear2d_aa_backward": "interpolation",
    "aten::digamma": "a special function: digamma",
    "aten::lgamma": "a special function: lgamma",
    "aten::_foreach_lgamma": "a special function: lgamma",
    "aten::mvlgamma": "a special function: lgamma",
    "aten::polygamma": "a special function: polygamma",
    "aten::igamma": "a special function: igamma",
    "aten::igammac": "a special function: igamma",
    "aten::special_digamma": "a special function: digamma",
    "aten::special_gammaln": "a special function: lgamma",
    "aten::special_gammainc": "a special function: igamma",
    "aten::special_gammaincc": "a special function: igamma",
    "aten::special_polygamma": "a special function: polygamma",
    "aten::_standard_gamma_grad": "a special function: gamma's derivative",
    "aten::cummax": "a running maximum",
    "aten::cummin": "a running minimum",
    "aten::_cummax_helper": "a running maximum",
    "aten::_cummin_helper": "a running minimum",
    "aten::_cslt_sparse_mm_search": "uncounted: times kernels, what they multiply is thrown away",
    "aten::_thnn_fused_lstm_cell": "the gates after the products, elementwise",
    "aten::_thnn_fused_lstm_cell_backward_impl": "the gates, elementwise",
    "aten::_thnn_fused_gru_cell": "the gates after the products, elementwise",
    "aten::_thnn_fused_gru_cell_backward": "the gates, elementwise",
}

# torch.compile registers these when it is first imported, for graphs of its own: no counter runs inside those.
COMPILER_ONLY = re.compile("prims::(inductor_.*|_low_memory_max_pool_.*|_unsafe_index_put|fma|prepare_softmax_online)")

# Comparisons and selections are tagged pointwise too, and are free; so is clone.
FREE_POINTWISE = FREE_GROUPS["comparisons, logic, bits, selection"] | {"aten::clone"}

# Names in the tables that only other releases than the one they were written for have.
OTHER_RELEASES: frozenset[str] = frozenset()


def base_name(name: str) -> str:
    return name if name.endswith("__") or not name.endswith("_") else name[:-1]


@cache
def installed() -> dict[str, list[torch.FunctionSchema]]:
    """Schemas by base name, of every namespace."""
    table = defaultdict(list)
    for schema in torch._C._jit_get_all_schemas():
        name = base_name(schema.name)
        if not COMPILER_ONLY.fullmatch(name):
            table[name].append(schema)
    return dict(table)


def overload(schema: torch.FunctionSchema) -> str:
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name


def dispatched(schema: torch.FunctionSchema) -> bool:
    """Does the dispatcher know it? Others live in the TorchScript interpreter only."""
    try:
        return bool(torch._C._dispatch_has_kernel(overload(schema)))
    except RuntimeError:
        return False


def composite(name: str) -> bool:
    """Is every overload written in terms of other operators, so that these are seen?"""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    schemas = [schema for schema in installed()[name] if dispatched(schema)]
    return all(has(overload(schema), "CompositeImplicitAutograd") for schema in schemas)


def on_tensors(name: str) -> bool:
    """Can a dispatch mode see it with tensors?"""
    return any("Tensor" in str(schema) and dispatched(schema) for schema in installed()[name])


def tags(name: str) -> set[torch.Tag]:
    found: set[torch.Tag] = set()
    for schema in installed()[name]:
        if dispatched(schema):
            found.update(torch._C._get_operation_overload(schema.name, schema.overload_name)[2])
    return found


def tables(name: str) -> list[str]:
    candidates = {"RULES": RULES, "ELEMENTWISE": ELEMENTWISE, "FREE": FREE, "UNCOUNTED": UNCOUNTED}
    return [table for table, names in candidates.items() if name in names]


def names(*namespaces: str) -> list[str]:
    return sorted(name for name in installed() if name.partition("::")[0] in namespaces and on_tensors(name))


def test_no_operator_is_in_two_tables() -> None:
    every = {*RULES, *ELEMENTWISE, *FREE, *UNCOUNTED}
    assert {name: tables(name) for name in every if len(tables(name)) > 1} == {}
    assert every & SEEN_THROUGH == set()


@pytest.mark.parametrize("namespace", sorted(NAMESPACES))
def test_every_operator_is_classified(namespace: str) -> None:
    unknown = [
        name for name in names(namespace) if not tables(name) and name not in SEEN_THROUGH and not composite(name)
    ]
    assert unknown == []


def test_the_guard_bites() -> None:
    """An operator that no table holds and that is not composite is found."""
    assert len(names("aten")) > 1000
    assert not composite("aten::mm")
    assert composite("aten::matmul")
    assert tables("aten::mm") == ["RULES"]
    assert tables("aten::no_such_operator") == []


def test_every_operator_whose_name_says_product_is_counted_free_composite_or_waived() -> None:
    silent = [
        name
        for name in names("aten")
        if PRODUCT.search(name)
        and name not in RULES
        and name not in FREE
        and name not in SEEN_THROUGH
        and name not in WAIVED
        and not composite(name)
    ]
    assert silent == []


def test_no_waiver_is_idle() -> None:
    idle = [name for name in WAIVED if name in installed() and (name in RULES or not PRODUCT.search(name))]
    assert idle == []


def test_pointwise_operators_are_elementwise() -> None:
    wrong = [
        name
        for name in names("aten")
        if torch.Tag.pointwise in tags(name)
        and name not in ELEMENTWISE
        and name not in FREE_POINTWISE
        and not composite(name)
    ]
    assert wrong == []


def test_reductions_are_elementwise_or_searches() -> None:
    searches = {"aten::all", "aten::any", "aten::argmax", "aten::argmin", "aten::count_nonzero", "aten::hash_tensor"}
    reductions = [name for name in names("aten") if torch.Tag.reduction in tags(name) and not composite(name)]
    assert [name for name in reductions if name not in ELEMENTWISE and name not in searches] == []


def test_views_are_free() -> None:
    def aliases(name: str) -> bool:
        return any(
            result.alias_info is not None and not result.alias_info.is_write
            for schema in installed()[name]
            if dispatched(schema)
            for result in schema.returns
        )

    views = [name for name in names("aten") if not composite(name)]
    views = [name for name in views if torch.Tag.view_copy in tags(name) or aliases(name)]
    assert len(views) > 60
    assert [name for name in views if name not in FREE] == []


def test_random_factories_do_no_counted_arithmetic() -> None:
    """An operator that draws numbers is free, or a stated cost besides: dropout, attention, recurrent layers."""
    seeded = [name for name in names("aten") if torch.Tag.nondeterministic_seeded in tags(name)]
    assert [name for name in seeded if name in UNCOUNTED] == []


@pytest.mark.skipif(RELEASE < WRITTEN_FOR, reason="this torch is older than the tables: it lacks some of their names")
def test_tables_hold_no_misspelt_name() -> None:
    known = installed().keys() | OTHER_RELEASES
    foreign = {name for name in RULES if name.partition("::")[0] not in {"aten", "quantized", "torchvision"}}
    every = {*RULES, *ELEMENTWISE, *FREE, *UNCOUNTED, *SEEN_THROUGH, *WAIVED} - foreign
    assert sorted(every - known) == []


def test_free_namespaces_have_no_product() -> None:
    products = re.compile("_mm|matmul|conv[0-9_]|attention|lstm|gru|linear")
    names = [name for name in installed() if name.partition("::")[0] in FREE_NAMESPACES]
    assert [name for name in names if products.search(name) and not name.startswith("prim::")] == []


def test_every_uncounted_operator_has_a_reason() -> None:
    assert [name for name, reason in UNCOUNTED.items() if len(reason) < 10] == []
