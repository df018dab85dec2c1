"""Where a loop's time went, live and in the file, and what its steps are held against: by hand, with a clock of ours.

A step of Linear(8, 4) on two rows is 2 x 2 x 8 x 4 = 128 FLOPs forward, and as many for the weight's gradient.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flopprof import Meter
from flopprof.errors import UsageError
from flopprof.meter import StepRecord, Summary
from flopprof.meter.between import Evaluations
from flopprof.meter.figures import figures, figures_of
from flopprof.meter.progress import line
from flopprof.meter.records import SCHEMA, RecordWriter, RunBetween, RunPeaks, RunStart, read
from flopprof.meter.runs import run_of
from flopprof.meter.summary import over_peak

STEP = 2 * 128


class Loop:
    """A model, a meter of it, and a clock."""

    def __init__(self, *, wall: float = 1000.0, **options: Any) -> None:
        self.now = 0.0
        self.model = nn.Linear(8, 4)
        self.meter = Meter(
            self.model, clock=lambda: self.now, wall_clock=lambda: wall + self.now, **{"peak": 1e3, **options}
        )

    def work(self, seconds: float = 1.0) -> None:
        self.model(torch.ones(2, 8)).sum().backward()
        self.now += seconds

    def steps(self, number: int, seconds: float = 1.0) -> None:
        for _ in range(number):
            with self.meter.step():
                self.work(seconds)

    def evaluate(self, seconds: float) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(torch.ones(2, 8))
        self.now += seconds
        self.model.train()

    def batches(self, number: int, wait: float) -> Iterator[torch.Tensor]:
        for _ in range(number):
            self.now += wait
            yield torch.ones(2, 8)

    def rows(self) -> dict[str, float]:
        rows = self.meter.summary().rows
        rows["steps"] += rows.pop("left_out")
        return rows


# --- evaluations between steps --------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["track", "start_step"])
def test_an_evaluation_ends_where_data_is_waited_for(by: str) -> None:
    """Three epochs of three batches, 5 s of waiting and 1 s of work each, and 100 s of evaluation behind each epoch."""
    loop = Loop()
    for _ in range(3):
        if by == "track":
            for _batch in loop.meter.track(loop.batches(3, 5.0), progress=False):
                loop.work()
        else:
            for _batch in loop.batches(3, 5.0):
                loop.meter.start_step(data_wait_s=5.0)
                loop.work()
                loop.meter.end_step()
        loop.evaluate(100.0)
    assert loop.rows() == {"steps": 9.0, "data_wait": 45.0, "evaluation": 300.0}
    assert loop.now == 9.0 + 45.0 + 300.0
    loop.meter.close()


def test_an_evaluation_ends_where_a_loader_is_asked_that_has_nothing_more() -> None:
    def nothing() -> Iterator[torch.Tensor]:
        loop.now += 5.0
        yield from ()

    loop = Loop()
    loop.steps(3)
    loop.evaluate(7.0)
    assert list(loop.meter.track(nothing(), progress=False)) == []
    assert loop.rows()["evaluation"] == 7.0
    loop.meter.close()


def test_an_evaluation_under_way_counts_until_now() -> None:
    loop = Loop()
    loop.steps(3)
    loop.evaluate(7.0)
    assert loop.rows()["evaluation"] == 7.0
    state = loop.meter.state_dict()
    loop.evaluate(3.0)
    assert loop.rows()["evaluation"] == loop.rows()["evaluation"] == 10.0
    loop.steps(1)
    assert loop.rows() == {"steps": 4.0, "data_wait": 0.0, "evaluation": 10.0}
    loop.evaluate(2.0)
    loop.meter.close()
    loop.now += 50.0
    loop.meter.close()
    assert loop.rows()["evaluation"] == 12.0
    other = Loop()
    other.steps(2)
    other.evaluate(4.0)
    other.meter.load_state_dict(state)  # what the other one had itself is gone, and what is under way
    other.now += 4.0
    assert other.rows() == {"steps": 3.0, "data_wait": 0.0, "evaluation": 7.0}
    other.meter.load_state_dict(other.meter.state_dict())
    assert other.rows()["evaluation"] == 7.0
    other.meter.close()


def test_a_pause_between_steps_is_in_one_row() -> None:
    """It ends an evaluation, and what is evaluated in it is its own."""
    loop = Loop()
    loop.steps(3)
    loop.evaluate(2.0)
    with loop.meter.pause("checkpoint"):
        loop.now += 3.0
    with loop.meter.pause("evaluation"):
        loop.evaluate(4.0)
    loop.now += 10.0
    assert loop.rows() == {"steps": 3.0, "data_wait": 0.0, "evaluation": 6.0, "checkpoint": 3.0}
    loop.evaluate(5.0)
    loop.meter.passed("evaluation", 5.5)  # as a trainer's callback tells it
    loop.steps(1)
    assert loop.rows() == {"steps": 4.0, "data_wait": 0.0, "evaluation": 11.5, "checkpoint": 3.0}
    loop.meter.close()


class Device:
    """A timer whose moments are past when the test says so."""

    def __init__(self) -> None:
        self.now, self.past = 0.0, 0.0

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float, *, wait: bool = False) -> float | None:
        return end - start if wait or end <= self.past else None


def test_evaluations_on_a_device_are_told_in_order_once_it_is_past_them() -> None:
    timer, found = Device(), Evaluations()
    for step, (start, end, waited) in enumerate([(1.0, 4.0, 0.0), (5.0, 11.0, 2.0), (12.0, 13.0, 6.0)]):
        timer.now = start
        found.start = timer.mark()
        timer.now = end
        found.end(timer, step=step, at=100 + end, waited=waited)
        found.end(timer, step=step, at=100 + end, waited=waited)  # none is under way
    assert list(found.over(timer, wait=False)) == []
    timer.past = 5.0
    assert list(found.over(timer, wait=False)) == [(3.0, 0, 104.0)]
    assert list(found.over(timer, wait=True)) == [(4.0, 1, 109.0), (0.0, 2, 107.0)]
    assert list(found.over(timer, wait=True)) == []


# --- in the file ----------------------------------------------------------------------------------------------------
def test_time_between_steps_is_in_the_file(tmp_path: Path) -> None:
    """Six times 1 s of work, 3 s of a checkpoint and 2 s of evaluation: the last 5 s lie behind all steps."""
    path = tmp_path / "run.jsonl"
    loop = Loop(records=path)
    for _ in range(6):
        loop.steps(1)
        with loop.meter.pause("checkpoint"):
            loop.now += 3.0
        # Written at once: a process that is killed leaves it.
        assert json.loads(path.read_text().splitlines()[-1])["between"] == "checkpoint"
        loop.evaluate(2.0)
    live = loop.rows()
    loop.meter.close()
    assert live == {"steps": 6.0, "data_wait": 0.0, "evaluation": 12.0, "checkpoint": 18.0}
    (process,) = read(path)
    assert process.between[:3] == (
        RunBetween(between="checkpoint", seconds=3.0, step=1, ended_at=1004.0),
        RunBetween(between="evaluation", seconds=2.0, step=1, ended_at=1006.0),
        RunBetween(between="checkpoint", seconds=3.0, step=2, ended_at=1010.0),
    )
    assert process.between[-1] == RunBetween(between="evaluation", seconds=2.0, step=6, ended_at=1036.0)
    run = run_of(path)
    assert run.rows == {
        "steps": 6.0, "slow_steps": 0.0, "repeated": 0.0, "data_wait": 0.0, "evaluation": 12.0, "checkpoint": 18.0,
        "other": 0.0,
    }  # fmt: skip
    assert (run.wall_s, run.goodput) == (36.0, 6 / 36)


def test_what_is_told_before_the_first_step_waits_for_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    loop = Loop(records=path)
    with loop.meter.pause("loading"):
        loop.now += 4.0
    assert not path.exists()
    loop.steps(3)
    loop.meter.passed("saving", 0.5)
    loop.meter.close()
    rows = run_of(path).rows
    assert (rows["loading"], rows["saving"], rows["steps"]) == (4.0, 0.5, 3.0)


def record(step: int, seconds: float = 1.0, **fields: Any) -> StepRecord:
    given = {"ended_at": 1001.0 + step, "flops": {"float32": (STEP, STEP)}, "bytes_moved": 64, **fields}
    return StepRecord(step=step, step_time_s=seconds, **given)


def written(path: Path, *lines: Any) -> Path:
    for item in lines:
        if isinstance(item, RunStart):
            writer = RecordWriter(path, item)
        else:
            writer.write(item)
    writer.close()
    return path


def start(at: float, peak: str = "as given", **fields: Any) -> RunStart:
    return RunStart(started_at=at, schema=SCHEMA, device="cpu", peak=peak, **fields)


def test_what_lay_between_repeated_steps_is_repeated(tmp_path: Path) -> None:
    """The checkpoint before step 1 was gone on from; the one before step 2, and step 1 itself, were in vain."""
    path = written(
        tmp_path / "run.jsonl",
        start(1000.0),
        record(0),
        RunBetween(between="checkpoint", seconds=2.0, step=1, ended_at=1003.0),
        record(1, ended_at=1004.0),
        RunBetween(between="checkpoint", seconds=5.0, step=2, ended_at=1009.0),
        start(1020.0),
        record(1, ended_at=1021.0),
        RunBetween(between="checkpoint", seconds=3.0, step=2, ended_at=1024.0),
    )
    run = run_of(path)
    assert run.rows == {
        "steps": 2.0, "slow_steps": 0.0, "repeated": 1.0 + 5.0, "data_wait": 0.0, "evaluation": 0.0,
        "checkpoint": 2.0 + 3.0, "down": 11.0, "other": 0.0,
    }  # fmt: skip
    assert run.wall_s == 24.0


# --- names ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["steps", "left_out", "left out", "slow_steps", "repeated", "down", "other", "", " "])
@pytest.mark.parametrize("inside", [True, False])
def test_a_pause_has_a_name_of_its_own(name: str, inside: bool) -> None:
    loop = Loop()
    loop.steps(2)
    if inside:
        loop.meter.start_step()
    with pytest.raises(UsageError, match="a pause cannot be named") as error, loop.meter.pause(name):
        raise AssertionError
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="a pause cannot be named"):
        loop.meter.passed(name, 1.0)
    loop.meter.close()
    assert name not in set(loop.meter.summary().rows) - {"steps", "left_out"}


@pytest.mark.parametrize("name", ["evaluation", "data_wait", "schema", "peaks", "between", "saving"])
def test_every_other_name_is_a_row(name: str, tmp_path: Path) -> None:
    loop = Loop(records=tmp_path / "run.jsonl")
    for _ in range(4):
        with loop.meter.step():
            loop.work()
            with loop.meter.pause(name):
                loop.now += 10.0
        loop.meter.passed(name, 1.0)
    loop.meter.close()
    assert loop.rows()[name] == 44.0
    run = run_of(tmp_path / "run.jsonl")
    assert (run.summary.steps, run.rows["steps"], run.rows[name]) == (4, 4.0, 44.0)


def test_files_with_such_names_are_read_all_the_same(tmp_path: Path) -> None:
    paused = {"steps": 2.0, "down": 3.0, "other": 4.0, "schema": 5.0, "left_out": 6.0}
    run = run_of(written(tmp_path / "run.jsonl", start(1000.0), record(0, ended_at=1021.0, paused_s=paused)))
    assert run.rows == {
        "steps": 1.0, "slow_steps": 0.0, "repeated": 0.0, "data_wait": 0.0, "evaluation": 0.0, "steps (pause)": 2.0,
        "down (pause)": 3.0, "other (pause)": 4.0, "schema": 5.0, "left_out (pause)": 6.0, "other": 0.0,
    }  # fmt: skip
    assert (run.wall_s, run.goodput) == (21.0, 1 / 21)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[1,2]\n{"step":1}\n', "line 1 is no record of a flopprof.Meter: Expected `object`, got `array`"),
        ('{"step":1,"ended_at":1.0,"step_time_s":1.0}\n\n', "line 1 is no record .* begins with their schema"),
        ('{"started_at":1.0,"schema":"flopprof.run/1"}\n[3]\n{}\n', "line 2 is no record"),
        (
            '{"started_at":1.0,"schema":"flopprof.run/1","peaks":{"float32":0.0}}\n{}\n',
            r"line 1 is no record .* Expected `float` > 0.0 - at `\$.peaks\[...\]`",
        ),
        ('{"started_at":1.0,"schema":"flopprof.run/1"}\n{"step":-1,"ended_at":1.0,"step_time_s":1.0}\n{}\n', "line 2"),
    ],
)
def test_a_file_of_another_kind_is_told_in_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=said) as error:
        read(path)
    assert "list index" not in str(error.value)


# --- peaks ----------------------------------------------------------------------------------------------------------
def two_peaks(path: Path) -> Summary:
    """Six steps of a second each at 1000 FLOP/s, a restart, and six at 10000; of each six, two are left out."""
    first = Loop(records=path)
    first.steps(6)
    first.meter.close()
    second = Loop(records=path, peak=1e4, wall=1010.0)
    second.meter.go_on_from(6)
    second.steps(6)
    second.meter.close()
    return run_of(path).summary


def test_each_step_is_held_against_the_peak_of_its_process(tmp_path: Path) -> None:
    summary = two_peaks(tmp_path / "run.jsonl")
    assert summary.whole is not None
    assert summary.whole.steps == 8
    assert summary.whole.mfu == summary.whole.hfu == pytest.approx((4 * 0.256 + 4 * 0.0256) / 8)
    assert (summary.peaks, summary.peaks_differ) == ({}, True)
    assert "MFU         14.1 % of peaks that differ (as given)" in str(summary)
    assert summary.notes == (
        "the peak changed: 1.000 kFLOP/s float32 (as given) in 4 steps, 10.00 kFLOP/s float32 (as given) in 4 steps. "
        "Each step is held against that of the process that made it.",
    )


def test_peaks_that_print_the_same_did_not_change(tmp_path: Path) -> None:
    lines = []
    for i in range(6):
        lines += [start(1000.0 + i, "measured"), RunPeaks(peaks={"float32": 1000.0 + i / 100}), record(i)]
    summary = run_of(written(tmp_path / "run.jsonl", *lines)).summary
    assert (summary.peaks_differ, summary.notes) == (False, ())
    assert "of 1.000 kFLOP/s float32 (measured)" in str(summary)


def test_many_peaks_are_not_all_named(tmp_path: Path) -> None:
    lines = []
    for i in range(6):
        lines += [start(1000.0 + i, f"device {i}"), RunPeaks(peaks={"float32": 1000.0 * (i + 1)}), record(i)]
    summary = run_of(written(tmp_path / "run.jsonl", *lines)).summary
    assert "4.000 kFLOP/s float32 (device 3) in 1 steps, and 2 others. Each" in summary.notes[0]
    assert summary.whole is not None
    assert summary.whole.mfu == pytest.approx(0.256 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6) / 6)


def test_a_process_without_a_peak_leaves_no_mfu_and_says_why(tmp_path: Path) -> None:
    path = written(
        tmp_path / "run.jsonl",
        *(start(1000.0, ""), RunPeaks(peaks={}, reason="nobody knows this device."), record(0)),
        *(start(1002.0), RunPeaks(peaks={"float32": 1e3}), record(1)),
    )
    summary = run_of(path).summary
    assert summary.whole is not None
    assert summary.whole.mfu is None
    assert summary.notes == ("no MFU: nobody knows this device.",)


def test_the_latest_steps_have_their_own_peaks(tmp_path: Path) -> None:
    """150 steps at 1000 FLOP/s and 60 at 10000: the last hundred are 40 and 60 of them."""
    path = written(
        tmp_path / "run.jsonl",
        *(start(1000.0, bytes_per_s=100.0), RunPeaks(peaks={"float32": 1e3}), *(record(i) for i in range(150))),
        *(start(1200.0, bytes_per_s=200.0), RunPeaks(peaks={"float32": 1e4}), *(record(i) for i in range(150, 210))),
    )
    window = run_of(path).summary.window
    assert window is not None
    assert window.mfu == pytest.approx((40 * 0.256 + 60 * 0.0256) / 100)
    assert window.mbu == pytest.approx((40 * 0.64 + 60 * 0.32) / 100)


def test_figures_of_parts_are_those_of_all() -> None:
    some, more, peak = [record(0, 2.0), record(1)], [record(2, 5.0)], {"float32": 1e3}.get
    assert figures_of([(some, peak, 16.0), ([], {}.get, None), (more, peak, 16.0)]) == figures(
        [*some, *more], peak, 16.0
    )
    assert figures_of([]) is None


# --- more than the peak ---------------------------------------------------------------------------------------------
def test_the_latest_steps_are_checked_too() -> None:
    """At 200 FLOP/s, 256 FLOPs in a second are 128 %, in a hundred seconds 1.28 %."""
    loop = Loop(peak=200.0, window=5)
    loop.steps(24, 100.0)
    loop.steps(6, 1.0)
    (note,) = loop.meter.summary().notes
    assert note.startswith("128.0 % of the peak in the last 5 steps cannot be: the peak given is too low")
    loop.meter.close()
    loop = Loop(peak=200.0, window=2)
    loop.steps(4, 1.0)
    loop.steps(2, 0.5)
    (note,) = loop.meter.summary().notes  # four timed steps of 1, 1, 0.5 and 0.5 s
    assert note.startswith("170.7 % of the peak and 256.0 % of the peak in the last 2 steps cannot be:")
    loop.meter.close()


def test_hfu_alone_is_warned_of() -> None:
    found = figures([record(0, flops={"float32": (800, 1200)})], {"float32": 1e3}.get)
    assert found is not None
    assert "MFU 80.0 %  HFU 120.0 % (cannot be: see the summary)" in line(1, found)
    assert over_peak(found)[0].startswith("120.0 % of the peak cannot be")
    both = figures([record(0, flops={"float32": (1100, 1200)})], {"float32": 1e3}.get)
    assert "MFU 110.0 % (cannot be: see the summary)  HFU 120.0 %  " in line(1, both)


# --- compiled, closed -----------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_step_that_compiled_did_what_the_others_did(tmp_path: Path) -> None:
    """Compiling differentiates, too, but multiplies nothing: 5 rows through 8 x 4 and 4 x 2 are 880 FLOPs each time."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="aot_eager")
    with Meter(compiled, peak=1e3, records=tmp_path / "run.jsonl") as meter:
        for _ in range(8):
            with meter.step():
                compiled(torch.randn(5, 8)).sum().backward()
        summary = meter.summary()
        assert [record.model_flops for record in meter.records] == [2 * 5 * (2 * 32 + 3 * 8)] * 8
        assert [reason for reason in meter.records[1].left_out if reason == "compiled"]
    assert summary.flops == {"float32": (7040, 7040)}
    assert summary.signatures == 1
    assert not [note for note in summary.notes if "in no figure" in note]
    assert run_of(tmp_path / "run.jsonl").summary.flops == summary.flops
    torch._dynamo.reset()


@pytest.mark.parametrize("closed", ["close", "with"])
def test_a_closed_meter_takes_no_more_steps(closed: str) -> None:
    loop = Loop()
    with loop.meter as meter:
        loop.steps(12)
    if closed == "close":
        meter.close()
    wrapped = meter.wrap(loop.work)
    for step in (meter.start_step, wrapped, lambda: next(iter(meter.track([1], progress=False))), loop.steps):
        with pytest.raises(UsageError, match="this meter is closed and sees no more steps"):
            step(*([1] if step == loop.steps else []))
    assert len(meter.records) == meter.summary().steps == 12
    meter.close()
