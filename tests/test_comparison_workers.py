"""Comparisons across processes and files: order, failures, deaths, Ctrl-C, resuming, the command line."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import flopprof
from flopprof.cli.main import app
from flopprof.compare import workers
from flopprof.compare.comparison import Comparison
from flopprof.compare.run import Interrupted, compare
from flopprof.compare.targets import expand, is_glob, jobs_of, parse_at
from flopprof.errors import UnknownTarget, UsageError

SAMPLES = Path(__file__).parent / "sample_models"
SLOW = SAMPLES / "slow.py"
SMALL = f"{SLOW}:Small"
AT = "input=2x8"


def flops(width: int) -> int:
    return 2 * 2 * 8 * width


def run(*arguments: str, width: int = 100) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments], env={"COLUMNS": str(width), "NO_COLOR": "1"})


# --- worker processes ---------------------------------------------------------------------------
def children() -> set[int]:
    listed = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return set(map(int, listed.read_text().split())) if listed.exists() else set()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_rows_come_in_the_order_asked_for_whoever_counts(count: int) -> None:
    before = children()
    widths = [1, 2, 3, 4, 5]
    jobs = [job for width in widths for job in jobs_of(SMALL, {"model_args": {"width": width}}, [AT], name=f"w{width}")]
    found = compare(jobs, workers=count)
    assert [row.name for row in found] == ["w1", "w2", "w3", "w4", "w5"]
    assert [row.forward_flops for row in found] == [flops(width) for width in widths]
    assert children() == before


def test_a_worker_that_dies_takes_one_model_with_it() -> None:
    found = compare([f"{SLOW}:dies", SMALL, f"{SAMPLES}/nets.py:Fails", f"{SLOW}:nothing"], at=AT, workers=2)
    dead, small, fails, unknown = found
    assert "SIGKILL" in dead.failed
    assert small.forward_flops == flops(4)
    assert "failed in inner" in fails.failed
    assert "has no 'nothing'" in unknown.failed


def test_a_worker_is_a_new_python_where_a_fork_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_can_fork", lambda: False)
    before = children()
    (found,) = compare([SMALL], at=AT, workers=1)
    assert found.forward_flops == flops(4)
    assert children() == before
    assert workers.worth(3) == 0


def test_an_accelerator_forbids_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not workers._can_fork()


def test_what_models_print_is_dropped_in_workers(capfd: pytest.CaptureFixture[str]) -> None:
    compare([f"{SLOW}:talks"], at=AT, workers=1)
    assert capfd.readouterr().out == ""


def test_workers_pay_from_some_models_on() -> None:
    assert workers.worth(1) == workers.worth(0) == 0
    if workers.cores() > 1 and workers._can_fork():
        assert workers.worth(3) == min(3, workers.cores())


# --- resuming -----------------------------------------------------------------------------------
def test_a_finished_row_is_not_counted_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    missing = f"{SLOW}:nothing"
    first = compare([SMALL, missing], at=AT, resume=str(file), workers=0)
    lines = file.read_text().splitlines()
    assert len(lines) == 2
    # the kept row is what is read: a number changed in the file comes out; what failed is tried again
    file.write_text("\n".join(lines).replace(f'"forward_flops":{flops(4)}', '"forward_flops":7') + "\n")
    again = compare([SMALL, missing], at=AT, resume=str(file), workers=0)
    assert again.rows[0].forward_flops == 7
    assert again.rows[1] == first.rows[1]
    assert len(file.read_text().splitlines()) == 3
    # other inputs, other attention: another job
    other = compare([SMALL], at="input=3x8", resume=str(file), workers=0)
    assert other.rows[0].forward_flops == 3 * flops(4) // 2
    assert compare([SMALL], at=AT, attention="causal", resume=str(file)).rows[0].forward_flops == flops(4)


def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    compare([SMALL], at=AT, resume=str(file), workers=0)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    compare([SMALL], at="input=3x8", resume=str(file), workers=0)
    assert file.read_bytes().startswith(whole)
    assert all(json.loads(line)["schema"] == "flopprof.row/1" for line in file.read_text().splitlines())
    assert len(file.read_text().splitlines()) == 2


def test_rows_of_another_version_are_counted_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    compare([SMALL], at=AT, resume=str(file), workers=0)
    changed = file.read_text().replace('"forward_flops":128', '"forward_flops":7')
    assert '"forward_flops":7' in changed
    file.write_text(changed.replace(f'"torch":"{torch.__version__}"', '"torch":"1.0"'))
    assert compare([SMALL], at=AT, resume=str(file), workers=0).rows[0].forward_flops == 128


@pytest.mark.parametrize("text", ["a shopping list", "a\nb\n", '{"job": 3}\n'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.txt"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"other\.txt"):
        compare([SMALL], at=AT, resume=str(file))
    assert file.read_text() == text


def test_ctrl_c_keeps_the_rows_and_ends_the_workers(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    before = children()

    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        compare([SMALL, f"{SLOW}:waits", f"{SLOW}:waits"], at=AT, resume=str(file), workers=2, progress=stop)
    assert [row.forward_flops for row in caught.value.comparison] == [flops(4)]
    assert caught.value.comparison.interrupted
    assert caught.value.left == 2
    assert children() == before
    assert len(file.read_text().splitlines()) == 1


def test_ctrl_c_on_the_command_line_prints_the_rows_and_how_to_go_on(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    words = [sys.executable, "-m", "flopprof", "compare", SMALL, f"{SLOW}:waits", "--at", AT, "--resume", str(file)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while time.monotonic() < end and not (file.exists() and file.read_bytes()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "128" in out
    assert f"1 of 2 rows, kept in {file}" in err


# --- what was typed -----------------------------------------------------------------------------
def test_globs() -> None:
    assert expand("resnet18") == ["resnet18"]
    assert expand("resnet?8") == ["resnet18"]
    assert expand("torchvision:vgg1[13]_bn") == ["vgg11_bn", "vgg13_bn"]
    assert expand("timm:convnext_nan*") == ["timm:convnext_nano", "timm:convnext_nano_ols"]
    assert expand("timm:resnet18.tv*") == ["timm:resnet18.tv_in1k"]
    assert "gpt2" in expand("catalogue:gpt2*")
    assert not is_glob("models/*.py:build")
    for wrong in ("torchvision:nothing*", "hf:org*"):
        with pytest.raises(UnknownTarget):
            expand(wrong)


def test_inputs_to_look_at() -> None:
    assert parse_at("batch=8,image_size=288") == {"batch": 8, "image_size": 288}
    assert parse_at("image-size=288") == {"image_size": 288}
    assert parse_at("input=1x8,input=1x8:int64") == {"inputs": ["1x8", "1x8:int64"]}
    at = ["batch=2", "input=1x3x64x64"]
    two = jobs_of("resnet18", {"batch": 1, "image_size": 32, "inputs": ()}, at)
    assert [job.name for job in two] == ["resnet18 @ batch=2", "resnet18 @ input=1x3x64x64"]
    assert (two[0].options["batch"], two[0].options["image_size"]) == (2, 32)
    assert (two[1].options["batch"], two[1].options["image_size"]) == (1, None)


# --- the command --------------------------------------------------------------------------------
def test_two_models_from_a_catalogue(tmp_path: Path) -> None:
    rows, table, page = tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "a.md"
    result = run(
        *("alexnet", "squeezenet1_1", "--hardware", "A100", "--sort", "flops"),
        *("--json", str(rows), "--csv", str(table), "--markdown", str(page)),
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = Comparison.from_json(rows.read_text())
    assert [row.name for row in found] == ["squeezenet1_1", "alexnet"]
    assert found.reference == "alexnet"
    counted = flopprof.load("alexnet").count(backward=True)
    alexnet = found["alexnet"]
    assert (alexnet.forward_flops, alexnet.backward_flops) == (counted.forward_flops, counted.backward_flops)
    # torchvision's own metadata of the default weights
    assert alexnet.accuracy is not None
    assert (alexnet.accuracy.value, alexnet.accuracy.metric, alexnet.accuracy.dataset) == (
        56.522,
        "acc@1",
        "ImageNet-1K",
    )
    assert found.pareto() == {"squeezenet1_1"}  # 58.178 for fewer FLOPs
    lines = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [int(line["pareto"]) for line in lines] == [1, 0]
    assert page.read_text().startswith("# Models compared")
    assert "Pareto front" in result.stdout


def test_an_accuracy_is_of_the_size_it_was_published_at() -> None:
    result = run(
        "alexnet", "--at", "image_size=224", "--at", "image_size=128", "--at", "input=1x3x224x224", "--json", "-"
    )
    assert result.exit_code == 0, result.output
    known = {row.name: row.accuracy is not None for row in Comparison.from_json(result.stdout)}
    assert known == {
        "alexnet @ image_size=224": True,
        "alexnet @ image_size=128": False,
        "alexnet @ input=1x3x224x224": True,
    }


def test_a_target_with_options_of_its_own_and_a_saved_profile(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text(flopprof.count(torch.nn.Linear(8, 4), torch.zeros(2, 8)).to_json())
    result = run(SMALL, f"{SMALL} --model-arg width=6 --frozen layer.weight", str(saved), "--at", AT, "--json", "-")
    assert result.exit_code == 0, result.output
    plain, wide, profile = Comparison.from_json(result.stdout)
    assert (plain.forward_flops, wide.forward_flops, profile.forward_flops) == (flops(4), flops(6), flops(4))
    assert (plain.n_params_trainable, wide.n_params_trainable) == (36, 6)
    assert wide.name.endswith("--model-arg width=6 --frozen layer.weight")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["resnet18", "--at", "size=3"], 2, "cannot read --at 'size=3'"),
        (["resnet18", "--sort", "beauty"], 2, "no figure 'beauty'"),
        (["resnet18", "--hardware", "H1000"], 2, "no device of the table"),
        (["resnet18 --colour red"], 2, "--colour"),
        (["resnet18 --reentrant"], 2, "--reentrant is a kind of"),
        (["torchvision:nothing*"], 2, "no model matches"),
        (["missing.json"], 2, "missing.json"),
        (["resnet18", "--json", "-", "--csv", "-"], 2, "standard output"),
        ([f"{SLOW}:nothing", "--at", AT], 1, "has no 'nothing'"),
        ([f"{SAMPLES}/nets.py:Fails", f"{SLOW}:nothing", "--at", AT], 1, "every model failed"),
    ],
)
def test_errors_are_a_sentence(arguments: list[str], code: int, sentence: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert sentence in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.nightly
def test_every_torchvision_model_has_a_row() -> None:
    """About four minutes of processor time."""
    found = compare(["torchvision:*"])
    assert [row.name for row in found if row.failed] == []
    assert len(found) > 100
    assert all(row.accuracy is not None and row.forward_flops and row.size_bytes for row in found)
