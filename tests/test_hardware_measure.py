"""The measured peak: repetitions, medians and spread on an injected clock; torch's settings and numbers stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

import flopprof
from flopprof.errors import NoPeak, UnknownDevice, UsageError
from flopprof.hardware import measure as measuring
from flopprof.hardware.measure import REPETITIONS, measure
from flopprof.hardware.sweep import Measurement, Timing

TINY = (8, 4, 2)
FLOPS = 2 * 8 * 4 * 2


def clock_of(*durations: float) -> Callable[[], float]:
    """A clock whose readings, taken in pairs, are `durations` apart; the last one lasts."""

    def readings() -> Iterator[float]:
        now, left = 100.0, list(durations)
        while True:
            yield now
            now += left.pop(0) if len(left) > 1 else left[0]
            yield now

    return readings().__next__


def test_twenty_repetitions_and_their_median() -> None:
    found = measure("cpu", "fp32", shapes=[TINY], clock=clock_of(*[0.001, 0.002, 0.004] * 7), seconds=1.0)
    (timing,) = found.timings
    # of 7, 7 and 6 runs: the 10th and 11th are 0.002, the quartiles the 5th and 6th, and the 15th and 16th
    assert timing.repetitions == REPETITIONS == 20
    assert timing.median_s == pytest.approx(0.002)
    assert (timing.q1_s, timing.q3_s) == (pytest.approx(0.001), pytest.approx(0.004))
    assert timing.spread == pytest.approx((0.004 - 0.001) / 0.002)
    assert timing.flops == FLOPS
    assert timing.flops_per_s == pytest.approx(FLOPS / 0.002)


def test_a_slow_shape_is_run_until_its_time_is_over_but_thrice_at_least() -> None:
    assert measure("cpu", "fp32", shapes=[TINY], clock=clock_of(0.25), seconds=1.0).timings[0].repetitions == 4
    assert measure("cpu", "fp32", shapes=[TINY], clock=clock_of(9.0), seconds=1.0).timings[0].repetitions == 3


def test_the_best_shape_is_the_peak() -> None:
    shapes = [(2, 2, 2), (4, 4, 4), (4, 2, 2)]
    durations = [0.001] * 20 + [0.002] * 20 + [0.004]
    peak = flopprof.measure_peak("cpu", torch.float32, shapes=shapes, clock=clock_of(*durations))
    assert peak.flops_per_s == round(2 * 4 * 4 * 4 / 0.002)  # 8,000 and 16,000 and 64,000 FLOP/s
    assert (peak.measured, peak.dtype, peak.bytes_per_s, peak.memory_bytes, peak.tdp_w) == (
        True,
        "float32",
        None,
        None,
        None,
    )
    assert peak.source.startswith("measured: 4 x 4 x 4, median of 20 runs, torch ")
    assert f"{torch.get_num_threads()} threads" in peak.source
    assert peak.device


def test_a_shape_that_one_run_of_which_passes_the_time_is_left_out() -> None:
    told: list[Timing] = []
    found = measure(
        "cpu",
        "fp32",
        shapes=[(4, 4, 4), (40, 40, 40), (8, 4, 4)],
        clock=clock_of(0.01),
        seconds=0.1,
        progress=told.append,
    )
    assert [timing.shape for timing in found.timings] == [(4, 4, 4), (8, 4, 4)]  # 1000 times 0.01 s is too long
    assert told == list(found.timings)


def test_float32_on_a_cpu_unless_told() -> None:
    assert measure("cpu", shapes=[TINY], clock=clock_of(0.1)).dtype == "float32"
    if not torch.accelerator.is_available():
        assert measure(shapes=[TINY], clock=clock_of(0.1)).threads == torch.get_num_threads()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
def test_a_real_clock(dtype: str) -> None:
    peak = flopprof.measure_peak("cpu", dtype, shapes=[(64, 64, 64)], seconds=0.05)
    assert 1e6 < peak.flops_per_s < 1e15


def test_what_a_cpu_cannot_multiply() -> None:
    with pytest.raises(NoPeak, match="tf32 exists on CUDA devices only: measure float32 on cpu"):
        flopprof.measure_peak("cpu", "tf32")
    with pytest.raises(NoPeak, match="cannot measure 'int8': choose fp64, fp32, tf32, bf16, fp16 or fp8"):
        flopprof.measure_peak("cpu", "int8")
    with pytest.raises(NoPeak, match="cannot measure 'what'"):
        flopprof.measure_peak("cpu", "what")


def test_a_product_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise RuntimeError('"addmm_impl_cpu_" not implemented for this.\nmore')

    monkeypatch.setattr(torch, "mm", refuse)
    with pytest.raises(
        NoPeak, match=r"does not multiply bfloat16 in this torch \(\"addmm_impl_cpu_\" not implemented for this\)\.$"
    ):
        flopprof.measure_peak("cpu", "bf16", shapes=[TINY])


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="seconds per shape must be more than 0, got 0"):
        flopprof.measure_peak("cpu", seconds=0)
    with pytest.raises(UsageError, match="the clock did not advance"):
        flopprof.measure_peak("cpu", shapes=[TINY], clock=lambda: 1.0)
    with pytest.raises(UsageError, match="at least one shape"):
        flopprof.measure_peak("cpu", shapes=[])
    if not torch.cuda.is_available():
        with pytest.raises(UnknownDevice, match="torch sees no cuda device here"):
            flopprof.measure_peak("cuda")


def test_settings_and_random_numbers_stay() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    matmul, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = matmul.fp32_precision, mkldnn.fp32_precision
    seen = []

    def look(_timing: Timing) -> None:
        seen.append((matmul.fp32_precision, mkldnn.fp32_precision))

    try:
        matmul.fp32_precision, mkldnn.fp32_precision = "tf32", "bf16"
        measure("cpu", "fp32", shapes=[TINY], clock=clock_of(0.1), progress=look)
        assert (matmul.fp32_precision, mkldnn.fp32_precision) == ("tf32", "bf16")
    finally:
        matmul.fp32_precision, mkldnn.fp32_precision = before
    assert seen == [("ieee", "ieee")]
    assert torch.equal(torch.rand(3), expected)


def test_an_interrupt_leaves_the_settings() -> None:
    before = torch.backends.cuda.matmul.fp32_precision

    def stop(_timing: Timing) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure("cpu", "fp32", shapes=[TINY], clock=clock_of(0.1), progress=stop)
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_the_numbers_are_not_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros draw less power, and let a GPU clock higher than work does."""
    seen: list[torch.Tensor] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (seen.extend((a, b)), mm(a, b, out=out))[1])
    measure("cpu", "fp32", shapes=[(64, 64, 64)], clock=clock_of(0.1))
    assert all(0.9 < values.std().item() < 1.1 and abs(values.mean().item()) < 0.1 for values in seen[:2])
    assert not torch.equal(seen[0], seen[1])


def test_the_float8_that_a_device_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(arch: str) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=arch))
        return measuring._float8(torch.device("cuda"))

    assert named("gfx942:sramecc+:xnack-") == "float8_e4m3fnuz"
    assert named("gfx950:sramecc+:xnack-") == named("") == measuring._float8(torch.device("cpu")) == "float8_e4m3fn"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_gpu_stays_under_its_peak(dtype: str) -> None:
    found: Measurement = measure("cuda", dtype, seconds=0.2)
    assert 0.1 < found.peak.flops_per_s / flopprof.peak("cuda", dtype).flops_per_s < 1.0
