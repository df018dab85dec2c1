"""What a call of a model is to a meter: the model's part of its structure, and the tokens and samples that it holds.

Structure and integers together are the signature of a call; `arguments` tells those of what the model is given.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from flopprof.meter.arguments import BOUNDARIES, DEEPEST, unwrapped
from flopprof.meter.freezing import seen
from flopprof.meter.padding import Padding
from flopprof.meter.places import number

_Tensor = torch.Tensor
_autocast = torch.is_autocast_enabled
_AMONG_THEM = ("cpu", "cuda")
_autocast_dtype = torch.get_autocast_dtype
_grad_enabled = torch.is_grad_enabled
_wants = attrgetter("requires_grad")
_TOKENS = ("decoder_input_ids", "input_ids", "tokens", "idx")
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "module")  # what wrappers call the module inside
_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def uses_flash(module: torch.nn.Module) -> bool | None:
    """Is a transformers model's attention flash attention? None: it is no such model."""
    chosen = _said(module, "_attn_implementation")
    return None if chosen is None else "flash" in str(chosen)


def _layers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module, and what DistributedDataParallel, FSDP or a compiler wrapped in it, from the outside in."""
    inner: Any = module
    for _ in range(DEEPEST):
        yield inner
        parts = (getattr(inner, name, None) for name in _WRAPPED)
        inner = next((part for part in parts if isinstance(part, torch.nn.Module)), None)
        if inner is None:
            return


def _said(module: torch.nn.Module, name: str) -> Any:
    """What the config of a transformers model says, of one that is wrapped, too; None where it says nothing."""
    told = (getattr(getattr(layer, "config", None), name, None) for layer in _layers(module))
    return next((value for value in told if value is not None), None)


def _names(module: torch.nn.Module) -> tuple[str, ...]:
    """Of the arguments by position of its forward; of a wrapper that hands on whatever it gets, of what it wraps."""
    for layer in _layers(module):
        try:
            parameters = inspect.signature(layer.forward).parameters.values()
        except (TypeError, ValueError):
            return ()
        names = tuple(parameter.name for parameter in parameters if parameter.kind in _NAMED)
        if names:
            return names
    return ()


class Root:
    """A model, and what of it is part of every call's structure."""

    __slots__ = (
        "__weakref__", "_asked", "_casts", "_flags", "_own", "_shapes", "apart", "bounds_at", "device", "first",
        "flash", "fresh", "index", "module", "names", "number", "parameters", "parts", "shaped", "stale", "trained",
        "two_stacks",
    )  # fmt: skip

    def __init__(self, module: torch.nn.Module, index: int) -> None:
        self.module, self.index = module, index
        self.trained = False
        self._flags: list[bool] | None = None
        self.parameters: list[torch.nn.Parameter] = []  # that it held when they were looked up, perhaps in a call
        self._own: list[torch.nn.Parameter] | None = None  # that it holds between its calls; None: not looked up
        self.first: torch.nn.Parameter | None = None
        self.fresh = False  # no parameter was replaced, frozen or thawed since they were looked at
        self.stale = False  # a part of it was replaced
        self._asked = False  # nobody tells when one of the parameters is frozen
        self._shapes = ""
        self.number = 0  # for the parameters' shapes and the set of those that want a gradient
        self.shaped = 0  # for the shapes alone: below 0
        self.refresh()

    def refresh(self) -> bool:
        """Look its parts and parameters up again; are these others than before?"""
        self.stale, self._own = False, None
        self.parts = frozenset(map(id, self.module.modules()))
        before = self.parameters
        self.parameters, self._flags, self.fresh = list(self.module.parameters()), None, False
        self._asked = not all(map(seen, self.parameters))
        shapes = shapes_of(self.parameters)
        if shapes != self._shapes:  # another head, say: the same arguments multiply something else now
            self._shapes = shapes
            self.shaped = -number(shapes)
        self.first = next(iter(self.parameters), None)
        self.flash = uses_flash(self.module)
        self.two_stacks = bool(_said(self.module, "is_encoder_decoder"))
        self.device = "cpu" if self.first is None else self.first.device.type
        self.names = _names(self.module)  # of the arguments by position
        # Of these, the first one that may tell where packed sequences begin.
        self.bounds_at = next((i for i, name in enumerate(self.names) if self._tells_boundaries(name)), sys.maxsize)
        self._casts = torch.amp.is_autocast_available(self.device)
        self.apart = self._casts and self.device not in _AMONG_THEM
        return list(map(id, before)) != list(map(id, self.parameters))

    def _tells_boundaries(self, name: str) -> bool:
        if name == "position_ids":
            return self.device == "cpu" if self.flash is None else self.flash
        return name.startswith(BOUNDARIES)

    def cast(self) -> torch.dtype | None:
        """What autocast computes in here; None where it is off."""
        return _autocast_dtype(self.device) if self._casts and _autocast(self.device) else None

    def renew(self) -> None:
        """Look at the parameters again, if they were replaced; and at which of them want a gradient."""
        if self.stale:
            self.refresh()
        self.fresh = not self._asked
        flags = list(map(_wants, self.parameters))
        if flags != self._flags:
            self._flags = flags
            self.number = number(repr((flags, self._shapes)))

    def owned(self) -> list[torch.nn.Parameter]:
        """Its parameters, asked for where it is not being called: functional_call puts others there meanwhile."""
        if self._own is None or self.stale:
            self._own = list(self.module.parameters())
        return self._own

    def trains(self) -> bool:
        """Would a call of it now be differentiated, down to parameters of its own?"""
        return _grad_enabled() and any(map(_wants, self.parameters))

    def forget(self) -> None:
        """Keep no parameter alive."""
        self.parameters.clear()
        self._own = self.first = None


