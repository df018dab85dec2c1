"""Figures of a meter, its file and its report: arithmetic over records that are written down here by hand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from flopprof import Meter, Peak
from flopprof.analytic import TransformerShape, korthikanti_training, palm_flops_per_token, torchtitan_flops_per_token
from flopprof.errors import UsageError
from flopprof.meter import Convention, Figures, Percentiles, StepRecord
from flopprof.meter.figures import figures, percentiles
from flopprof.meter.fitting import fitted
from flopprof.meter.peaks import Peaks
from flopprof.meter.progress import line
from flopprof.meter.records import SCHEMA, RecordWriter, RunPeaks, RunStart, read
from flopprof.meter.runs import run_of
from flopprof.meter.summary import format_time
from flopprof.meter.work import rate_of


def record(step: int, seconds: float = 2.0, **fields: Any) -> StepRecord:
    given = {"flops": {"float32": (600, 800)}, "bytes_moved": 50, "tokens": 10, "samples": 2, **fields}
    return StepRecord(step=step, ended_at=100.0 + step, step_time_s=seconds, **given)


# --- figures --------------------------------------------------------------------------------------------------------
def test_figures_whole() -> None:
    mixed = record(1, 4.0, flops={"bfloat16": (4000, 4400), "float32": (200, 200)}, effective_tokens=7)
    found = figures([record(0, effective_tokens=9), mixed], {"float32": 1000.0, "bfloat16": 4000.0}.get, 25.0)
    assert found == Figures(
        steps=2,
        time_s=6.0,
        model_flops=4800,
        hardware_flops=5400,
        mfu=(800 / 1000 + 4000 / 4000) / 6,
        hfu=(1000 / 1000 + 4400 / 4000) / 6,
        mbu=100 / 25 / 6,
        model_flops_per_s=800.0,
        hardware_flops_per_s=900.0,
        tokens_per_s=20 / 6,
        effective_tokens_per_s=16 / 6,
        samples_per_s=4 / 6,
        step_time_s=Percentiles(least=2.0, p10=2.2, median=3.0, p90=3.8, p99=3.98, most=4.0),
    )


def test_what_is_not_known_is_none() -> None:
    found = figures([record(0, tokens=0, samples=0)], {}.get)
    assert found is not None
    unknown = ("mfu", "hfu", "mbu", "tokens_per_s", "samples_per_s", "effective_tokens_per_s")
    assert {name: getattr(found, name) for name in unknown} == dict.fromkeys(unknown)
    assert figures([], {}.get) is None
    assert figures([record(0, 0.0)], {}.get) is None
    # One step without a mask: then what is padding is not known.
    assert figures([record(0, effective_tokens=3), record(1)], {}.get).effective_tokens_per_s is None  # type: ignore[union-attr]


def test_percentiles_interpolate() -> None:
    assert percentiles([5.0, 1.0, 3.0]).median == 3.0
    assert percentiles([float(i) for i in range(101)]) == Percentiles(
        least=0.0, p10=10.0, median=50.0, p90=90.0, p99=99.0, most=100.0
    )
    assert percentiles([7.0]).p99 == 7.0


def test_times_print() -> None:
    assert [format_time(s) for s in (1.5, 0.9999999, 0.25, 0.00099999, 12e-6)] == [
        "1.500 s", "1.000 s", "250.00 ms", "1.00 ms", "12.0 us",
    ]  # fmt: skip


# --- peaks ----------------------------------------------------------------------------------------------------------
def test_peaks_of_every_kind() -> None:
    assert Peaks(2e12, "cpu").flops_per_s("bfloat16") == 2e12
    assert Peaks({"bf16": 4e12, "fp32": 1e12}, "cpu").flops_per_s("bfloat16") == 4e12
    h100 = Peaks("H100", "cpu")
    assert (h100.flops_per_s("bfloat16"), h100.bytes_per_s) == (989_400_000_000_000, 3.352e12)
    measured = Peaks(Peak(device="this CPU", dtype="float32", flops_per_s=10**11, measured=True), "cpu")
    assert (measured.flops_per_s("float32:convolution"), measured.measured) == (1e11, True)
    assert measured.label == "measured on this CPU"
    assert measured.flops_per_s("bfloat16") is None
    assert measured.reason == "the peak that was given is of float32, and the loop multiplies bfloat16 too: give both."
    unknown = Peaks(None, "cpu")
    assert unknown.flops_per_s("float32") is None
    assert "a CPU has no peak in the table" in unknown.reason
    assert Peaks("V100", "cpu").flops_per_s("bfloat16") is None


def test_float32_convolutions_are_told_from_products() -> None:
    """A device may run the ones in tf32 and not the others."""
    assert rate_of("aten::convolution", "float32") == rate_of("aten::convolution_backward", "float32")
    assert rate_of("aten::mm", "float32") == "float32"
    assert rate_of("aten::convolution", "float32") == "float32:convolution"
    assert rate_of("aten::_cudnn_rnn", "float32") == "float32:recurrent"
    assert rate_of("aten::convolution", "bfloat16") == "bfloat16"


def test_more_than_the_peak_is_printed_with_a_warning() -> None:
    model, now = nn.Linear(4, 4), [0.0]
    with Meter(model, peak=100.0, clock=lambda: now[0], skip=0) as meter:
        for _ in range(2):
            with meter.step():
                model(torch.randn(2, 4)).sum().backward()
                now[0] += 1.0
        summary = meter.summary()
    assert summary.whole is not None
    assert summary.whole.mfu == 2 * 2 * 2 * 4 * 4 / 100
    assert "cannot be: the peak given is too low" in summary.notes[0]
    assert "MFU         128.0 % of 100.0 FLOP/s float32 (as given)" in str(summary)
    assert "MFU 128.0 % (cannot be: see the summary)" in line(2, summary.whole)


def test_no_peak_no_mfu_and_a_sentence() -> None:
    model = nn.Linear(4, 4)
    with Meter(model) as meter:
        for _ in range(4):
            with meter.step():
                model(torch.randn(2, 4)).sum().backward()
        summary = meter.summary()
        assert summary.whole is not None
        assert (summary.whole.mfu, summary.whole.hfu) == (None, None)
        assert summary.notes[0].startswith("no MFU: a CPU has no peak in the table")
        assert "peak=flopprof.measure_peak()" in summary.notes[0]
        assert "MFU not known" in line(4, summary.whole)
        assert set(meter.metrics("m/")) == {
            *("m/model_flops_per_s", "m/hardware_flops_per_s", "m/samples_per_s", "m/step_time_s"),
        }
    with Meter(model) as meter:
        assert meter.metrics() == {}
        assert meter.summary().notes == (
            "no step is timed yet: the first ones, and those that are counted, are in no figure.",
        )


def test_log_is_given_the_figures() -> None:
    model, told = nn.Linear(4, 4), []
    with Meter(model, peak=1e9, log=told.append, log_every=3) as meter:
        for _ in range(9):
            with meter.step():
                model(torch.randn(2, 4)).sum().backward()
    assert [bool(figures) for figures in told] == [True, True, True]
    assert "flopprof/mfu" in told[0]


# --- forms ----------------------------------------------------------------------------------------------------------
def samples(function: Any, *points: tuple[int, ...]) -> dict[tuple[int, ...], dict[Any, int]]:
    return {point: {("float32", "forward"): function(*point)} for point in points}


def test_a_form_is_taken_only_where_a_count_proves_it() -> None:
    def cost(n: int) -> int:
        return 3 * n * n + 5 * n + 7

    name = ("float32", "forward")
    assert fitted(samples(cost, (2,), (9,), (4,))) is None
    fit = fitted(samples(cost, (2,), (9,), (4,), (7,)))
    assert fit is not None
    assert fit.at((5,)) == {name: cost(5)}
    assert fit.at((10,)) is fit.at((1,)) is None  # outside what was counted
    even = fitted(samples(lambda n: 8 * (n // 2), (2,), (10,), (6,), (4,)))
    assert even is not None
    assert even.at((8,)) == {name: 32}
    assert even.at((7,)) is None  # off the lattice of what was counted


def test_sizes_that_go_together_are_one() -> None:
    fit = fitted(samples(lambda b, s, t: b * s * s, (2, 3, 4), (2, 9, 10), (2, 4, 5), (2, 5, 6), (2, 7, 8)))
    assert fit is not None
    assert fit.at((2, 8, 9)) == {("float32", "forward"): 128}
    assert fit.at((2, 8, 8)) is None
    assert fit.at((3, 8, 9)) is None


def test_what_varies_without_effect_does_not_matter() -> None:
    fit = fitted(samples(lambda n: 42, (2,), (9,), (4,)))
    assert fit is not None
    assert fit.at((5,)) == {("float32", "forward"): 42}
    assert fit.at((11,)) is None


# --- conventions ----------------------------------------------------------------------------------------------------
class Config:
    n_layer, n_head, n_embd, vocab_size, block_size, bias = 2, 4, 32, 64, 16, False

    def to_dict(self) -> dict[str, Any]:
        return {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 64}


class Gpt(nn.Module):
    """As much of a GPT as its parameters say: 12 L d^2, tied embeddings, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.wte, self.wpe = nn.Embedding(64, 32), nn.Embedding(16, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 12 * 32, bias=False) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        for layer in self.layers:
            x = x + layer(x).unflatten(-1, (12, 32)).sum(-2)
        return x @ self.wte.weight.T


