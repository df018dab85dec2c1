"""`flopprof run` beside `python`: the same streams and exit code, whatever the script does; and what is told of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_run_cli import STEP, as_before, run, script, steps

__all__ = ["as_before"]

MARK = "\nflopprof: train.py\n"


def process(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env=environment, timeout=240
    )


def as_alone(*, count: int = 3) -> str:
    """Runs train.py with and without: all is alike but what flopprof says at the end, which is returned."""
    alone = process("train.py")
    options = ["--quiet", "--peak", "1G", "--json", "out.json", "--records", "run.jsonl"]
    metered = process("-m", "flopprof", "run", *options, "train.py")
    errors, mark, said = metered.stderr.partition(MARK)
    assert mark, metered.stderr
    assert (metered.returncode, metered.stdout, errors) == (alone.returncode, alone.stdout, alone.stderr)
    assert json.loads(Path("out.json").read_text())["steps"] == count
    assert [record.model_flops for record in steps()] == [STEP] * count
    return said


ENDS = {
    "globals": """
import sys, os, builtins, __main__
names = sorted(name for name in globals() if name.startswith("__"))
print(names, __file__, __loader__.path, __builtins__ is builtins, sys.excepthook is sys.__excepthook__)
print(sys.argv, sys.path[0], train.__code__.co_filename, __spec__, __package__, __cached__)
train(3)
""",
    "no standard output": "import sys\nsys.stdout = None\ntrain(3)\n",
    "no standard streams": "import sys\ntrain(3)\nsys.stdout = sys.stderr = None\n",
    "standard output closed": "import sys\ntrain(3)\nprint('x')\nsys.stdout.close()\n",
    "standard error closed": "import sys\nsys.stderr.close()\ntrain(3)\nprint('x')\n",
    "a hook that exits": """
import sys
def hook(*error):
    print("hook", error[1])
    sys.exit(3)
sys.excepthook = hook
train(3)
raise ValueError("it")
""",
    "a hook that raises": """
import sys
def hook(*error):
    raise RuntimeError("in the hook")
sys.excepthook = hook
train(3)
raise ValueError("it")
""",
    "no hook": "import sys\ndel sys.excepthook\ntrain(3)\nraise ValueError('it')\n",
    "what is known at exit": """
import atexit, sys
atexit.register(lambda: print(sys.last_type, sys.last_value, sys.last_traceback.tb_lineno, sys.last_traceback.tb_next))
train(3)
raise ValueError("it")
""",
    "a child that comes to the end": """
import os, sys
train(2)
child = os.fork()
if child == 0:
    train(4)
    print("child")
    sys.exit(0)
os.waitpid(child, 0)
train(1)
print("parent")
""",
    "a child that raises": """
import os
train(2)
child = os.fork()
if child == 0:
    train(4)
    raise ValueError("child")
print(os.waitpid(child, 0)[1])
train(1)
""",
    "another directory": """
import os, tempfile
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    train(3)
    os.chdir("/")
