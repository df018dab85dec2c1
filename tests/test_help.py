"""Help that helps: every command has examples that its own parser takes, every option says what it does."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from flopprof.cli.main import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group


def examples(name: str) -> list[str]:
    return [line for line in (COMMANDS[name].epilog or "").split("\n\n") if line.startswith("flopprof ")]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_can_be_typed(name: str) -> None:
    assert len(examples(name)) >= 2
    for line in examples(name):
        for part in line.split(" | "):
            program, command, *words = shlex.split(part)
            assert program == "flopprof"
            with COMMANDS[command].make_context(command, words) as context:
                assert context.params


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_an_example_that_a_narrow_terminal_shows_in_one_line(name: str) -> None:
    lines = (COMMANDS[name].epilog or "").split("\n\n")[1:]
    typed = {word for line in lines for word in shlex.split(line)}
    for parameter in COMMANDS[name].params:
        spellings = {*parameter.opts, *parameter.secondary_opts}
        assert parameter.param_type_name == "argument" or typed & spellings, spellings
    assert max(map(len, lines)) <= 80 - 2


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_is_for_its_command(name: str) -> None:
    assert all(f"flopprof {name}" in line for line in examples(name))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", "").rstrip().endswith((".", "%", ")")), parameter.name


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_cut_off_in_help_at_80_columns(name: str) -> None:
    text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"}).stdout
    assert "Options" in text
    assert "…" not in text


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_a_narrow_terminal_and_imports_no_torch(name: str) -> None:
    code = (
        "import sys\nfrom flopprof.cli.main import app\n"
        f"try:\n    app({[name, '--help'] if name else ['--help']!r})\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    environment = {**os.environ, "COLUMNS": "60", "NO_COLOR": "1", "TERMINAL_WIDTH": "60"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    console = Console()
    assert max(map(len, console.render_str(done.stdout, markup=False).plain.splitlines())) <= 60