@pytest.mark.parametrize("name", ["nanogpt", "palm", "megatron", "torchtitan"])
def test_what_a_script_of_that_convention_prints(name: str) -> None:
    model, now = Gpt(), [0.0]
    n = sum(p.numel() for p in model.parameters())
    shape = TransformerShape(layers=2, d_model=32, heads=4, vocab=64, seq=8)
    with Meter(model, peak=1e9, convention=name, clock=lambda: now[0], skip=1) as meter:
        for _ in range(3):
            with meter.step():
                model(torch.zeros(3, 8, dtype=torch.long)).sum().backward()
                now[0] += 0.5
        told = meter.summary().convention
    flops = {
        "nanogpt": 24 * (6 * (n - 16 * 32) + 12 * 2 * 32 * 8),  # estimate_mfu: N without wpe, 12 L H Q T
        "palm": 24 * palm_flops_per_token(n, shape),
        "megatron": korthikanti_training(shape, 3),  # of a GPT
        "torchtitan": 24 * torchtitan_flops_per_token(n, shape),
    }[name]
    peak = 312e12 if name == "nanogpt" else 1e9
    assert told == Convention(name=name, flops_per_s=flops / 0.5, mfu=flops / 0.5 / peak, peak_flops_per_s=peak)


def test_a_convention_of_another_kind_of_model() -> None:
    model = nn.Linear(4, 4)
    with Meter(model, peak=1e9, convention="palm", tokens=8, samples=2) as meter:
        for _ in range(4):
            with meter.step():
                model(torch.randn(2, 4)).sum().backward()
        told = meter.summary().convention
        assert told is not None
        assert told.reason == "Linear has no config to read the sizes of a transformer from."
        assert "palm" in str(meter.summary())


