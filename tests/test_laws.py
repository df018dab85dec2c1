"""Laws that hold whatever the sizes and however modules are put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flopprof
from conservation import conserved, counted, own, where
from flopprof.profile import PHASES, Profile

sizes = st.integers(1, 9)


def meta(*shape: int, graded: bool = False) -> torch.Tensor:
    return torch.empty(shape, device="meta", requires_grad=graded)


def both_ways(function: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> tuple[int, int]:
    """Forward and backward FLOPs of a function of tensors that all want their gradient."""
    operands = [meta(*shape, graded=True) for shape in shapes]
    profile = counted(lambda: function(*operands).sum().backward())
    return profile.forward_flops, profile.backward_flops


# --- linear in each dimension ---------------------------------------------------------------------------------------


def mm(b: int, m: int, k: int, n: int) -> tuple[int, int]:
    return both_ways(torch.bmm, (b, m, k), (b, k, n))


def linear(b: int, m: int, k: int, n: int) -> tuple[int, int]:
    return both_ways(F.linear, (b, m, k), (n, k), (n,))


def conv(b: int, length: int, c: int, o: int) -> tuple[int, int]:
    return both_ways(lambda x, w: F.conv1d(x, w, padding=1), (b, c, length), (o, c, 3))


def transposed(b: int, length: int, c: int, o: int) -> tuple[int, int]:
    return both_ways(lambda x, w: F.conv_transpose1d(x, w, stride=2), (b, c, length), (c, o, 3))


def bilinear(b: int, i: int, j: int, o: int) -> tuple[int, int]:
    # At least two summed: over one, torch runs an einsum as a multiplication, which is elementwise.
    return both_ways(lambda x, y: torch.einsum("bi,bio->bo", x, y), (b * j, 2 * i), (b * j, 2 * i, o))


def attention(b: int, h: int, t: int, s: int) -> tuple[int, int]:
    return both_ways(F.scaled_dot_product_attention, (b, h, t, 8), (b, h, s, 8), (b, h, s, 8))


PRODUCTS = (mm, linear, conv, transposed, bilinear, attention)


@given(st.sampled_from(PRODUCTS), st.lists(sizes, min_size=4, max_size=4), st.integers(0, 3), st.integers(2, 4))
def test_linear_in_each_dimension(
    product: Callable[..., tuple[int, int]], dims: list[int], dim: int, times: int
) -> None:
    once = product(*dims)
    more = product(*(size * times if index == dim else size for index, size in enumerate(dims)))
    assert more == tuple(times * flops for flops in once)


@given(st.lists(sizes, min_size=4, max_size=4))
def test_backward_is_twice_the_forward_where_everything_wants_a_gradient(dims: list[int]) -> None:
    for product in (mm, linear, conv, transposed, attention):
        forward, backward = product(*dims)
        assert backward == 2 * forward


# --- the same work in other words -----------------------------------------------------------------------------------


@given(sizes, sizes, sizes)
def test_a_product_is_that_of_the_transposes(m: int, k: int, n: int) -> None:
    assert both_ways(torch.mm, (m, k), (k, n)) == both_ways(lambda a, b: b.mT @ a.mT, (m, k), (k, n))


@given(sizes, sizes, st.integers(2, 9), sizes)
def test_every_way_to_write_a_product(b: int, m: int, k: int, n: int) -> None:
    a, c, weight = (b, m, k), (b, k, n), (k, n)
    expected = 2 * b * m * k * n, 4 * b * m * k * n
    for function, shapes in (
        (torch.bmm, (a, c)),
        (torch.matmul, (a, c)),
        (torch.matmul, (a, weight)),
        (lambda x, w: torch.einsum("bmk,bkn->bmn", x, w), (a, c)),
        (lambda x, w: torch.einsum("bmk,kn->bmn", x, w), (a, weight)),
        (lambda x, w: torch.tensordot(x, w, dims=([2], [0])), (a, weight)),
        (lambda x, w: F.linear(x, w.mT), (a, weight)),
        (lambda x, w: torch.baddbmm(x.new_zeros(b, m, n), x, w), (a, c)),
        (lambda x, w: F.conv1d(x.mT, w.mT.unsqueeze(-1)), (a, weight)),
    ):
        assert both_ways(function, *shapes) == expected


@given(sizes, sizes, sizes, sizes)
def test_a_convolution_of_one_tap_is_a_linear_layer(b: int, c: int, o: int, side: int) -> None:
    convolution = both_ways(F.conv2d, (b, c, side, side), (o, c, 1, 1))
    assert convolution == both_ways(F.linear, (b, side, side, c), (o, c))


@given(sizes, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3]))
def test_groups_divide_a_convolution(b: int, groups: int, c: int, o: int, taps: int) -> None:
    x = (b, groups * c, 5)
    whole = both_ways(lambda x, w: F.conv1d(x, w, padding=taps // 2), x, (groups * o, groups * c, taps))
    parted = both_ways(lambda x, w: F.conv1d(x, w, padding=taps // 2, groups=groups), x, (groups * o, c, taps))
    assert whole == tuple(groups * flops for flops in parted)


@given(sizes, st.integers(1, 4), st.integers(1, 3), sizes, sizes)
def test_grouped_queries_cost_what_all_heads_cost(b: int, shared: int, groups: int, t: int, s: int) -> None:
    """Sharing keys saves memory, and products only where keys are made: every query still meets every key."""
    heads = shared * groups

    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    few = both_ways(grouped, (b, heads, t, 8), (b, groups, s, 8), (b, groups, s, 8))
    assert few == both_ways(F.scaled_dot_product_attention, (b, heads, t, 8), (b, heads, s, 8), (b, heads, s, 8))


@given(st.integers(1, 4), sizes)
def test_two_halves_of_a_batch_are_the_whole(b: int, n: int) -> None:
    layer = nn.Linear(n, n, device="meta")
    halves = counted(lambda: [layer(meta(b, n)).sum().backward() for _ in range(2)], model=layer)
    assert where(halves) == where(counted(lambda: layer(meta(2 * b, n)).sum().backward(), model=layer))


# --- random trees of modules ----------------------------------------------------------------------------------------

WIDTH = 4


class Own(nn.Module):
    """Products of its own beside a child's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x @ self.w).tanh() @ self.w


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Twice(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x).tanh())


