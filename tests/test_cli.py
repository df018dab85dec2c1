"""The command line: what it prints, writes and exits with, also when things go wrong."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import flopprof
from flopprof.cli import output
from flopprof.cli.main import app
from flopprof.cli.options import parse_model_arg
from flopprof.errors import FlopprofError, UsageError
from flopprof.profile import Profile

SAMPLES = Path(__file__).parent / "sample_models"
NETS = SAMPLES / "nets.py"
MLP = f"{NETS}:Mlp"
OPAQUE = f"{SAMPLES / 'opaque.py'}:Opaque"

# Mlp on (2, 8): 2 x (8 -> 16) and 2 x (16 -> 4); backward: both weights' gradients, and one hidden gradient
FORWARD = 2 * 2 * (8 * 16 + 16 * 4)
BACKWARD = FORWARD + 2 * 2 * 16 * 4


def run(*arguments: str, width: int = 100) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width), "NO_COLOR": "1"})


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")} | environment
    return subprocess.run(
        [sys.executable, *arguments], check=False, capture_output=True, text=True, env=env, timeout=120
    )


# --- what it prints --------------------------------------------------------------------------------
def test_count_prints_modules_operators_and_totals() -> None:
    result = run("count", MLP, "--input", "2x8", "--backward")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "input 2x8 float32, eval, meta" in result.stdout
    assert re.search(r"^  up +Linear +144 +2x16 +0\.512 +0\.512 ", result.stdout, re.MULTILINE)
    assert re.search(r"^  down +Linear +68 +2x4 +0\.256 +0\.512 ", result.stdout, re.MULTILINE)
    assert re.search(r"^aten::addmm +2 +0\.768 ", result.stdout, re.MULTILINE)
    assert f"forward      {FORWARD} FLOPs  (= {FORWARD // 2} MACs)" in result.stdout
    assert f"backward     {BACKWARD / 1000:.3f} kFLOPs" in result.stdout


def test_blocks_fold_under_their_list_and_own_work_has_a_row() -> None:
    result = run("count", f"{NETS}:Stack", "--input", "1x8")
    assert re.search(r"^  blocks\.0\.\.5 \(6x\) +Sequential +432 +1x8 +768 ", result.stdout, re.MULTILINE)
    assert re.search(r"^  \(own\) +- +128 ", result.stdout, re.MULTILINE)


def test_by_depth_and_unit() -> None:
    operators = run("count", MLP, "--input", "2x8", "--by", "operator").stdout
    assert "Operator" in operators
    assert "Linear" not in operators
    modules = run("count", MLP, "--input", "2x8", "--by", "module", "--depth", "0", "--unit", "mac").stdout
    assert "Operator" not in modules
    assert "Linear" not in modules
    assert f"forward      {FORWARD // 2} MACs  (= {FORWARD} FLOPs)" in modules


def test_train_dtype_device_and_model_arg() -> None:
    result = run(
        *(
            "count",
            MLP,
            "--input",
            "2x8",
            "--train",
            "--dtype",
            "float64",
            "--device",
            "cpu",
            "--model-arg",
            "hidden=32",
        )
    )
    assert result.exit_code == 0, result.output
    assert "input 2x8 float64, train, cpu" in result.stdout
    assert f"forward      {2 * 2 * (8 * 32 + 32 * 4) / 1000:.3f} kFLOPs" in result.stdout


def test_a_torchvision_name_counts() -> None:
    result = run("count", "resnet18", "--depth", "1", "--batch", "2", "--image-size", "64")
    assert result.exit_code == 0, result.output
    assert "parameters   11,689,512" in result.stdout
    assert "input 2x3x64x64 float32, eval, meta" in result.stdout


def test_a_timm_name_counts() -> None:
    result = run("count", "timm:resnet18", "--image-size", "64", "--depth", "0")
    assert result.exit_code == 0, result.output
    assert "parameters   11,689,512" in result.stdout


def test_both_attention_conventions_are_told(tmp_path: Path) -> None:
    file = tmp_path / "attend.py"
    file.write_text(
        "import torch\n"
        "class Attend(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)\n"
    )
    arguments = ("count", f"{file}:Attend", "--input", "1x2x10x4", "--device", "cpu")
    # QK^T and PV over 2 heads, head size 4: 10 x 10 pairs, or the 55 on and under the diagonal
    assert (2 * 2 * 2 * 4 * 100, 2 * 2 * 2 * 4 * 55) == (3200, 1760)
    result = run(*arguments)
    assert "with full attention 3.200 kFLOPs, causal 1.760 kFLOPs" in " ".join(result.stdout.split())
    assert "forward      1.760 kFLOPs" in run(*arguments, "--attention", "causal").stdout


# --- files -----------------------------------------------------------------------------------------
def test_json_is_the_profile(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    result = run("count", MLP, "--input", "2x8", "--backward", "--json", str(file))
    profile = Profile.from_json(file.read_text())
    assert profile.by_phase() == {"forward": FORWARD, "backward": BACKWARD, "recompute": 0, "optimizer": 0}
    assert profile.target == MLP
    assert file.read_text() == profile.to_json()
    assert "Operator" in result.stdout
    assert os.listdir(tmp_path) == ["p.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_json_and_csv_on_standard_output_replace_the_tables() -> None:
    result = run("count", MLP, "--input", "2x8", "--json", "-")
    assert json.loads(result.stdout)["schema"] == "flopprof.profile/1"
    rows = list(csv.DictReader(io.StringIO(run("count", MLP, "--input", "2x8", "--csv", "-").stdout)))
    assert sum(int(row["flops"]) for row in rows if row["kind"] == "counted") == FORWARD


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    file, link = tmp_path / "p.csv", tmp_path / "link.csv"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    assert run("count", MLP, "--input", "2x8", "--csv", str(link)).exit_code == 0
    assert link.is_symlink()
    assert file.read_text().startswith("module,class,phase,operator")
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p.json"
    file.write_text("old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(FlopprofError, match="No space left on device"):
        output.write_text(str(file), "new")
    assert os.listdir(tmp_path) == ["p.json"]
    assert file.read_text() == "old"


def test_a_device_file_is_written_in_place() -> None:
    output.write_text(os.devnull, "anything")
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_a_missing_directory_is_said_before_the_work(option: str, tmp_path: Path) -> None:
    result = run("count", "no_such_model", option, str(tmp_path / "nowhere" / "p"))
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
    assert run("count", MLP, option, str(tmp_path)).exit_code == 2
    assert os.listdir(tmp_path) == []


# --- what goes wrong -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["count", "resnet5O"], 2, "did you mean resnet50"),
        (["count", MLP], 2, "give one --input SHAPE"),
        (["count", MLP, "--input", "2y8"], 2, "cannot read input '2y8'"),
        (["count", MLP, "--input", "2x9"], 1, r"failed in up (Linear) on input 2x9 float32"),
        (["count", MLP, "--input", "2x8:int64"], 1, r"failed in up (Linear) on input 2x8 int64: aten::addmm would"),
        (["count", MLP, "--input", "2x8", "--input", "2x8"], 1, "takes 2 positional arguments but 3 were given"),
        (["count", MLP, "--input", "2x8", "--model-arg", "hidden"], 2, "write it as name=value"),
        (["count", MLP, "--input", "2x8", "--model-arg", "width=3"], 2, "unexpected keyword argument 'width'"),
        (["count", MLP, "--input", "2x8", "--json", "-", "--csv", "-"], 2, "several options ask for standard output"),
        (["count", f"{NETS}:Fails", "--input", "1x8"], 1, "ValueError: the fuse is lit."),
        (["count", f"{SAMPLES / 'broken.py'}:f"], 1, "ModuleNotFoundError"),
        (["count", OPAQUE, "--input", "4x4", "--strict"], 1, "no formula: flopprof_tests::opaque."),
    ],
)
def test_an_error_is_one_sentence_on_standard_error(arguments: list[str], code: int, says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert result.stderr.startswith("flopprof: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_traceback_is_there_when_asked_for() -> None:
    result = run("count", f"{NETS}:Fails", "--input", "1x8", "--traceback")
    assert "Traceback (most recent call last)" in result.stderr
    assert "and more lines" in result.stderr
    assert result.exit_code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["count"],
        ["count", MLP, "--depth", "-1"],
        ["count", MLP, "--batch", "0"],
        ["count", MLP, "--unit", "macs"],
        ["no"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_uncounted_work_is_told_and_strict_refuses_it(tmp_path: Path) -> None:
    result = run("count", OPAQUE, "--input", "4x4")
    assert result.exit_code == 0, result.output
    assert "forward      >= 0 FLOPs" in result.stdout
    assert "flopprof_tests::opaque, 1 call" in result.stdout
    file = tmp_path / "p.json"
    assert run("count", OPAQUE, "--input", "4x4", "--strict", "--json", str(file)).exit_code == 1
    assert not file.exists()


def test_an_interrupt_is_130_and_quiet() -> None:
    result = run("count", f"{NETS}:Interrupted", "--input", "1x8")
    assert result.exit_code == 130
    assert result.stderr == "flopprof: interrupted\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n=10", ("n", 10)),
        ("n=True", ("n", True)),
        ("n=[1, 2]", ("n", [1, 2])),
        ("n=relu", ("n", "relu")),
        ("n=a=b", ("n", "a=b")),
        ("n=", ("n", "")),
    ],
)
def test_model_arguments_are_literals_or_text(text: str, value: tuple[str, object]) -> None:
    assert parse_model_arg(text) == value


@pytest.mark.parametrize("text", ["n", "=3", "1a=3", "a b=3"])
def test_model_arguments_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="write it as name=value"):
        parse_model_arg(text)


# --- the whole program -----------------------------------------------------------------------------
def test_help_imports_no_torch() -> None:
    probe = (
        "import sys, flopprof.cli.main as m\n"
        "sys.argv = ['flopprof', *{arguments}]\n"
        "try:\n    m.main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "heavy = {{'torch', 'torchvision', 'timm', 'numpy'}} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["count", "--help"], ["--version"]):
        result = shell("-c", probe.format(arguments=arguments))
        assert result.returncode == 0, result.stderr


def test_help_names_every_option_with_its_unit_and_shows_examples() -> None:
    text = run("count", "--help", width=200).stdout
    for option in (
        *(
            "--batch",
            "--image-size",
            "--input",
            "--backward",
            "--depth",
            "--by",
            "--json",
            "--csv",
            "--unit",
            "--attention",
        ),
        *("--device", "--dtype", "--strict", "--train", "--model-arg", "--traceback"),
    ):
        assert option in text
    assert "1 MAC = 2 FLOPs" in text
    assert "flopprof count resnet50 --backward" in text


def test_version() -> None:
    assert run("--version").stdout == f"flopprof {flopprof.__version__}\n"


def test_a_pipe_gets_80_plain_columns() -> None:
    result = shell("-m", "flopprof", "count", f"{NETS}:Stack", "--input", "1x8", "--backward")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    header = [line for line in result.stdout.splitlines() if str(NETS) not in line]
    assert max(map(len, header)) <= 80
    assert shell("-m", "flopprof", "count", "nothing_like_this").returncode == 2


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_control_c_ends_cleanly(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text("import time\nprint('started', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "flopprof", "count", f"{file}:f"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "flopprof: interrupted\n"


def test_the_spinner_waits_a_second_and_only_shows_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(output, "_PATIENCE_S", 0.05)
    monkeypatch.setenv("TERM", "xterm")
    for stream, pause, shown in ((io.StringIO(), 0.2, False), (Terminal(), 0.0, False), (Terminal(), 0.3, True)):
        monkeypatch.setattr(sys, "stderr", stream)
        with output.progress("Counting x"):
            time.sleep(pause)
        assert ("Counting x" in stream.getvalue()) is shown
