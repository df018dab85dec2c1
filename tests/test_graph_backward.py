"""Backward from the graph: which gradients flow decides what is multiplied, and equals what autograd ran.

A linear layer 4 -> 4 on 3 rows multiplies L = 2 * 3 * 4 * 4 = 96 FLOPs, and each of its gradients as many again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from conservation import conserved, own
from flopprof import count, trace
from flopprof.errors import Untraceable

L = 2 * 3 * 4 * 4

Run = Callable[[Any, Any], Any]


def w(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


def linear(n: int = 4, m: int = 4, bias: bool = True) -> nn.Linear:
    return nn.Linear(n, m, bias=bias)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


class Runs(nn.Module):
    """A forward that is given, and what it uses as attributes."""

    def __init__(self, run: Run, **held: Any) -> None:
        super().__init__()
        self.run = run
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self, *inputs)


def two(run: Run, **held: Any) -> Callable[[], nn.Module]:
    return lambda: Runs(run, **{"a": linear(), "b": linear(), **held})


def no_grad(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = m.a(x)
    return m.b(y)


def enabled_again(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = m.a(x)
        with torch.enable_grad():
            return m.b(y)


def write_to_slice(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 0
    y[1] = m.a(x)[0]
    return m.b(y)


def write_to_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 0
    first, rest = y[:1], y[1:]
    first.copy_(m.a(x)[:1])
    return m.b(torch.cat([rest, first]))


def write_after_detach(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    z = y.detach()
    z.copy_(m.a(x).detach())
    return m.b(y)


def x() -> torch.Tensor:
    return torch.randn(3, 4)


def wanting() -> torch.Tensor:
    return torch.randn(3, 4, requires_grad=True)


# name -> (model, input, backward FLOPs of a and of b)
FLOWS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], int, int]] = {
    "both layers": (two(lambda m, x: m.b(torch.relu(m.a(x)))), x, L, 2 * L),
    "and the input": (two(lambda m, x: m.b(torch.relu(m.a(x)))), wanting, 2 * L, 2 * L),
    "the first is frozen": (two(lambda m, x: m.b(m.a(x)), a=frozen(linear())), x, 0, L),
    "the last is frozen": (two(lambda m, x: m.b(m.a(x)), b=frozen(linear())), x, L, L),
    "both are frozen": (two(lambda m, x: m.b(m.a(x)), a=frozen(linear()), b=frozen(linear())), x, 0, 0),
    "both are frozen, the input wants": (
        two(lambda m, x: m.b(m.a(x)), a=frozen(linear()), b=frozen(linear())),
        wanting,
        L,
        L,
    ),
    "a layer nobody reads": (two(lambda m, x: (m.a(x), m.b(x))[1]), x, 0, L),
    "detached": (two(lambda m, x: m.b(m.a(x).detach())), x, 0, L),
    "one way detached": (two(lambda m, x: m.b((y := m.a(x)).detach()) + y), x, L, L),
    "without gradients": (two(no_grad), wanting, 0, L),
    "with them again": (two(enabled_again), wanting, 0, L),
    "a comparison": (two(lambda m, x: m.b((m.a(x) > 0).float())), x, 0, L),
    "rounded": (two(lambda m, x: m.b(torch.sign(m.a(x)).round())), x, L, 2 * L),
    "drawn": (two(lambda m, x: m.b(torch.bernoulli(torch.sigmoid(m.a(x))))), x, L, 2 * L),
    "the shape alone": (two(lambda m, x: m.b(x[:1].expand_as(m.a(x)))), x, 0, L),
    "the type alone": (two(lambda m, x: m.b(x.type_as(m.a(x)))), x, 0, L),
    "ones of its shape": (two(lambda m, x: m.b(torch.ones_like(m.a(x)))), x, 0, L),
    "in place": (two(lambda m, x: m.b(F.relu(m.a(x), inplace=True))), x, L, 2 * L),
    "filled": (two(lambda m, x: m.b(m.a(x).fill_(1.0))), x, L, 2 * L),
    "added in place": (two(lambda m, x: m.b((x * 1).add_(m.a(x)))), x, L, 2 * L),
    "written to a slice": (two(write_to_slice), x, L, 2 * L),
    "written to a view": (two(write_to_view), x, L, 2 * L),
    "written to what was detached": (two(write_after_detach), x, 0, L),
    "one of several results": (two(lambda m, x: m.b(m.a(x).unbind(0)[0].expand(3, 4))), x, L, 2 * L),
    "indexed": (two(lambda m, x: m.b(m.a(x)[torch.arange(3, device=x.device)])), x, L, 2 * L),
    "in a dictionary": (two(lambda m, x: {"a": m.a(x), "list": [m.b(x), 1], "none": None}), x, L, L),
    "wanted from here on": (two(lambda m, x: m.b(m.a(x).requires_grad_()), a=frozen(linear())), x, 0, 2 * L),
    "read twice": (two(lambda m, x: m.b(y := m.a(x)) * y), x, L, 2 * L),
    "through integers": (two(lambda m, x: m.b(m.a(x).view(torch.int32).view(torch.float32))), x, 0, L),
    "a function without derivative": (two(lambda m, x: m.b(torch.special.spherical_bessel_j0(m.a(x)))), x, 0, L),
    "copied into what is new": (two(lambda m, x: m.b(torch.empty_like(x).copy_(m.a(x)))), x, L, 2 * L),
    "only the bias": (two(lambda m, x: m.b(F.linear(x, m.a.weight.detach(), m.a.bias))), x, 0, 2 * L),
}


@pytest.mark.parametrize("engine", ["fx", "export"])
@pytest.mark.parametrize("name", FLOWS)
def test_the_flow_of_gradients(name: str, engine: Any) -> None:
    make, given, of_a, of_b = FLOWS[name]
    if engine == "fx" and name == "written to a slice":
        with pytest.raises(Untraceable, match="does not support item assignment"):
            trace(make(), given(), engine="fx")
        return
    profile = conserved(trace(make(), given(), backward=True, engine=engine))
    expected = {fqn: flops for fqn, flops in (("a", of_a), ("b", of_b)) if flops}
    found = own(profile, "backward")
    found.pop("", None)
    assert found == expected
    assert own(count(make(), given(), backward=True), "backward") == own(profile, "backward")


@pytest.mark.parametrize("engine", ["fx", "export"])
def test_the_loss_decides_what_is_reached(engine: Any) -> None:
    model = two(lambda m, x: (m.a(x), m.b(x)))()
    profile = trace(model, x(), loss=lambda pair: pair[1].sum(), engine=engine)
    assert own(profile, "backward") == {"b": L}


# --- operators -------------------------------------------------------------------------------------------------------
def inputs(*shape: int, wants: bool = True) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape).requires_grad_(wants)


def grouped(m: Any, x: torch.Tensor) -> torch.Tensor:
    offsets = torch.tensor([8, 16], dtype=torch.int32, device=x.device)
    return torch._grouped_mm(x.bfloat16(), m.w, offs=offsets)


def autocast(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.a(x)


def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs)


OPERATORS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "matmul, broadcast": (lambda: Runs(lambda m, x: m.w @ x, w=w(5, 1, 6, 3)), inputs(2, 3, 4)),
    "matmul, folded": (lambda: Runs(lambda m, x: x @ m.w, w=w(4, 5)), inputs(2, 3, 4)),
    "matmul, by a vector": (lambda: Runs(lambda m, x: x @ m.w, w=w(4)), inputs(2, 3, 4)),
    "matmul, of a vector": (lambda: Runs(lambda m, x: m.w @ x, w=w(3)), inputs(2, 3, 4)),
    "mv": (lambda: Runs(lambda m, x: torch.mv(x, m.w), w=w(4)), inputs(3, 4)),
    "mv, the vector alone": (lambda: Runs(lambda m, x: torch.mv(x, m.w), w=w(4)), inputs(3, 4, wants=False)),
    "dot": (lambda: Runs(lambda m, x: torch.dot(x, m.w), w=w(4)), inputs(4)),
    "addmv": (lambda: Runs(lambda m, x: torch.addmv(m.c, x, m.w), c=w(3), w=w(4)), inputs(3, 4)),
    "addmm": (lambda: Runs(lambda m, x: torch.addmm(m.c, x, m.w), c=w(3, 5), w=w(4, 5)), inputs(3, 4)),
    "bmm": (lambda: Runs(lambda m, x: torch.bmm(x, m.w), w=w(2, 4, 5)), inputs(2, 3, 4)),
    "baddbmm": (lambda: Runs(lambda m, x: torch.baddbmm(m.w, x, x.mT), w=w(2, 3, 3)), inputs(2, 3, 4)),
    "addbmm": (lambda: Runs(lambda m, x: torch.addbmm(m.w, x, x.mT), w=w(3, 3)), inputs(2, 3, 4)),
    "einsum": (lambda: Runs(lambda m, x: torch.einsum("bij,jk->bik", x, m.w), w=w(4, 5)), inputs(2, 3, 4)),
    "einsum of three": (
        lambda: Runs(lambda m, x: torch.einsum("ij,jk,kl->il", x, m.w, m.v), w=w(4, 5), v=w(5, 2)),
        inputs(3, 4),
    ),
    "einsum without a sum": (lambda: Runs(lambda m, x: torch.einsum("i,j->ij", x, m.w), w=w(5)), inputs(3)),
    "tensordot": (lambda: Runs(lambda m, x: torch.tensordot(x, m.w, dims=1), w=w(4, 2)), inputs(3, 4)),
    "inner": (lambda: Runs(lambda m, x: torch.inner(x, m.w), w=w(5, 4)), inputs(3, 4)),
    "multi_dot": (lambda: Runs(lambda m, x: torch.linalg.multi_dot([x, m.v, m.w]), v=w(4, 5), w=w(5, 2)), inputs(3, 4)),
    "bilinear": (lambda: Runs(lambda m, x: m.a(x, x), a=nn.Bilinear(4, 4, 3)), inputs(3, 4)),
    "cdist": (lambda: Runs(lambda m, x: torch.cdist(x, m.w), w=w(30, 4)), inputs(30, 4)),
    "linear, one row": (lambda: linear(4, 5), inputs(4)),
    "linear, more dimensions": (lambda: linear(4, 5), inputs(2, 3, 3, 4)),
    "linear, frozen": (lambda: frozen(linear(4, 5)), inputs(2, 3, 4)),
    "grouped_mm": (lambda: Runs(grouped, w=w(2, 16, 16, dtype=torch.bfloat16)), inputs(16, 16)),
    "complex": (
        lambda: Runs(lambda m, x: (x.to(m.w.dtype) @ m.w).abs(), w=w(4, 5, dtype=torch.complex64)),
        inputs(3, 4),
    ),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), inputs(2, 4, 8, 8)),
    "convolution, of an image": (lambda: nn.Conv2d(4, 6, 3), inputs(2, 4, 8, 8, wants=False)),
    "convolution, frozen": (lambda: frozen(nn.Conv2d(4, 6, 3)), inputs(2, 4, 8, 8)),
    "convolution, same": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same"), inputs(2, 3, 8, 8)),
    "convolution, reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), inputs(2, 3, 8, 8)),
    "convolution, unbatched": (lambda: nn.Conv1d(3, 4, 3), inputs(3, 8)),
    "convolution, transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), inputs(2, 3, 8, 8)),
    "convolution, complex": (
        lambda: Runs(lambda m, x: m.a(x.to(torch.complex64)).abs(), a=nn.Conv1d(3, 4, 3, dtype=torch.complex64)),
        inputs(2, 3, 8),
    ),
    "attention": (two(lambda m, x: attend(m.a(x), m.b(x), x)), inputs(2, 3, 5, 4)),
    "attention, causal": (two(lambda m, x: attend(m.a(x), x, m.b(x), is_causal=True)), inputs(2, 3, 5, 4, wants=False)),
    "attention, values": (two(lambda m, x: attend(x, x, m.b(x))), inputs(2, 3, 5, 4, wants=False)),
    "attention, queries": (two(lambda m, x: attend(m.b(x), x, x)), inputs(2, 3, 5, 4, wants=False)),
    "attention, keys": (two(lambda m, x: attend(x, m.b(x), x)), inputs(2, 3, 5, 4, wants=False)),
    "attention, bias": (lambda: Runs(lambda m, x: attend(x, x, x, m.w), w=w(5, 5)), inputs(2, 3, 5, 4, wants=False)),
    "attention, broadcast": (two(lambda m, x: attend(m.b(x), x[:1], x[:, :1])), inputs(2, 3, 5, 4, wants=False)),
    "attention, grouped": (
        two(lambda m, x: attend(m.a(x), m.b(x)[:, :1], x[:, :1], is_causal=True, enable_gqa=True)),
        inputs(2, 3, 5, 4),
    ),
    "multi-head": (
        lambda: Runs(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, batch_first=True)),
        inputs(2, 5, 4, wants=False),
    ),
    "lstm": (lambda: Runs(lambda m, x: m.a(x)[0], a=nn.LSTM(4, 5, 2, bidirectional=True)), inputs(6, 2, 4)),
    "lstm, last state": (lambda: Runs(lambda m, x: m.a(x)[1][0][-1], a=nn.LSTM(4, 5, 2)), inputs(6, 2, 4, wants=False)),
    "lstm, cell state": (lambda: Runs(lambda m, x: m.a(x)[1][1], a=nn.LSTM(4, 5, 2, proj_size=3)), inputs(6, 2, 4)),
    "lstm, frozen": (
        lambda: Runs(lambda m, x: m.b(m.a(x)[0])[0], a=frozen(nn.LSTM(4, 5)), b=nn.GRU(5, 3)),
        inputs(6, 2, 4),
    ),
    "gru": (lambda: Runs(lambda m, x: m.a(x)[0], a=nn.GRU(4, 5, 2, bias=False)), inputs(6, 2, 4)),
    "rnn": (lambda: Runs(lambda m, x: m.a(x)[0], a=nn.RNN(4, 5, nonlinearity="relu")), inputs(6, 2, 4, wants=False)),
    "cell": (lambda: nn.GRUCell(4, 5), inputs(2, 4)),
    "merged weights": (lambda: Runs(lambda m, x: F.linear(x, m.w + m.u @ m.v), w=w(4, 4), u=w(4, 1), v=w(1, 4)), x),
    "cast": (lambda: Runs(lambda m, x: F.linear(x.bfloat16(), m.w.bfloat16()), w=w(4, 4)), x),
    "autocast": (two(autocast), x),
    "dropout and norms": (
        lambda: nn.Sequential(linear(), nn.BatchNorm1d(4), nn.Dropout(0.5), linear(), nn.LayerNorm(4), linear()),
        x,
    ),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(linear(4, 6)), wanting),
    "padding": (two(lambda m, x: m.b(F.pad(m.a(x), (0, 1))[:, 1:])), x),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch's advice on kernels
@pytest.mark.parametrize("name", OPERATORS)
def test_backward_equals_what_autograd_runs(name: str) -> None:
    torch.manual_seed(0)
    make, given = OPERATORS[name]
    model = make()
    batch = given()
    counted = count(model, batch, backward=True)
    assert name == "einsum without a sum" or counted.forward_flops > 0
    for engine in ("fx", "export") if name != "autocast" else ("export", "auto"):
        traced = conserved(trace(model, batch, backward=True, engine=engine))  # type: ignore[arg-type]
        assert own(traced, "forward") == own(counted, "forward")
        assert own(traced, "backward") == own(counted, "backward")
        assert traced.by_dtype("forward") == counted.by_dtype("forward")
        assert traced.by_dtype("backward") == counted.by_dtype("backward")
        assert traced.causal_flops == counted.causal_flops
        assert traced.exact


# --- what a graph does not show --------------------------------------------------------------------------------------
class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight.t(), x.t() @ gradient


@pytest.mark.parametrize("engine", ["fx", "export", "auto"])
def test_a_custom_function_is_named(engine: Any) -> None:
    model = Runs(lambda m, x: m.a(Product.apply(x, m.w)), a=linear(), w=w(4, 4))
    profile = trace(model, wanting(), backward=True, engine=engine)
    assert own(profile, "backward") == {"": 2 * L, "a": 2 * L}
    assert [sentence for sentence in profile.assumptions if sentence.startswith("Product: ")]
    assert trace(model, wanting(), engine=engine).assumptions == ()  # its forward is in the graph


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("engine", ["fx", "export"])
def test_checkpointed_layers_are_differentiated_and_their_replay_is_not_forgotten(engine: Any, reentrant: bool) -> None:
    model = two(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=reentrant)))()
    profile = trace(model, wanting(), backward=True, engine=engine)
    assert own(profile, "backward") == {"a": 2 * L, "b": 2 * L}
    assert profile.recompute_flops or any("again in backward" in sentence for sentence in profile.assumptions)


BATCHED_OR_SPARSE = {
    "vmap": lambda m, x: torch.func.vmap(m.a)(x),
    "sparse": lambda m, x: torch.sparse.mm(torch.eye(3).to_sparse(), m.a(x)),
}


@pytest.mark.parametrize("name", BATCHED_OR_SPARSE)
def test_what_a_graph_does_not_hold_is_refused(name: str) -> None:
    """The batch of vmap and the elements of a sparse matrix: read from the graph, they would silently be none."""
    with pytest.raises(Untraceable, match=r"flopprof\.count"):
        trace(two(BATCHED_OR_SPARSE[name])(), torch.randn(3, 4), engine="export")
