"""`flopprof peaks`: the table, one device, JSON, and a measurement."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flopprof import hardware
from flopprof.cli.main import app
from flopprof.hardware import measure as measuring

TINY = {"cpu": (16, 32)}


def run(*arguments: str, width: int = 80) -> Result:
    return CliRunner().invoke(app, ["peaks", *arguments], env={"COLUMNS": str(width), "NO_COLOR": "1"})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_SQUARES", TINY)


def test_the_table_fits_a_terminal() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for row in hardware.devices():
        name = row.name.removeprefix(row.vendor).strip()
        assert sum(bool(re.match(rf" {re.escape(name)}( \*)? {{2,}}[-0-9]", line)) for line in lines) == 1, name
    assert re.search(
        r"^ H100 SXM5 +66.9 +494.7 +989.4 +989.4 +1978.9 +66.9 +3352 +80 +700$", result.stdout, re.MULTILINE
    )
    assert re.search(r"^ V100 SXM2 16GB +15.7 +- +125 +- +- +7.8 +900 +16 +300$", result.stdout, re.MULTILINE)
    assert "(not shown for want of width: int8, fp4)" in result.stdout
    assert "dense" in result.stdout


def test_a_wide_terminal_shows_every_dtype() -> None:
    assert re.search(r"^ H100 SXM5 .* 66.9 +1978.9 +- +3352 +80 +700$", run(width=120).stdout, re.MULTILINE)
    assert "not shown" not in run(width=120).stdout


def test_a_narrow_terminal_keeps_its_numbers() -> None:
    line = next(line for line in run(width=60).stdout.splitlines() if line.startswith(" H100 SXM5"))
    assert re.search(r"66.9 +494.7 +989.4 +989.4 +1978.9 +3352 +80 +700$", line)


def test_one_device_shows_its_source() -> None:
    result = run("H100")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    # 989.4e12 / 3352e9 = 295.2 FLOPs for each byte
    assert re.search(r"^bfloat16 +989.4 +295$", result.stdout, re.MULTILINE)
    for fact in (
        "NVIDIA H100 SXM5",
        "NVIDIA H100 80GB HBM3",
        "80 GB, 3352 GB/s",
        "700 W",
        "2026-11-22",
        "verified-text",
    ):
        assert fact in result.stdout, fact


def test_one_dtype_orders_the_devices() -> None:
    lines = run("--dtype", "bf16").stdout.splitlines()[3:]
    rates = [float(re.split(r"\s{2,}", line)[1]) for line in lines[: lines.index("")]]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 2516.6
    assert len(rates) == sum("bfloat16" in row.peaks for row in hardware.devices())
    assert not any(line.startswith("V100") for line in lines)
    only = run("H100", "--dtype", "tf32").stdout
    assert "tf32" in only
    assert "bfloat16 " not in only


def test_json_holds_everything() -> None:
    document = json.loads(run("--json", "-").stdout)
    assert document["schema"] == "flopprof.peaks/1"
    assert len(document["devices"]) == len(hardware.devices())
    (row,) = json.loads(run("A100", "--dtype", "bf16", "--json", "-").stdout)["devices"]
    assert row["dense_flops_per_s"] == {"bfloat16": 312 * 10**12}
    assert (row["bytes_per_s"], row["memory_bytes"], row["tdp_w"]) == (2039e9, 80 * 10**9, 400)
    assert row["reported_as"] == ["NVIDIA A100-SXM4-80GB"]


def test_json_in_a_file_comes_with_the_table(tmp_path: Path) -> None:
    file = tmp_path / "peaks.json"
    assert "989.4" in run("H100", "--json", str(file)).stdout
    assert json.loads(file.read_text())["devices"][0]["id"] == "h100-sxm5"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["H101"], "no device of the table goes by 'H101'"),
        (["RTX 6000"], "no device of the table goes by 'RTX 6000'"),
        (["V100", "--dtype", "bf16"], "V100 SXM2 16GB has no bfloat16 peak"),
        (["cpu"], "a CPU has no peak in the table"),
        (["--dtype", "fp3"], "no device of the table has 'fp3'"),
        (["--dtype", "fp16", "--dtype", "bf16"], "one --dtype at a time, got fp16 and bf16"),
        (["--measure", "--dtype", "int8", "cpu"], "cannot measure 'int8'"),
        (["--measure", "H100"], "'H100' is no torch device"),
        (["--measure", "--seconds", "0", "cpu"], "seconds per shape must be more than 0"),
        (["--json", "/nowhere/x.json"], "does not exist"),
    ],
)
def test_wrong_use_is_a_sentence_and_2(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_measure(tiny: None) -> None:
    result = run("--measure", "cpu", "--seconds", "0.05")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for dtype in ("float32", "bfloat16", "float16"):
        assert re.search(rf"^{dtype} +16 x 16 x 16 +[0-9.]+ +[0-9.]+ +[0-9.]+% +20", result.stdout, re.MULTILINE), dtype
        assert len(re.findall(rf"^{dtype} .* best$", result.stdout, re.MULTILINE)) == 1
    assert "tf32: tf32 exists on CUDA devices only" in result.stdout
    assert "of the table" not in result.stdout
    assert result.stderr == ""


def test_measure_as_json(tiny: None) -> None:
    document = json.loads(run("--measure", "cpu", "--dtype", "fp32", "--seconds", "0.05", "--json", "-").stdout)
    (found,) = document["measured"]
    assert found["peak"]["measured"] is True
    assert [shape["m_k_n"] for shape in found["shapes"]] == [[16, 16, 16], [32, 32, 32]]
    best = max(shape["flops_per_s"] for shape in found["shapes"])
    assert found["peak"]["flops_per_s"] == round(best)
    assert all(shape["flops_per_s"] == 2 * shape["m_k_n"][0] ** 3 / shape["median_s"] for shape in found["shapes"])


def test_ctrl_c_stops_a_measurement_at_once() -> None:
    # it says when the first shape is done, and is interrupted in the middle of the next
    code = (
        "import sys; from flopprof.cli import peaks; from flopprof.cli.main import main\n"
        "peaks._tell = lambda *_: (sys.stderr.write('ready\\n'), sys.stderr.flush())\n"
        "sys.stderr.isatty = lambda: True\n"
        "sys.argv = ['flopprof', 'peaks', '--measure', 'cpu', '--dtype', 'fp32', '--seconds', '60']\n"
        "main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert err.replace("ready\n", "") == "flopprof: interrupted\n"


def test_the_table_needs_no_torch() -> None:
    code = (
        "import sys; from flopprof.cli.main import app; app(['peaks'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
