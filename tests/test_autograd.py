"""Backward as autograd runs it: which gradients are asked for, by which module, in which order, how often.

Every expected number is 2 x (the index sizes of one product), worked out beside the case. The network is two
bias-free linear layers on 2 rows, 3 -> 5 -> 7, with tanh between: one product of `a` is A = 2*2*3*5 = 60 and one of
`b` is B = 2*2*5*7 = 140, for the layer itself, for its input gradient and for its weight gradient alike.
"""

# Longer than 400 lines: one table of cases, with the models that its rows name.
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from conservation import conserved, counted, own, where
from flopprof import FlopCounter

A, B = 60, 140
FORWARD = {"a": A, "b": B}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 5, bias=False)
        self.b = nn.Linear(5, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Case(NamedTuple):
    run: Callable[[Any, torch.Tensor], Any]
    forward: dict[str, int]
    backward: dict[str, int]


def plain(net: Net, x: torch.Tensor) -> None:
    net(x).sum().backward()


def with_input_gradient(net: Net, x: torch.Tensor) -> None:
    net(x.requires_grad_()).sum().backward()


def frozen(name: str, *, input_gradient: bool = False) -> Callable[..., None]:
    def run(net: Net, x: torch.Tensor) -> None:
        net.get_submodule(name).requires_grad_(False)
        net(x.requires_grad_(input_gradient)).sum().backward()

    return run


def grad_of_input_only(net: Net, x: torch.Tensor) -> None:
    torch.autograd.grad(net(x.requires_grad_()).sum(), x)


def grad_of_one_weight(net: Net, x: torch.Tensor) -> None:
    torch.autograd.grad(net(x).sum(), net.b.weight)


def backward_into_some_inputs(net: Net, x: torch.Tensor) -> None:
    net(x).sum().backward(inputs=[net.a.weight])


def under_no_grad(net: Net, x: torch.Tensor) -> None:
    with torch.no_grad():
        net(x)


def under_inference_mode(net: Net, x: torch.Tensor) -> None:
    with torch.inference_mode():
        net(x)


def detached_between(net: Net, x: torch.Tensor) -> None:
    net.b(torch.tanh(net.a(x)).detach()).sum().backward()


def gradient_penalty(net: Net, x: torch.Tensor) -> None:
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    (gradient**2).sum().backward()


def penalty_of_weights(net: Net, x: torch.Tensor) -> None:
    gradients = torch.autograd.grad(net(x).sum(), list(net.parameters()), create_graph=True)
    sum((gradient**2).sum() for gradient in gradients).backward()


def backward_creating_a_graph_unused(net: Net, x: torch.Tensor) -> None:
    torch.autograd.grad(net(x).sum(), list(net.parameters()), create_graph=True)


def thrice_retained(net: Net, x: torch.Tensor) -> None:
    loss = net(x).sum()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()


def two_branches(net: Net, x: torch.Tensor) -> None:
    first, second = net.a(x), net.b(x.new_ones(2, 5))
    first.sum().backward()
    second.sum().backward()


def accumulated(net: Net, x: torch.Tensor) -> None:
    for _ in range(3):
        net(x).sum().backward()


def first_then_second(net: Net, x: torch.Tensor) -> None:
    first, second = net(x).sum(), net(x.clone().requires_grad_()).sum()
    first.backward()
    second.backward()


def second_then_first(net: Net, x: torch.Tensor) -> None:
    first, second = net(x).sum(), net(x.clone().requires_grad_()).sum()
    second.backward()
    first.backward()


def summed_losses(net: Net, x: torch.Tensor) -> None:
    (net(x).sum() + net(x).sum()).backward()


def functional_gradient(net: Net, x: torch.Tensor) -> None:
    grad(lambda values: functional_call(net, values, (x,)).sum())(dict(net.named_parameters()))


def per_sample_gradients(net: Net, x: torch.Tensor) -> None:
    def loss(values: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return functional_call(net, values, (row,)).sum()

    vmap(grad(loss), in_dims=(None, 0))(dict(net.named_parameters()), x)


def forward_mode(net: Net, x: torch.Tensor) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        forward_ad.unpack_dual(net(dual))


def batched_gradients(net: Net, x: torch.Tensor) -> None:
    x.requires_grad_()
    torch.autograd.grad(net(x), x, torch.randn(4, 2, 7), is_grads_batched=True)


def saved_elsewhere(net: Net, x: torch.Tensor) -> None:
    with torch.autograd.graph.save_on_cpu():
        loss = net(x).sum()
    loss.backward()


def under_anomaly_detection(net: Net, x: torch.Tensor) -> None:
    with torch.autograd.detect_anomaly(check_nan=False):
        net(x).sum().backward()


CASES = {
    # The weight gradient of each layer, and what `b` hands to `a`; nobody asks for the gradient of x.
    "plain": Case(plain, FORWARD, {"a": A, "b": 2 * B}),
    "with input gradient": Case(with_input_gradient, FORWARD, {"a": 2 * A, "b": 2 * B}),
    "a frozen": Case(frozen("a"), FORWARD, {"b": B}),
    "a frozen, input gradient": Case(frozen("a", input_gradient=True), FORWARD, {"a": A, "b": 2 * B}),
    "b frozen": Case(frozen("b"), FORWARD, {"a": A, "b": B}),
    "grad of input only": Case(grad_of_input_only, FORWARD, {"a": A, "b": B}),
    "grad of one weight": Case(grad_of_one_weight, FORWARD, {"b": B}),
    "backward(inputs=)": Case(backward_into_some_inputs, FORWARD, {"a": A, "b": B}),
    "no_grad": Case(under_no_grad, FORWARD, {}),
    "inference_mode": Case(under_inference_mode, FORWARD, {}),
    "detached between": Case(detached_between, FORWARD, {"b": B}),
    # First backward: 1 @ Wb, then @ Wa: A + B. Second: of g = d @ Wa both factors (2A); of 1 @ Wb only Wb (B); the
    # tanh' in between leads back through a's forward, to Wa and to x (2A).
    "gradient penalty": Case(gradient_penalty, FORWARD, {"a": 5 * A, "b": 2 * B}),
    # First: dWa, dWb, dh: A + 2B. Second, of dWa = d^T x to d alone (x wants no gradient) A; of 1 @ Wb to Wb, B;
    # of dWb = 1^T h to h, B; then back through a's forward to Wa, A.
    "penalty of weights": Case(penalty_of_weights, FORWARD, {"a": 3 * A, "b": 4 * B}),
    "create_graph, not used": Case(backward_creating_a_graph_unused, FORWARD, {"a": A, "b": 2 * B}),
    "three retained": Case(thrice_retained, FORWARD, {"a": 3 * A, "b": 6 * B}),
    "two branches": Case(two_branches, FORWARD, {"a": A, "b": B}),
    "accumulation": Case(accumulated, {"a": 3 * A, "b": 3 * B}, {"a": 3 * A, "b": 6 * B}),
    "f1 f2 b1 b2": Case(first_then_second, {"a": 2 * A, "b": 2 * B}, {"a": 3 * A, "b": 4 * B}),
    "f1 f2 b2 b1": Case(second_then_first, {"a": 2 * A, "b": 2 * B}, {"a": 3 * A, "b": 4 * B}),
    "two losses added": Case(summed_losses, {"a": 2 * A, "b": 2 * B}, {"a": 2 * A, "b": 4 * B}),
    "func.grad": Case(functional_gradient, FORWARD, {"a": A, "b": 2 * B}),
    "vmap": Case(lambda net, x: vmap(net)(x), FORWARD, {}),
    # One outer product per row and layer is a summed dimension of 1: the same total as the batch's one product.
    "per-sample gradients": Case(per_sample_gradients, FORWARD, {"a": A, "b": 2 * B}),
    "vjp": Case(lambda net, x: vjp(net, x)[1](torch.ones(2, 7)), FORWARD, {"a": A, "b": B}),
    # Forward mode: y = x W^T and its tangent dx W^T + x dW^T; torch runs the last also where dW is zero.
    "jvp": Case(lambda net, x: jvp(net, (x,), (x,)), {"a": 3 * A, "b": 3 * B}, {}),
    "forward-mode AD": Case(forward_mode, {"a": 3 * A, "b": 3 * B}, {}),
    "four gradients at once": Case(batched_gradients, FORWARD, {"a": 4 * A, "b": 4 * B}),
    "saved tensors elsewhere": Case(saved_elsewhere, FORWARD, {"a": A, "b": 2 * B}),
    "anomaly detection": Case(under_anomaly_detection, FORWARD, {"a": A, "b": 2 * B}),
    # 14 outputs, one backward for each, to x alone.
    "autograd.functional.jacobian": Case(torch.autograd.functional.jacobian, FORWARD, {"a": 14 * A, "b": 14 * B}),
    # The trick of two backwards: the second differentiates g @ W with regard to g alone.
    "autograd.functional.jvp": Case(
        lambda net, x: torch.autograd.functional.jvp(net, x, x), FORWARD, {"a": 2 * A, "b": 2 * B}
    ),
    # One row (A/2, B/2), and one backward for each of the 7 outputs.
    "jacrev": Case(lambda net, x: jacrev(net)(x[0]), {"a": A // 2, "b": B // 2}, {"a": 7 * A // 2, "b": 7 * B // 2}),
    # One row, 3 tangents for it at once, and the zero tangent of the weight once.
    "jacfwd": Case(lambda net, x: jacfwd(net)(x[0]), {"a": 5 * A // 2, "b": 5 * B // 2}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_products_by_module_and_phase(name: str) -> None:
    case, net = CASES[name], Net()
    profile = counted(case.run, net, torch.randn(2, 3), model=net)
    assert own(profile, "forward") == case.forward
    assert own(profile, "backward") == case.backward
    assert profile.recompute_flops == profile.optimizer_flops == 0
    assert profile.exact


@pytest.mark.parametrize(
    "name", ["plain", "gradient penalty", "penalty of weights", "f1 f2 b2 b1", "per-sample gradients"]
)
def test_meta_counts_as_cpu_does(name: str) -> None:
    run, net = CASES[name].run, Net()
    on_cpu = counted(run, net, torch.randn(2, 3), model=net)
    twin = Net().to("meta")
    on_meta = counted(run, twin, torch.randn(2, 3, device="meta"), model=twin)
    assert where(on_meta) == where(on_cpu)
    assert on_meta.by_operator() == on_cpu.by_operator()
    assert on_meta.elementwise_flops == on_cpu.elementwise_flops


def test_hessian_is_forward_mode_over_reverse_mode() -> None:
    net = Net()
    profile = counted(lambda: hessian(lambda row: net(row).sum())(torch.randn(3)), model=net)
    # jacfwd of jacrev on one row (A/2, B/2). Forward: the row, its 3 tangents, the zero tangent of the weight.
    # Backward of one output: 1 @ Wb has no tangent; d @ Wa has d, its 3 tangents and the zero tangent of Wa.
    assert where(profile) == {
        "forward": {"a": 5 * A // 2, "b": 5 * B // 2},
        "backward": {"a": 5 * A // 2, "b": B // 2},
    }


# --- products of vectors: their backward is spelled as a broadcast multiplication ---------------------------------


def vectors(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]


VECTORS = {
    # name: (function, operand shapes, dtype, forward, backward)
    "mv": (torch.mv, [(4, 5), (5,)], torch.float32, 2 * 4 * 5, 2 * 2 * 4 * 5),
    "matmul mv": (torch.matmul, [(4, 5), (5,)], torch.float32, 2 * 4 * 5, 2 * 2 * 4 * 5),
    "matmul vm": (torch.matmul, [(4,), (4, 5)], torch.float32, 2 * 4 * 5, 2 * 2 * 4 * 5),
    "matmul batch mv": (torch.matmul, [(2, 4, 5), (5,)], torch.float32, 2 * 8 * 5, 2 * 2 * 8 * 5),
    "dot": (torch.dot, [(5,), (5,)], torch.float32, 2 * 5, 2 * 2 * 5),
    "vdot": (torch.vdot, [(5,), (5,)], torch.float32, 2 * 5, 2 * 2 * 5),
    "inner": (torch.inner, [(5,), (5,)], torch.float32, 2 * 5, 2 * 2 * 5),
    "addmv": (torch.addmv, [(4,), (4, 5), (5,)], torch.float32, 2 * 4 * 5, 2 * 2 * 4 * 5),
    # Scaling by alpha and beta is elementwise, before and after.
    "addmv scaled": (
        lambda y, a, x: torch.addmv(y, a, x, beta=0.5, alpha=2.0),
        [(4,), (4, 5), (5,)],
        torch.float32,
        2 * 4 * 5,
        2 * 2 * 4 * 5,
    ),
    "complex mv": (torch.mv, [(4, 5), (5,)], torch.complex64, 8 * 4 * 5, 2 * 8 * 4 * 5),
    "complex dot": (torch.dot, [(5,), (5,)], torch.complex64, 8 * 5, 2 * 8 * 5),
    "complex vdot": (torch.vdot, [(5,), (5,)], torch.complex64, 8 * 5, 2 * 8 * 5),
    "complex mm": (torch.mm, [(4, 5), (5, 6)], torch.complex64, 8 * 4 * 5 * 6, 2 * 8 * 4 * 5 * 6),
    "complex bmm": (torch.bmm, [(3, 4, 5), (3, 5, 6)], torch.complex128, 8 * 360, 2 * 8 * 360),
    "complex addmm": (torch.addmm, [(6,), (4, 5), (5, 6)], torch.complex64, 8 * 120, 2 * 8 * 120),
}


@pytest.mark.parametrize("name", VECTORS)
def test_products_of_vectors_and_of_complex_numbers(name: str) -> None:
    function, sizes, dtype, forward, backward = VECTORS[name]
    operands = vectors(*sizes, dtype=dtype)
    profile = counted(lambda: function(*operands).abs().sum().backward())
    assert (profile.forward_flops, profile.backward_flops) == (forward, backward)
    assert profile.exact


def test_a_product_spelled_as_a_multiplication_is_counted_once() -> None:
    matrix, vector = vectors((4, 5), (5,))
    profile = counted(lambda: torch.mv(matrix, vector).sum().backward())
    assert profile.by_operator("backward") == {"aten::mul": 40, "aten::mv": 40}
    assert "aten::mul" not in profile.elementwise_by_operator()


def scaled_by_hook(y: torch.Tensor) -> None:
    y.register_hook(lambda gradient: gradient * torch.ones_like(gradient))
    y.sum().backward()


def scaled_by_node(y: torch.Tensor) -> None:
    y.grad_fn.register_hook(lambda made, given: tuple(each * torch.ones_like(each) for each in made))
    y.sum().backward()


@pytest.mark.parametrize("backward", [scaled_by_hook, scaled_by_node])
@pytest.mark.parametrize(("product", "flops"), [(torch.mv, 2 * 4 * 5), (torch.dot, 2 * 5)])
def test_a_hook_that_scales_is_no_product(product: Any, flops: int, backward: Any) -> None:
    first = torch.randn(4, 5) if product is torch.mv else torch.randn(5)
    first, second = first.requires_grad_(), torch.randn(5, requires_grad=True)
    profile = counted(lambda: backward(product(first, second)))
    assert (profile.forward_flops, profile.backward_flops) == (flops, 2 * flops)


def test_a_saved_tensor_that_a_hook_scales_is_no_product() -> None:
    matrix, vector = torch.randn(4, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t / 2.0, lambda t: t * torch.full_like(t, 2.0))

    def run() -> None:
        with hooks:
            y = matrix @ vector
        y.sum().backward()

    profile = counted(run)
    assert (profile.forward_flops, profile.backward_flops) == (2 * 4 * 5, 2 * 2 * 4 * 5)


def test_an_outer_product_is_elementwise() -> None:
    left, right = vectors((4,), (5,))
    profile = counted(lambda: torch.outer(left, right).sum().backward())
    assert profile.hardware_flops == 0
    assert profile.elementwise_by_operator("forward")["aten::mul"] == 4 * 5


# --- custom autograd functions ------------------------------------------------------------------------------------


class Product(torch.autograd.Function):
    """x @ w with both gradients written out: x (2, 3), w (3, 5)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        return gradient @ w.mT, x.mT @ gradient


class Recomputing(torch.autograd.Function):
    """tanh(x @ w) @ v that keeps only its inputs and runs its forward again in backward, under enable_grad."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w, v)
        return torch.tanh(x @ w) @ v

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            x, w, v = inputs
            output = torch.tanh(x @ w) @ v
        return torch.autograd.grad(output, inputs, gradient)


class Custom(nn.Module):
    def __init__(self, function: Any, *sizes: tuple[int, int]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x, *self.weights)


def test_custom_function_belongs_to_its_module_forward_and_backward() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), Custom(Product, (3, 5)), nn.Linear(5, 7, bias=False))
    profile = counted(lambda: net(torch.randn(2, 3)).sum().backward(), model=net)
    assert own(profile, "forward") == {"0": 2 * 2 * 3 * 3, "1": A, "2": B}
    assert own(profile, "backward") == {"0": 2 * 2 * 3 * 3, "1": 2 * A, "2": 2 * B}


def test_custom_function_differentiated_twice() -> None:
    net = nn.Sequential(Custom(Product, (3, 5)), nn.Tanh(), nn.Linear(5, 7, bias=False))
    x = torch.randn(2, 3, requires_grad=True)

    def run() -> None:
        (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (gradient**2).sum().backward()

    profile = counted(run, model=net)
    assert own(profile, "forward") == {"0": A, "2": B}
    # As the gradient penalty above, but the function's own backward makes both gradients whether asked or not:
    # first 2A, then of g @ w^T both factors (2A), then through its forward again (2A). Under create_graph the
    # double backward of the unasked x^T @ g does not run.
    assert own(profile, "backward") == {"0": 6 * A, "2": 2 * B}


class Functional(torch.autograd.Function):
    """As Product, in the form that torch.func understands."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    backward = Product.backward


def test_custom_function_under_torch_func() -> None:
    w = torch.randn(3, 5)
    gradient = counted(lambda: grad(lambda w: Functional.apply(torch.randn(2, 3), w).sum())(w))
    assert gradient.by_phase() == {"forward": A, "backward": 2 * A, "recompute": 0, "optimizer": 0}
    batch = torch.randn(4, 2, 3)
    assert counted(lambda: vmap(lambda x: Functional.apply(x, w))(batch)).by_phase()["forward"] == 4 * A
    per_sample = counted(lambda: vmap(grad(lambda x: Functional.apply(x, w).sum()))(batch))
    assert per_sample.by_phase() == {"forward": 4 * A, "backward": 8 * A, "recompute": 0, "optimizer": 0}
    assert gradient.exact
    assert per_sample.exact


def test_recompute_written_by_the_user_is_recompute_of_its_module() -> None:
    net = nn.Sequential(Custom(Recomputing, (3, 5), (5, 7)), nn.Linear(7, 2, bias=False))
    x = torch.randn(2, 3, requires_grad=True)
    profile = counted(lambda: net(x).sum().backward(), model=net)
    assert where(profile) == {
        "forward": {"0": A + B, "1": 2 * 2 * 7 * 2},
        "recompute": {"0": A + B},
        "backward": {"0": 2 * A + 2 * B, "1": 2 * 2 * 2 * 7 * 2},
    }


# --- the counter and the graph it meets ---------------------------------------------------------------------------


def test_backward_of_a_forward_before_the_counter_belongs_to_no_module() -> None:
    net = Net()
    loss = net(torch.randn(2, 3)).sum()
    profile = counted(loss.backward, model=net)
    assert where(profile) == {"backward": {"": A + 2 * B}}


def test_forward_before_the_counter_does_not_take_the_place_of_one_inside() -> None:
    net = Net()
    before = net(torch.randn(2, 3)).sum()
    with FlopCounter(net) as counter:
        inside = net(torch.randn(2, 3)).sum()
        (before + inside).backward()
    profile = conserved(counter.profile)
    assert where(profile) == {"forward": FORWARD, "backward": {"": A + 2 * B, "a": A, "b": 2 * B}}


def test_backward_after_the_counter_was_left_and_entered_again() -> None:
    net = Net()
    with FlopCounter(net) as counter:
        loss = net(torch.randn(2, 3)).sum()
    outside = net(torch.randn(2, 3)).sum()
    with counter:
        (loss + outside).backward()
    assert where(conserved(counter.profile)) == {
        "forward": FORWARD,
        "backward": {"": A + 2 * B, "a": A, "b": 2 * B},
    }


def test_backward_inside_forward() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.after = nn.Linear(3, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(self.net(x).sum(), x)
            return self.after(x - gradient)

    model = Inner()
    profile = counted(lambda: model(torch.randn(2, 3)).sum().backward(), model=model)
    last = 2 * 2 * 3 * 4
    assert where(profile) == {
        "forward": {"net.a": A, "net.b": B, "after": last},
        "backward": {"net.a": A, "net.b": B, "after": last * 1 + last},
    }


def test_hooks_on_tensors_that_multiply_belong_to_the_module_of_their_tensor() -> None:
    class Hooked(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.a(x)
            hidden.register_hook(lambda gradient: gradient @ torch.eye(5))
            return self.b(hidden)

    net = Hooked()
    profile = counted(plain, net, torch.randn(2, 3), model=net)
    # The engine runs the hook before the node that made `hidden`, which is a's.
    assert where(profile) == {"forward": FORWARD, "backward": {"a": A + 2 * 2 * 5 * 5, "b": 2 * B}}
