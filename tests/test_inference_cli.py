"""`flopprof count --mode`: what it prints and refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flopprof.cli.main import app
from flopprof.inference.result import Inference

pytest.importorskip("transformers")

FACTS = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 100,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(FACTS))
    return str(folder)


def run(*arguments: str, width: int = 80) -> Result:
    return CliRunner().invoke(app, ["count", *arguments], env={"COLUMNS": str(width), "NO_COLOR": "1"})


def test_a_step_is_printed_by_part_in_80_columns(tiny: str) -> None:
    result = run(tiny, "--mode", "decode", "--context", "40", "--batch", "2", "--hardware", "H100")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if tiny not in line)
    linear = 2 * (32 * 8 * 12 + 3 * 32 * 48) + 3200
    attention = 4 * 2 * 32 * 41
    assert re.search(rf"^weights +{2 * 2 * linear / 1000:.3f} ", result.stdout, re.MULTILINE)
    assert re.search(rf"^cache, read +{2 * attention / 1000:.3f} ", result.stdout, re.MULTILINE)
    assert re.search(r"^attention +bfloat16 +4 +5\.120 +128$", result.stdout, re.MULTILINE)
    assert "one new token of each sequence, after 40 in the cache" in result.stdout
    assert "never: at this context no batch" in result.stdout
    assert "H100 SXM5, bfloat16: 989.4 TFLOP/s dense" in result.stdout


@pytest.mark.parametrize("mode", [("prefill",), ("generate", "--new", "3")])
def test_other_modes_print_too(tiny: str, mode: tuple[str, ...]) -> None:
    result = run(tiny, "--mode", *mode, "--prompt", "12")
    assert result.exit_code == 0, result.output
    assert "the last position's logits" in " ".join(result.stdout.split())
    assert "12" in result.stdout


def test_json_is_the_whole_result(tiny: str, tmp_path: Path) -> None:
    result = run(tiny, "--mode", "generate", "--seq", "9", "--new", "4", "--json", "-")
    found = Inference.from_json(result.stdout)
    assert (found.mode, found.prompt, found.new_tokens) == ("generate", 9, 4)
    file = tmp_path / "step.json"
    result = run(tiny, "--mode", "decode", "--context", "9", "--json", str(file))
    assert "One step" in result.stdout
    assert Inference.from_json(file.read_text()).context == 9


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--context", "8"], "--context is about generating text: add --mode"),
        (["--hardware", "H100"], "--hardware is about generating text"),
        (["--mode", "decode", "--backward"], "--backward and --mode decode do not go together"),
        (["--mode", "decode", "--train"], "--train and --mode decode"),
        (["--mode", "prefill", "--input", "1x8:int64"], "--input and --mode prefill"),
        (["--mode", "prefill", "--by", "line"], "--by and --mode prefill"),
        (["--mode", "prefill", "--csv", "-"], "--csv and --mode prefill"),
        (["--mode", "prefill", "--context", "8"], "--context is for --mode decode"),
        (["--mode", "generate"], "needs --new"),
        (["--mode", "decode", "--seq", "8"], "takes --context"),
        (["--mode", "decode", "--hardware", "H1000"], "H1000"),
        (["--mode", "prefill", "--prompt", "8", "--seq", "8"], "leave one of them out"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_sentence(tiny: str, arguments: list[str], says: str) -> None:
    result = run(tiny, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_models_that_generate_nothing_are_refused() -> None:
    result = run("resnet18", "--mode", "decode")
    assert result.exit_code == 2
    assert "Hugging Face models that generate text" in result.stderr


def test_wrong_sizes_are_said_before_torch_is_imported() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from flopprof.cli.main import app\n"
        "done = CliRunner().invoke(app, ['count', 'gpt2', '--mode', 'generate'])\n"
        "assert done.exit_code == 2, done.output\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
