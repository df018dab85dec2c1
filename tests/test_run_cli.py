"""`flopprof run` as one types it: the script is what it is under Python, and its MFU comes beside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flopprof.cli.main import app
from flopprof.meter import records

ROOT = Path(__file__).parents[1]
# Two rows, four inputs, four outputs, no bias: 2 x 2 x 4 x 4 forward, as much for the weight's gradient.
STEP = 128
TRAINS = """
import torch

def train(steps):
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
"""


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    before = sys.modules["__main__"], list(sys.argv), list(sys.path), sys.excepthook
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules["__main__"], sys.argv[:], sys.path[:], sys.excepthook = before


def script(text: str, name: str = "train.py") -> str:
    Path(name).write_text(TRAINS + text)
    return name


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["run", *arguments])


def steps(path: str = "run.jsonl") -> list[Any]:
    return [record for process in records.read(path) for record in process.records]


def test_the_script_is_what_it_is_under_python() -> None:
    name = script(
        "import sys, json, __main__\n"
        "train(4)\n"
        "print(json.dumps([__name__, __file__, sys.argv, sys.path[0], __main__.train is train]))\n"
    )
    done = run("--records", "run.jsonl", "--json", "out.json", "--peak", "1G", name, "--json", "-x", "--", "last")
    assert done.exit_code == 0
    here = str(Path.cwd())
    assert json.loads(done.stdout) == ["__main__", f"{here}/{name}", [name, "--json", "-x", "--", "last"], here, True]
    assert "flopprof: train.py\nsteps       4, of which 2 are timed (left out: 2 first)" in done.stderr
    assert [record.model_flops for record in steps()] == [STEP] * 4
    summary = json.loads(Path("out.json").read_text())
    assert summary["schema"] == "flopprof.summary/1"
    assert summary["flops"] == {"float32": [4 * STEP, 4 * STEP]}
    assert summary["peaks"] == {"float32": 1e9}


def test_the_summary_may_be_all_of_standard_output() -> None:
    done = run("--json", "-", "--quiet", "--hardware", "H100", script("train(3)\n"))
    assert json.loads(done.stdout)["steps"] == 3
    assert "H100" in done.stderr


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(7)", 7), ("sys.exit('bye')", 1), ("raise KeyboardInterrupt", 130), ("sys.exit()", 0)]
)
def test_its_end_is_its_own(end: str, code: int) -> None:
    done = run("--peak", "1G", script(f"import sys\ntrain(3)\n{end}\n"))
    assert done.exit_code == code
    assert "steps       3" in done.stderr


def test_an_exception_shows_the_scripts_own_frames() -> None:
    name = script(
        "from torch.utils.data import DataLoader\n"
        "def load(i):\n"
        "    raise ValueError('mine')\n"
        "class Data(list):\n"
        "    __getitem__ = lambda self, i: load(i)\n"
        "train(3)\n"
        "model = train(1)\n"
        "try:\n"
        "    for x in DataLoader(Data([1, 2])):\n"
        "        pass\n"
        "except ValueError as error:\n"
        "    raise RuntimeError('and mine') from error\n"
    )
    done = run("--peak", "1G", name)
    assert done.exit_code == 1
    assert "ValueError: mine" in done.stderr
    assert "RuntimeError: and mine" in done.stderr
    assert ", in load\n    raise ValueError" in done.stderr
    assert "flopprof/" not in done.stderr
    assert "steps       4" in done.stderr


def test_a_hook_of_the_scripts_own_tells_of_its_exceptions() -> None:
    name = script("import sys\nsys.excepthook = lambda *e: print('hooked', e[1])\ntrain(2)\nraise ValueError('it')\n")
    done = run(name)
    assert done.exit_code == 1
    assert done.stdout == "hooked it\n"


def test_a_script_that_never_trains_is_told_in_a_sentence() -> None:
    done = run(script("print('only this')\n"))
    assert done.exit_code == 0
    assert done.stdout == "only this\n"
    assert done.stderr.splitlines()[-1].startswith("no step was found: no torch optimizer stepped in this process.")


def test_without_a_step_it_is_said_what_is_not_written() -> None:
    Path("old.json").write_text("{}")
    new = run("--json", "new.json", script("pass\n"))
    assert new.exit_code == 0
    assert new.stderr.splitlines()[-1] == f"flopprof: no step, so {str(Path('new.json').absolute())!r} is not written."
    assert not Path("new.json").exists()
    old = run("--json", "old.json", script("pass\n"))
    assert old.stderr.splitlines()[-1].endswith("is not written; what is there is of an earlier run.")
    assert Path("old.json").read_text() == "{}"
    assert "no step, so nothing is written to standard output." in run("--json", "-", script("pass\n")).stderr


def test_a_module_is_run_as_python_runs_it() -> None:
    Path("package").mkdir()
    Path("package/__init__.py").write_text("")
    script("", "package/trains.py")
    script(
        "import sys\nfrom package.trains import train\ntrain(3)\nprint(sys.argv, __package__)\n", "package/__main__.py"
    )
    done = run("-m", "package", "--lr", "1")
    assert done.exit_code == 0
    assert done.stdout == f"{[str(Path('package/__main__.py').resolve()), '--lr', '1']} package\n"
    assert "steps  3" in done.stderr.replace("     ", "")
    for name in ("package", "package.trains"):
        sys.modules.pop(name, None)


def test_lines_come_as_often_as_asked() -> None:
    done = run("--every", "2", "--peak", "1G", script("train(7)\n"))
    lines = [line.split("  ")[0] for line in done.stderr.splitlines() if line.startswith("step ") and "/step" in line]
    assert lines == ["step 4", "step 6"]  # none of the first two is timed
    assert "step 2" not in run("--every", "2", "--quiet", script("train(7)\n")).stderr


def test_of_several_ranks_only_the_first_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("--records", "run.jsonl", "--json", "out.json", script("train(3)\n"))
    assert done.exit_code == 0
    assert done.stderr == ""
    assert not Path("out.json").exists()
    assert len(steps("run.rank1.jsonl")) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.py"], "cannot read the script 'none.py'"),
        (["."], "'.' is a directory"),
        (["-m", "no.such.module"], "no module named 'no.such.module'"),
        (["--peak", "1G", "--hardware", "H100", "train.py"], "--peak and --hardware both say"),
        (["--peak", "0", "train.py"], "--peak is the dense peak"),
        (["--peak", "fast", "train.py"], "cannot read 'fast' as a count"),
        (["--hardware", "H9000", "train.py"], "H9000"),
        (["--records", "no/such/run.jsonl", "train.py"], "the directory 'no/such' does not exist"),
    ],
)
def test_wrong_usage_is_told_before_anything_runs(arguments: list[str], says: str) -> None:
    script("print('ran')\n")
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_not_python_is_told_with_its_line() -> None:
    Path("broken.py").write_text("x = 1\nx = = 2\n")
    done = run("broken.py")
    assert done.exit_code == 1
    assert "broken.py, line 2 is not Python: invalid syntax" in done.stderr


# --- as processes ----------------------------------------------------------------------------------------------------
LOADS = """
import os, signal, sys, torch
from torch.utils.data import DataLoader, Dataset

