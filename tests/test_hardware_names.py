"""Names: what drivers report, what people type, and the device that is here. Every near miss is a row."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flopprof
from flopprof import hardware
from flopprof.errors import UnknownDevice
from flopprof.hardware.names import reported, tokens, typed

TERA = 10**12
ROWS = {row.id: row for row in hardware.devices()}


def tera(id: str, dtype: str) -> float:
    return ROWS[id].peak(dtype).flops_per_s / TERA


# --- names -----------------------------------------------------------------------------------------
REPORTED = [
    ("NVIDIA L4", "l4"),
    ("NVIDIA L40", "l40"),
    ("NVIDIA L40S", "l40s"),
    ("NVIDIA L40G", None),
    ("NVIDIA L20", "l20"),
    ("NVIDIA L20Y", None),
    ("NVIDIA L2", None),
    ("NVIDIA H20", "h20"),
    ("NVIDIA H20-3e", "h20-3e"),
    ("NVIDIA H200", "h200-sxm"),
    ("NVIDIA H200 NVL", "h200-nvl"),
    ("NVIDIA GH200 480GB", "gh200-96gb"),
    ("NVIDIA GH200 120GB", "gh200-96gb"),
    ("NVIDIA GH200 144G HBM3e", "gh200-144gb"),
    ("NVIDIA GH200", None),
    ("NVIDIA H100 80GB HBM3", "h100-sxm5"),
    ("NVIDIA H100 PCIe", "h100-pcie"),
    ("NVIDIA H100 NVL", "h100-nvl"),
    ("NVIDIA H100", None),  # several boards
    ("NVIDIA H100 64GB HBM2", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("NVIDIA H800", None),
    ("NVIDIA H800 PCIe", None),
    ("H100", None),  # typed, never reported
    ("NVIDIA A10", "a10"),
    ("NVIDIA A10G", "a10g"),
    ("NVIDIA A10M", None),
    ("NVIDIA A10-24Q", None),
    ("NVIDIA A100", None),
    ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"),
    ("A100-SXM4-40GB", "a100-sxm4-40gb"),
    ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
    ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
    ("NVIDIA A100-SXM-64GB", None),
    ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
    ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
    ("NVIDIA A100 80GB PCIe LC", None),
    ("NVIDIA A100X", None),
    ("NVIDIA A800-SXM4-80GB", "a800-sxm4-80gb"),
    ("NVIDIA A30", "a30"),
    ("NVIDIA A30X", None),
    ("NVIDIA A40", "a40"),
    ("NVIDIA A40-48Q", None),
    ("NVIDIA A2", None),
    ("NVIDIA RTX A6000", "rtx-a6000"),
    ("RTX A6000", "rtx-a6000"),
    ("NVIDIA RTX A600", None),
    ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
    ("NVIDIA RTX 6000", None),
    ("Quadro RTX 6000", None),
    ("NVIDIA RTX 5000 Ada Generation", None),
    ("NVIDIA GeForce RTX 2080 Ti", "rtx-2080-ti"),
    ("GeForce RTX 2080 Ti", "rtx-2080-ti"),
    ("NVIDIA GeForce RTX 2080", None),
    ("NVIDIA GeForce RTX 3090", "rtx-3090"),
    ("NVIDIA GeForce RTX 3090 Ti", "rtx-3090-ti"),
    ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ("NVIDIA GeForce RTX 4090 D", "rtx-4090-d"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 5090", "rtx-5090"),
    ("NVIDIA GeForce RTX 5090 D", None),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000-bw-ws"),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000-bw-max-q"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None),
    ("NVIDIA B100", "b100"),
    ("NVIDIA B200", "b200"),
    ("NVIDIA GB200", "gb200"),
    ("NVIDIA B300 SXM6 AC", "b300"),
    ("NVIDIA B300", None),
    ("NVIDIA GB300", "gb300"),
    ("NVIDIA GB10", None),
    ("Tesla T4", "t4"),
    ("NVIDIA T4G", None),
    ("Tesla V100-SXM2-16GB", "v100-sxm2-16gb"),
    ("Tesla V100-SXM2-32GB", "v100-sxm2-32gb"),
    ("Tesla V100-SXM3-32GB", "v100-sxm2-32gb"),
    ("Tesla V100-SXM2-32GB-LS", None),
    ("Tesla V100-PCIE-16GB", "v100-pcie-16gb"),
    ("Tesla V100S-PCIE-32GB", "v100s-pcie"),
    ("Tesla V100-FHHL-16GB", None),
    ("AMD Instinct MI210", "mi210"),
    ("AMD Instinct MI250X", "mi250x-gcd"),
    ("AMD Instinct MI250", None),
    ("AMD Instinct MI300X", "mi300x"),
    ("AMD Instinct MI300A", None),
    ("AMD Instinct MI308X", None),
    ("AMD Instinct MI300X VF", None),
    ("AMD Instinct MI325X", "mi325x"),
    ("AMD Instinct MI350X", "mi350x"),
    ("AMD Instinct MI355X", "mi355x"),
    ("AMD Radeon Graphics", None),
    ("Graphics Device", None),
    ("NVIDIA Graphics Device", None),
    ("Device", None),
    ("NVIDIA", None),
    ("", None),
    ("Apple M2 Max", "apple-m2-max"),
    ("Apple M2", "apple-m2"),
    ("Apple M5", None),
    ("Apple", None),
    ("Intel(R) Data Center GPU Max 1100", "pvc-max1100"),
    ("Intel(R) Data Center GPU Max 1550", None),  # a card, or one of its two stacks: the units tell
    ("TPU v4", None),
    # case and whitespace tell nothing apart
    ("nvidia l40s", "l40s"),
    ("  NVIDIA   L40S ", "l40s"),
    ("NVIDIA\tA100-SXM4-80GB\n", "a100-sxm4-80gb"),
    ("NVIDIA L 40 S", None),
    ("NVIDIAL40S", None),
]


@pytest.mark.parametrize(("name", "id"), REPORTED)
def test_a_reported_name(name: str, id: str | None) -> None:
    if id is None:
        with pytest.raises(UnknownDevice, match=r"pass peak=\.\.\. in FLOP/s, or measure it with `flopprof"):
            reported(name)
    else:
        assert reported(name).id == id


TYPED = [
    ("H100", "h100-sxm5"),
    ("h100", "h100-sxm5"),
    ("h100-sxm5", "h100-sxm5"),
    ("H100_SXM", "h100-sxm5"),
    ("H100 PCIe", "h100-pcie"),
    ("H100-NVL", "h100-nvl"),
    ("H800", "h800"),
    ("A100", "a100-sxm4-80gb"),
    ("A100-80GB", "a100-sxm4-80gb"),
    ("A100 40GB", "a100-sxm4-40gb"),
    ("nvidia a100", "a100-sxm4-80gb"),
    ("V100", "v100-sxm2-16gb"),
    ("T4", "t4"),
    ("A10", "a10"),
    ("A10G", "a10g"),
    ("L4", "l4"),
    ("L40S", "l40s"),
    ("RTX 4090", "rtx-4090"),
    ("rtx4090", "rtx-4090"),
    ("RTX 4090 D", "rtx-4090-d"),
    ("H200", "h200-sxm"),
    ("GH200", "gh200-96gb"),
    ("B200", "b200"),
    ("MI300X", "mi300x"),
    ("MI250X", "mi250x-gcd"),
    ("TPU v5e", "tpu-v5e"),
    ("tpu-v5p", "tpu-v5p"),
    ("v6e", "tpu-v6e"),
    ("Trainium2", "trn2"),
    ("M2 Max", "apple-m2-max"),
    ("NVIDIA H100 80GB HBM3", "h100-sxm5"),
    ("RTX 6000", None),  # three generations
    ("RTX", None),
    ("MI250", None),
    ("H100 MIG 1g.10gb", None),
    ("H10", None),
    ("A1000", None),
    ("TPU v5", None),
    ("", None),
]


@pytest.mark.parametrize(("name", "id"), TYPED)
def test_a_typed_name(name: str, id: str | None) -> None:
    if id is None:
        with pytest.raises(UnknownDevice, match="`flopprof peaks` lists them"):
            typed(name)
    else:
        assert typed(name).id == id


def test_an_unknown_name_is_told_its_neighbours() -> None:
    with pytest.raises(UnknownDevice, match=r"'H100 SXM6'.* Near: H100 SXM5"):
        hardware.peak("H100 SXM6")


EXACT = {tokens(name): row.id for row in ROWS.values() for name in row.detect}
WORDS = sorted(
    {word for name in EXACT for word in name} | {"mig", "1g.10gb", "ti", "d", "s", "laptop", "gpu", "ls", "vf"}
)


@given(st.sampled_from(sorted(EXACT)), st.sampled_from(WORDS), st.integers(0, 9), st.booleans())
def test_a_word_more_or_less_never_gives_another_devices_peak(
    name: tuple[str, ...], word: str, at: int, add: bool
) -> None:
    words = list(name)
    if add:
        words.insert(min(at, len(words)), word)
    else:
        del words[at % len(words)]
    try:
        found = reported(" ".join(words), units=ROWS[EXACT[name]].units)
    except UnknownDevice:
        return
    assert found.id == EXACT.get(tokens(" ".join(words)))  # only ever a name that is itself listed


@given(st.text(max_size=40))
def test_no_text_has_a_peak_unless_listed(text: str) -> None:
    try:
        found = reported(text)
    except UnknownDevice:
        return
    assert tokens(text) in EXACT
    assert EXACT[tokens(text)] == found.id


GIB = 2**30
SEEN = [
    ("NVIDIA A100-SXM4-80GB", 108, 79.2 * GIB, "a100-sxm4-80gb"),
    ("NVIDIA A100-SXM4-80GB", 98, 79.2 * GIB, None),  # limited to some of its multiprocessors
    ("NVIDIA H20", 78, 95.1 * GIB, "h20"),
    ("NVIDIA H20", 78, 139.8 * GIB, None),
    ("NVIDIA A10G", 80, 22.1 * GIB, "a10g"),
    ("Tesla T4", 40, 14.56 * GIB, "t4"),
    ("NVIDIA H200", 132, 139.7 * GIB, "h200-sxm"),
    ("NVIDIA B200", 148, 178.4 * GIB, "b200"),
    ("AMD Instinct MI300X", 304, 191.98 * GIB, "mi300x"),
    ("AMD Instinct MI300X", 38, 191.98 * GIB, None),  # one eighth, in CPX mode
    ("AMD Instinct MI300X", 304, 48 * GIB, None),
    ("AMD Instinct MI250X / MI250", 110, 63.98 * GIB, "mi250x-gcd"),
    ("AMD Instinct MI250X / MI250", 104, 63.98 * GIB, None),  # the MI250, under the same name
]


@pytest.mark.parametrize(("name", "units", "memory", "id"), SEEN)
def test_units_and_memory_tell_parts_and_sisters(name: str, units: int, memory: float, id: str | None) -> None:
    if id is None:
        with pytest.raises(UnknownDevice, match=rf"{units} compute units and \d+ GiB"):
            reported(name, units=units, memory_bytes=round(memory))
    else:
        assert reported(name, units=units, memory_bytes=round(memory)).id == id


def test_a_stack_of_an_intel_card_has_half_its_peak() -> None:
    name = "Intel(R) Data Center GPU Max 1550"
    card, stack = reported(name, units=1024, memory_bytes=128 * GIB), reported(name, units=512, memory_bytes=64 * GIB)
    assert (card.peak("bf16").flops_per_s / 2, card.bytes_per_s) == (
        pytest.approx(stack.peak("bf16").flops_per_s, rel=0.001),
        3277e9,
    )


# --- the device that is here -----------------------------------------------------------------------
@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with an A100, as far as torch's answers go."""
    properties = SimpleNamespace(name="NVIDIA A100-SXM4-40GB", multi_processor_count=108, total_memory=42_298_834_944)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    return properties


