"""The pages of comparisons, runs and plans as text: exact figures, valid charts, names that stay text."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
import pytest
from typer.testing import CliRunner

from flopprof.cli.main import app
from flopprof.compare.budget import Budget
from flopprof.compare.comparison import Row, side_by_side
from flopprof.compare.difference import diff
from flopprof.plan import plan
from flopprof.plan.mesh_result import Alike, Mesh, Stage, Traffic
from flopprof.report.html import comparison, difference, mesh, verdict
from flopprof.report.html import page as frame
from flopprof.report.html import plan as planned
from html_pages import (
    FLOPS,
    LARGE,
    NAME,
    SMALL,
    STEP_S,
    WAIT_S,
    Page,
    compared,
    hostile,
    rebuilt,
    records,
    run_page,
    synthetic,
)

MLP = f"{Path(__file__).parent / 'sample_models' / 'nets.py'}:Mlp"


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
    both = ranks.text[ranks.text.index("All ranks") : ranks.text.index("Figures of each run")]
    assert f"{2 * 4 * FLOPS / 1e12:.1f} TFLOPs model" in both
    assert f"rate {2 * FLOPS / STEP_S / 1e12:.1f} TFLOP/s model, all devices together" in both
    assert "MFU 50.0 % HFU 100.0 %" in both
    assert "throughput 4.000 ktokens/s" in both
    starts = check(run_page(records(tmp_path, 4, 3)))
    assert [trace["name"] for trace in starts.data["figures"]["mfu"]["data"]] == ["run, start 1", "run, start 2"]
    assert "once; 1 steps were done again" in starts.text
    assert "All ranks" not in starts.text
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
    result = CliRunner().invoke(app, ["plan", "--params", "7e9", "--json", "-", "--html", "-"])
    assert result.exit_code == 2
    assert "both --json and --html" in result.output


# --- differences, budgets, meshes, generated text ----------------------------------------------------
def test_a_difference_has_every_change_whole() -> None:
    before, after = hostile(), rebuilt(hostile(), target="after", operators=[])
    found = diff(before, after)
    read = check(difference.render(found))
    for change in (*found.totals, *found.own, *found.operators):
        if change.before:
            assert f"{change.name.replace('_', ' ') if change in found.totals else change.name} " in read.text
            assert f"{change.before:,}" in read.text
    bars = read.data["figures"]["modules-chart"]["data"][0]
    assert sum(bars["x"]) == -before.hardware_flops
    assert "No figure differs." in check(difference.render(diff(before, before))).text


def test_more_changes_than_rows_are_counted() -> None:
    before = synthetic(700)
    read = check(difference.render(diff(before, synthetic(700, scale=2))))
    changed = len(diff(before, synthetic(700, scale=2)).own)
    assert f"{changed - 300:,} more with smaller deltas" in read.text


def test_a_verdict_says_who_is_to_blame() -> None:
    profile = hostile()
    over = Budget(max_flops=profile.model_flops - 1, max_params=10**6).judge(profile)
    read = check(verdict.render(over, profile, heading="2 rows"))
    assert "is over its budget" in read.text
    assert over.excesses[0].sentence in read.text
    assert "model flops over" in read.text
    assert f"{10**6 - profile.n_params:,} as given" in read.text
    assert read.data["modules"]["root"] == profile.target
    assert "is within its budget" in check(verdict.render(Budget(max_params=10**6).judge(profile), profile)).text


def test_a_mesh_has_each_stage_whole() -> None:
    sent = Traffic(tensor=3, tensor_each=5, pipeline=7, data=11)
    stages = tuple(
        Stage(
            first=place,
            last=place,
            forward_flops=LARGE + place,
            backward_flops=2 * LARGE,
            recompute_flops=0,
            params=13,
            states_bytes=17,
            activations_bytes=19,
            traffic=sent,
        )
        for place in range(2)
    )
    alike = (Alike(module="<b>router</b>", flops=6),)
    found = Mesh(
        model=NAME,
        tp=2,
        pp=2,
        dp=1,
        zero=0,
        seq=8,
        micro_batch=1,
        micro_batches=2,
        stages=stages,
        whole_flops=2 * sum(stage.flops for stage in stages) - 6,
        replicated=alike,
    )
    read = check(mesh.render(found))
    assert f"{NAME}: tp 2 x pp 2 x dp 1 = 4 ranks" in read.text
    for stage in stages:
        assert f"{stage.flops:,}" in read.text
    assert "not split <b>router</b>: 6 FLOPs" in read.text
    assert [bar["x"] for bar in read.data["figures"]["sent-chart"]["data"]] == [[3, 3], [7, 7], [11, 11]]


def test_generated_text_is_a_page(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=128, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path / "tiny")
    page = tmp_path / "decode.html"
    arguments = ["count", str(tmp_path / "tiny"), "--mode", "decode", "--context", "16", "--html", str(page)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    read = check(page.read_text())
    assert "Of one decoding step" in read.text
    # of one token: the matrices and the head; a query over 16 keys that are kept and its own
    assert f"{2 * (2 * (4 * 64**2 + 3 * 64 * 96) + 64 * 128) + 2 * 4 * 64 * 17:,} FLOPs" in read.text


def test_commands_write_pages_or_say_why_not(tmp_path: Path) -> None:
    saved, page = tmp_path / "a.json", tmp_path / "page.html"
    saved.write_text(hostile().to_json())
    assert CliRunner().invoke(app, ["diff", str(saved), str(saved), "--html", str(page)]).exit_code == 0
    assert "No figure differs." in Page(page.read_text()).text
    budget = ["check", MLP, "--input", "1x8", "--max-params", "1", "--html", str(page)]
    assert CliRunner().invoke(app, budget).exit_code == 1
    assert "is over its budget" in Page(page.read_text()).text
    refused = CliRunner().invoke(app, ["run", "--html", str(page), "train.py"])
    assert (refused.exit_code, "give --records FILE too" in refused.stderr) == (2, True)
