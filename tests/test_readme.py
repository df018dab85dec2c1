"""The blocks of the README and of docs/ run, and print what they show."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/*.md")))]
COMMANDS = [
    block
    for page in PAGES
    for block in re.findall(r"```console\n\$ (.*?)\n(.*?)\n```", (ROOT / page).read_text(), re.DOTALL)
]
# Of the pages behind the README, those that take longest.
SLOW = (
    "count t5-small --mode generate",
    "count gpt-oss-20b",
    "plan llama-3.2-1b",
    "plan deepseek",
    "crosscheck vit_b_16",
)


def stable(text: str) -> list[str]:
    """Without what depends on the installation: the torch version, spaces at the end."""
    return [re.sub(r"torch \S+", "torch", line).rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        pytest.param(*block, marks=pytest.mark.nightly if block[0].removeprefix("flopprof ").startswith(SLOW) else ())
        for block in COMMANDS
    ],
)
def test_a_command_prints_what_the_pages_show(command: str, shown: str) -> None:
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    words = [sys.executable, "-m", *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert stable(done.stdout) == stable(shown)


def test_the_pages_show_commands() -> None:
    assert len(COMMANDS) == sum((ROOT / page).read_text().count("```console") for page in PAGES) > 2


@pytest.mark.parametrize("path", PAGES)
def test_python_examples_run(path: str) -> None:
    failed, _tried = doctest.testfile(str(ROOT / path), module_relative=False)
    assert failed == 0


@pytest.mark.parametrize(
    "name",
    [
        "compare.run",
        "counting.count",
        "counting.runtime",
        "formulas",
        "meter.meter",
        "models.targets",
        "profile",
        "units",
    ],
)
def test_docstring_examples_run(name: str) -> None:
    failed, _tried = doctest.testmod(importlib.import_module(f"flopprof.{name}"))
    assert failed == 0


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
