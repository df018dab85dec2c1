"""Where results go: never over what is read or run, and whatever standard output is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flopprof.cli.main import app

NET = """
import torch

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(8, 4)
"""
SCRIPT = "print('ran')\n"
DATA = "step,loss\n1,0.5\n"
ON = ("--input", "2x8")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Path("kept").mkdir()
    texts = {"net.py": NET, "train.py": SCRIPT, "data.csv": DATA, "b.json": "{}", "kept/config.json": "{}"}
    for name, text in texts.items():
        Path(name).write_text(text)
    Path("link.py").symlink_to("train.py")
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "NO_COLOR": "1"})


# --- never over what is read or run ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--records", "train.py", "train.py"], "--records would write over "),
        (["run", "--records", "link.py", "train.py"], "--records would write over "),
        (["run", "--json", "train.py", "train.py"], "--json would write over "),
        (["run", "--json", "train.py", "-m", "train"], "--json would write over "),
        (["run", "--records", "data.csv", "train.py"], "'data.csv' is no file of records: give --records a file of"),
        (["count", "net.py:Net", *ON, "--json", "net.py"], "--json would write over 'net.py', which is read: "),
        (["count", "net.py:Net", *ON, "--folded", "./net.py"], "--folded would write over 'net.py'"),
        (["check", "net.py:Net", *ON, "--max-flops", "1", "--json", "net.py"], "--json would write over 'net.py'"),
        (["check", "net.py:Net", *ON, "--baseline", "b.json", "--json", "b.json"], "--json would write over 'b.json'"),
        (["compare", "net.py:Net --train", *ON, "--csv", "net.py"], "--csv would write over 'net.py'"),
        (["reconcile", "net.py:Net", *ON, "--json", "net.py"], "--json would write over 'net.py'"),
        (["crosscheck", "net.py:Net", *ON, "--json", "net.py"], "--json would write over 'net.py'"),
        (["count", "kept", "--json", "kept/config.json"], "--json would write over 'kept', which is read: "),
        (["diff", "b.json", "b.json", "--json", "b.json"], "--json would write over 'b.json'"),
        (["report", "data.csv", "--json", "data.csv"], "--json would write over 'data.csv'"),
    ],
)
def test_no_output_replaces_what_is_read(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    kept = [Path(name).read_text() for name in ("net.py", "train.py", "data.csv", "b.json", "kept/config.json")]
    assert kept == [NET, SCRIPT, DATA, "{}", "{}"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["count", "net.py:Net", *ON, "--json", "a", "--csv", "./a"],
        ["compare", "net.py:Net", *ON, "--csv", "a", "--resume", "a"],
        ["check", "net.py:Net", *ON, "--max-flops", "1", "--json", "a", "--html", "a"],
        ["run", "--records", "a", "--json", "a", "train.py"],
    ],
)
def test_two_options_name_two_files(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "give each a file of its own." in result.stderr
    assert not Path("a").exists()


@pytest.mark.parametrize("start", ["", '{"started_at":1.0,"schema":"flopprof.run/1"}\n', '{"started_at":1.0,"sch'])
def test_records_go_on_in_a_file_of_records(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.modules["__main__"], list(sys.argv), list(sys.path), sys.excepthook
    Path("run.jsonl").write_text(start)
    result = run("run", "--records", "run.jsonl", "train.py")
    sys.modules["__main__"], sys.argv[:], sys.path[:], sys.excepthook = before
    assert result.exit_code == 0, result.output
    assert result.stdout == "ran\n"


# --- whatever standard output is -------------------------------------------------------------------
def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    line = f"{sys.executable} -m flopprof count net.py:Net --input 2x8 {command}"
    env = os.environ | {"COLUMNS": "80"} | environment
    return subprocess.run(["sh", "-c", line], check=False, capture_output=True, env=env, timeout=120)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize(
    ("where", "why", "what"),
    [
        ("> /dev/full", "No space left on device.", ""),
        (">&-", "it is closed.", "--json -"),
        pytest.param("> /dev/full", "No space left on device.", "--json -", marks=pytest.mark.nightly),
        pytest.param(">&-", "it is closed.", "", marks=pytest.mark.nightly),
    ],
)
def test_a_standard_output_that_takes_nothing_is_told_in_a_sentence(what: str, where: str, why: str) -> None:
    done = shell(f"{what} {where}")
    assert done.returncode == 1
    assert done.stderr.decode().startswith("flopprof: cannot write to standard output: ")
    assert done.stderr.decode().endswith(f"{why}\n")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.nightly
def test_files_on_standard_output_are_utf_8_and_tables_have_replacements() -> None:
    Path("net.py").write_text(NET.replace("Net", "N\u00e4t") + "Net = N\u00e4t\n", encoding="utf-8")
    whole = shell("--json -", PYTHONIOENCODING="ascii")
    assert whole.returncode == 0, whole.stderr
    assert json.loads(whole.stdout.decode("utf-8"))["modules"][0]["cls"] == "N\u00e4t"
    table = shell("", PYTHONIOENCODING="ascii")
    assert table.returncode == 0, table.stderr
    assert b"N?t" in table.stdout


def test_a_program_that_cannot_be_loaded_is_one_sentence() -> None:
    Path("bad.pt2").write_bytes(b"no archive")
    result = run("count", "bad.pt2")
    assert result.exit_code == 1
    assert "bad.pt2 could not be loaded" in result.stderr
    line = f"{sys.executable} -m flopprof count bad.pt2"  # torch logs to the descriptor of the process
    done = subprocess.run(["sh", "-c", line], check=False, capture_output=True, timeout=120)
    assert done.stderr.count(b"\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.nightly
def test_a_summary_that_standard_output_does_not_take_is_told_too() -> None:
    steps = "model(torch.ones(2, 4)).sum().backward(); optimizer.step(); optimizer.zero_grad()"
    Path("train.py").write_text(
        "import torch\nmodel = torch.nn.Linear(4, 4)\noptimizer = torch.optim.SGD(model.parameters())\n"
        f"for _ in range(3):\n    {steps}\n"
    )
    line = f"{sys.executable} -m flopprof run --json - train.py > /dev/full"
    done = subprocess.run(["sh", "-c", line], check=False, capture_output=True, timeout=120)
    assert done.stderr.decode().splitlines()[-1] == (
        "flopprof: cannot write to standard output: No space left on device."
    )
