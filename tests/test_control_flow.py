"""Control-flow operators and flex_attention: counted as they run, and what they return is unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.flex_attention import flex_attention as flex_operator
from torch._higher_order_ops.map import map as hop_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._pytree import tree_leaves

import flopprof.counting.flex as flex
from flopprof import FlopCounter, Profile
from flopprof.formulas.attention import flex_cost

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]

PRODUCT = 2 * 4 * 4 * 4  # (4, 4) @ (4, 4)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(run: Callable[[], Any], model: torch.nn.Module | None = None) -> Profile:
    """The profile of `run`, whose tensors are bitwise those without a counter."""
    torch.manual_seed(0)
    bare = run()
    torch._dynamo.reset()
    torch.manual_seed(0)
    with FlopCounter(model) as counter:
        seen = run()
    for expected, got in zip(tree_leaves(bare), tree_leaves(seen), strict=True):
        assert torch.equal(expected, got)
    return counter.profile


def weight() -> torch.Tensor:
    return torch.linspace(-1, 1, 16).view(4, 4).requires_grad_()


X = torch.linspace(-2, 2, 16).view(4, 4)


def multiplied_twice(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ w @ w).sin()


def multiplied_once(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ w).cos()


@pytest.mark.parametrize("taken", [True, False])
def test_cond_counts_the_branch_taken(taken: bool) -> None:
    def run() -> Any:
        w = weight()
        out = torch.cond(torch.tensor(taken), multiplied_twice, multiplied_once, (X, w))
        out.sum().backward()
        return out, w.grad

    products = 2 if taken else 1
    profile = counted(run)
    # X wants no gradient: of the first product only that of w, of the second both. The operator's own backward
    # runs the branch forward once more, as part of it.
    assert profile.by_phase() == {
        "forward": products * PRODUCT,
        "backward": (products + (3 if taken else 1)) * PRODUCT,
        "recompute": 0,
        "optimizer": 0,
    }
    assert profile.exact


def test_while_loop_counts_every_turn() -> None:
    w = weight().detach()

    def run() -> Any:
        return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x @ w), (torch.tensor(0), X))

    assert counted(run).by_phase() == {"forward": 3 * PRODUCT, "backward": 0, "recompute": 0, "optimizer": 0}


def test_scan_counts_every_step_forward_and_backward() -> None:
    def run() -> Any:
        w = weight()
        carry, _outputs = scan(lambda c, x: (c @ w, c + x), X, torch.ones(3, 4, 4))
        carry.sum().backward()
        return carry, w.grad

    profile = counted(run)
    # The operator's own backward makes both gradients at each of the three steps.
    assert profile.by_phase() == {"forward": 3 * PRODUCT, "backward": 6 * PRODUCT, "recompute": 0, "optimizer": 0}


def test_map_counts_every_slice_forward_and_backward() -> None:
    def run() -> Any:
        w = weight()
        out = hop_map(lambda x, w: x @ w, torch.ones(3, 4, 4), w)
        out.sum().backward()
        return out, w.grad

    profile = counted(run)
    assert profile.by_phase() == {"forward": 3 * PRODUCT, "backward": 6 * PRODUCT, "recompute": 0, "optimizer": 0}


def test_associative_scan_counts_what_it_combines() -> None:
    def run() -> Any:
        return associative_scan(lambda a, b: a @ b, torch.ones(4, 4, 4), 0, combine_mode="generic")

    # Four elements: two pairs, one pair of those, and one more for the element in between.
    assert counted(run).by_phase()["forward"] == 4 * PRODUCT


class Branch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Linear(4, 8, bias=False)
        self.back = torch.nn.Linear(8, 4, bias=False)
        self.flat = torch.nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.back(self.wide(x)), self.flat, (x,))


class Outer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()
        self.last = torch.nn.Linear(4, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.branch(x))


@pytest.mark.parametrize("sign", [1, -1])
def test_cond_inside_modules_belongs_to_the_module_that_holds_it(sign: int) -> None:
    torch.manual_seed(0)
    model = Outer()
    x = sign * torch.ones(3, 4)

    def run() -> Any:
        model.zero_grad()
        out = model(x)
        out.sum().backward()
        return out, [p.grad.clone() if p.grad is not None else torch.zeros(()) for p in model.parameters()]

    profile = counted(run, model)
    inside = 2 * 3 * (4 * 8 + 8 * 4) if sign > 0 else 2 * 3 * 4 * 4
    last = 2 * 3 * 4 * 2
    assert profile.by_module("forward")["branch"] == inside
    assert profile.by_module("forward")[""] == inside + last
    # The operator's own backward runs the branch once more. The input wants no gradient: the branch's first product
    # makes one, its second both.
    first = 2 * 3 * 4 * 8 if sign > 0 else 2 * 3 * 4 * 4
    assert profile.by_module("backward")["branch"] == inside + 2 * inside - first
    assert profile.by_module("backward")[""] == inside + 2 * inside - first + 2 * last
    assert profile.recompute_flops == 0


# --- flex_attention -------------------------------------------------------------------------------------------------
B, H, HKV, S, D, DV = 2, 4, 2, 300, 8, 12
FULL = 2 * B * H * S * S * (D + DV)


def operands() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(B, H, S, D), torch.randn(B, HKV, S, D), torch.randn(B, HKV, S, DV)


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j


def test_flex_attention_without_a_mask_is_full() -> None:
    q, k, v = operands()
    profile = counted(lambda: flex_attention(q, k, v, enable_gqa=True))
    assert profile.by_operator() == {"higher_order::flex_attention": FULL}
    (row,) = profile.operators
    assert (row.dtype, row.flops_causal, row.mask_known) == ("float32", FULL, False)
    assert row.shapes == ((B, H, S, D), (B, HKV, S, D), (B, HKV, S, DV))
    assert profile.exact


def test_flex_attention_counts_pairs_by_its_block_mask() -> None:
    q, k, v = operands()
    # 300 is no multiple of a block's 128: the last blocks reach over the end.
    mask = create_block_mask(causal, None, None, S, S, device="cpu")
    profile = counted(lambda: flex_attention(q, k, v, block_mask=mask, enable_gqa=True))
    assert profile.forward_flops == FULL
    assert profile.causal_flops == 2 * B * H * (S * (S + 1) // 2) * (D + DV)
    assert profile.operators[0].mask_known
    assert profile.exact


def test_flex_attention_mask_that_reads_a_buffer_and_scores_that_change() -> None:
    q, k, v = operands()
    document = torch.arange(S) // 100
    mask = create_block_mask(lambda b, h, i, j: document[i] == document[j], None, None, S, S, device="cpu")

    def run() -> Any:
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j), block_mask=mask, enable_gqa=True)

    profile = counted(run)
    assert profile.forward_flops == FULL
    assert profile.causal_flops == 2 * B * H * 3 * 100 * 100 * (D + DV)


def test_flex_attention_mask_of_its_own_for_each_batch_and_head() -> None:
    q, k, v = operands()
    mask = create_block_mask(lambda b, h, i, j: (i >= j) | ((b == 1) & (h == 0)), B, H, S, S, device="cpu")
    profile = counted(lambda: flex_attention(q, k, v, block_mask=mask, enable_gqa=True))
    assert profile.causal_flops == 2 * ((B * H - 1) * (S * (S + 1) // 2) + S * S) * (D + DV)


def test_flex_attention_cross_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 64, 8), torch.randn(1, 2, 160, 8), torch.randn(1, 2, 160, 4)
    mask = create_block_mask(lambda b, h, i, j: j < 2 * i, None, None, 64, 160, device="cpu")
    profile = counted(lambda: flex_attention(q, k, v, block_mask=mask))
    assert profile.forward_flops == 2 * 2 * 64 * 160 * (8 + 4)
    assert profile.causal_flops == 2 * 2 * sum(2 * i for i in range(64)) * (8 + 4)


def test_a_mask_that_is_changed_is_read_again() -> None:
    q, k, v = operands()
    window = torch.tensor(10)
    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None, S, S, device="cpu")

    def pairs(width: int) -> int:
        return sum(min(i + 1, width) for i in range(S))

    with FlopCounter() as counter:
        flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        first = counter.profile.causal_flops
        window.fill_(5)
        flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    assert first == 2 * B * H * pairs(10) * (D + DV)
    assert counter.profile.causal_flops - first == 2 * B * H * pairs(5) * (D + DV)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_flex_attention(fullgraph: bool) -> None:
    q, k, v = operands()
    mask = create_block_mask(causal, None, None, S, S, device="cpu")
    compiled = torch.compile(flex_attention, backend="eager", fullgraph=fullgraph)
    with FlopCounter() as counter:
        compiled(q, k, v, block_mask=mask, enable_gqa=True)
    assert counter.profile.forward_flops == FULL
    assert counter.profile.causal_flops == 2 * B * H * (S * (S + 1) // 2) * (D + DV)


def test_flex_attention_belongs_to_its_module() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(16, 48, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).view(2, 64, 3, 2, 8).permute(2, 0, 3, 1, 4)
            return flex_attention(q, k, v)

    model = torch.nn.Sequential(Attention(), torch.nn.Identity())
    x = torch.randn(2, 64, 16)

    def run() -> Any:
        with torch.no_grad():
            return model(x)

    attention = 2 * 2 * 2 * 64 * 64 * (8 + 8)
    profile = counted(run, model)
    assert profile.by_module("forward", own=True) == {
        "": 0, "0": attention, "0.qkv": 2 * 2 * 64 * 16 * 48, "1": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "backward"),
    [
        # Per pair: dV and dP cost 2 dv each, dQ and dK 2 d; dP is needed for dQ and for dK.
        ("qkv", 2 * (2 * DV + 2 * D)),
        ("qv", 2 * (2 * DV + D)),
        ("k", 2 * (DV + D)),
        ("v", 2 * DV),
    ],
)
def test_flex_attention_backward_counts_the_gradients_wanted(wanted: str, backward: int) -> None:
    # flex_attention itself refuses a backward on CPU; the operator below it does not.
    mask = create_block_mask(causal, None, None, S, S, device="cpu")

    def run() -> Any:
        tensors = dict(zip("qkv", operands(), strict=True))
        for name in wanted:
            tensors[name].requires_grad_()
        out, *_rest = flex_operator(*tensors.values(), lambda s, b, h, i, j: s, mask.as_tuple(), 0.25, {}, (), ())
        out.sum().backward()
        return [tensors[name].grad for name in wanted]

    pairs, seen = B * H * S * S, B * H * S * (S + 1) // 2
    profile = counted(run)
    assert profile.by_phase() == {
        "forward": FULL, "backward": pairs * backward, "recompute": pairs * 2 * D, "optimizer": 0,
    }  # fmt: skip
    assert profile.causal_flops == seen * (2 * (D + DV) + backward)
    if wanted == "qkv":
        assert profile.backward_flops == 2 * profile.forward_flops


def test_flex_cost_is_one_to_two() -> None:
    shapes = ((1, 2, 5, 3), (1, 1, 7, 3), (1, 1, 7, 4))
    forward, backward = flex_cost(*shapes, 20), flex_cost(*shapes, 20, backward=True)
    assert (forward.flops, forward.causal) == (2 * 2 * 5 * 7 * (3 + 4), 2 * 20 * (3 + 4))
    assert (backward.flops, backward.causal) == (2 * forward.flops, 2 * 2 * 20 * (3 + 4))
    assert (backward.recompute, backward.recompute_causal) == (2 * 2 * 5 * 7 * 3, 2 * 20 * 3)


def test_a_mask_with_too_many_pairs_is_counted_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_MOST_PAIRS", 1000)
    q, k, v = operands()
    mask = create_block_mask(causal, None, None, S, S, device="cpu")
    with FlopCounter() as counter:
        flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    # Blocks of 128: three rows, their diagonal blocks whole, of which the last is 44 x 44.
    pairs = 128 * 128 + (128 * 128 + 128 * 128) + (44 * 128 + 44 * 128 + 44 * 44)
    assert counter.profile.causal_flops == 2 * B * H * pairs * (D + DV)
    assert counter.profile.assumptions == (flex.ROUNDED,)
    assert not counter.profile.exact


def test_a_mask_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_AT_ONCE", 1)
    q, k, v = operands()
    mask = create_block_mask(causal, None, None, S, S, device="cpu")
    with FlopCounter() as counter:
        flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    assert counter.profile.causal_flops == 2 * B * H * (S * (S + 1) // 2) * (D + DV)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_without_values_a_mask_is_not_known(device: str) -> None:
    # flex_attention itself refuses the meta device; the operator below it does not.
    def run() -> None:
        where = "meta" if device == "meta" else "cpu"
        q, k, v = (torch.empty(t.shape, device=where) for t in operands())
        number, indices = torch.ones(1, 1, 1, dtype=torch.int32, device=where), torch.zeros(1, 1, 1, 1, device=where)
        mask = (S, S, number, indices.int(), *(None,) * 6, 512, 512, causal)
        flex_operator(q, k, v, lambda s, b, h, i, j: s, mask, 0.25, {}, (), ())

    with FlopCounter() as counter:
        if device == "fake":
            with FakeTensorMode():
                run()
        else:
            run()
    assert counter.profile.forward_flops == FULL
    assert counter.profile.causal_flops == FULL
    assert not counter.profile.operators[0].mask_known


def test_a_mask_that_cannot_be_read_is_uncounted_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> int:
        raise RuntimeError("no rule")

    monkeypatch.setattr(flex, "_passed", fails)
    q, k, v = operands()
    mask = create_block_mask(causal, None, None, S, S, device="cpu")
    with FlopCounter() as counter:
        flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    (row,) = counter.profile.uncounted_rows
    assert (row.op, row.reason) == (flex.FORWARD, "its mask cannot be read: RuntimeError: no rule")
