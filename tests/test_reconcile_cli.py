"""`flopprof reconcile`: the waterfall, its reasons, its verdict, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flopprof.cli.main import app

NETS = Path(__file__).parent / "sample_models" / "nets.py"
MLP = f"{NETS}:Mlp"


def run(*arguments: str, width: int = 80) -> Result:
    return CliRunner().invoke(app, ["reconcile", *arguments], env={"COLUMNS": str(width), "NO_COLOR": "1"})


def test_the_waterfall_of_a_small_network() -> None:
    """2 rows through 8 -> 16 -> 4: N = 128 + 16 + 64 + 4; the biases are added, the first input wants no gradient."""
    result = run(MLP, "--input", "2x8", "--backward", "--tokens", "2")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "2 N T 0.848 100.0%" in lines
    assert "never multiplied -0.080 -9.4%" in lines
    assert "= forward FLOPs 0.768 90.6%" in lines
    assert "no input gradient -0.512 -33.3%" in lines
    assert "= backward FLOPs 1.024 66.7%" in lines
    assert any(line.startswith("this run 1.792 kFLOPs of training: 4.226 N T, not 6 N T") for line in lines)
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_json_closes(tmp_path: Path) -> None:
    file = tmp_path / "ledger.json"
    assert run(MLP, "--input", "2x8", "--backward", "--tokens", "2", "--json", str(file)).exit_code == 0
    ledger = json.loads(file.read_text())
    for part in (ledger, ledger["backward"], ledger["hardware"]):
        assert part["estimate_flops"] + sum(term["flops"] for term in part["terms"]) == part["measured_flops"]


def test_variants_change_the_verdict() -> None:
    frozen = run(MLP, "--input", "2x8", "--backward", "--tokens", "2", "--frozen", "up")
    assert frozen.exit_code == 0, frozen.output
    assert "frozen weights" in frozen.stdout
    adapted = run(MLP, "--input", "2x8", "--backward", "--tokens", "2", "--lora", "r=2,targets=down")
    assert adapted.exit_code == 0, adapted.output
    assert "frozen weights" in adapted.stdout


def test_samples_are_said_to_be_samples() -> None:
    result = run("resnet18", "--batch", "2")
    assert result.exit_code == 0, result.output
    assert "2 samples" in result.stdout
    assert "The model has no tokens" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lora", "q_proj"], "write it as r=16,targets=q_proj,v_proj"),
        (["--frozen", "nowhere"], "matches no parameter"),
        (["--reentrant"], "give both"),
        (["--checkpointing"], "no repeated blocks"),
    ],
)
def test_usage_errors(arguments: list[str], sentence: str) -> None:
    result = run(MLP, "--input", "2x8", *arguments)
    assert result.exit_code == 2
    assert sentence in result.output


def test_variants_last_when_the_model_must_run_on_the_cpu(tmp_path: Path) -> None:
    """A model whose branch depends on values is built again on the CPU: what was frozen is frozen there too."""
    file = tmp_path / "asking.py"
    file.write_text(
        "import torch\n"
        "class Asking(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)\n"
        "    def forward(self, x):\n"
        "        x = self.up(x)\n"
        "        return self.down(x if float(x.sum()) > 0 else -x)\n"
    )
    result = run(f"{file}:Asking", "--input", "2x8", "--backward", "--tokens", "2", "--frozen", "up", "--json", "-")
    assert result.exit_code == 0, result.output
    terms = {term["name"]: term["flops"] for term in json.loads(result.stdout)["backward"]["terms"]}
    assert terms["frozen_weights"] == -2 * 2 * 8 * 16


@pytest.mark.parametrize("net", ["torch.nn.Identity", "torch.nn.BatchNorm1d"])
@pytest.mark.parametrize("phases", [[], ["--backward"]])
def test_where_nothing_is_multiplied_there_is_nothing_to_reconcile(net: str, phases: list[str], tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(f"import torch\ndef net():\n    return {net}(8)\n")
    result = run(f"{file}:net", "--input", "2x8", *phases)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "nothing is multiplied, so there is nothing to reconcile" in said
    assert "nan" not in said.split()
    assert "too high" not in said
