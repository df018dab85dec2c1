"""The pages of comparisons, runs and plans as text: exact figures, valid charts, names that stay text."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
import pytest
from typer.testing import CliRunner

from flopprof.cli.main import app
from flopprof.compare.comparison import Row, side_by_side
from flopprof.plan import plan
from flopprof.report.html import comparison
from flopprof.report.html import page as frame
from flopprof.report.html import plan as planned
from html_pages import FLOPS, LARGE, NAME, SMALL, STEP_S, WAIT_S, Page, compared, records, run_page


@pytest.fixture(autouse=True)
def _no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "plotly_js", lambda: "")


def check(text: str) -> Page:
    read = Page(text)
    assert {"b", "it", "h100"}.isdisjoint(tag for tag, _ in read.tags)
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(read.data["figures"]) <= set(ids)
    for figure in read.data["figures"].values():
        go.Figure(data=figure["data"], layout=figure["layout"])
    return read


# --- comparisons -----------------------------------------------------------------------------------
def test_a_comparison_has_every_figure_and_reason() -> None:
    read = check(comparison.render(compared(), heading="batch 1"))
    for words in (
        NAME,
        f"{SMALL:,}",
        f"{LARGE:,}",
        f"≥ {LARGE + 2:,}",
        "broken: it raised <it>.",
        "no formula for mine::odd",
    ):
        assert words in read.text
    found = read.data["comparison"]
    keys = [column["key"] for column in found["columns"]]
    assert keys == ["params", "flops", "macs", "accuracy", "ideal"]  # only what some model has
    assert [row["name"] for row in found["rows"]] == [NAME, "large", "worse"]
    assert [row["pareto"] for row in found["rows"]] == [True, True, False]
    assert [row["values"][keys.index("flops")] for row in found["rows"]] == [SMALL, str(LARGE), str(LARGE + 2)]
    assert [row["ratio"] for row in found["rows"]] == pytest.approx([1, LARGE / SMALL, (LARGE + 2) / SMALL])
    assert {row["values"][keys.index("ideal")] for row in found["rows"]} == {0.5}


def test_a_comparison_of_what_failed_is_a_page() -> None:
    read = check(comparison.render(side_by_side([Row(name="broken", failed="it raised.")])))
    assert "1 model compared" in read.text
    assert "broken: it raised." in read.text


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    file, net = tmp_path / "models.html", f"{Path(__file__).parent / 'sample_models' / 'nets.py'}:Mlp"
    result = CliRunner().invoke(app, ["compare", net, "--at", "input=2x8", "--workers", "0", "--html", str(file)])
    assert result.exit_code == 0, result.output
    assert f"{2 * 2 * (8 * 16 + 16 * 4):,}" in Page(file.read_text()).text
    result = CliRunner().invoke(app, ["compare", net, "--html", "-", "--csv", "-"])
    assert result.exit_code == 2
    assert "several options ask for standard output" in result.output


# --- runs ------------------------------------------------------------------------------------------
def test_a_run_shows_what_its_timed_steps_achieved(tmp_path: Path) -> None:
    read = check(run_page(records(tmp_path, 5)))
    assert "MFU 50.0 %" in read.text
    assert "HFU 100.0 %" in read.text
    assert f"{4 * FLOPS:,} FLOPs" in read.text
    assert "5, of which 4 are timed (left out: 1 first)" in read.text
    figures = read.data["figures"]
    assert figures["mfu"]["data"][0]["x"] == [1, 2, 3, 4]
    assert figures["mfu"]["data"][0]["y"] == [0.5] * 4
    assert figures["hfu"]["data"][0]["y"] == [1.0] * 4
    assert figures["step-time"]["data"][0]["y"] == [STEP_S] * 4
    assert figures["tokens"]["data"][0]["y"] == [2000.0] * 4
    times = dict(zip(figures["times"]["data"][0]["y"], figures["times"]["data"][0]["x"], strict=True))
    assert times == {"steps": 5 * STEP_S, "data wait": 5 * WAIT_S}
    assert f"wall clock {5 * (STEP_S + WAIT_S):.3f} 100.0%" in read.text


def test_many_steps_are_taken_together_and_their_mfu_stays(tmp_path: Path) -> None:
    read = check(run_page(records(tmp_path, 2502)))
    [trace] = read.data["figures"]["mfu"]["data"]
    assert len(trace["x"]) == 834  # 2501 timed steps, three at a time
    assert trace["y"] == pytest.approx([0.5] * 834)
    assert "A point is up to 3 steps in a row" in read.text


def test_each_rank_and_each_start_is_a_line(tmp_path: Path) -> None:
    ranks = check(run_page(*(records(tmp_path, 4, rank=rank, world=2) for rank in range(2))))
    assert [trace["name"] for trace in ranks.data["figures"]["mfu"]["data"]] == ["rank 0", "rank 1"]
    starts = check(run_page(records(tmp_path, 4, 3)))
    assert [trace["name"] for trace in starts.data["figures"]["mfu"]["data"]] == ["run, start 1", "run, start 2"]
    assert "once; 1 steps were done again" in starts.text
    several = check(run_page(records(tmp_path, 4), records(tmp_path, 3, 2)))
    assert [trace["name"].rpartition("/")[2] for trace in several.data["figures"]["mfu"]["data"]] == [
        "&lt;b&gt;run&lt;b&gt;.rank0.1.jsonl",
        "&lt;b&gt;run&lt;b&gt;.rank0.2.jsonl, start 1",
        "&lt;b&gt;run&lt;b&gt;.rank0.2.jsonl, start 2",
    ]


def test_a_run_without_a_peak_has_no_mfu_and_one_without_steps_is_a_page(tmp_path: Path) -> None:
    unknown = check(run_page(records(tmp_path, 3, peak=None)))
    assert "MFU not known" in unknown.text
    assert "no MFU: no table peak." in unknown.text
    assert "mfu" not in unknown.data["figures"]
    assert "0, of which 0 are timed" in check(run_page(records(tmp_path, 0))).text


def test_the_report_of_a_run_is_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", records(tmp_path, 5), "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert "MFU 50.0 %" in check(page.read_text()).text
    result = CliRunner().invoke(app, ["report", records(tmp_path, 5), "--html", "-", "--json", "-"])
    assert result.exit_code == 2


# --- plans -----------------------------------------------------------------------------------------
def test_a_plan_is_a_page(tmp_path: Path) -> None:
    """6 x 7e9 x 1e12 FLOPs on 64 H100s."""
    found = plan(params=7 * 10**9, tokens=10**12, hardware="H100", mfu=0.5, devices=64)
    read = check(planned.render(found))
    assert "4.2e+22 FLOPs" in read.text
    assert found.device_hours is not None
    [line, point] = read.data["figures"]["time"]["data"]
    assert point["x"] == [64]
    assert point["y"] == pytest.approx([found.device_hours / 24 / 64])
    assert [x * y for x, y in zip(line["x"], line["y"], strict=True)] == pytest.approx(
        [found.device_hours / 24] * len(line["x"])
    )
    memory = {bar["name"]: bar["x"][0] for bar in read.data["figures"]["memory"]["data"]}
    assert memory.pop("device") == found.device_memory_bytes
    assert found.memory is not None
    assert sum(memory.values()) == found.memory.total_bytes
    file = tmp_path / "plan.html"
    result = CliRunner().invoke(app, ["plan", "--params", "7e9", "--tokens", "1e12", "--html", str(file)])
    assert result.exit_code == 0, result.output
    assert "4.2e+22 FLOPs" in Page(file.read_text()).text
    for more, sentence in ((["--published"], "without --published"), (["--json", "-"], "both --json and --html")):
        result = CliRunner().invoke(app, ["plan", "--params", "7e9", *more, "--html", "-"])
        assert result.exit_code == 2
        assert sentence in result.output
