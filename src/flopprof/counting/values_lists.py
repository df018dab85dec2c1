"""Python numbers that become meta tensors above every dispatch mode: seen where torch's functions are called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from flopprof.counting.values import Values


class Lists(TorchFunctionMode):
    """torch.tensor(numbers, device="meta") drops its numbers before any dispatch mode sees it; so does x[[0, -1]].

    And f"{x[0]}" is the number on every other device: models look for modules by such names.
    """

    def __init__(self, values: Values) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__format__ and args[0].is_meta and not args[0].dim():  # torch prints it, others ask it
            return format(args[0].item(), args[1])
        if func in _INDEXED and args[0].is_meta:
            args = (args[0], self._index(args[1], args[0].device), *args[2:])
        out = func(*args, **(kwargs or {}))
        position = _FROM_NUMBERS.get(func)
        if position is not None and isinstance(out, torch.Tensor) and out.is_meta:
            given = [*args[position:], *((kwargs or {}).get(name) for name in ("data", "obj"))]
            if given and not isinstance(given[0], torch.Tensor):
                self._values.learn(out, given[0])
        return out

    def _index(self, index: Any, device: torch.device) -> Any:
        if isinstance(index, tuple):
            return tuple(self._listed(list(each) if isinstance(each, tuple) else each, device) for each in index)
        return self._listed(index, device)

    def _listed(self, index: Any, device: torch.device) -> Any:
        if not isinstance(index, list):
            return index
        try:
            made = torch.tensor(index, device=device)
        except (TypeError, ValueError, RuntimeError):  # slices within, or tensors: torch's to read
            return index
        self._values.learn(made, index)
        return made


_INDEXED = frozenset({torch.Tensor.__getitem__, torch.Tensor.__setitem__})
_FROM_NUMBERS: dict[Any, int] = {
    torch.tensor: 0, torch.as_tensor: 0, torch.asarray: 0, torch.Tensor.new_tensor: 1,
}  # fmt: skip
