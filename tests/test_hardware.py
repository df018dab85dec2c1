"""The table of peaks: held to arithmetic and to what vendors print."""

from __future__ import annotations

import doctest

import pytest
import torch

import flopprof
from flopprof import hardware
from flopprof.errors import NoPeak, UnknownDevice
from flopprof.hardware.names import tokens

TERA = 10**12
ROWS = {row.id: row for row in hardware.devices()}


def tera(id: str, dtype: str) -> float:
    return ROWS[id].peak(dtype).flops_per_s / TERA


# --- each row against its own arithmetic -----------------------------------------------------------
# units x FLOPs per clock and unit (fp16 operands, fp32 accumulated) x clock in GHz. Volta 8 tensor cores of 64
# multiply-adds an SM; A100 4 of 256; Hopper 4 of 512; workstation Ampere and Ada 4 of 128, GeForce half of that
CLOCKS = [
    ("v100-sxm2-16gb", "fp16", 80 * 1024, 1.530),
    ("v100-pcie-32gb", "fp16", 80 * 1024, 1.370),
    ("v100s-pcie", "fp16", 80 * 1024, 1.597),
    ("t4", "fp16", 40 * 1024, 1.590),
    ("rtx-2080-ti", "fp16", 68 * 512, 1.635),
    ("a100-sxm4-80gb", "bf16", 108 * 2048, 1.410),
    ("a100-pcie-40gb", "bf16", 108 * 2048, 1.410),
    ("a30", "bf16", 56 * 2048, 1.440),
    ("a10", "bf16", 72 * 1024, 1.695),
    ("a10g", "bf16", 80 * 512, 1.710),
    ("a40", "bf16", 84 * 1024, 1.740),
    ("rtx-a6000", "bf16", 84 * 1024, 1.800),
    ("rtx-3090", "bf16", 82 * 512, 1.695),
    ("rtx-3090-ti", "bf16", 84 * 512, 1.860),
    ("rtx-4090", "bf16", 128 * 512, 2.520),
    ("rtx-4090-d", "bf16", 114 * 512, 2.520),
    ("rtx-6000-ada", "bf16", 142 * 1024, 2.505),
    ("l4", "bf16", 58 * 1024, 2.040),
    ("l40", "bf16", 142 * 512, 2.490),
    ("h100-sxm5", "bf16", 132 * 4096, 1.830),
    ("h100-pcie", "bf16", 114 * 4096, 1.620),
    ("h100-nvl", "bf16", 132 * 4096, 1.545),
    ("rtx-5090", "bf16", 170 * 512, 2.407),
    ("rtx-pro-6000-bw-ws", "bf16", 188 * 1024, 2.617),
    ("mi210", "bf16", 104 * 1024, 1.700),
    ("mi250x-gcd", "bf16", 110 * 1024, 1.700),
    ("mi300x", "bf16", 304 * 2048, 2.100),
    ("mi355x", "bf16", 256 * 4096, 2.400),
    ("mi350x", "bf16", 256 * 4096, 2.200),
    ("gaudi2", "bf16", 2 * 256 * 256 * 2 * 2, 1.650 / 2),  # two engines of 256 x 256 multiply-adds
    ("gaudi3", "bf16", 8 * 256 * 256, 1.600 * 2),
    ("pvc-max1550", "bf16", 128 * 4096, 1.600),
    ("pvc-max1550-stack", "bf16", 64 * 4096, 1.600),
    ("pvc-max1100", "bf16", 56 * 4096, 1.550),
    ("pvc-max1100", "fp64", 56 * 256, 1.550),
    ("apple-m1-max", "fp32", 32 * 256, 1.278),
    ("apple-m3-max", "fp32", 40 * 256, 1.398),
]


@pytest.mark.parametrize(("id", "dtype", "per_clock", "ghz"), CLOCKS)
def test_the_peak_is_units_times_clock(id: str, dtype: str, per_clock: int, ghz: float) -> None:
    assert tera(id, dtype) == pytest.approx(per_clock * ghz / 1000, rel=0.007)


# what vendors print with 2:4 sparsity
SPARSE = [
    ("a100-sxm4-80gb", "bf16", 624),
    ("a100-sxm4-80gb", "int8", 1248),
    ("a30", "bf16", 330),
    ("a10", "bf16", 250),
    ("a10g", "bf16", 140),
    ("a40", "bf16", 299.4),
    ("rtx-a6000", "bf16", 309.7),
    ("rtx-3090", "bf16", 142.4),
    ("rtx-3090-ti", "bf16", 160),
    ("rtx-4090", "bf16", 330.4),
    ("rtx-4090", "fp8", 660.6),
    ("rtx-6000-ada", "fp8", 1457),
    ("l4", "bf16", 242),
    ("l4", "fp8", 485),
    ("l40", "bf16", 362.1),
    ("l40s", "fp8", 1466),
    ("h100-sxm5", "tf32", 989.4),
    ("h100-sxm5", "bf16", 1979),
    ("h100-sxm5", "fp8", 3958),
    ("h100-pcie", "bf16", 1513),
    ("h100-nvl", "tf32", 835),
    ("h100-nvl", "bf16", 1671),
    ("h200-sxm", "bf16", 1979),
    ("h200-nvl", "tf32", 835),
    ("h200-nvl", "bf16", 1671),
    ("gh200-96gb", "bf16", 1979),
    ("h20", "bf16", 296),
    ("b200", "bf16", 4500),
    ("b200", "fp4", 18000),
    ("gb200", "bf16", 5000),
    ("b300", "bf16", 4500),
    ("gb300", "bf16", 5000),
    ("rtx-5090", "bf16", 419),
    ("mi300x", "bf16", 2614.9),
    ("mi355x", "fp8", 10066),
]