@pytest.mark.parametrize("where", [None, "cuda", "cuda:0", torch.device("cuda", 0)])
def test_the_device_that_is_here(a100: SimpleNamespace, where: str | torch.device | None) -> None:
    assert flopprof.peak(where, "bf16").device == "A100 SXM4 40GB"
    assert hardware.device(where).memory_bytes == 40 * 10**9


def test_a_slice_that_is_here_is_unknown(a100: SimpleNamespace) -> None:
    a100.name = "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    with pytest.raises(UnknownDevice, match="slice of a GPU"):
        flopprof.peak(None, "bf16")
    a100.name = "A100"  # what people type is never what is detected
    with pytest.raises(UnknownDevice):
        flopprof.peak(None, "bf16")


@pytest.fixture
def precision() -> object:
    """torch's float32 settings come back."""
    places = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,
        torch.backends.cudnn.rnn,
        torch.backends.mkldnn.matmul,
    )
    before = [place.fp32_precision for place in places]
    yield
    for place, setting in zip(places, before, strict=True):
        place.fp32_precision = setting


def test_float32_is_tf32_only_where_torch_is_set_to_it(
    a100: SimpleNamespace, precision: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert hardware.float32_rate() == "float32"
    assert flopprof.peak(None, torch.float32) == flopprof.peak("A100 40GB", "float32")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert hardware.float32_rate() == "tf32"
    assert flopprof.peak(None, torch.float32) == flopprof.peak("A100 40GB", "tf32")
    assert flopprof.peak("A100 40GB", "float32").flops_per_s == 19.5e12  # typed: as asked
    assert flopprof.peak(None, "bf16").dtype == "bfloat16"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert hardware.float32_rate() == "float32"


def test_float32_of_a_device_without_tf32_stays_float32(a100: SimpleNamespace, precision: object) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    a100.name, a100.multi_processor_count, a100.total_memory = "Tesla V100-SXM2-16GB", 80, 16 * GIB
    assert flopprof.peak(None, torch.float32).flops_per_s == 15.7e12


def test_convolutions_and_recurrences_have_a_setting_of_their_own(precision: object) -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    assert hardware.float32_rate() == hardware.float32_rate("recurrent") == "float32"
    assert hardware.float32_rate("convolution") == "tf32"


def test_looking_up_needs_no_torch() -> None:
    code = (
        "import sys, flopprof; flopprof.peak('H100', 'bf16'); from flopprof.hardware import energy, sweep; "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_apples_chips_go_by_name_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2 Max")
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: 38)
    assert flopprof.peak("mps", "fp16").flops_per_s == 13.6e12
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: 30)
    with pytest.raises(UnknownDevice, match=r"'Apple M2 Max' with 30 compute units \(Apple M2 Max: 38 units, 96 GB\)"):
        flopprof.peak("mps", "fp16")


def test_an_intel_gpu_goes_by_name_units_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = SimpleNamespace(max_compute_units=448, total_memory=round(48 * GIB * 0.95))
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: "Intel(R) Data Center GPU Max 1100")
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: seen)
    assert flopprof.peak("xpu:0", "bf16").flops_per_s == 355.5e12


def test_a_device_that_torch_cannot_name_is_unknown() -> None:
    with pytest.raises(UnknownDevice, match=r"torch cannot name its device 'meta'.*peak="):
        flopprof.peak(torch.device("meta"))


def test_a_device_that_is_not_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UnknownDevice, match="torch sees no cuda device here"):
        flopprof.peak("cuda:3", "bf16")


def test_a_number_too_high(a100: SimpleNamespace) -> None:
    with pytest.raises(UnknownDevice, match="torch sees 1 cuda devices here, numbered from 0; got cuda:1"):
        flopprof.peak("cuda:1", "bf16")
