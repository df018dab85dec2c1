"""What a target's own code does to the command: it neither decides the exit code nor mixes with the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flopprof.cli import output
from flopprof.cli.main import app
from flopprof.errors import FlopprofError, ModelFailed

LEAVES = """
import sys
import torch

class Built(torch.nn.Linear):
    def __init__(self):
        sys.exit(0)

class Run(torch.nn.Linear):
    def __init__(self):
        super().__init__(8, 4)
    def forward(self, x):
        raise SystemExit
"""
TALKS = """
import torch
print("imported")

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(8, 4)
        print("built")
    def forward(self, x):
        print("run")
        return super().forward(x)
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "NO_COLOR": "1"})


def written(folder: Path, text: str) -> str:
    file = folder / "net.py"
    file.write_text(text)
    return str(file)


# --- it ends the process ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["Built", "Run"])
@pytest.mark.parametrize(
    "command",
    [["check", "--max-flops", "1"], ["count"], ["compare", "--workers", "0"], ["reconcile"], ["crosscheck"]],
    ids=lambda command: command[0],
)
def test_a_model_that_ends_the_process_has_failed(command: list[str], name: str, tmp_path: Path) -> None:
    result = run(*command, f"{written(tmp_path, LEAVES)}:{name}", "--input", "2x8")
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("flopprof: ")
    assert result.stderr.count("\n") == 1
    assert "SystemExit: " in result.stderr


def test_what_ends_the_process_where_nobody_expects_it_has_failed_too() -> None:
    with pytest.raises(ModelFailed, match=r"ended the process \(SystemExit: 0\)"):
        with output.progress("Counting"):
            raise SystemExit(0)


# --- it prints -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "command",
    [["check", "--max-flops", "1G"], ["count"], ["compare", "--workers", "0"], ["reconcile"], ["crosscheck"]],
    ids=lambda command: command[0],
)
def test_what_a_model_prints_goes_to_standard_error(command: list[str], tmp_path: Path) -> None:
    result = run(*command, f"{written(tmp_path, TALKS)}:Net", "--input", "2x8", "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)
    assert {"imported", "built", "run"} <= set(result.stderr.split())


def test_what_a_model_prints_is_in_no_table_either(tmp_path: Path) -> None:
    result = run("count", f"{written(tmp_path, TALKS)}:Net", "--input", "2x8", "--csv", "-")
    assert result.exit_code == 0, result.output
    assert not {"imported", "built", "run"} & set(result.stdout.split())


# --- it does not fit -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("99999999999999999999x3", 2, "an input of 99999999999999999999x3 float32 is larger than any tensor"),
        ("99999999999x99999999999", 2, "is larger than any tensor"),
        ("9999999999999x8 --device cpu", 1, "an input of 9999999999999x8 float32 cannot be made on cpu: "),
        ("9999999999999x8:int64 --device cpu", 1, "an input of 9999999999999x8 int64 cannot be made on cpu: "),
    ],
)
def test_an_input_that_does_not_fit_is_told_in_a_sentence(arguments: str, code: int, says: str, tmp_path: Path) -> None:
    result = run("count", f"{written(tmp_path, TALKS.replace('print', 'str'))}:Net", "--input", *arguments.split())
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("flopprof: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "size", ["--batch 99999999999999999999", "--image-size 99999999999", "--image-size 99999999999999999999"]
)
def test_a_size_that_no_tensor_has_is_told_in_a_sentence(size: str) -> None:
    result = run("count", "resnet18", *size.split())
    assert result.exit_code == 2, result.output
    assert "larger than any tensor" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_too_little_memory_is_told_in_a_sentence(error: Exception) -> None:
    with pytest.raises(FlopprofError, match="out of memory: give smaller sizes"):
        with output.progress("Counting"):
            raise error
