"""What training holds in memory, read off autograd during one forward: on meta as well as where the values are.

activations  bytes of the distinct storages that autograd keeps for the backward, without those of parameters and
             buffers. Attention through scaled_dot_product_attention keeps what a fused kernel keeps: its operands, its
             result and one float32 per query, where the device at hand would keep every score
weights      parameters and buffers, each storage once
gradients    as many bytes as the parameters that train
optimizer    AdamW as torch makes it: two states of each parameter that trains, in its own dtype

Left out: what a kernel needs while it runs (workspaces, fragmentation), and the gradients of activations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flopprof.compare.comparison import Memory
from flopprof.counting.foreign import inner
from flopprof.counting.guesses import named
from flopprof.counting.preserve import preserved
from flopprof.counting.questions import failures
from flopprof.counting.values import carried, moved, needs_values, on_meta

_STATES = 2
_LSE_BYTES = 4


class _Kept:
    """A tensor that autograd keeps: it lives as long as the graph does."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _Fused(TorchFunctionMode):
    """Counts attention as a fused kernel keeps it, and nothing of what its parts keep."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.packed: weakref.WeakSet[_Kept] = weakref.WeakSet()
        self.held: list[torch.Tensor] = []
        self.rows_bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention or self.inside:
            return func(*args, **kwargs)
        self.inside = True
        try:
            out = func(*args, **kwargs)
        finally:
            self.inside = False
        if isinstance(out, torch.Tensor) and out.requires_grad and not out.is_nested:
            operands = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            self.held += [*operands, out]
            self.rows_bytes += _LSE_BYTES * out.shape[:-1].numel()
        return out

    def pack(self, tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor)
        if not self.inside:
            self.packed.add(kept)
        return kept


class _Shapes(TorchDispatchMode):
    """Gives on meta at once what torch finds by running dozens of other operators: half of a forward's time.

    What is not exactly as expected here runs as it would.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = _KNOWN.get(func)
        if known is not None and not kwargs and all(type(arg) in _PLAIN or not _is_tensor(arg) for arg in args):
            found = known(*args)
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _batch_norm(inputs: torch.Tensor, *rest: Any) -> Any:
    training = rest[4]
    if training or not inputs.is_meta:
        return None
    return torch.empty_like(inputs), inputs.new_empty(0), inputs.new_empty(0)


def _layer_norm(inputs: torch.Tensor, shape: list[int], *_rest: Any) -> Any:
    if not inputs.is_meta or inputs.dtype not in _COMPUTED_IN:
        return None
    outer = [*inputs.shape[: inputs.dim() - len(shape)], *[1] * len(shape)]
    mean, rstd = (inputs.new_empty(outer, dtype=_COMPUTED_IN[inputs.dtype]) for _ in range(2))
    return torch.empty_like(inputs), mean, rstd


def _addmm(added: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Any:
    alike = added.dtype == left.dtype == right.dtype and left.is_meta and right.is_meta and added.is_meta
    if not alike or left.shape[1] != right.shape[0]:
        return None
    return left.new_empty(left.shape[0], right.shape[1])


_PLAIN = (torch.Tensor, nn.Parameter)
_COMPUTED_IN = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
_KNOWN: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_layer_norm.default: _layer_norm,
    torch.ops.aten.addmm.default: _addmm,
}


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def training_memory(model: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Memory:
    """The bytes that training this model on these inputs holds; the model is afterwards as it was.

    Raises whatever the model raises.
    """
    args = tuple(args)
    meta, failed = on_meta(model, args, kwargs), failures()
    try:
        activations = _activations(model, args, kwargs, values=False)
        again = meta and failures() > failed  # it asked for values and went on by another branch: as in count()
    except Exception as error:
        if not meta or not needs_values(error):
            raise
        again = True
    if again:
        activations = _activations(model, args, kwargs, values=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return Memory(
        activations=activations,
        weights=sum(_storages(_tensors(model)).values()),
        gradients=gradients,
        optimizer=_STATES * gradients,
    )


def _activations(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, values: bool) -> int:
    fused = _Fused()
    with preserved([model], (args, dict(kwargs)), None), ExitStack() as stack:
        if values:
            stack.enter_context(carried(lambda _sentence: None, named(model, args, kwargs)))
            args, kwargs = moved(args), moved(kwargs)
        elif on_meta(model, args, kwargs):
            stack.enter_context(_Shapes())  # type: ignore[no-untyped-call]  # torch's own mode has no types
        stack.enter_context(torch.enable_grad())
        stack.enter_context(fused)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(fused.pack, lambda kept: kept.tensor))
        output = model(*args, **kwargs)
        found = _storages([*(kept.tensor for kept in fused.packed), *fused.held])
        for storage in _storages(_tensors(model)):
            found.pop(storage, None)
        del output  # until here its graph kept what it keeps
    return sum(found.values()) + fused.rows_bytes


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes by storage. Tensors made of others (sparse, quantised subclasses) count what they are made of."""
    found: dict[int, int] = {}
    for tensor in tensors:
        for part in parts(tensor):
            storage = part.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold a tensor's elements: itself, the values and indices of a sparse one, ..."""
    held = inner(tensor)
    if held is not None:
        return [part for wrapped in held.values() for part in parts(wrapped)]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]
