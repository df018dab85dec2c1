"""The values that meta tensors carry: for a meta storage, a CPU storage of the same bytes, as long as it lives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

# Elements up to which values are computed: indices and masks of long sequences; of floats, masks of usual ones. What
# rulers, bucket bounds and pooled sizes need is small; of more than that there is a budget.
_MOST_INTEGERS = 1 << 25
_MOST_FLOATS = 1 << 22
SMALL_FLOATS = 1 << 16
_MOST_BYTES = 1 << 30  # of all that is carried at once
_SWEEP_AT = 512

_aten = torch.ops.aten
_INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class Fact:
    """What is known of one meta storage.

    guesses  the sentences that its values rest on
    labels   its values are labels (token ids) of which only their being different is known
    written  something was written to it since it was allocated
    part     which elements are known (True), where not all are
    """

    __slots__ = ("guesses", "labels", "part", "ref", "storage", "written")

    def __init__(
        self, ref: StorageWeakRef, storage: torch.UntypedStorage, guesses: frozenset[str], labels: bool, written: bool
    ) -> None:
        self.ref = ref  # also keeps the address from being taken by another storage
        self.storage = storage
        self.guesses = guesses
        self.labels = labels
        self.written = written
        self.part: torch.Tensor | None = None


class Store:
    """Facts by meta storage; those of dead storages are swept."""

    def __init__(self) -> None:
        self._facts: dict[int, Fact] = {}
        self._bytes = 0
        self._sweep_at = _SWEEP_AT

    def __len__(self) -> int:
        self._sweep()
        return len(self._facts)

    def get(self, tensor: torch.Tensor) -> Fact | None:
        """What is known of a meta tensor's storage, if all that the tensor shows of it is known."""
        try:
            fact = self._facts.get(tensor.untyped_storage()._cdata)
        except (RuntimeError, NotImplementedError):  # sparse, nested: none
            return None
        if fact is not None and fact.part is not None and not _shows(tensor, fact.part):
            return None
        return fact

    def bind(self, tensor: torch.Tensor, value: torch.Tensor | None, guesses: frozenset[str], labels: bool) -> None:
        """Let a meta tensor with new storage carry `value` (CPU, its shape); None: nothing was written to it yet."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if not self._room(size):
            return
        held = _aten.zeros.default([size], dtype=torch.uint8, device="cpu").untyped_storage()
        if value is not None:
            _aten.copy_.default(_view(tensor, held), value)
        self._facts[storage._cdata] = Fact(StorageWeakRef(storage), held, guesses, labels, value is not None)
        self._bytes += size

    def bind_parts(
        self, tensor: torch.Tensor, dim: int, parts: list[tuple[int, torch.Tensor]], guesses: frozenset[str]
    ) -> None:
        """Let a new contiguous meta tensor carry what is known of parts of it: (where along `dim`, values)."""
        values = _aten.zeros.default(tensor.shape, dtype=tensor.dtype, device="cpu")
        known = _aten.zeros.default(tensor.shape, dtype=torch.bool, device="cpu")
        for start, value in parts:
            end = start + value.shape[dim]
            _aten.copy_.default(_aten.slice.Tensor(values, dim, start, end), value)
            _aten.fill_.Scalar(_aten.slice.Tensor(known, dim, start, end), True)
        self.bind(tensor, values, guesses, labels=False)
        fact = self._facts.get(tensor.untyped_storage()._cdata)
        if fact is not None:
            fact.part = _aten.view.default(known, [-1])

    def shadow(self, tensor: torch.Tensor, fact: Fact) -> torch.Tensor | None:
        """The CPU tensor that stands for this view of a known storage; None where its bits alone do not tell."""
        if tensor.dtype not in _INTEGERS and tensor.dtype not in _FLOATS:
            return None
        if tensor.is_neg() or tensor.untyped_storage().nbytes() != fact.storage.nbytes():
            return None
        return _view(tensor, fact.storage)

    def forget(self, tensor: torch.Tensor) -> None:
        """Something unknown was written to it."""
        try:
            fact = self._facts.pop(tensor.untyped_storage()._cdata, None)
        except (RuntimeError, NotImplementedError):
            return
        if fact is not None:
            self._bytes -= fact.storage.nbytes()

    def clear(self) -> None:
        """Forget everything."""
        self._facts.clear()
        self._bytes = 0

    def _room(self, size: int) -> bool:
        if len(self._facts) >= self._sweep_at or self._bytes + size > _MOST_BYTES:
            self._sweep()
        return self._bytes + size <= _MOST_BYTES

    def _sweep(self) -> None:
        for key in [key for key, fact in self._facts.items() if fact.ref.expired()]:
            self._bytes -= self._facts.pop(key).storage.nbytes()
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._facts))


@contextmanager
def aside() -> Iterator[None]:
    """What runs inside is seen by no mode, no subclass and no autograd."""
    with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        yield


def fits(tensor: torch.Tensor, *, floats: bool) -> bool:
    """Is a tensor of this dtype and size worth carrying values?"""
    if tensor.is_nested or tensor.layout is not torch.strided:
        return False
    if tensor.dtype in _INTEGERS:
        return tensor.numel() <= _MOST_INTEGERS
    return floats and tensor.dtype in _FLOATS and tensor.numel() <= _MOST_FLOATS


def is_large(tensor: torch.Tensor) -> bool:
    """Is a tensor that fits one of those floating ones that are only followed within a budget?"""
    return tensor.dtype in _FLOATS and tensor.numel() > SMALL_FLOATS


def _view(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    empty = _aten.empty.memory_format([0], dtype=tensor.dtype, device="cpu")
    place: tuple[Any, ...] = (storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    return _aten.set_.source_Storage_storage_offset(empty, *place)  # type: ignore[no-any-return]


def _shows(tensor: torch.Tensor, part: torch.Tensor) -> bool:
    """Are all elements of this view among those of its storage that are known?"""
    with aside():
        if tensor.untyped_storage().nbytes() != part.numel() * tensor.element_size():  # seen as another type
            return False
        seen = _aten.as_strided.default(part, tensor.size(), tensor.stride(), tensor.storage_offset())
        return bool(_aten.all.default(seen))
