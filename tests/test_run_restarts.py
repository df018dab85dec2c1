"""Restarts of a script that is metered from outside: nobody says which of its steps a process went on from."""

from pathlib import Path

import pytest

from flopprof.meter import StepRecord
from flopprof.meter.records import SCHEMA, RecordWriter, RunStart
from flopprof.meter.runs import Run, run_of


def record(step: int, ended_at: float) -> StepRecord:
    return StepRecord(step=step, ended_at=ended_at, step_time_s=1.0, signature=0, flops={"float32": (6, 6)})


def restarted(path: Path, *, own_count: bool) -> Run:
    """Ten steps, and after ten seconds eight more, of which nobody says that two were done again."""
    for start, steps in ((0.0, 10), (20.0, 8)):
        writer = RecordWriter(path, RunStart(started_at=start, schema=SCHEMA, own_count=own_count))
        for step in range(steps):
            writer.write(record(step, start + step + 1.0))
        writer.close()
    return run_of(path)


def test_steps_that_a_process_numbers_itself_are_not_taken_for_those_before(tmp_path: Path) -> None:
    run = restarted(tmp_path / "run.jsonl", own_count=True)
    assert (run.summary.steps, run.repeated, run.restarts) == (18, None, 1)
    assert run.rows["down"] == 10.0
    assert run.goodput == pytest.approx(18 / 28)
    assert [text for _, text in run.facts()] == [
        "once; not known how many steps were done again: each process numbers its own",
        "at most 64.3 % of 28.000 s made progress",
    ]


def test_those_of_a_meter_are(tmp_path: Path) -> None:
    run = restarted(tmp_path / "run.jsonl", own_count=False)
    assert (run.summary.steps, run.repeated, run.restarts) == (8, 10, 1)