def shapes_of(parameters: Iterable[torch.Tensor]) -> str:
    """Of those that have one."""
    return repr([tuple(parameter.shape) for parameter in parameters if not is_lazy(parameter)])


def size_of(root: Root, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int, Padding | None]:
    """(tokens, samples, what tells padding from the tokens) that a call holds; 0 and None where it has none.

    Tokens are the integers of a (batch, length) input, those of the decoder where there are two stacks, or the
    positions of `inputs_embeds`; samples are the rows of the first tensor, of all that `vmap` makes one of.
    """
    at: dict[str, int | str] = {name: i for i, name in zip(range(len(args)), root.names, strict=False)}
    at |= {name: name for name in kwargs}
    given = {name: args[where] if isinstance(where, int) else kwargs[where] for name, where in at.items()}
    given = {name: value for name, value in given.items() if value is not None}
    tokens = next((name for name in _TOKENS if name in given), None)
    if root.two_stacks and "labels" in given and "decoder_input_ids" not in given:
        tokens = "labels"
    named = None if tokens is None else given[tokens]
    if named is None and "inputs_embeds" in given:
        shape: Any = getattr(given["inputs_embeds"], "shape", ())
        if len(shape) == 3:
            return shape[0] * shape[1], shape[0], _padding(tokens, shape[:2], given, at)
    for value in (named, *args, *kwargs.values()):
        if isinstance(value, _Tensor) and value.dim() > 0:
            if value.is_nested:
                return 0, int(value.size(0)), None
            shape, times = value.shape, _mapped(value)
            if len(shape) == 1 and value is named:
                return times * shape[0], times, None
            if len(shape) == 2 and not value.is_floating_point() and not value.is_complex():
                padding = _padding(tokens, shape, given, at) if times == 1 else None
                return times * shape[0] * shape[1], times * shape[0], padding
            return 0, times if len(shape) == 1 and times > 1 else times * shape[0], None
    batch = next((value for value in (*args, *kwargs.values()) if isinstance(value, Mapping)), None)
    return (0, 0, None) if batch is None else (*size_of(root, (), batch)[:2], None)


def _mapped(value: torch.Tensor) -> int:
    """How many such tensors `vmap` makes one of."""
    return unwrapped(value)[0].numel() // value.numel() if value.numel() else 1


def _padding(tokens: str | None, shape: Any, given: Mapping[str, Any], at: Mapping[str, int | str]) -> Padding | None:
    """What tells padding from these tokens: of a decoder beside an encoder its own mask, or the labels."""
    decoded = tokens in ("decoder_input_ids", "labels")
    choices = [("decoder_attention_mask" if decoded else "attention_mask", 0)]
    if decoded and "attention_mask" in given:  # padding is spoken of: then that of the labels is marked, too
        choices.append(("labels", -100))
    for name, value in choices:
        found = given.get(name)
        if isinstance(found, _Tensor) and found.shape == shape and found.device.type != "meta":
            return Padding(at[name], value, shape[0] * shape[1])
    return None