class Checkpointed(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Unwatched(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.inner(x)
        return x * y


class Parallel(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) * self.right(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x.flatten(0, 1)).view_as(x)


LEAVES: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Linear(WIDTH, WIDTH),
    lambda: nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False),
    lambda: nn.Conv1d(3, 3, 3, padding=1),
    lambda: nn.LayerNorm(WIDTH),
    nn.Tanh,
    Attention,
    Gated,
)
Builder = Callable[[], nn.Module]


def containers(children: st.SearchStrategy[Builder]) -> st.SearchStrategy[Builder]:
    def sequence(builders: list[Builder]) -> Builder:
        return lambda: nn.Sequential(*(build() for build in builders))

    def around(kind: type[nn.Module], inner: Builder) -> Builder:
        return lambda: kind(inner())

    def beside(left: Builder, right: Builder) -> Builder:
        return lambda: Parallel(left(), right())

    wrappers = st.sampled_from([Own, Residual, Twice, Checkpointed, Unwatched])
    return (
        st.builds(sequence, st.lists(children, min_size=1, max_size=3))
        | st.builds(around, wrappers, children)
        | st.builds(beside, children, children)
    )


trees = st.recursive(st.sampled_from(LEAVES), containers, max_leaves=6)


def train(module: nn.Module, x: torch.Tensor, steps: int = 1) -> Profile:
    def run() -> None:
        for _ in range(steps):
            output = module(x)
            if output.requires_grad:
                output.sum().backward()

    return counted(run, model=module)


@given(trees, st.booleans())
def test_a_random_tree_adds_up_and_counts_on_meta_as_on_the_cpu(build: Builder, graded: bool) -> None:
    module = build()
    on_cpu = train(module, torch.randn(2, 3, WIDTH, requires_grad=graded))
    on_meta = train(module.to("meta"), meta(2, 3, WIDTH, graded=graded))
    assert where(on_meta) == where(on_cpu)
    assert on_meta.by_operator() == on_cpu.by_operator()
    assert on_meta.by_parameter() == on_cpu.by_parameter()
    assert on_cpu.exact
    assert on_meta.exact


@given(trees, st.integers(2, 4))
def test_accumulation_is_that_many_times_one(build: Builder, steps: int) -> None:
    module, x = build().to("meta"), meta(2, 3, WIDTH, graded=True)
    once, often = train(module, x), train(module, x, steps)
    for phase in PHASES:
        assert own(often, phase) == {fqn: steps * flops for fqn, flops in own(once, phase).items()}
    assert often.elementwise_flops >= once.elementwise_flops * steps
    assert [row.calls for row in often.modules] == [steps * row.calls for row in once.modules]


@given(trees)
def test_a_profile_survives_its_json(build: Builder) -> None:
    profile = train(build().to("meta"), meta(2, 3, WIDTH, graded=True))
    again = Profile.from_json(profile.to_json())
    assert again == profile
    assert again.to_json() == profile.to_json()
    assert again.by_module() == profile.by_module()


@given(trees)
def test_checkpointing_moves_nothing_but_recompute(build: Builder) -> None:
    module, x = build().to("meta"), meta(2, 3, WIDTH, graded=True)
    plain = train(nn.Sequential(module), x)
    replayed = train(Checkpointed(module), x)

    def renamed(phase: Any) -> dict[str, int]:
        return {f"inner{fqn[1:]}" if fqn else fqn: flops for fqn, flops in own(plain, phase).items()}

    assert own(replayed, "forward") == renamed("forward")
    assert own(replayed, "backward") == renamed("backward")
    assert replayed.model_flops == plain.model_flops


@given(trees, st.booleans())
def test_count_is_the_counter(build: Builder, backward: bool) -> None:
    module, x = build().to("meta"), meta(2, 3, WIDTH)
    profile = conserved(flopprof.count(module, x, backward=backward))
    again = conserved(flopprof.count(module, x, backward=backward))
    assert profile == again
    if not backward:
        assert profile.backward_flops == profile.recompute_flops == 0
