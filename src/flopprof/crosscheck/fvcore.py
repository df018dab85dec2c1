"""fvcore's FlopCountAnalysis on a workload. It counts multiply-adds (and norms, roughly); given here times two."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
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
        counts = analysis.by_module_and_operator()
        missing = {name: analysis.unsupported_ops(name) for name in counts}
    found = Sheet(aligned=False)
    for name in counts:
        if name == "":  # the wrapper: what it holds is the model's
            continue
        place: Place = (name.removeprefix("model").removeprefix("."), "forward")
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
