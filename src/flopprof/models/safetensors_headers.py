"""What a checkpoint stores, read from the headers of its safetensors files alone: names, dtypes, shapes, bytes.

A file is 8 bytes of length, that much JSON, and the tensors' bytes without hole or overlap. Nothing of the last part
is read. Everything that a header says is checked against the size of its file, and what is read is bounded.
"""

from __future__ import annotations

import gc
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Annotated

import msgspec

from flopprof.errors import InvalidCheckpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The format's own limit for one header; here for all headers of a checkpoint together, and for its index.
MOST_BYTES = 100_000_000
MOST_TENSORS = 300_000  # the largest published checkpoints (1 T parameters in 384 experts, packed) have some 200,000
_MOST_SHARDS = 4096
_LONGEST_ENTRY = 4096  # bytes of JSON about one tensor
LENGTH = 8  # bytes that tell how long the header is
_AT_ONCE = 8

# https://huggingface.co/docs/safetensors and the reference implementation, tensor.rs (0.8)
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

_Size = Annotated[int, msgspec.Meta(ge=0)]


class StoredTensor(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a file: dtype as safetensors names it, sizes, and where its bytes begin and end."""

    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


@dataclass(frozen=True)
class Stored:
    """Every tensor that a checkpoint stores, by name, and how many files hold them."""

    tensors: Mapping[str, StoredTensor]
    files: int

    @property
    def elements(self) -> int:
        """Numbers stored: parameters, persistent buffers, and what quantisation keeps beside them."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors, without headers."""
        return sum(end - start for start, end in (tensor.data_offsets for tensor in self.tensors.values()))

    def by_dtype(self) -> dict[str, int]:
        """Elements by dtype, most first."""
        found: Counter[str] = Counter()
        for tensor in self.tensors.values():
            found[tensor.dtype] += tensor.elements
        return dict(found.most_common())


def read_directory(folder: Path) -> Stored | None:
    """What the safetensors files of a checkpoint's folder hold; None where it has none. Raises InvalidCheckpoint."""
    if (folder / SINGLE).exists():
        tensors = read_file(folder / SINGLE)
        return Stored(tensors, 1)
    if not (folder / INDEX).exists():
        return None
    shards = read_index(read_small(folder / INDEX), str(folder / INDEX))
    budget = MOST_BYTES

    def header(name: str) -> Mapping[str, StoredTensor]:
        nonlocal budget
        raw, size = _raw_header(folder / name, budget)
        budget -= len(raw)
        return parse_header(raw, size, str(folder / name))

    return gather(shards, map(header, shards), str(folder / INDEX))


def read_remotely(shards: Mapping[str, Sequence[str]], header: Callable[[str], Mapping[str, StoredTensor]],
                  where: str) -> Stored:  # fmt: skip
    """What the shards hold, their headers asked for several at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return gather(shards, pool.map(header, shards), where)


def gather(shards: Mapping[str, Sequence[str]], headers: Iterable[Mapping[str, StoredTensor]], where: str) -> Stored:
    """The tensors that an index promises, each found in its shard. Raises InvalidCheckpoint where one is missing."""
    tensors: dict[str, StoredTensor] = {}
    for (shard, names), header in zip(shards.items(), headers, strict=True):
        for name in names:
            if name not in header:
                raise InvalidCheckpoint(f"{where} says that {shard} holds {_shown(name)}, and it does not.")
            tensors[name] = header[name]
    return Stored(tensors, len(shards))


def read_index(text: bytes, where: str) -> dict[str, list[str]]:
    """Shard -> the names of its tensors, from the text of an index. Raises InvalidCheckpoint."""
    try:
        with uncollected():
            entries = msgspec.json.decode(text, type=_Index).weight_map
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidCheckpoint(f"{where} is no index of safetensors shards: {error}.") from error
    if len(entries) > MOST_TENSORS:
        raise InvalidCheckpoint(f"{where} lists {len(entries):,} tensors; more than {MOST_TENSORS:,} are not read.")
    shards: dict[str, list[str]] = {}
    for name, shard in entries.items():
        shards.setdefault(shard, []).append(name)
    if len(shards) > _MOST_SHARDS:
        raise InvalidCheckpoint(f"{where} lists {len(shards):,} files; more than {_MOST_SHARDS:,} are not read.")
    for shard in shards:
        parts = PurePosixPath(shard).parts
        lies_within = shard.isprintable() and parts and not {"..", "/", "//"} & set(parts)
        if not lies_within or "\\" in shard or ":" in shard or not shard.endswith(".safetensors"):
            raise InvalidCheckpoint(f"{where} names the shard {_shown(shard)}, which is no safetensors file beside it.")
    return shards


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises InvalidCheckpoint."""
    return parse_header(*_raw_header(file, MOST_BYTES), str(file))


def read_small(file: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most that many bytes. Raises InvalidCheckpoint."""
    size = _size_of(file)
    if size > most:
        raise InvalidCheckpoint(f"{file} has {size:,} bytes; more than {most:,} are not read.")
    try:
        with file.open("rb") as stream:
            return stream.read(most)
    except OSError as error:
        raise InvalidCheckpoint(f"{file} cannot be read: {error.strerror}.") from error


@contextmanager
def uncollected() -> Iterator[None]:
    """While open, the garbage collector rests: it would walk all of torch again for every few objects of a file."""
    rests = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if rests:
            gc.enable()


def _size_of(file: Path) -> int:
    try:
        facts = os.stat(file)
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{file} cannot be read: {getattr(error, 'strerror', error)}.") from error
    if not stat.S_ISREG(facts.st_mode):  # a pipe would be waited for
        raise InvalidCheckpoint(f"{file} is not a regular file.")
    return facts.st_size


def _raw_header(file: Path, most: int) -> tuple[bytes, int]:
    """(the JSON, bytes of tensors that follow it) of a file."""
    size = _size_of(file)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH), "little")
            if size < LENGTH or length > size - LENGTH:
                raise InvalidCheckpoint(
                    f"{file} is cut short: its header claims {length:,} bytes, and the file has {size:,}."
                )
            if length > most:
                raise InvalidCheckpoint(f"{file} has a header of {length:,} bytes; more than {most:,} are not read.")
            return stream.read(length), size - LENGTH - length
    except OSError as error:
        raise InvalidCheckpoint(f"{file} cannot be read: {error.strerror}.") from error


def parse_header(raw: bytes, room: int | None, where: str) -> dict[str, StoredTensor]:
    """The tensors that a header describes. room: bytes that follow it, None where unknown. Raises InvalidCheckpoint."""
    try:
        with uncollected():
            entries = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
            entries.pop("__metadata__", None)
            if len(entries) > MOST_TENSORS:
                raise InvalidCheckpoint(
                    f"{where} lists {len(entries):,} tensors; more than {MOST_TENSORS:,} are not read."
                )
            tensors = {}
            decode = msgspec.json.Decoder(StoredTensor).decode
            for name, entry in entries.items():
                if len(memoryview(entry)) > _LONGEST_ENTRY:
                    raise InvalidCheckpoint(f"{where} describes {_shown(name)} in more than {_LONGEST_ENTRY} bytes.")
                tensors[name] = decode(entry)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidCheckpoint(f"{where} has a header that is not what safetensors writes: {error}.") from error
    check(tensors, room, where)
    return tensors


def check(tensors: Mapping[str, StoredTensor], room: int | None, where: str) -> None:
    """Raises InvalidCheckpoint unless each shape fills its bytes, and all of them fill the file once."""
    for name, tensor in tensors.items():
        start, end = tensor.data_offsets
        if tensor.dtype not in BITS:
            raise InvalidCheckpoint(f"{where} stores {_shown(name)} in the unknown dtype {_shown(tensor.dtype)}.")
        if tensor.elements * BITS[tensor.dtype] != 8 * (end - start):
            raise InvalidCheckpoint(
                f"{where} gives {_shown(name)} {end - start} bytes; its shape in {tensor.dtype} takes another number."
            )
    reached = 0
    for start, end in sorted(tensor.data_offsets for tensor in tensors.values()):
        if start != reached:
            raise InvalidCheckpoint(f"{where} has tensors that overlap, or bytes of no tensor, at offset {start}.")
        reached = end
    if room is not None and reached != room:
        raise InvalidCheckpoint(f"{where} describes {reached} bytes of tensors, and holds {room}.")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
