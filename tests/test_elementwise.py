"""What each elementwise call costs, as literals derived in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torchvision  # noqa: F401 - registers torchvision's operators
from torch.nn import functional as F

from cases_elementwise import LAYER_CASES
from elementwise_tally import IMAGE, Case, X, ones, tally
from flopprof.formulas.elementwise import ELEMENTWISE, FAMILIES, qualified
from flopprof.formulas.free import FREE
from flopprof.formulas.losses import ctc_loss
from flopprof.formulas.registry import LengthsUnknown

aten = torch.ops.aten

LIST = [ones(2, 3), ones(4)]


def optimizer(name: str, **options) -> Callable[[], object]:
    """A fused step over parameters of 6 and 4 elements."""
    state = {"_fused_adam": 5, "_fused_adamw": 5, "_fused_sgd": 3, "_fused_adagrad": 4}[name]
    lists = [[t.clone() for t in LIST] for _ in range(state)]
    if name == "_fused_sgd":
        lists[-1] = lists[-1] if options["momentum"] else []
    else:
        lists[-1] = [torch.ones(()) for _ in LIST]
        if state == 5:
            lists.insert(4, [t.clone() for t in LIST] if options["amsgrad"] else [])
    return lambda: getattr(aten, name)(*lists, **options)


ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False, "maximize": False}
SGD = {
    "weight_decay": 0.0,
    "momentum": 0.0,
    "lr": 0.1,
    "dampening": 0.0,
    "nesterov": False,
    "maximize": False,
    "is_first_step": False,
}
ADAGRAD = {"lr": 0.1, "lr_decay": 0.0, "weight_decay": 0.0, "eps": 1e-8, "maximize": False}

CASES = [
    Case("relu", lambda: torch.relu(X), 6, "1 x 6 elements"),
    Case("relu", lambda: ones(2, 3).relu_(), 6, "in-place is the same operator"),
    Case("add", lambda: X + ones(3), 6, "1 x 6 of the broadcast result"),
    Case("add", lambda: torch.add(X, X, alpha=2), 12, "a multiplication and an addition"),
    Case("add", lambda: torch.add(X, X, out=ones(2, 3)), 6, "out= is the same operator"),
    Case("sub", lambda: torch.sub(X, X, alpha=3), 12, "a multiplication and a subtraction"),
    Case("rsub", lambda: torch.rsub(X, 1), 6, "1 - x"),
    Case("addcmul", lambda: torch.addcmul(X, X, X), 12, "a product and a sum"),
    Case("addcmul", lambda: torch.addcmul(X, X, X, value=0.5), 18, "two products and a sum"),
    Case("addcdiv", lambda: torch.addcdiv(X, X, X, value=0.5), 18, "quotient, product, sum"),
    Case("_add_relu", lambda: aten._add_relu(X, X), 12, "a sum and a maximum"),
    Case("addr", lambda: torch.addr(X, ones(2), ones(3)), 12, "outer product and sum; a matrix, but nothing summed"),
    Case("addr", lambda: torch.addr(X, ones(2), ones(3), beta=2, alpha=3), 24, "and two scales"),
    Case("mul", lambda: torch.outer(ones(4), ones(5)), 20, "an outer product is 20 products"),
    Case("div", lambda: torch.div(X, X), 6, "6 quotients"),
    Case("div", lambda: torch.div(X, X, rounding_mode="floor"), 12, "quotient, floor"),
    Case("clamp", lambda: X.clamp(0, 1), 12, "a maximum and a minimum"),
    Case("clamp", lambda: X.clamp(min=0), 6, "a maximum"),
    Case("clamp", lambda: X.clamp(max=0), 6, "a minimum"),
    Case("hardtanh", lambda: F.relu6(X), 12, "a maximum and a minimum"),
    Case("max", X.max, 6, "over 6 elements"),
    Case("max", lambda: X.max(dim=1), 6, "over 6 elements, whatever the dimension"),
    Case("maximum", lambda: torch.maximum(X, X), 6, "elementwise"),
    Case("amax", lambda: X.amax(0), 6, "over 6 elements"),
    Case("sum", lambda: X.sum(1), 6, "over 6 elements"),
    Case("mean", X.mean, 6, "5 additions and a division"),
    Case("var", X.var, 24, "mean, difference, square, sum: 4 x 6"),
    Case("linalg_vector_norm", lambda: torch.linalg.vector_norm(X), 12, "square and sum"),
    Case("logsumexp", lambda: X.logsumexp(1), 24, "max, difference, exp, sum"),
    Case("cumsum", lambda: X.cumsum(1), 6, "1 x 6"),
    Case("trace", lambda: torch.trace(X), 2, "the diagonal of 2 x 3"),
    Case("_softmax", lambda: X.softmax(-1), 30, "max, difference, exp, sum, division: 5 x 6"),
    Case("_log_softmax", lambda: X.log_softmax(-1), 30, "max, difference, exp, sum, difference: 5 x 6"),
    Case("sigmoid", X.sigmoid, 24, "negation, exp, sum, division"),
    Case("silu", lambda: F.silu(X), 30, "sigmoid 4 and a product"),
    Case("gelu", lambda: F.gelu(X), 30, "scale, erf, sum, two products"),
    Case("gelu", lambda: F.gelu(X, approximate="tanh"), 54, "cube 2, c, sum, k, tanh, sum, half, product"),
    Case("gelu_backward", lambda: aten.gelu_backward(X, X), 66, "11 x 6"),
    Case("gelu_backward", lambda: aten.gelu_backward(X, X, approximate="tanh"), 108, "18 x 6"),
    Case("elu", lambda: F.elu(X), 24, "comparison, exp, difference, product"),
    Case("elu", lambda: F.selu(X), 30, "and the outer scale"),
    Case("elu_backward", lambda: aten.elu_backward(X, 1, 1, 1, False, X), 24, "comparison, exp, two products"),
    Case("logit", lambda: torch.logit(X), 18, "difference, division, log"),
    Case("logit", lambda: torch.logit(X, eps=0.1), 30, "and a clamp of two bounds"),
    Case("mvlgamma", lambda: torch.mvlgamma(ones(2, 3) * 5, 4), 72, "4 lgammas, differences, sums: 3 x 4 x 6"),
    Case("native_dropout", lambda: torch.native_dropout(X, 0.5, True), 12, "mask and scale"),
    Case("native_dropout", lambda: torch.native_dropout(X, 0.5, False), 0, "nothing in evaluation"),
    # lists of tensors: 6 + 4 elements
    Case("_foreach_add", lambda: torch._foreach_add(LIST, 1), 10, "all elements of the list"),
    Case("_foreach_add", lambda: torch._foreach_add(LIST, LIST, alpha=2), 20, "scaled"),
    Case("_foreach_add", lambda: torch._foreach_add_([t.clone() for t in LIST], LIST), 10, "in-place returns nothing"),
    Case("_foreach_mul", lambda: torch._foreach_mul(LIST, LIST), 10, "all elements of the list"),
    Case("_foreach_pow", lambda: torch._foreach_pow(2.0, LIST), 10, "the list is the second argument"),
    Case("_foreach_lerp", lambda: torch._foreach_lerp(LIST, LIST, 0.5), 30, "3 x 10"),
    Case("_foreach_addcdiv", lambda: torch._foreach_addcdiv(LIST, LIST, LIST, [1.0, 2.0]), 30, "quotient, scale, sum"),
    Case("_foreach_addcmul", lambda: torch._foreach_addcmul(LIST, LIST, LIST), 20, "product, sum"),
    Case("_fused_adam", optimizer("_fused_adam", **ADAM), 130, "m 3, v 4, denominator 3, step 3: 13 x 10"),
    Case("_fused_adam", optimizer("_fused_adam", **{**ADAM, "weight_decay": 0.1, "amsgrad": True}), 160, "16 x 10"),
    Case("_fused_adamw", optimizer("_fused_adamw", **{**ADAM, "weight_decay": 0.1, "maximize": True}), 150, "15 x 10"),
    Case("_fused_sgd", optimizer("_fused_sgd", **SGD), 20, "2 x 10"),
    Case(
        "_fused_sgd",
        optimizer("_fused_sgd", **{**SGD, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
        70,
        "step 2, decay 2, momentum 3",
    ),
    Case(
        "_fused_sgd",
        optimizer("_fused_sgd", **{**SGD, "momentum": 0.9, "nesterov": True, "is_first_step": True}),
        40,
        "step 2, Nesterov 2; the first buffer is a copy",
    ),
    Case("_fused_adagrad", optimizer("_fused_adagrad", **{**ADAGRAD, "weight_decay": 0.1}), 90, "9 x 10"),
    *LAYER_CASES,
]


@pytest.mark.filterwarnings("ignore:.*(beta|deprecated).*:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case.name}" for i, case in enumerate(CASES)])
def test_a_call_costs_what_its_equation_says(case: Case) -> None:
    assert tally(case.call).get(case.name, 0) == case.flops, case.words


def test_every_cost_that_depends_on_arguments_has_a_case() -> None:
    cased = {ELEMENTWISE[case.name if "::" in case.name else f"aten::{case.name}"].cost_of for case in CASES}
    named = {function.__qualname__ for function in cased if function}
    missing = {entry.cost_of.__qualname__ for entry in ELEMENTWISE.values() if entry.cost_of} - named
    assert not missing


def test_a_name_is_in_one_family_only() -> None:
    names = Counter(name for row in FAMILIES for name in qualified(row.names))
    names.update(name for name, entry in ELEMENTWISE.items() if entry.cost_of is not None)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("spelling", ["fused", "foreach", "for loop"])
def test_every_spelling_of_adam_costs_the_same(spelling: str) -> None:
    weight = ones(2, 3, requires_grad=True)
    weight.grad = ones(2, 3)
    adam = torch.optim.Adam([weight], fused=spelling == "fused", foreach=spelling == "foreach")
    assert sum(tally(adam.step).values()) == 13 * 6 + 1, "13 per parameter, 1 to count the step"


COMPOSITES = {
    "softmax": lambda: aten.softmax.int(X, 1),
    "log_softmax": lambda: aten.log_softmax.int(X, 1),
    "layer_norm": lambda: aten.layer_norm(IMAGE, [8], ones(8), ones(8)),
    "batch_norm train": lambda: aten.batch_norm(IMAGE, ones(3), ones(3), ones(3), ones(3), True, 0.1, 1e-5, False),
    "batch_norm eval": lambda: aten.batch_norm(IMAGE, ones(3), None, ones(3), ones(3), False, 0.1, 1e-5, False),
    "relu6": lambda: aten.relu6(X),
    "isfinite": lambda: aten.isfinite(X),
    "square": lambda: aten.square(X),
    "max_pool2d": lambda: aten.max_pool2d(IMAGE, [3, 3]),
    "adaptive_avg_pool2d": lambda: aten.adaptive_avg_pool2d(IMAGE, [3, 5]),
    "adaptive_avg_pool2d to 1": lambda: aten.adaptive_avg_pool2d(IMAGE, [1, 1]),
    "upsample_bilinear2d": lambda: aten.upsample_bilinear2d.vec(IMAGE, [16, 16], False, None),
    "max of two": lambda: aten.max.other(X, ones(4, 2, 3)),
    "divide": lambda: aten.divide.Tensor_mode(X, X, rounding_mode="trunc"),
    "multiply": lambda: aten.multiply(X, X),
    "special_expit": lambda: aten.special_expit(X),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_composite_costs_whole_what_its_parts_cost(name: str) -> None:
    with torch.inference_mode():
        whole = tally(COMPOSITES[name])
    with torch.no_grad():
        parts = tally(COMPOSITES[name])
    assert sum(whole.values()) == sum(parts.values()) > 0


def test_free_operators_cost_nothing() -> None:
    def selections() -> None:
        mask = X > 0
        torch.where(mask & ~mask, X, 0).masked_fill(mask, 1).to(torch.float16).t().contiguous()[:, [1, 0]].sort()
        torch.cat([X, X]).argmax()
        torch.randn(3).topk(2)

    assert tally(selections) == {}


def test_a_cost_that_values_decide_is_said_to_be_unknown() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 4, 4]])
    with pytest.raises(LengthsUnknown, match="sampling_ratio"):
        tally(lambda: torch.ops.torchvision.roi_align(IMAGE, boxes, 1.0, 2, 2, -1, False))
    with pytest.raises(LengthsUnknown, match="ctc_loss"):
        lengths = torch.ones(2, dtype=torch.long, device="meta")
        ctc_loss(ones(5, 2, 4), ones(2, 3), lengths, lengths)


def test_a_sum_of_adaptive_taps_is_the_windows_taps() -> None:
    """n + m - gcd(n, m) against the loop over windows."""
    for size in range(1, 12):
        for count in range(1, 12):
            taps = sum(-(-(i + 1) * size // count) - i * size // count for i in range(count))
            whole = tally(lambda: aten._adaptive_avg_pool2d(ones(1, 1, size, 1), [count, 1]))
            assert whole == {"_adaptive_avg_pool2d": taps}


def test_the_document_lists_every_family_and_group(pytestconfig: pytest.Config) -> None:
    text = (pytestconfig.rootpath / "docs" / "operators.md").read_text()
    rows = [row for row in FAMILIES if f"| {row.equation.replace('|', chr(92) + '|')} | {row.cost} |" not in text]
    assert rows == []
    words = set(text.replace("`", " ").replace(",", " ").split())
    assert sorted(name for name in {*ELEMENTWISE, *FREE} if name.removeprefix("aten::") not in words) == []
