"""Grouped products on meta, as older torch refuses them: the shapes are those that this torch finds itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flopprof.counting import refused

GROUPED = "aten::_grouped_mm"
OLD = "Expected mat_a to be BFloat16 or supported Float16 matrix, got torch.float32."


def refusing(*_: Any) -> Any:
    raise RuntimeError(OLD)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("a", "b", "ends", "shape"),
    [
        ((24, 16), (3, 16, 32), 3, (24, 32)),  # rows one after another
        ((3, 8, 16), (16, 24), 3, (8, 24)),  # columns
        ((8, 24), (24, 32), 3, (3, 8, 32)),  # what is summed over
        ((3, 8, 16), (3, 16, 32), 0, (3, 8, 32)),
    ],
)
def test_shapes(a: tuple[int, ...], b: tuple[int, ...], ends: int, shape: tuple[int, ...]) -> None:
    offs = meta(ends, dtype=torch.int32) if ends else None
    found = refused.shaped(GROUPED, refusing)(meta(*a), meta(*b), offs, None, torch.bfloat16)
    assert (tuple(found.shape), found.dtype, found.device.type) == (shape, torch.bfloat16, "meta")
    narrow = torch.ops.aten._grouped_mm(meta(*a, dtype=torch.bfloat16), meta(*b, dtype=torch.bfloat16), offs)
    assert narrow.shape == shape


def test_what_no_device_runs_is_refused_still() -> None:
    call, offs = refused.shaped(GROUPED, refusing), meta(2, dtype=torch.int32)
    for a, b in (
        (meta(4, 16), meta(2, 8, 16)),  # 16 is not 8
        (meta(4, 16), meta(2, 16, 8, dtype=torch.float16)),
        (meta(4, 16, dtype=torch.float64), meta(2, 16, 8, dtype=torch.float64)),
        (torch.ones(4, 16), torch.ones(2, 16, 8)),
    ):
        with pytest.raises(RuntimeError, match="BFloat16"):
            call(a, b, offs)
    assert refused.shaped("aten::mm", refusing) is refusing


def test_a_torch_that_refuses_is_helped_where_no_counter_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refused, "_refuses", lambda: True)
    monkeypatch.setattr(refused, "shaped", lambda name, func: (lambda *_, **__: meta(7)) if name == GROUPED else func)
    with refused.accepted():
        a = meta(4, 16) + 1
        assert torch.ops.aten._grouped_mm(a, meta(2, 16, 8), meta(2, dtype=torch.int32)).shape == (7,)