""",
}
OFTEN = {"globals", "a child that comes to the end"}


@pytest.mark.parametrize("end", [pytest.param(end, marks=() if end in OFTEN else pytest.mark.nightly) for end in ENDS])
def test_a_script_is_what_it_is_alone(end: str) -> None:
    script(ENDS[end])
    assert as_alone().startswith("steps       3, of which 1 is timed")


# --- files of flopprof's own --------------------------------------------------------------------------------------
def test_files_are_those_of_the_directory_in_which_it_was_started() -> None:
    name = script("import os\nos.mkdir('elsewhere')\nos.chdir('elsewhere')\ntrain(3)\n")
    here = Path.cwd()
    done = run("--records", "run.jsonl", "--json", "out.json", "--html", "page.html", name)
    assert done.exit_code == 0, done.stderr
    os.chdir(here)
    assert sorted(path.name for path in here.iterdir() if path.is_file()) == [
        "out.json",
        "page.html",
        "run.jsonl",
        "train.py",
    ]
    assert [*Path("elsewhere").iterdir()] == []
    assert len(steps()) == 3


@pytest.mark.parametrize("taken", ["shutil.rmtree('out')", "os.mkdir('out/run.jsonl')"])
def test_files_that_cannot_be_written_are_told_at_the_end(taken: str) -> None:
    Path("out").mkdir()
    name = script(f"import os, shutil, sys\ntrain(0)\n{taken}\ntrain(5)\nprint('done')\nsys.exit(4)\n")
    done = run("--records", "out/run.jsonl", "--json", "out/out.json", "--peak", "1G", name)
    assert (done.exit_code, done.stdout) == (4, "done\n")
    assert "steps       5, of which 3 are timed" in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("flopprof: ")][1:]
    assert "run.jsonl" in said[0]
    assert ["out.json" in line for line in said[1:]] == ([True] if "rmtree" in taken else [])


def test_a_full_disk_is_told_at_the_end() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = run("--records", "/dev/full", "--json", "/dev/full", "--peak", "1G", script("train(3)\n"))
    assert done.exit_code == 0
    assert "steps       3" in done.stderr
    assert "cannot write all records to '/dev/full': the file ends early." in done.stderr
    assert "cannot write '/dev/full': No space left on device." in done.stderr


@pytest.mark.parametrize(
    "files",
    [
        ["--records", "x", "--json", "x"],
        ["--records", "x", "--html", "./x"],
        ["--records", "r", "--json", "y", "--html", "link"],
    ],
)
def test_one_file_has_one_use(files: list[str]) -> None:
    Path("link").symlink_to("y")
    done = run(*files, script("print('ran')\n"))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "both name" in done.stderr


# --- what is said -------------------------------------------------------------------------------------------------
OWN = """
class Own:
    def __init__(self, parameters):
        self.parameters = [*parameters]
    def step(self):
        with torch.no_grad():
            for parameter in self.parameters:
                parameter -= 0.1 * parameter.grad
model = torch.nn.Linear(4, 4)
optimizer = Own(model.parameters())
for _ in range(4):
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
"""
THREAD = "import threading\nthread = threading.Thread(target=train, args=(4,))\nthread.start()\nthread.join()\n"
RAW = "x = torch.ones(2, 2, requires_grad=True)\n(x @ x).sum().backward()\ntorch.optim.SGD([x]).step()\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("print(1)\n", "no torch optimizer stepped in this process. Processes that the script starts are not seen"),
        (OWN, "a model was called to train, but no torch optimizer stepped, and it is by their steps that steps are"),
        (THREAD, "an optimizer stepped in a thread that the script started, and steps of other threads are not seen"),
        (RAW, "the first step of an optimizer is where metering begins, and no other one came"),
    ],
)
def test_why_there_is_no_step(text: str, says: str) -> None:
    done = run(script(text))
    assert done.exit_code == 0
    assert says in done.stderr
    assert ("Meter" in done.stderr) == (text in (OWN, THREAD))


def test_steps_of_another_thread_are_told_of() -> None:
    done = run("--peak", "1G", script(f"train(3)\n{THREAD}"))
    assert "steps       3" in done.stderr
    assert "another thread, too" in done.stderr


def test_advice_is_what_one_can_do_here() -> None:
    floats = """
model = torch.nn.Linear(4, 4, bias=False)
class Often(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.times = torch.nn.Linear(4, 4), 0
    def forward(self, x):
        self.times += 1
        with torch.no_grad():
            for _ in range(1 + (self.times > 1)):
                self.inner(x)
        return self.inner(x)
model = Often()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(4):
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
"""
    done = run("--convention", "nanogpt", "--json", "out.json", script(floats))
    said = " ".join(done.stderr.split())
    assert "told how many by tokens= and samples=." in said
    assert "give Meter" not in said
    assert "`--peak measure`" in said
    assert "peak=" not in said
    notes = json.loads(Path("out.json").read_text())["notes"]
    assert any("recount_every= of a flopprof.Meter in the script narrows it down" in note for note in notes), notes
