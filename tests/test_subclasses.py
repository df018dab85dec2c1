"""Tensor subclasses, quantised and sparse tensors: what is multiplied inside them is counted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from flopprof import FlopCounter, Profile, count

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning",
    "ignore:.*:FutureWarning",
    "ignore:Sparse",
    "ignore:.*[Qq]uantiz.*",
    "ignore:.*TypedStorage.*",
    "ignore:.*masked.*:UserWarning",
)

PRODUCT = 2 * 3 * 4 * 5  # (3, 4) @ (4, 5)


def counted(run: Callable[[], Any], model: nn.Module | None = None) -> Profile:
    with FlopCounter(model) as counter:
        run()
    assert counter.profile.exact
    return counter.profile


class Wrapper(torch.Tensor):
    """Holds another tensor, and has no data of its own."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapper, lambda tensor: tensor.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapper, func(*args, **kwargs))


class Named(torch.Tensor):
    """Looks at functions, and changes nothing."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 4), torch.randn(4, 5)


def test_wrapper_is_counted_by_what_it_holds() -> None:
    a, b = operands()
    assert counted(lambda: Wrapper(a) @ Wrapper(b)).forward_flops == PRODUCT


def test_wrapper_forward_and_backward() -> None:
    a, b = operands()

    def run() -> None:
        (Wrapper(a.clone().requires_grad_()) @ Wrapper(b.clone().requires_grad_())).sum().backward()

    assert counted(run).by_phase() == {"forward": PRODUCT, "backward": 2 * PRODUCT, "recompute": 0, "optimizer": 0}


def test_wrapper_under_inference_mode() -> None:
    a, b = operands()
    with torch.inference_mode():
        assert counted(lambda: F.linear(Wrapper(a), Wrapper(b.t().contiguous()))).forward_flops == PRODUCT


def test_a_wrapper_that_a_forward_writes_to_is_as_before() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 5)
            self.register_buffer("calls", Wrapper(torch.zeros(1)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.inner += 1
            return self.layer(x)

    model = Written()
    calls = model.calls.inner
    profile = count(model, Wrapper(torch.randn(3, 4)))
    assert profile.by_module() == {"": PRODUCT, "layer": PRODUCT}
    assert model.calls.inner is calls
    assert calls.item() == 0


def test_a_jagged_input() -> None:
    rows = torch.nested.nested_tensor([torch.randn(n, 4) for n in (1, 2)], layout=torch.jagged)
    profile = count(nn.Linear(4, 5), rows, backward=True)
    assert (profile.forward_flops, profile.backward_flops) == (PRODUCT, PRODUCT)


def test_a_wrapped_parameter_keeps_its_name() -> None:
    linear = nn.Linear(4, 5)
    linear.weight = nn.Parameter(Wrapper(torch.randn(5, 4)))
    x = torch.randn(3, 4)
    profile = counted(lambda: linear(x).sum().backward(), linear)
    assert profile.by_phase() == {"forward": PRODUCT, "backward": PRODUCT, "recompute": 0, "optimizer": 0}
    assert profile.by_parameter("forward") == {"weight": PRODUCT}


def test_function_subclass() -> None:
    a, b = operands()

    def run() -> None:
        (a.clone().as_subclass(Named).requires_grad_() @ b).sum().backward()

    assert counted(run).by_phase() == {"forward": PRODUCT, "backward": PRODUCT, "recompute": 0, "optimizer": 0}


def test_masked_tensors_raise_no_alarm() -> None:
    a = torch.randn(3, 4)
    assert counted(lambda: torch.masked.masked_tensor(a, a > 0).sum()).hardware_flops == 0


# --- dynamic quantisation -------------------------------------------------------------------------------------------
def quantised(module: nn.Module, dtype: torch.dtype = torch.qint8) -> nn.Module:
    kinds = {nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell}
    return torch.ao.quantization.quantize_dynamic(module.eval(), kinds, dtype=dtype)


QUANTISED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (3, 8), 2 * 3 * (8 * 16 + 16 * 4),
    ),
    # 15 rows, 4 x 6 gate values, the inputs and states of two layers.
    "lstm": (lambda: nn.LSTM(4, 6, 2, batch_first=True), (3, 5, 4), 2 * 15 * 24 * (4 + 6 + 6 + 6)),
    "gru": (
        lambda: nn.GRU(4, 6, 2, batch_first=True, bidirectional=True), (3, 5, 4), 2 * 2 * 15 * 18 * (4 + 6 + 12 + 6),
    ),
    "lstm cell": (lambda: nn.LSTMCell(4, 6), (3, 4), 2 * 3 * 24 * (4 + 6)),
}  # fmt: skip


@pytest.mark.skipif(
    not {"fbgemm", "onednn", "x86", "qnnpack"} & set(torch.backends.quantized.supported_engines),
    reason="no quantised kernels",
)
@pytest.mark.parametrize("name", QUANTISED)
def test_dynamic_quantisation(name: str) -> None:
    build, shape, flops = QUANTISED[name]
    model = quantised(nn.Sequential(build()))
    assert counted(lambda: model(torch.randn(shape)), model).forward_flops == flops


def test_dynamic_quantisation_to_half_precision() -> None:
    model = quantised(nn.Sequential(nn.Linear(8, 16)), torch.float16)
    assert counted(lambda: model(torch.randn(3, 8))).forward_flops == 2 * 3 * 8 * 16


# --- sparse ---------------------------------------------------------------------------------------------------------
ROWS, INNER, COLUMNS, STORED = 6, 5, 7, 4
SPARSE = 2 * STORED * COLUMNS


def sparse(layout: str) -> torch.Tensor:
    dense = torch.zeros(ROWS, INNER)
    for place, (row, column) in enumerate([(0, 1), (2, 3), (5, 0), (5, 4)]):
        dense[row, column] = place + 1
    return dense.to_sparse_coo().coalesce() if layout == "coo" else dense.to_sparse_csr()


@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("inference", [False, True])
def test_sparse_products_count_stored_elements(layout: str, *, inference: bool) -> None:
    matrix, dense = sparse(layout), torch.randn(INNER, COLUMNS)
    with torch.inference_mode(inference):
        assert counted(lambda: matrix @ dense).forward_flops == SPARSE
        assert counted(lambda: torch.sparse.mm(matrix, dense)).forward_flops == SPARSE
        assert counted(lambda: matrix @ torch.randn(INNER)).forward_flops == 2 * STORED


def test_sparse_products_of_other_orders() -> None:
    coo, csr = sparse("coo"), sparse("csr")
    added = counted(lambda: torch.sparse.addmm(torch.zeros(ROWS, COLUMNS), coo, torch.randn(INNER, COLUMNS)))
    assert added.forward_flops == SPARSE
    assert counted(lambda: torch.randn(3, ROWS) @ csr).forward_flops == 2 * STORED * 3
    sampled = counted(lambda: torch.sparse.sampled_addmm(csr, torch.randn(ROWS, 9), torch.randn(9, INNER)))
    assert sampled.forward_flops == 2 * STORED * 9
    # Each stored element meets its own column's: three columns of one, and one of one in A A^T.
    assert counted(lambda: torch.sparse.mm(coo, coo.t())).forward_flops == 2 * 4


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_backward_to_the_dense_operand(layout: str) -> None:
    matrix, dense = sparse(layout), torch.randn(INNER, COLUMNS, requires_grad=True)
    profile = counted(lambda: (matrix @ dense).sum().backward())
    assert profile.by_phase() == {"forward": SPARSE, "backward": SPARSE, "recompute": 0, "optimizer": 0}


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_backward_to_the_sparse_operand_runs_dense(layout: str) -> None:
    """torch multiplies the whole gradient by the dense operand, and keeps what the mask holds: counted as it runs."""
    matrix, dense = sparse(layout).requires_grad_(), torch.randn(INNER, COLUMNS, requires_grad=True)
    profile = counted(lambda: (matrix @ dense).sum().backward())
    assert profile.backward_flops == SPARSE + 2 * ROWS * COLUMNS * INNER


def test_sparse_gradients_of_an_embedding_multiply_nothing() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    assert counted(lambda: embedding(torch.tensor([1, 2])).sum().backward()).hardware_flops == 0


# --- deformable convolution -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_deformable_convolution_is_a_convolution(device: str) -> None:
    ops = pytest.importorskip("torchvision.ops")
    shapes = {"x": (2, 4, 8, 8), "offset": (2, 18, 8, 8), "weight": (6, 4, 3, 3)}
    tensors = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes.values()]
    profile = counted(lambda: ops.deform_conv2d(*tensors, padding=1).sum().backward())
    forward = 2 * 2 * 8 * 8 * 6 * 4 * 9
    assert profile.by_phase() == {"forward": forward, "backward": 2 * forward, "recompute": 0, "optimizer": 0}


def test_packed_weights_are_parameters_too() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), {nn.Linear})
    with FlopCounter(model) as counter:
        model(torch.randn(3, 4))
    profile = counter.profile
    assert profile.n_params == 4 * 5 + 5
    assert {row.fqn: row.parameters for row in profile.modules} == {"": 25, "0": 25, "1": 0}
    assert profile.by_operator() == {"quantized::linear_dynamic": 2 * 3 * 4 * 5}