# --- the file -------------------------------------------------------------------------------------------------------
def start(at: float, **fields: Any) -> RunStart:
    return RunStart(started_at=at, schema=SCHEMA, device="cpu", peak="as given", **fields)


def written(path: Path, *lines: Any) -> Path:
    for item in lines:
        if isinstance(item, RunStart):
            writer = RecordWriter(path, item)
        else:
            writer.write(item)
    return path


def test_records_survive_their_process(tmp_path: Path) -> None:
    """Killed without a warning in its fifth step, it leaves four, and the next process goes on behind them."""
    script = """
import os, signal, sys, torch
from flopprof import Meter
model = torch.nn.Linear(4, 4)
meter = Meter(model, records=sys.argv[1])
for i, x in enumerate(meter.track([torch.ones(2, 4)] * 9, progress=False)):
    if i == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    model(x).sum().backward()
"""
    path = tmp_path / "run.jsonl"
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    (process,) = read(path)
    assert [r.step for r in process.records] == [0, 1, 2, 3]
    assert {r.model_flops for r in process.records} == {2 * 2 * 2 * 4 * 4}
    path.write_bytes(path.read_bytes() + b'{"step":4,"end')  # as a full disk would leave it
    model = nn.Linear(4, 4)
    with Meter(model, records=path) as meter, meter.step():
        model(torch.ones(2, 4)).sum().backward()
    first, second = read(path)
    assert (first.records, [r.step for r in second.records]) == (process.records, [0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no records"),
        ("{}\n{}\n", "line 1 is no record"),
        ('{"started_at":1.0,"schema":"flopprof.run/9"}\n', "schema 'flopprof.run/9'"),
        ('{"step":1,"ended_at":1.0,"step_time_s":1.0}\n{"step":1}\n', "line 1 is no record"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read(path)


def test_a_file_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(UsageError, match="is missing"):
        Meter(model, records=tmp_path / "missing" / "run.jsonl")
    with Meter(model, records="/dev/full") as meter:  # a full disk ends the records, not the training
        for _ in range(3):
            with meter.step():
                model(torch.ones(2, 4))
        assert len(meter.records) == 3
    assert "no more records are written: No space left on device" in caplog.text


# --- the report -----------------------------------------------------------------------------------------------------
def test_restarts_and_goodput(tmp_path: Path) -> None:
    """Steps 2 and 3 were made again from an older checkpoint; seven seconds passed between the processes."""
    path = written(
        tmp_path / "run.jsonl",
        start(98.0),
        RunPeaks(peaks={"float32": 1000.0}),
        msgspec.structs.replace(record(0, 1.5), ended_at=100.0, left_out=("first", "counted")),
        msgspec.structs.replace(record(1, 1.0), ended_at=101.0),
        msgspec.structs.replace(record(2, 1.0), ended_at=102.5, data_wait_s=0.5),
        msgspec.structs.replace(record(3, 1.0), ended_at=103.5),
        start(110.5),
        RunPeaks(peaks={"float32": 1000.0}),
        msgspec.structs.replace(record(2, 3.0), ended_at=114.0, left_out=("first", "counted"), flops=None),
        msgspec.structs.replace(record(3, 1.0), ended_at=115.0),
        msgspec.structs.replace(record(4, 1.0), ended_at=118.0, paused_s={"checkpoint": 2.0}),
    )
    run = run_of(path)
    assert (run.restarts, run.repeated, run.wall_s) == (1, 2, 20.0)
    assert run.rows == {
        "steps": 5.0,  # five steps of the usual second
        "slow_steps": 0.5 + 2.0,
        "repeated": 1.5 + 1.0,
        "data_wait": 0.0,
        "evaluation": 0.0,
        "checkpoint": 2.0,
        "down": 7.0,
        "other": 1.0,
    }
    assert run.goodput == 5.0 / 20.0
    assert run.summary.steps == 5
    assert run.summary.left_out == {"first": 2}
    assert run.summary.whole is not None
    assert (run.summary.whole.steps, run.summary.whole.mfu) == (3, 0.6)
    assert run.summary.flops == {"float32": (3000, 4000)}  # the one not counted has its signature's


def shown(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "flopprof", "report", *arguments],
        check=False, capture_output=True, text=True, env={"COLUMNS": "80", "PATH": "", "NO_COLOR": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_report_fits_80_columns_and_its_times_add_up(tmp_path: Path) -> None:
    path = written(
        tmp_path / "run.jsonl",
        start(98.0),
        RunPeaks(peaks={"float32": 1000.0}),
        *(record(i, 1.0) for i in range(4)),
    )
    code, out, _ = shown(str(path), "--json", str(tmp_path / "report.json"))
    assert code == 0
    assert max(map(len, out.splitlines())) <= max(80, len(str(path)))
    assert "MFU         60.0 % of 1.000 kFLOP/s float32 (as given)" in out
    assert "goodput     80.0 % of 5.000 s made progress" in out
    (found,) = json.loads((tmp_path / "report.json").read_text())
    assert found["run"]["rows"]["steps"] + found["run"]["rows"]["other"] == found["run"]["wall_s"] == 5.0
    code, out, error = shown(str(tmp_path / "none.jsonl"))
    assert (code, out) == (2, "")
    assert error.startswith("flopprof: cannot read ")
