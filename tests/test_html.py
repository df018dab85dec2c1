"""The HTML report as text: exact numbers, escaped names, valid figures, one file. A browser tests the rest."""

from __future__ import annotations

import base64
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import plotly.graph_objects as go
import pytest
from typer.testing import CliRunner, Result

from flopprof.cli.main import app
from flopprof.errors import MissingPackage
from flopprof.hardware import device
from flopprof.profile import PHASES, Profile, ancestors
from flopprof.report.html import page as frame
from flopprof.report.html.modules import modules_data
from flopprof.report.html.page import Section, as_json, page, plot_text
from flopprof.report.html.profile import render, render_reconciled
from flopprof.report.tree import module_tree
from html_pages import BATCH, HOSTILE, INSIDE, OUTSIDE, Page, hostile, rebuilt, synthetic, with_hole

MLP = f"{Path(__file__).parent / 'sample_models' / 'nets.py'}:Mlp"
FORWARD = 2 * 2 * (8 * 16 + 16 * 4)
BACKWARD = FORWARD + 2 * 2 * 16 * 4  # both weights' gradients, and that of the hidden activation


@pytest.fixture(scope="module", autouse=True)
def _short_plotly() -> pytest.MonkeyPatch:
    """plotly's own megabytes are left out, except where they are what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame, "plotly_js", lambda: "/* plotly */")
        yield patch


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "NO_COLOR": "1"})


# --- numbers ---------------------------------------------------------------------------------------
def test_totals_are_the_exact_integers() -> None:
    """6 layers of 8 x 8 and one of 8 x 4 on 2 rows; each weight's gradient costs as much, the first input's nothing."""
    forward = 2 * BATCH * (6 * INSIDE * INSIDE + INSIDE * OUTSIDE)
    backward = 2 * forward - 2 * BATCH * INSIDE * INSIDE
    text = Page(render(hostile())).text
    for label, flops in (
        ("forward", forward),
        ("backward", backward),
        ("model: forward + backward", forward + backward),
    ):
        assert re.search(rf"{re.escape(label)} \S+ k?FLOPs {flops:,} FLOPs", text), label
    assert f"{(forward + backward) // 2:,} MACs" in text
    assert "1 MAC = 1 multiply-add = 2 FLOPs" in text


def test_own_counts_add_up_to_the_totals_of_every_module() -> None:
    """What the script does: own counts summed from the leaves up give by_module of each phase."""
    profile = synthetic(400)
    columns = modules_data(profile, module_tree(profile))
    parents = columns["parents"]
    assert all(parent < i for i, parent in enumerate(parents))
    names: list[str] = []
    for name, parent in zip(columns["names"], parents, strict=True):
        names.append(f"{names[parent]}.{name}" if parent > 0 else name)
    for phase, own in zip(columns["phases"], columns["flops"], strict=True):
        totals = list(own)
        for i in reversed(range(1, len(totals))):
            totals[parents[i]] += totals[i]
        assert dict(zip(names, totals, strict=True)) == profile.by_module(phase)


def test_folded_nodes_hold_every_module_once() -> None:
    """A block that is repeated is one node, times its repeats; nothing is lost or doubled."""
    profile = Profile.from_json(run("count", f"{MLP.replace('Mlp', 'Stack')}", "--input", "1x8", "--json", "-").stdout)
    columns = modules_data(profile, module_tree(profile))
    times: list[int] = []
    own = 0
    for parent, module, repeats, _label in columns["folded"]:
        times.append(repeats * (times[parent] if parent >= 0 else 1))
        own += times[-1] * sum(column[module] for column in columns["flops"])
    assert own == profile.hardware_flops
    assert max(times) == 6


def test_an_uncounted_operator_makes_a_lower_bound() -> None:
    profile = with_hole(synthetic(30))
    read = Page(render(profile))
    assert f"≥ {profile.forward_flops / 1e9:.1f} GFLOPs" in read.text
    assert "No formula for mine::odd (3 calls)" in read.text
    names = {*ancestors(profile.modules[-1].fqn)}
    assert len(read.data["modules"]["uncounted"][PHASES.index("forward")]) == len(names)


def test_integers_past_a_browser_s_numbers_are_text() -> None:
    big = 2**53 + 1
    assert as_json([2**53 - 1, big, -big, True, 1.5]) == f'[{2**53 - 1},"{big}","-{big}",true,1.5]'
    profile = synthetic(30, scale=10**6)
    assert f"{profile.forward_flops:,} FLOPs" in Page(render(profile)).text
    assert profile.forward_flops > 2**53


def test_the_operators_of_each_phase_are_in_the_table_and_in_the_chart() -> None:
    profile = hostile()
    read = Page(render(profile))
    bars = read.data["figures"]["operators-chart"]["data"]
    assert {bar["name"]: sum(bar["x"]) for bar in bars} == {
        "forward": profile.forward_flops,
        "backward": profile.backward_flops,
    }
    for op, flops in profile.by_operator("forward").items():
        assert f"{op} " in read.text
        assert f"{flops:,}" in read.text


def test_the_waterfall_closes() -> None:
    profile = hostile()
    ledger = profile.reconcile()
    figures = Page(render(profile)).data["figures"]
    for name, part in (("waterfall-0", ledger), ("waterfall-1", ledger.backward)):
        [trace] = figures[name]["data"]
        assert part is not None
        assert trace["measure"] == ["absolute", *["relative"] * (len(trace["x"]) - 2), "total"]
        assert sum(trace["x"][:-1]) == trace["x"][-1] == part.measured_flops


def test_points_of_the_roofline_hold_every_flop() -> None:
    profile = synthetic(100)
    roof = Page(render(profile)).data["roofline"]
    assert sum(point["flops"] for point in roof["points"]) == profile.hardware_flops
    assert sum(point["bytes"] for point in roof["points"]) == profile.bytes_moved
    assert roof["devices"]["h100-sxm5"]["peaks"]["bfloat16"] == 989_400_000_000_000
    assert roof["devices"]["h100-sxm5"]["columns"] == {"bfloat16": "bfloat16"}


def test_the_named_device_is_chosen_and_an_example_is_called_one() -> None:
    profile = synthetic(30)
    named = Page(render(profile, hardware=device("A100")))
    assert [attrs["value"] for tag, attrs in named.tags if tag == "option" and "selected" in attrs] == [
        device("A100").id
    ]
    assert "is an example" not in named.text
    assert "No device was named: H100 SXM5 is an example." in Page(render(profile)).text
    assert "V100 SXM2 16GB has no peak in the dtypes" in Page(render(profile, hardware=device("v100-sxm2-16gb"))).text


# --- names are text --------------------------------------------------------------------------------
def test_names_stay_text() -> None:
    read = Page(render(hostile(), heading="<img src=x onerror=alert(3)>"))
    kinds = [tag for tag, _ in read.tags]
    assert (
        kinds.count("script") == 5
    )  # what hides parts that need scripts, the data, plotly's notice, it, the page's own
    assert {"img", "b", "iframe", "object"}.isdisjoint(kinds)
    assert not [attrs for _, attrs in read.tags if any(name.startswith("on") for name in attrs)]
    assert '<script>target</script> & "co"' in read.text
    assert "<img src=x onerror=alert(3)>" in read.text
    assert set(HOSTILE) <= set(read.data["modules"]["names"])
    for name in HOSTILE:
        assert name in read.text  # in the table that needs no script


def test_json_cannot_end_its_script() -> None:
    text = as_json({"</script>": "<!-- <script>"})
    assert "<" not in text
    assert json.loads(text) == {"</script>": "<!-- <script>"}


def test_plotly_gets_text_it_cannot_read_as_markup() -> None:
    assert plot_text("<b>&lt;") == "&lt;b&gt;&amp;lt;"


def test_a_name_that_is_no_unicode_is_written() -> None:
    page("bad \udcff name", "", []).encode()


# --- one file --------------------------------------------------------------------------------------
def test_nothing_is_asked_of_the_network() -> None:
    text = render(synthetic(30))
    read = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    addresses = [attrs[name] for _, attrs in read.tags for name in ("src", "href", "action") if name in attrs]
    assert {address for address in addresses if not str(address).startswith("#")} == {"data:,"}
    [policy] = [attrs["content"] for tag, attrs in read.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none';")


def test_ids_are_unique_and_every_figure_has_its_box() -> None:
    read = Page(render(hostile()))
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(read.data["figures"]) <= set(ids)
    links = {str(attrs["href"])[1:] for tag, attrs in read.tags if tag == "a"}
    assert links <= set(ids)


def test_figures_are_ones_that_plotly_knows() -> None:
    figures = Page(render(hostile())).data["figures"]
    assert set(figures) == {"operators-chart", "waterfall-0", "waterfall-1"}
    for figure in figures.values():
        go.Figure(data=figure["data"], layout=figure["layout"])  # raises ValueError for what plotly has not


def test_20_000_modules_fit(_short_plotly: pytest.MonkeyPatch) -> None:
    """What 2,500 modules add to a page of 25, eight times."""
    small, large = (len(render(synthetic(modules)).encode()) for modules in (25, 2500))
    _short_plotly.undo()
    text = page("T", "", [])
    code = frame.plotly_js()
    _short_plotly.setattr(frame, "plotly_js", lambda: "/* plotly */")
    assert len(text.encode()) + small + 8 * (large - small) < 6_000_000
    assert "Licensed under the MIT license" in text
    packed = next(part for part in Page(text).scripts if part.startswith("H4sI"))
    assert gzip.decompress(base64.b64decode(packed)).decode() == code


def test_an_empty_profile_is_a_page() -> None:
    text = Page(render(Profile())).text
    assert "forward 0 FLOPs" in text
    assert "Not reconciled: how many tokens is this profile of?" in text


def test_a_profile_of_one_phase_shows_one() -> None:
    read = Page(render(rebuilt(hostile(), operators=[])))
    assert read.data["modules"]["phases"] == ["forward"]
    assert [attrs["value"] for tag, attrs in read.tags if tag == "option" and "value" in attrs] == [
        "icicle",
        "treemap",
        "all",
        "elementwise",
        "parameters",
    ]


def test_a_page_with_nothing_inside_names_no_script_twice() -> None:
    sections = [Section(anchor=name, title=name, body="", scripts=("table",)) for name in ("a", "b")]
    assert page("t", "", sections).count("function sortableTable") == 1


def test_the_ledger_comes_first_where_it_was_asked_for() -> None:
    profile = hostile()
    read = Page(render_reconciled(profile, profile.reconcile(tokens=3)))
    assert next(attrs["id"] for tag, attrs in read.tags if tag == "section") == "ledger"
    assert "T 3 tokens" in read.text


# --- the command line ------------------------------------------------------------------------------
def test_count_and_reconcile_write_a_page(tmp_path: Path) -> None:
    for command in ("count", "reconcile"):
        file = tmp_path / f"{command}.html"
        result = run(command, MLP, "--input", "2x8", "--backward", "--html", str(file))
        assert result.exit_code == 0, result.output
        text = Page(file.read_text()).text
        assert f"{FORWARD:,} FLOPs" in text
        assert f"{BACKWARD:,} FLOPs" in text
        assert "input 2x8 float32, eval, meta" in text
    result = run("count", MLP, "--input", "2x8", "--html", "-", "--hardware", "A100")
    assert result.stdout.startswith("<!DOCTYPE html>")
    assert result.stdout.rstrip().endswith("</html>")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["count", MLP, "--html", "-", "--json", "-"], "several options ask for standard output"),
        (["reconcile", MLP, "--html", "-", "--json", "-"], "both --json and --html ask for standard output"),
        (["count", MLP, "--html", "/nowhere/page.html"], "does not exist"),
        (["reconcile", MLP, "--html", "/nowhere/page.html"], "does not exist"),
        (["count", MLP, "--hardware", "H100"], "or --html FILE"),
        (["count", MLP, "--html", "-", "--hardware", "abacus"], "goes by 'abacus'"),
    ],
)
def test_usage_errors(arguments: list[str], sentence: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())


def test_without_plotly_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingPackage, match=re.escape("pip install 'flopprof[html]'")):
        frame.require_plotly()
    for command in ("count", "reconcile"):
        result = run(command, "no_such_model", "--html", str(tmp_path / "page.html"))
        assert result.exit_code == 2
        assert "an HTML report needs plotly: pip install 'flopprof[html]'." in result.output  # before the model
    assert list(tmp_path.iterdir()) == []


def test_plotly_is_imported_only_for_a_page() -> None:
    code = "import sys, flopprof.cli.main, flopprof.report.html.profile; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