@pytest.mark.parametrize(("id", "dtype", "sparse"), SPARSE)
def test_the_peak_is_dense(id: str, dtype: str, sparse: float) -> None:
    assert tera(id, dtype) == pytest.approx(sparse / 2, rel=0.002)


def test_rates_of_one_device_are_in_the_ratios_of_its_units() -> None:
    for row in ROWS.values():
        # the vendor's 362.05 beside 733, kept as printed
        within = pytest.approx(1, rel=0.013 if row.id == "l40s" else 0.007)
        rate = {name: row.peaks.get(name) for name in (*row.peaks, "tf32", "bfloat16", "float16", "float8_e4m3fn")}
        half, tf32, fp8 = rate["bfloat16"], rate["tf32"], rate["float8_e4m3fn"]
        if half and row.vendor in ("NVIDIA", "AMD"):
            assert rate["float16"] == half, row.id
            if tf32:
                assert 2 * tf32 / half == within, row.id
            if fp8:
                assert fp8 / half / 2 == within, row.id
        if "float64" in row.peaks and "float32" in row.peaks:
            assert row.peaks["float64"] <= row.peaks["float32"], row.id
        if fp8 and "float4_e2m1fn_x2" in row.peaks and row.vendor != "AWS":
            assert row.peaks["float4_e2m1fn_x2"] / fp8 == pytest.approx(3, abs=1.01), row.id
        if row.arch.startswith(("ampere", "ada", "hopper")) and half and row.peaks.get("int8"):
            times = 4 if row.name.startswith(("RTX 3", "RTX 4")) else 2  # GeForce halves only what is summed in fp32
            assert row.peaks["int8"] / half / times == pytest.approx(1, rel=0.013)


# Public tables and what they print for these in TFLOP/s, and the dense peak per torch device
WRONG = [
    ("a10g", "lightning", 125.0, 70.0),
    ("a40", "lightning", 37.4, 149.7),
    ("h100-nvl", "lightning", 1978.8, 835.5),
    ("h100-nvl", "verl", 989.0, 835.5),
    ("h100-pcie", "verl", 989.0, 756.0),
    ("h200-nvl", "torchtitan", 989.0, 835.5),
    ("h200-sxm", "lightning", 2000.0, 989.4),
    ("l4", "torch inductor", 242.0, 121.0),
    ("l40s", "lightning, by the L4's name", 121.0, 362.05),
    ("mi250x-gcd", "llm-analysis, stas00: per module", 383.0, 191.5),
    ("mi300x", "verl", 1336.0, 1307.4),
    ("mi355x", "stas00, torchtitan", 2500.0, 2516.6),
    ("rtx-2080-ti", "lightning", 28.5, 56.9),
    ("rtx-3090", "lightning", 35.6, 71.2),
    ("rtx-3090-ti", "lightning", 40.0, 80.0),
    ("rtx-4090", "lightning", 82.6, 165.2),
    ("rtx-a6000", "lightning", 38.7, 154.8),
    ("trn1", "torchtitan", 180.0, 190.0),
    ("trn2", "torchtitan", 632.0, 667.0),
    ("b300", "a blog", 3500.0, 2250.0),
    ("a100-sxm4-80gb", "torch inductor", 312.5, 312.0),
    ("h100-sxm5", "circulating, sparse", 2000.0, 989.4),
    ("gaudi3", "the white paper, at 1750 MHz", 1835.0, 1677.7),
]


@pytest.mark.parametrize(("id", "where", "theirs", "right"), WRONG)
def test_where_public_tables_are_wrong(id: str, where: str, theirs: float, right: float) -> None:
    dtype = "fp16" if "bfloat16" not in ROWS[id].peaks else "bf16"
    assert tera(id, dtype) == right != theirs


def test_other_wrong_figures() -> None:
    assert "bfloat16" not in ROWS["v100-sxm2-16gb"].peaks  # "125 bf16"
    assert ROWS["l4"].bytes_per_s == 300e9  # torch inductor: 3350 GB/s
    assert ROWS["a10"].memory_bytes == 24e9  # llm-analysis: 28 GB
    assert tera("gb300", "int8") == 165  # stas00: 5000
    assert "int8" not in ROWS["b300"].peaks  # stas00: 4500
    assert tera("pvc-max1100", "fp64") == 22.2  # torch inductor: 11.1
    assert tera("mi210", "fp32") == 45.3  # the matrix units' rate, not the vector units' 22.6
    assert tera("rtx-4090", "fp8") == 330.3  # 660.6 is with fp16 accumulated, or sparse
    assert "tf32" not in ROWS["mi355x"].peaks  # torch inductor: 157.3, which is float32's
    assert "float8_e4m3fn" not in ROWS["mi210"].peaks  # torch inductor: 181, which is float16's