class Data(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.ones(16, 16) @ torch.ones(16)

def main():
    model = torch.nn.Linear(16, 4, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    for epoch in range(2):
        for x in DataLoader(Data(), batch_size=8, num_workers=2, multiprocessing_context=sys.argv[1]):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.save(Data(), "data.pt")
    os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    main()
"""


def process(*words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env=environment, timeout=timeout
    )


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.nightly)])
def test_workers_and_interrupts(start: str) -> None:
    Path("train.py").write_text(LOADS)
    done = process("-m", "flopprof", "run", "--peak", "1G", "--records", "run.jsonl", "train.py", start)
    assert done.returncode == 130
    before, _, summary = done.stderr.partition("flopprof: train.py")
    assert before.rstrip().endswith("KeyboardInterrupt")
    assert "flopprof/" not in before
    assert "steps       6" in summary
    # 2 x 8 x 16 x 4 forward, as much for the weight's gradient; what workers multiply is theirs.
    assert [record.model_flops for record in steps()] == [2048] * 6


@pytest.mark.nightly
def test_torchrun() -> None:
    script(
        "import torch.distributed as dist\n"
        "from torch.nn.parallel import DistributedDataParallel\n"
        "dist.init_process_group('gloo')\n"
        "model = DistributedDataParallel(torch.nn.Linear(4, 4, bias=False))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for _ in range(5):\n"
        "    model(torch.randn(2, 4)).sum().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
        "dist.destroy_process_group()\n"
    )
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flopprof", "run"]
    done = process(*words, "--peak", "1G", "--records", "run.jsonl", "train.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("flopprof: train.py") == 1
    for rank in (0, 1):
        assert [record.model_flops for record in steps(f"run.rank{rank}.jsonl")] == [STEP] * 5
