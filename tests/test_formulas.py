"""Every formula against its row of the case table, through the real operator where it can run here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flopprof.formulas as formulas
from case import Case
from cases import CASES, WAIVED
from flopprof.errors import FormulaError
from flopprof.formulas import RULES, SEEN_THROUGH, Cost, LengthsUnknown, register_formula
from flopprof.formulas.attention import flex_cost, visible_pairs
from releases import WRITTEN_FOR_THIS

# Operators that torch deprecates, or calls a prototype, still count.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def base_name(func: Any) -> str:
    """Schema base name: no overload, no in-place underscore."""
    name: str = func._schema.name
    return name if name.endswith("__") else name.removesuffix("_")


def as_cost(cost: int | Cost) -> Cost:
    return cost if isinstance(cost, Cost) else Cost(cost)


class Tally(TorchDispatchMode):
    """Costs of every call of an operator that has a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[tuple[str, Cost]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        rule = RULES.get(base_name(func))
        if rule is not None:
            node = torch._C._current_autograd_node()
            wanted = tuple(edge is not None for edge, _ in node.next_functions) if node and rule.wanted else None
            extra = {"wanted": wanted} if rule.wanted else {}
            self.costs.append((rule.name, as_cost(rule.formula(*args, **{**kwargs, "out": out}, **extra))))
        return out

    def flops(self, *names: str) -> int:
        return sum(cost.flops for name, cost in self.costs if not names or name in names)


def built(value: Any, make: Callable[[tuple[int, ...]], Any]) -> Any:
    """Arguments of a case: tuples of sizes become tensors, lists of tuples lists of tensors."""
    if isinstance(value, tuple) and all(isinstance(size, int) for size in value):
        return make(value)
    if isinstance(value, list) and any(isinstance(item, (tuple, list)) for item in value):
        return [built(item, make) for item in value]
    return value


def run(case: Case) -> list[Cost]:
    """The costs of the operator's calls as a dispatch mode sees them."""
    tally = Tally()
    if callable(case.args):
        with tally:
            case.args()
    else:
        namespace, name = case.op.split("::")
        op = getattr(getattr(getattr(torch.ops, namespace), name), case.overload)
        dtype = getattr(torch, case.dtype)

        def make(shape: tuple[int, ...]) -> torch.Tensor:
            if case.device == "meta":
                return torch.empty(shape, dtype=dtype, device="meta")
            return torch.ones(shape).to(dtype)

        # Composite operators reach a mode in one piece only under inference_mode.
        with torch.inference_mode(), tally:
            op(*(built(value, make) for value in case.args), **case.kwargs)
    return [cost for name, cost in tally.costs if name == case.op]


def on_stand_ins(case: Case) -> list[Cost]:
    def make(shape: tuple[int, ...]) -> Any:
        return SimpleNamespace(shape=shape)

    rule = RULES[case.op]
    extra = {"wanted": case.wanted} if rule.wanted else {}
    args = [built(value, make) for value in case.args]
    return [as_cost(rule.formula(*args, **case.kwargs, out=built(case.out, make), **extra))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_formula_equals_literal_and_arithmetic(case: Case) -> None:
    namespace, _, op = case.op.partition("::")
    if not WRITTEN_FOR_THIS and not hasattr(getattr(torch.ops, namespace), op):
        pytest.skip("this torch has no such operator")
    costs = on_stand_ins(case) if case.device == "shapes" else run(case)
    assert costs, f"{case.op} was never seen"
    assert case.flops == eval(case.arithmetic)
    assert sum(cost.flops for cost in costs) == case.flops
    assert all(type(cost.flops) is int for cost in costs)
    assert sum(cost.recompute for cost in costs) == case.recompute
    assert all(cost.mask_known == (case.causal is not None) for cost in costs)
    assert sum(cost.causal or 0 for cost in costs) == (case.causal or 0)


def test_every_rule_has_a_row() -> None:
    shipped = {name for name, rule in RULES.items() if rule.formula.__module__.startswith("flopprof.")}
    assert shipped - {case.op for case in CASES} == set()
    assert {case.op for case in CASES} - shipped == set()
    assert not shipped & SEEN_THROUGH
    assert all(WAIVED.values())


def test_what_can_run_is_not_waived() -> None:
    for name in ("aten::mm", "aten::convolution", "aten::linear", "aten::lstm", "quantized::conv2d"):
        assert name not in WAIVED


@pytest.mark.parametrize("name", sorted(n for n in RULES if n.startswith(("aten::", "quantized::"))))
def test_rules_name_operators_that_exist(name: str) -> None:
    namespace, _, op = name.partition("::")
    assert hasattr(getattr(torch.ops, namespace), op) or not WRITTEN_FOR_THIS


# --- attention -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("keys", [1, 3, 7])
def test_visible_pairs_equal_a_count_of_the_mask(queries: int, keys: int) -> None:
    bounds = [None, *range(-6, 7)]
    for first, last in itertools.product(bounds, bounds):
        if first is not None and last is not None and last < first - 1:
            continue
        mask = [
            (first is None or j >= i + first) and (last is None or j <= i + last)
            for i in range(queries)
            for j in range(keys)
        ]
        assert visible_pairs(queries, keys, first, last) == sum(mask)


def test_flex_cost_counts_block_mask() -> None:
    shape = (2, 3, 4, 8)
    assert flex_cost(shape, shape, shape) == Cost(2 * 96 * 16)
    assert flex_cost(shape, shape, shape, 60) == Cost(2 * 96 * 16, causal=2 * 60 * 16, mask_known=True)
    backward = flex_cost(shape, (2, 1, 4, 8), (2, 1, 4, 8), 60, backward=True)
    assert backward.flops == 2 * flex_cost(shape, shape, shape).flops
    assert (backward.causal, backward.recompute, backward.recompute_causal) == (2 * 2 * 60 * 16, 2 * 96 * 8, 2 * 60 * 8)


WANTED = list(itertools.product((False, True), repeat=3))


@pytest.mark.parametrize("wanted", WANTED[1:], ids=str)
def test_attention_backward_equals_the_unfused_one(wanted: tuple[bool, bool, bool]) -> None:
    counts = {}
    for device in ("cpu", "meta"):
        shapes = [(2, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 8)]
        operands = [torch.ones(s, device=device, requires_grad=w) for s, w in zip(shapes, wanted, strict=True)]
        with Tally() as tally:
            torch.nn.functional.scaled_dot_product_attention(*operands).sum().backward()
        counts[device] = tally.flops()
    assert counts["cpu"] == counts["meta"] > 0


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_lengths_without_values_are_unknown(device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        cumulative = torch.empty(3, dtype=torch.int32)
    q = torch.empty(8, 2, 16, device="meta")
    rule = RULES["aten::_flash_attention_forward"]
    with pytest.raises(LengthsUnknown, match="lengths"):
        rule.formula(q, q, q, cumulative, cumulative, 5, 5, 0.0, False, False, out=(q,))


def test_sparse_on_meta_is_unknown() -> None:
    sparse = torch.eye(4).to_sparse().to("meta")
    with pytest.raises(LengthsUnknown, match="non-zeros"):
        RULES["aten::mm"].formula(sparse, torch.empty(4, 2), out=None)


# --- recurrent: every path equals the unfused one ------------------------------------------------------------------
def unfused(model: nn.Module, x: Any, states: Any) -> tuple[int, int]:
    """(forward, backward) FLOPs of the products that autograd runs on meta."""
    with Tally() as forward:
        result = model(x, states)[0]
    data = result.data if isinstance(result, nn.utils.rnn.PackedSequence) else result
    with Tally() as backward:
        data.sum().backward()
    assert {name for name, _ in forward.costs + backward.costs} <= {"aten::mm", "aten::addmm", "aten::bmm"}
    return forward.flops(), backward.flops()


STACKS = [
    {"kind": kind, "num_layers": layers, "bidirectional": bidirectional, "proj_size": proj, "bias": bias}
    for kind, layers, bidirectional, proj, bias in [
        (nn.LSTM, 1, False, 0, True),
        (nn.LSTM, 2, True, 0, True),
        (nn.LSTM, 2, True, 2, True),
        (nn.LSTM, 2, False, 2, False),
        (nn.GRU, 2, True, 0, True),
        (nn.RNN, 3, False, 0, False),
    ]
]
FROZEN = {
    "none": lambda name: False,
    "all": lambda name: True,
    "lower layer": lambda name: "_l0" in name,
    "all but the state's": lambda name: "weight_hh_l0" not in name,
    "all but one bias": lambda name: name != "bias_hh_l0_reverse",
    "all but the projection": lambda name: "weight_hr_l0" not in name,
}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("leaves", ["", "x", "h", "c"], ids=lambda leaves: f"wants-{leaves or 'weights'}")
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("stack", STACKS, ids=lambda s: f"{s['kind'].__name__}{s['num_layers']}x{s['proj_size']}")
def test_cudnn_rnn_equals_the_unfused_one(stack: dict[str, Any], frozen: str, leaves: str, packed: bool) -> None:
    options = {key: value for key, value in stack.items() if key != "kind" and (key != "proj_size" or value)}
    is_lstm = stack["kind"] is nn.LSTM
    if "c" in leaves and not is_lstm:
        pytest.skip("no cell state")
    model = stack["kind"](3, 4, **options, device="meta")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    directions, layers = 1 + stack["bidirectional"], stack["num_layers"]
    lead = (directions * layers, 2)
    hx = torch.empty(*lead, stack["proj_size"] or 4, device="meta", requires_grad="h" in leaves)
    cx = torch.empty(*lead, 4, device="meta", requires_grad="c" in leaves)
    data = torch.empty(*((4, 3) if packed else (3, 2, 3)), device="meta", requires_grad="x" in leaves)
    weights = list(model._flat_weights)
    wanted = ("x" in leaves, *(w.requires_grad for w in weights), "h" in leaves, "c" in leaves)
    if not any(wanted):
        pytest.skip("nothing needs a gradient")
    sizes = [2, 1, 1] if packed else []
    x = nn.utils.rnn.PackedSequence(data, torch.tensor(sizes)) if packed else data

    forward, backward = unfused(model, x, (hx, cx) if is_lstm else hx)

    mode = {nn.LSTM: 2, nn.GRU: 3, nn.RNN: 1}[stack["kind"]]
    stride, cell = len(weights) // (directions * layers), cx if is_lstm else None
    shape = [mode, 4, stack["proj_size"], layers, False, 0.0, True, stack["bidirectional"], sizes, None]
    rules = RULES["aten::_cudnn_rnn"].formula, RULES["aten::_cudnn_rnn_backward"].formula
    assert rules[0](data, weights, stride, None, hx, cell, *shape, out=()) == forward
    grads = [None, None, None]
    mask = [wanted[0], wanted[-2], wanted[-1], any(wanted[1:-2])]
    args = [data, weights, stride, None, hx, cell, None, *grads, *shape, None, mask]
    assert rules[1](*args, out=(), wanted=wanted) == backward


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("leaves", ["", "x", "xh"])
def test_fused_cpu_lstm_equals_the_unfused_one(options: dict[str, Any], leaves: str) -> None:
    counts = []
    for device in ("cpu", "meta"):
        model = nn.LSTM(3, 4, **options, device=device)
        layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        states = torch.zeros(layers, 2, 4, device=device, requires_grad="h" in leaves), torch.zeros(layers, 2, 4)
        x = torch.zeros(5, 2, 3, device=device, requires_grad="x" in leaves)
        with Tally() as tally:
            model(x, (states[0], states[1].to(device)))[0].sum().backward()
        counts.append(tally.flops())
    assert counts[0] == counts[1] > 0


# --- laws ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_backward_is_twice_the_forward(heads: int, causal: bool) -> None:
    q, k, v = (SimpleNamespace(shape=shape) for shape in ((2, 3, 4, 8), (2, heads, 6, 8), (2, heads, 6, 5)))
    none = [None] * 2
    calls = {
        "flash_attention_for_cpu": [*none, 0.0, causal],
        "flash_attention": [*none, *none, 4, 6, 0.0, causal, *none],
        "cudnn_attention": [*none, *none, None, *none, 4, 6, 0.0, causal],
        "efficient_attention": [None, *none, *none, 0.0, [True, True, True, False], causal],
        "fused_attention_overrideable": [None, [True, True, True, False], *none, *none, 4, 6, 0.0, causal, *none],
    }
    for name, rest in calls.items():
        op = f"aten::_scaled_dot_product_{name}"
        bias = [None, True] if name.startswith(("cudnn", "efficient")) else [None] if "over" in name else []
        forward = RULES[op].formula(q, k, v, *bias, 0.0, causal, out=(q,))
        backward = RULES[f"{op}_backward"].formula(q, q, k, v, *rest, out=None)
        assert forward.flops == 2 * (2 * 3 * 4 * 6) * (8 + 5)
        assert forward.causal == (2 * (2 * 3 * (1 + 2 + 3 + 4)) * (8 + 5) if causal else None)
        assert backward.flops == 2 * forward.flops
        assert backward.causal == (2 * forward.causal if causal else None)
        assert backward.recompute == 2 * (2 * 3 * 4 * 6) * 8
        assert backward.recompute_causal == (2 * (2 * 3 * (1 + 2 + 3 + 4)) * 8 if causal else None)


def test_composites_count_what_their_pieces_count() -> None:
    calls: list[Callable[[], Any]] = [
        lambda: torch.nn.functional.linear(torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(5)),
        lambda: torch.nn.functional.linear(torch.ones(4), torch.ones(5, 4)),
        lambda: torch.ones(2, 1, 3, 4) @ torch.ones(5, 4, 3),
        lambda: torch.ones(4) @ torch.ones(2, 4, 3),
        lambda: torch.nn.functional.conv1d(torch.ones(3, 7), torch.ones(4, 3, 3), padding="same"),
        lambda: torch.nn.functional.conv_transpose2d(torch.ones(1, 4, 3, 3), torch.ones(4, 3, 2, 2), groups=2),
        lambda: nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)(torch.ones(5, 2, 3)),
        lambda: nn.GRU(3, 4, 2, bidirectional=True)(torch.ones(5, 2, 3)),
        lambda: nn.LSTMCell(3, 4)(torch.ones(2, 3)),
    ]
    for call in calls:
        with torch.no_grad(), Tally() as pieces:
            call()
        with torch.inference_mode(), Tally() as whole:
            call()
        assert pieces.flops() == whole.flops() > 0


# --- registering ---------------------------------------------------------------------------------------------------
@pytest.fixture
def rules() -> Any:
    before = dict(RULES)
    yield RULES
    RULES.clear()
    RULES.update(before)


def test_register_formula(rules: dict[str, Any]) -> None:
    before = formulas.generation()

    @register_formula("mylib::double", operands=(0,), wanted=True)
    def double(x: Any, *, out: Any, wanted: Any) -> int:
        """Twice."""
        return 2 * x.shape[0]

    assert rules["mylib::double"].formula is double
    assert (rules["mylib::double"].operands, rules["mylib::double"].wanted) == ((0,), True)
    assert formulas.generation() > before
    with pytest.raises(FormulaError, match="has a formula already: pass replace=True"):
        register_formula("mylib::double")(double)
    register_formula("mylib::double", replace=True)(double)
    assert rules["mylib::double"].wanted is False


@pytest.mark.parametrize("name", ["mm", "aten::", "::mm", "aten::mm.out", "aten::add_", "a::b::c", "my lib::x"])
def test_register_formula_rejects_names_of_another_form(name: str) -> None:
    with pytest.raises(FormulaError, match="is no operator name: write it as 'namespace::operator'"):
        register_formula(name)(lambda *args, out: 0)


def test_the_example_of_register_formula_runs(rules: dict[str, Any]) -> None:
    import doctest

    example = doctest.DocTestFinder().find(register_formula, globs=dict(vars(formulas)))[0]
    assert doctest.DocTestRunner().run(example).attempted == 1
    a, b = SimpleNamespace(shape=(2, 3)), SimpleNamespace(shape=(3, 4))
    assert rules["mylib::scaled_matmul"].formula(a, b, 1.0, out=None) == 2 * 2 * 3 * 4


def test_formulas_import_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, flopprof.formulas; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
