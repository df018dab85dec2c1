"""Headers of safetensors files: read alone, every claim checked against the file, hostile ones refused at once."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flopprof.errors import InvalidCheckpoint
from flopprof.models.safetensors_headers import INDEX, SINGLE, parse_header, read_directory, read_file

save_file = pytest.importorskip("safetensors.torch").save_file


def packed(header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_what_the_library_writes_is_read_back(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros(2, dtype=torch.int64),
        "scalar": torch.zeros(()),
        "none": torch.zeros(0, 4),
        "narrow": torch.zeros(7, dtype=torch.float8_e4m3fn),
        "flag": torch.zeros(3, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt", "note": "a,b" * 5000})
    stored = read_directory(tmp_path)
    assert stored is not None
    assert {name: tensor.shape for name, tensor in stored.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert stored.elements == 15 + 2 + 1 + 0 + 7 + 3
    assert stored.n_bytes == 15 * 2 + 2 * 8 + 4 + 7 + 3
    assert stored.by_dtype() == {"BF16": 15, "F8_E4M3": 7, "BOOL": 3, "I64": 2, "F32": 1}


def test_the_tensors_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    size = 2**40
    file.write_bytes(packed(one([size // 4], [0, size])))
    os.truncate(file, file.stat().st_size + size)  # a hole: it takes no room
    assert read_file(file)["w"].elements == size // 4


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut short"),
    "seven bytes": (b"\0" * 7, "cut short"),
    "length beyond the file": (packed({}, length=2**63), "cut short"),
    "cut in the header": (packed(one([1], [0, 4]), b"\0" * 4)[:20], "cut short"),
    "cut in the data": (packed(one([2], [0, 8]), b"\0" * 7), "describes 8 bytes of tensors, and holds 7"),
    "bytes of no tensor": (packed(one([1], [0, 4]), b"\0" * 9), "describes 4 bytes"),
    "no JSON": (packed(b"{" * 40), "not what safetensors writes"),
    "deep": (packed(b'{"w":' + b"[" * 1_000_000), "not what safetensors writes"),
    "a list": (packed(b"[]"), "not what safetensors writes"),
    "no UTF-8": (packed(b'{"\xff":1}'), "not what safetensors writes"),
    "negative size": (packed(one([-1], [0, 4]), b"\0" * 4), "not what safetensors writes"),
    "two negative sizes": (packed(one([-1, -1], [0, 4]), b"\0" * 4), "not what safetensors writes"),
    "size as text": (packed(one(["1"], [0, 4]), b"\0" * 4), "not what safetensors writes"),
    "half a size": (packed(one([0.5], [0, 4]), b"\0" * 4), "not what safetensors writes"),
    "size as truth": (packed(one([True], [0, 4]), b"\0" * 4), "not what safetensors writes"),
    "huge size": (packed(one([10**30], [0, 4]), b"\0" * 4), "takes another number"),
    "many sizes": (packed(one([1] * 100_000, [0, 4]), b"\0" * 4), "more than 4096 bytes"),
    "unknown dtype": (packed(one([1], [0, 4], "F31"), b"\0" * 4), "unknown dtype 'F31'"),
    "wrong bytes": (packed(one([1], [0, 5]), b"\0" * 5), "takes another number"),
    "reversed": (packed(one([1], [4, 0]), b"\0" * 4), "takes another number"),
    "three offsets": (packed(one([1], [0, 4, 8]), b"\0" * 4), "not what safetensors writes"),
    "beyond the file": (packed(one([1], [8, 12]), b"\0" * 4), "overlap, or bytes of no tensor"),
    "overlap": (
        packed({**one([1], [0, 4]), "v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        "overlap",
    ),
    "hole": (
        packed({**one([1], [0, 4]), "v": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}, b"\0" * 12),
        "overlap, or bytes of no tensor, at offset 8",
    ),
    "no shape": (packed({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4), "not what safetensors writes"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_lie_are_refused_at_once(name: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[name]
    (tmp_path / SINGLE).write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(InvalidCheckpoint, match=reason) as caught:
        read_directory(tmp_path)
    spent = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert spent < 1
    assert peak < 20 * 2**20
    assert len(str(caught.value)) < 700
    assert str(tmp_path) in str(caught.value)


def test_a_header_beyond_the_formats_limit_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    file.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(file, 100_000_100)
    with pytest.raises(InvalidCheckpoint, match="100,000,001 bytes; more than 100,000,000"):
        read_file(file)


def test_too_many_tensors_are_refused_within_a_second() -> None:
    entry = b'{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
    raw = b"{" + b",".join(b'"%d":%b' % (i, entry) for i in range(300_001)) + b"}"
    start = time.perf_counter()
    with pytest.raises(InvalidCheckpoint, match="300,001 tensors"):
        parse_header(raw, 0, "x")
    assert time.perf_counter() - start < 1


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(InvalidCheckpoint, match="not a regular file"):
        read_directory(tmp_path)


# --- shards -------------------------------------------------------------------------------------
def shards(folder: Path, weight_map: Any) -> Path:
    save_file({"a": torch.zeros(3), "stray": torch.zeros(9)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(2, 2)}, folder / "two.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 28}, "weight_map": weight_map}))
    return folder


def test_shards_hold_what_the_index_lists(tmp_path: Path) -> None:
    stored = read_directory(shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))
    assert stored is not None
    assert (stored.elements, stored.n_bytes, stored.files) == (7, 28, 2)
    assert list(stored.tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "../one.safetensors"}, "no safetensors file beside it"),
        ({"a": "/etc/one.safetensors"}, "no safetensors file beside it"),
        ({"a": "x/../../one.safetensors"}, "no safetensors file beside it"),
        ({"a": "..\\one.safetensors"}, "no safetensors file beside it"),
        ({"a": "C:one.safetensors"}, "no safetensors file beside it"),
        ({"a": "one.safetensors\0"}, "no safetensors file beside it"),
        ({"a": "/etc/passwd"}, "no safetensors file beside it"),
        ({"a": "model.bin"}, "no safetensors file beside it"),
        ({"a": ""}, "no safetensors file beside it"),
        ({"a": "absent.safetensors"}, "No such file"),
        ({"c": "one.safetensors"}, "holds 'c', and it does not"),
        ({"a": 3}, "no index"),
        ([], "no index"),
        ({str(i): f"{i}.safetensors" for i in range(5000)}, "5,000 files"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: Any, reason: str) -> None:
    start = time.perf_counter()
    with pytest.raises(InvalidCheckpoint, match=reason):
        read_directory(shards(tmp_path, weight_map))
    assert time.perf_counter() - start < 1


def test_a_folder_without_safetensors_stores_nothing_known(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert read_directory(tmp_path) is None