def test_background() -> None:
    """V100 125 fp16, 900 GB/s; A100 312, 1,555 / 2,039; H100 989.4, 3,352."""
    v100, a100, h100 = (hardware.device(name) for name in ("V100", "A100", "H100"))
    assert (v100.peak("fp16").flops_per_s, v100.bytes_per_s) == (125 * TERA, 900e9)
    assert (a100.peak("bf16").flops_per_s, a100.bytes_per_s) == (312 * TERA, 2039e9)
    assert hardware.device("A100 40GB").bytes_per_s == 1555e9
    assert (h100.peak("bf16").flops_per_s, h100.bytes_per_s) == (989_400_000_000_000, 3352e9)


def test_every_row_says_where_it_is_from() -> None:
    assert len(ROWS) == len(hardware.devices()) > 72
    assert len({row.name for row in ROWS.values()}) == len(ROWS)
    for row in ROWS.values():
        assert row.source, row.id
        assert row.confidence, row.id
        assert row.date == "2026-11-22"
        assert all(type(rate) is int and rate > 0 for rate in row.peaks.values())
        assert row.bytes_per_s is not None
        assert row.peak().flops_per_s == row.peaks[row.peak().dtype]


def test_no_name_leads_to_two_rows() -> None:
    claimed: dict[tuple[str, ...], str] = {}
    for row in ROWS.values():
        for name in {tokens(name) for name in (row.id, row.name, *row.alias)}:
            assert claimed.setdefault(name, row.id) == row.id, name
    for name in {tokens(name) for row in ROWS.values() for name in row.detect}:
        rows = [row for row in ROWS.values() if name in map(tokens, row.detect)]
        assert len({row.units for row in rows}) == len(rows), name  # the units tell them apart
        assert name not in claimed or claimed[name] == rows[0].id, name


# --- dtypes ----------------------------------------------------------------------------------------
def test_dtypes_go_by_torchs_names_and_by_short_ones() -> None:
    for spelled in ("bf16", "BF16", "bfloat16", "torch.bfloat16", torch.bfloat16):
        assert flopprof.peak("H100", spelled).dtype == "bfloat16"
    assert flopprof.peak("H100", "fp32").flops_per_s == flopprof.peak("H100", torch.float32).flops_per_s == 66.9e12
    assert flopprof.peak("H100", "tf32").dtype == "tf32"
    assert flopprof.peak("H100", "fp8").dtype == "float8_e4m3fn"
    assert flopprof.peak("H100", torch.float8_e5m2).flops_per_s == 1_978_900_000_000_000
    assert flopprof.peak("MI300X", "fp8").dtype == "float8_e4m3fnuz"
    assert flopprof.peak("B200", "fp4").dtype == str(torch.float4_e2m1fn_x2).removeprefix("torch.")
    assert flopprof.peak("A100", torch.complex64).dtype == "float32"
    assert flopprof.peak("A100").dtype == "bfloat16"
    assert flopprof.peak("V100").dtype == "float16"


def test_every_dtype_of_the_table_is_torchs() -> None:
    names = {name for row in ROWS.values() for name in row.peaks} - {"tf32"}
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in names)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("V100", "bf16"),
        ("V100", "tf32"),
        ("T4", "bf16"),
        ("A100", "fp8"),
        ("H100", "fp4"),
        ("MI300X", "float8_e4m3fn"),
        ("MI355X", "tf32"),
        ("B300", "int8"),
        ("H100", "int32"),
        ("H100", ""),
    ],
)
def test_a_dtype_that_a_device_lacks_is_an_error(name: str, dtype: str) -> None:
    with pytest.raises(NoPeak, match=r"has no .* peak in the table \(it has float"):
        flopprof.peak(name, dtype)


def test_a_cpu_has_no_peak_in_the_table() -> None:
    for name in ("cpu", torch.device("cpu")):
        with pytest.raises(UnknownDevice, match=r"a CPU has no peak in the table.*measure_peak\(\)"):
            flopprof.peak(name)


def test_the_row_is_handed_out_with_the_peak() -> None:
    peak = flopprof.peak("L40S", "bf16")
    assert peak == flopprof.Peak(
        device="L40S",
        dtype="bfloat16",
        flops_per_s=362_050_000_000_000,
        bytes_per_s=864e9,
        memory_bytes=48 * 10**9,
        tdp_w=350,
        measured=False,
        source=ROWS["l40s"].source,
        date="2026-11-22",
    )


def test_examples() -> None:
    failed, tried = doctest.testmod(hardware)
    assert (failed, tried > 0) == (0, True)
