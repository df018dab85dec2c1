"""The README's blocks run, and print what they show."""

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
COMMANDS = re.findall(r"```console\n\$ (.*?)\n(.*?)\n```", README, re.DOTALL)


def stable(text: str) -> list[str]:
    """Without what depends on the installation: the torch version, spaces at the end."""
    return [re.sub(r"torch \S+", "torch", line).rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize(("command", "shown"), COMMANDS)
def test_a_command_prints_what_the_readme_shows(command: str, shown: str) -> None:
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    words = [sys.executable, "-m", *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert stable(done.stdout) == stable(shown)


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) == 2


@pytest.mark.parametrize("path", ["README.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/*.md")))])
def test_python_examples_run(path: str) -> None:
    failed, _tried = doctest.testfile(str(ROOT / path), module_relative=False)
    assert failed == 0


@pytest.mark.parametrize(
    "name", ["counting.count", "counting.runtime", "formulas", "models.targets", "profile", "units"]
)
def test_docstring_examples_run(name: str) -> None:
    failed, _tried = doctest.testmod(importlib.import_module(f"flopprof.{name}"))
    assert failed == 0


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
