"""The parameters of modules, in rows and in numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from flopprof.profile import ParameterRow


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `float32`."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def untraced() -> Iterator[None]:
    """While torch.jit traces, a size that is read is an operator of the trace."""
    state = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    resume = torch._C._set_tracing_state  # type: ignore[attr-defined]  # in no stub
    resume(None)
    try:
        yield
    finally:
        resume(state)


@untraced()
def held(module: torch.nn.Module) -> tuple[int, int]:
    """Elements of a module's parameters: with those of its children, and its own."""
    own = _held([module])
    return _held(list(module.modules())) if module._modules else own, own


def _held(modules: list[torch.nn.Module]) -> int:
    unique = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    return sum(map(_numel, unique.values())) + sum(map(packed, modules))


@untraced()
def unique_parameters(modules: Iterable[tuple[str, torch.nn.Module]]) -> tuple[ParameterRow, ...]:
    """Tied ones once; those that are not initialised yet have no shape, and no row."""
    unique: dict[int, ParameterRow] = {}
    modules = list(modules)
    looked_up = {id(module.weight) for _fqn, module in modules if isinstance(module, torch.nn.Embedding)}
    for fqn, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in unique and _numel(parameter):
                unique[id(parameter)] = ParameterRow(
                    name=f"{fqn}.{key}" if fqn else key,
                    shape=tuple(parameter.shape),
                    dtype=dtype_name(parameter.dtype),
                    trainable=parameter.requires_grad,
                    embedding=id(parameter) in looked_up,
                )
    return tuple(unique.values())


def elements(parameters: Iterable[ParameterRow]) -> int:
    """Of all of them."""
    return sum(parameter.numel for parameter in parameters)


def packed(module: torch.nn.Module) -> int:
    """Elements of the weight and bias that a quantised module of torch's own keeps packed, as no Parameter."""
    if not type(module).__module__.startswith("torch.ao.nn."):
        return 0
    with torch._C._DisableTorchDispatch():  # unpacking is no part of what is counted
        values = [value() for name in ("weight", "bias") if callable(value := getattr(module, name, None))]
    return sum(value.numel() for value in values if isinstance(value, torch.Tensor))


def _numel(parameter: torch.nn.Parameter) -> int:
    if type(parameter) is not torch.nn.Parameter and torch.nn.parameter.is_lazy(parameter):
        return 0
    return parameter.numel()
