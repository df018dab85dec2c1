"""`flopprof plan`: what it prints, its JSON, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flopprof.cli.main import app
from flopprof.plan.make import plan
from flopprof.plan.published import runs


def run(*arguments: str, width: int = 80) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": str(width), "NO_COLOR": "1"})


def words(result: Result) -> str:
    return " ".join(result.stdout.split())


def test_the_page_of_a_run() -> None:
    result = run("--params", "7e9", "--tokens", "1T", "--hardware", "H100", "--mfu", "50%", "--price", "2")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stdout.isascii()
    for said in (
        "model 7 B parameters",
        "tokens 1 T (143 a parameter)",
        "6 N D 4.2e+22 FLOPs",
        "H100 SXM5, 989.4 TFLOP/s dense bfloat16, 3352 GB/s",
        "MFU 50.0% = 494.7 TFLOP/s a device (given)",
        "device-hours 23,583 (982.6 device-days)",
        "cost $47,167 at $2.00 a device-hour",
        "energy 16.51 MWh: 700 W a device (TDP), PUE 1",
        "weights 14 GB gradients 14 GB optimizer 84 GB activations not known",
        "together >= 112 GB, MORE than the device's 80 GB",
        "bound by memory: 4.177 ms a step, 239.4 tokens/s (batch 1; at best)",
        "by products from a batch of 296",
    ):
        assert said in words(result), said
    assert "assumed" not in result.stdout


def test_a_named_model_in_full() -> None:
    arguments = "llama-3.1-70b --tokens 15e12 --hardware H100 --devices 1024 --mfu 0.4 --zero 3 --checkpointing full"
    result = run(*arguments.split(), "--co2", "0.4", "--power", "650", "--pue", "1.2", "--batch", "8")
    said = words(result)
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "detailed 6.738e+24 FLOPs, 1.061 of 6 N D; attention over all pairs of 4096 tokens (used below)" in said
    assert "192.4 days on 1,024 devices" in said
    assert "650 W a device (given), PUE 1.2" in said
    assert "CO2 " in said
    assert "for which 2 devices are needed" in said
    assert "within the device's 80 GB; buffers come on top" in said
    assert "ZeRO 3 over 1024, micro-batch 1, checkpointing full" in said
    assert "(batch 8; at best)" in said


def test_assumptions_and_warnings_are_told() -> None:
    assert "assumed MFU 100 %" in words(run("--params", "7e9", "--tokens", "1e12", "--hardware", "A100"))
    implied = words(run("--params", "7e9", "--tokens", "1e12", "--hardware", "H100", "--device-hours", "500"))
    assert "MFU 2358.3% = 23333.3 TFLOP/s a device (implied)" in implied
    assert "warning MFU 2358% is more than the peak allows" in implied
    budget = words(run("--hardware", "H100", "--mfu", "0.4", "--price", "2", "--cost", "1M"))
    assert "assumed 20 tokens a parameter (Chinchilla)" in budget


def test_a_shape_and_its_layout() -> None:
    shape = "layers=48,d_model=6144,heads=64,vocab=51200,positions=2048"
    arguments = ("--seq", "2048", "--micro-batch", "4", "--tp", "8", "--dropout", "--keep-scores", "--json", "-")
    memory = json.loads(run("--shape", shape, *arguments).stdout)["memory"]
    # Korthikanti 2022, eq. 2: L s b h (10 + 24 / t + 5 a s / (h t))
    assert memory["activations_bytes"] == 48 * 2048 * 4 * (10 * 6144 + (24 * 6144 + 5 * 64 * 2048) // 8)
    gated = json.loads(run("--shape", f"{shape},gated,tied=false", "--json", "-").stdout)
    assert gated["params"] == 48 * (4 + 3 * 4) * 6144**2 + (2 * 51200 + 2048) * 6144


def test_json_is_the_plan(tmp_path: Path) -> None:
    arguments = ("gpt2", "--tokens", "10B", "--hardware", "A100", "--mfu", "0.3")
    expected = plan("gpt2", tokens=10**10, hardware="A100", mfu=0.3)
    assert json.loads(run(*arguments, "--json", "-").stdout) == json.loads(expected.to_json())
    file = tmp_path / "plan.json"
    assert "Training" in run(*arguments, "--json", str(file)).stdout
    assert json.loads(file.read_text())["schema"] == "flopprof.plan/1"


def test_published_runs() -> None:
    result = run("--published")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    for line in ("GPT-3 175B 174.6 B 300 B 3.14e23 V100 - 24.6 19.7%", "15.6 T 3.80e25 H100 30,840,000 342.2 34.6%"):
        assert line in words(result)
    rows = json.loads(run("--published", "--json", "-").stdout)["runs"]
    assert all(row["source"] and row["date"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing follows from that"),
        (["--params", "seven"], "cannot read 'seven' as a count"),
        (["--params", "7e9", "--mfu", "half"], "cannot read 'half' as a share"),
        (["--params", "7e9", "--mfu", "40"], "write 40 % as 0.4"),
        (["--params", "7e9", "--tokens", "1e12", "--hardware", "H1000"], "no device of the table goes by 'H1000'"),
        (["--params", "7e9", "--hardware", "V100", "--dtype", "bf16"], "V100 SXM2 16GB has no bfloat16 peak"),
        (["gpt9"], "no model goes by 'gpt9'"),
        (["resnet50"], "Of a model that is no text model, count a step (flopprof count) and give flops."),
        (["--shape", "layers"], "cannot read 'layers' of --shape: write it as layers=32"),
        (["--shape", "layers=2"], "not the shape of a transformer"),
        (["--params", "7e9", "--devices", "12", "--tp", "8"], "12 devices do not divide into replicas"),
        (["--params", "7e9", "--json", "/nowhere/plan.json"], "does not exist"),
    ],
)
def test_wrong_use_is_a_sentence_and_2(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; from flopprof.cli.main import app; "
        "app(['plan', 'llama-3.1-8b', '--tokens', '1e12', '--hardware', 'H100'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_mesh() -> None:
    result = run("llama-3.2-1b", "--mesh", "tp=4,pp=2,dp=8", "--seq", "128", "--micro-batches", "6", "--zero", "1")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    said = words(result)
    assert "llama-3.2-1b: tp 4 x pp 2 x dp 8 = 64 ranks" in said
    assert "a step 48 sequences of 128 tokens: 6 micro-batches of 1 a replica" in said
    assert "FLOPs, as unsharded" in said
    assert "14.3% of a step in the bubble" in said  # (2 - 1) / (6 + 2 - 1)
    document = json.loads(run("llama-3.2-1b", "--mesh", "tp=4", "--seq", "128", "--json", "-").stdout)
    assert (document["schema"], document["tp"], len(document["stages"])) == ("flopprof.mesh/2", 4, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mesh", "tp=2"], "--mesh needs a MODEL"),
        (["gpt2", "--mesh", "tp=2"], "has no tensor parallel plan"),
        (["gpt2", "--mesh", "fsdp=2"], "cannot read 'fsdp=2' of the mesh"),
        (["gpt2", "--mesh", "pp=2", "--tp", "2"], "--tp and --pp are for plans without --mesh"),
        (["gpt2", "--mesh", "pp=2", "--hardware", "H100"], "--hardware has no effect on --mesh: leave one"),
        (["gpt2", "--mesh", "pp=2", "--tokens", "1e12"], "--tokens has no effect on --mesh"),
        (["gpt2", "--mesh", "pp=2", "--context", "0"], "--context has no effect on --mesh"),
        (["gpt2", "--micro-batches", "2"], "--micro-batches are those of --mesh"),
        (["gpt2", "--published"], "MODEL has no effect on --published: leave one of them out."),
        (["--published", "--pue", "1.0"], "--pue has no effect on --published"),
        (["resnet18", "--mesh", "cp=2"], "no decoder or encoder of a known shape"),
    ],
)
def test_meshes_that_cannot_be(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_sizes_beyond_every_float_are_refused(tmp_path: Path) -> None:
    facts = {"model_type": "llama", "hidden_size": 10**400, "num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(facts | {"vocab_size": 9, "intermediate_size": 9}))
    refused = run(str(tmp_path))
    assert refused.exit_code == 2
    assert "more than 1e+36 parameters or tokens" in " ".join(refused.stderr.split())


def test_a_checkpoint_directory(tmp_path: Path) -> None:
    """Its own config.json says the sizes: a decoder of 2 layers, 2 x 4 d^2 of attention and 2 x 3 d f, two tables."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    facts = {
        "model_type": "llama",
        "vocab_size": 128,
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
    }
    facts |= sizes
    file = tmp_path / "config.json"
    file.write_text(json.dumps(facts | {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 32}))
    found = json.loads(run(str(tmp_path), "--tokens", "1e6", "--json", "-").stdout)
    assert found["params"] == 2 * (4 * 64**2 + 3 * 64 * 96) + 2 * 128 * 64
    assert (found["seq"], found["model"]) == (32, tmp_path.name)
    assert found["flops_detailed"] // 10**6 == 3 * (2 * (found["params"] - 128 * 64) + 2 * 2 * 4 * (16 + 16) * 32)
    file.write_text(json.dumps({name: value for name, value in facts.items() if name != "tie_word_embeddings"}))
    assert "does not say tie_word_embeddings: taken as tied" in words(run(str(tmp_path), "--tokens", "1e6"))
    wrong = (("{", "is no JSON object"), ('{"model_type": "llama"}', "no plan follows"), (None, "cannot be read"))
    for text, said in wrong:
        file.unlink()
        if text is not None:
            file.write_text(text)
        result = run(str(tmp_path))
        assert result.exit_code == 2
        assert said in result.stderr
        file.touch()


def test_published_runs_are_a_page(tmp_path: Path) -> None:
    page = tmp_path / "runs.html"
    assert run("--published", "--html", str(page)).exit_code == 0
    for run_ in runs():
        assert f">{run_.name}<" in page.read_text()
        assert f">{run_.utilisation:.1%}<" in page.read_text()
