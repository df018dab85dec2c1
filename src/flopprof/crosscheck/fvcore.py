"""fvcore's FlopCountAnalysis on a workload. It counts multiply-adds (and norms, roughly); given here times two."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from flopprof.counting.preserve import preserved
from flopprof.crosscheck.cells import Place, Sheet, multiplies
from flopprof.models import Workload


class _Flat(nn.Module):
    """The model as jit traces it: tensors in, a tuple of tensors out."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.model = workload.model
        leaves, self._structure = tree_flatten((workload.args, dict(workload.kwargs)))
        self._fixed = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        self._positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves: list[Any] = list(self._fixed)
        for position, tensor in zip(self._positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = tree_unflatten(leaves, self._structure)
        return tuple(leaf for leaf in _tensors(self.model(*args, **kwargs)))


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Tensors of any output: of a Hugging Face one too, which is a mapping that pytree may not know."""
    for leaf in tree_leaves(dict(output) if hasattr(output, "keys") else output):
        if isinstance(leaf, torch.Tensor):
            yield leaf


def sheet(workload: Workload) -> Sheet:
    """What it says of each operator in each module. Raises ImportError, and whatever tracing the model raises."""
    with _quiet():
        from fvcore.nn import FlopCountAnalysis

    flat = _Flat(workload)
    with preserved([workload.model], flat.tensors), _quiet():
        analysis = FlopCountAnalysis(flat, flat.tensors)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        slips = [_Slip(analysis, *known) for known in _SLIPS]
        counts = analysis.by_module_and_operator()
        missing = {name: analysis.unsupported_ops(name) for name in counts}
    found = Sheet(aligned=False)
    for slip in slips:
        for name, macs in slip.macs.items():
            found.slips[_place(name)][slip.sentence] += 2 * macs
    for name in counts:
        if name == "":  # the wrapper: what it holds is the model's
            continue
        place = _place(name)
        children = [child for child in counts if child and child.rpartition(".")[0] == name]
        for operator, macs in counts[name].items():
            own = macs - sum(counts[child][operator] for child in children)
            if own:
                found.counts[place][operator] += 2 * math.floor(own)
        for operator, calls in missing[name].items():
            own = calls - sum(missing[child][operator] for child in children)
            plain = operator.removeprefix("aten::")
            if own and (multiplies(operator) or not operator.startswith(("aten::", "prim::"))):
                found.blind[place][plain] += own
            elif own and operator.startswith("prim::PythonOp"):
                found.blind[place][operator.removeprefix("prim::PythonOp.")] += own
    return found


def _place(scope: str) -> Place:
    return scope.removeprefix("model").removeprefix("."), "forward"


def _matmul(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Each element of the result is a sum over the last dimension of the first factor."""
    return math.prod(_sizes(outputs[0])) * _sizes(inputs[0])[-1]


def _einsum(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Of two factors: the product of the sizes of all indices."""
    terms = inputs[0].toIValue().replace(" ", "").partition("->")[0].split(",")
    shapes = [_sizes(value) for value in inputs[1].node().inputs()]
    if len(terms) != 2:
        raise ValueError("of more factors, the order decides")
    sizes = {
        index: size for term, shape in zip(terms, shapes, strict=True) for index, size in zip(term, shape, strict=True)
    }
    return math.prod(sizes.values())


def _sizes(value: Any) -> list[int]:
    return list(value.type().sizes())


_SLIPS: tuple[tuple[str, Callable[[Sequence[Any], Sequence[Any]], int], str], ...] = (
    ("aten::matmul", _matmul, "leaves out of matmul the batch that only its second factor has"),
    ("aten::einsum", _einsum, "reads the cost of einsum off a printed figure of four digits"),
)


class _Slip:
    """Where fvcore's count of one operator is not the product of its shapes: by how many multiply-adds, by scope."""

    def __init__(
        self,
        analysis: Any,
        operator: str,
        count: Callable[[Sequence[Any], Sequence[Any]], int],
        sentence: str,
    ) -> None:
        self.macs: Counter[str] = Counter()
        self.sentence = sentence
        original = analysis._op_handles[operator]

        def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
            said = original(inputs, outputs)
            with suppress(ValueError, IndexError):  # shapes of another kind: then nothing is known
                scope = outputs[0].node().scopeName().rpartition("/")[2]
                self.macs[scope] += math.floor(said) - count(inputs, outputs)
            return said

        analysis.set_op_handle(operator, handle)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what tracing writes to the log and to standard error."""
    logger = logging.getLogger("fvcore")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
