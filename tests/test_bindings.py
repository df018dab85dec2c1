"""The bindings through which the counter runs operators reach exactly the overload that was called."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flopprof.counting.operators import BINDINGS

A, V, IMAGE = torch.randn(3, 3), torch.randn(3), torch.randn(2, 3, 5, 5)

CALLS: dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    torch.ops.aten.add.Tensor: [((A, V), {}), ((A, 2), {}), ((A, A), {"alpha": 0.5})],
    torch.ops.aten.add_.Tensor: [((A.clone(), V), {}), ((A.clone(), 2), {"alpha": 3})],
    torch.ops.aten.addmm.default: [((V, A, A), {}), ((V, A, A), {"beta": 2, "alpha": 0.5})],
    torch.ops.aten.bmm.default: [((A[None], A[None]), {})],
    torch.ops.aten.clone.default: [((A.t(),), {}), ((A.t(),), {"memory_format": torch.contiguous_format})],
    torch.ops.aten.convolution.default: [
        ((IMAGE, torch.randn(4, 3, 2, 2), bias, [2, 1], [0, 1], [1, 1], False, [0, 0], 1), {})
        for bias in (None, torch.randn(4))
    ],
    torch.ops.aten.detach.default: [((torch.nn.Parameter(A),), {})],
    torch.ops.aten.div.Tensor: [((A, V), {}), ((torch.ones(3, dtype=torch.int64), 2), {})],
    torch.ops.aten.embedding.default: [
        ((A, torch.tensor([0, 2])), {}),
        ((A, torch.tensor([0, 2]), 0, True, False), {}),
    ],
    torch.ops.aten.expand.default: [((V, [2, 3]), {}), ((V, [2, -1]), {"implicit": True})],
    torch.ops.aten.mm.default: [((A, A), {})],
    torch.ops.aten.mul.Tensor: [((A, V), {}), ((A, 0.5), {})],
    torch.ops.aten.native_batch_norm.default: [
        ((IMAGE, V, V, None, None, training, 0.1, 1e-5), {}) for training in (True,)
    ]
    + [((IMAGE, None, None, V, V.exp(), False, 0.1, 1e-5), {})],
    torch.ops.aten.native_layer_norm.default: [((A, [3], V, V, 1e-5), {}), ((A, [3], None, None, 1e-5), {})],
    torch.ops.aten.permute.default: [((IMAGE, [0, 2, 3, 1]), {}), ((torch.tensor(1.0), []), {})],
    torch.ops.aten.relu.default: [((A,), {})],
    torch.ops.aten.select.int: [((A, 1, -1), {})],
    torch.ops.aten.sum.dim_IntList: [((A, [0], True), {}), ((A, [], False), {}), ((A, None), {"dtype": torch.float64})],
    torch.ops.aten.t.default: [((A,), {})],
    torch.ops.aten.transpose.int: [((IMAGE, 1, -1), {})],
    torch.ops.aten.unbind.int: [((A,), {}), ((A, 1), {})],
    torch.ops.aten.unsqueeze.default: [((A, -1), {})],
    torch.ops.aten.view.default: [((A, [9]), {}), ((A[:1, :1], []), {}), ((A, [-1, 1]), {})],
}


class Heard(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def test_every_binding_is_tried() -> None:
    assert CALLS.keys() == BINDINGS.keys()


@pytest.mark.parametrize("func", BINDINGS, ids=str)
def test_a_binding_calls_its_overload_with_the_same_arguments(func: Any) -> None:
    for args, kwargs in CALLS[func]:
        direct, bound = Heard(), Heard()
        copies = [torch.clone(arg) if func._schema.is_mutable and i == 0 else arg for i, arg in enumerate(args)]
        with torch._C._AutoDispatchBelowAutograd():
            with direct:
                expected = func(*args, **kwargs)
            with bound:
                result = BINDINGS[func](*copies, **kwargs)
        assert [call[0] for call in bound.calls] == [func]
        assert same(bound.calls[0][1], direct.calls[0][1]) or func._schema.is_mutable
        assert bound.calls[0][2].keys() == direct.calls[0][2].keys()
        assert same(result, expected)
