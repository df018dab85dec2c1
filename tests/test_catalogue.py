"""The catalogue against its sources: published parameters, closed forms and counts, row by row."""

from __future__ import annotations

import datetime
import importlib.resources
import inspect
import json
import os
import re
import subprocess
import sys
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner, Result

import flopprof
from flopprof.analytic import TransformerShape
from flopprof.cli.main import app
from flopprof.errors import UnknownTarget
from flopprof.models import catalogue
from flopprof.models.targets import suggestions

FAMILIES = [
    *("Llama", "Qwen", "Mistral", "Mixtral", "Gemma", "Phi", "DeepSeek", "gpt-oss", "GPT-2", "GPT-3", "GPT-NeoX"),
    *("Pythia", "OPT", "BLOOM", "Falcon", "OLMo", "Command-R", "Granite", "Jamba", "Zamba", "Nemotron-H", "Mamba"),
    *("Mamba-2", "BERT", "ModernBERT", "DeBERTa", "T5", "BART", "Whisper", "wav2vec2", "ViT", "DeiT", "DINOv2"),
    *("CLIP", "SigLIP", "SAM", "DETR", "Swin", "ConvNeXt", "LLaVA", "Qwen-VL", "PaliGemma"),
]
GENERATIONS = [
    *("llama-7b", "llama-2-7b", "llama-3-8b", "llama-4-scout", "qwen2-7b", "qwen3-8b", "qwen2-57b-a14b"),
    *("qwen3-235b-a22b", "gemma-7b", "gemma-2-9b", "gemma-3-27b", "deepseek-v2", "deepseek-v3", "flan-t5-xxl"),
]

ROWS = list(catalogue.entries().values())
# One of each way to be built and counted; all of them in the nightly run.
SAMPLE = [
    *("llama-3.1-405b", "deepseek-v3", "qwen2-57b-a14b", "mixtral-8x7b", "gpt-oss-120b", "gemma-3-4b", "phi-2", "gpt2"),
    *("pythia-12b", "falcon-40b", "command-r", "mamba2-130m", "bert-base", "flan-t5-small"),
    *("whisper-tiny", "vit-base-patch16", "clip-vit-base-patch32", "convnext-tiny", "qwen2-vl-2b"),
]
SPREAD = [pytest.param(row, id=row.name, marks=() if row.name in SAMPLE else pytest.mark.nightly) for row in ROWS]

UNITS = {"M": 10**6, "B": 10**9}


def bounds(printed: str) -> tuple[int, int]:
    """What a printed figure can stand for: within one unit of its last digit, as authors round up, off or down.

    `6.7B`, `110M` (a zero before the unit is no digit that was measured), or an exact `70,426,624`.
    """
    if printed[-1] not in UNITS:
        exact = int(printed.replace(",", ""))
        return exact, exact
    whole, _, fraction = printed[:-1].partition(".")
    zeros = 0 if fraction else len(whole) - len(whole.rstrip("0"))
    unit = UNITS[printed[-1]]
    value = int(whole + fraction) * unit // 10 ** len(fraction)
    tick = unit * 10**zeros // 10 ** len(fraction)
    return value - tick + 1, value + tick - 1


def load(row: catalogue.Entry) -> flopprof.Workload:
    """The workload in the sizes that the row's cost is told for: text alone, where that is told per token."""
    cost = row.cost()
    text_alone = cost.per == "token" and row.kind == "image-text"
    return flopprof.load(
        row.name,
        seq=cost.tokens,
        image_size=cost.image,
        audio_seconds=cost.seconds,
        images=0 if text_alone else 1,
    )


def run(*arguments: str, width: int = 80) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width), "NO_COLOR": "1"})


# --- what the file says ----------------------------------------------------------------------------
def test_bounds_of_printed_figures() -> None:
    assert bounds("6.7B") == (6_600_000_001, 6_799_999_999)
    assert bounds("110M") == (100_000_001, 119_999_999)
    assert bounds("4.0B") == (3_900_000_001, 4_099_999_999)
    assert bounds("1,722,408,960") == (1_722_408_960, 1_722_408_960)


def test_every_family_and_generation_is_there() -> None:
    assert len(ROWS) >= 60
    assert set(FAMILIES) <= {row.family for row in ROWS}
    assert all(any(row.name.startswith(name) for row in ROWS) for name in GENERATIONS)


def test_every_row_is_named_once_and_says_where_it_is_from() -> None:
    text = (importlib.resources.files("flopprof") / "data" / "models.toml").read_text(encoding="utf-8")
    assert text.count("[[model]]") == len(ROWS)
    for row in ROWS:
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", row.name), row.name
        assert re.match(r"https://\S+$|arXiv:\d{4}\.\d{5}(, \S.*)?$", row.source), row.name
        assert datetime.date(2018, 1, 1) < row.date < datetime.date.today(), row.name


def test_dates_are_no_earlier_than_the_papers_they_cite() -> None:
    for row in ROWS:
        paper = re.match(r"arXiv:(\d\d)(\d\d)\.", row.source)
        if paper:
            year, month = 2000 + int(paper[1]), int(paper[2])
            # a model may come out before its paper, by at most half a year
            assert (row.date.year - year) * 12 + row.date.month - month >= -6, row.name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parameters_are_those_published(row: catalogue.Entry) -> None:
    low, high = bounds(row.published)
    assert low <= row.parameters <= high


@pytest.mark.parametrize("row", [row for row in ROWS if row.published_active], ids=lambda row: row.name)
def test_active_parameters_are_those_published(row: catalogue.Entry) -> None:
    """Owners differ in whether embeddings are among them: with, without the looked-up one, or without both."""
    assert row.active is not None
    assert row.published_active is not None
    low, high = bounds(row.published_active)
    text: dict[str, Any] = row.config.get("text_config", row.config)
    embedding = text["vocab_size"] * text["hidden_size"]
    readings = [row.active, row.active - embedding, row.active - 2 * embedding]
    assert any(low <= reading <= high for reading in readings), readings


def test_only_models_with_experts_have_active_parameters() -> None:
    for row in ROWS:
        text = row.config.get("text_config", row.config)
        experts = any(name in text for name in ("num_local_experts", "num_experts", "n_routed_experts"))
        assert (row.active is not None) == experts, row.name


# --- the file against what transformers builds -----------------------------------------------------
@pytest.mark.parametrize("row", SPREAD)
def test_transformers_builds_the_model(row: catalogue.Entry) -> None:
    model = load(row).model
    assert type(model).__name__ == row.architecture
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes.values()) == row.parameters
    assert all(parameter.is_meta for parameter in model.parameters())
    if row.active is not None:
        text = row.config.get("text_config", row.config)
        every = next(text[name] for name in ("num_local_experts", "num_experts", "n_routed_experts") if name in text)
        routed = sum(size for name, size in sizes.items() if ".experts." in name)
        assert row.parameters - routed // every * (every - text["num_experts_per_tok"]) == row.active


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("vit-base-patch16", "vit_base_patch16_224"),
        ("deit-small", "deit_small_patch16_224"),
        ("swin-tiny", "swin_tiny_patch4_window7_224"),
        ("convnext-base", "convnext_base"),
    ],
)
def test_another_library_builds_as_many_parameters(name: str, model: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        built = timm.create_model(model)
    assert sum(parameter.numel() for parameter in built.parameters()) == catalogue.entries()[name].parameters


@pytest.mark.parametrize("row", SPREAD)
def test_every_field_is_one_that_the_class_reads(row: catalogue.Entry) -> None:
    model = load(row).model
    pairs = [(row.config, model.config)]
    pairs += [(value, getattr(model.config, name)) for name, value in row.config.items() if isinstance(value, dict)]
    for fields, config in pairs:
        code = inspect.getsource(sys.modules[type(model).__module__])
        plain = type(config)()
        for name, value in fields.items():
            assert hasattr(plain, name) or f'config, "{name}"' in code, name
            if not isinstance(value, dict) and name != "tie_word_embeddings":  # T5 ties whatever its config says
                found = getattr(config, name)
                if name == "layers_block_type":  # kinds of layers are renamed between releases, each to one other
                    assert len(found) == len(value)
                    assert len(set(zip(found, value, strict=True))) == len(set(found)) == len(set(value))
                else:
                    assert (list(found) if isinstance(value, list) else found) == value, name


@pytest.mark.parametrize("row", SPREAD)
def test_the_cost_is_what_a_count_finds(row: catalogue.Entry) -> None:
    cost, profile = row.cost(), load(row).count()
    assert not profile.uncounted
    if row.runs_every_expert:
        shape = TransformerShape.from_config(row.facts(), seq=row.tokens())
        whole = msgspec.structs.replace(shape, experts_per_token=shape.experts)
        assert profile.forward_flops == catalogue.forward_flops_per_token(whole) * row.tokens()
    elif row.forward is not None:
        assert profile.forward_flops == row.forward.flops
    else:
        assert profile.forward_flops == cost.flops * row.tokens()


def test_the_closed_form_by_hand() -> None:
    """GPT-2: 12 layers of 12 d^2, the tied head, and 4 d s a layer for scores and values."""
    d, s = 768, 1024
    assert catalogue.entries()["gpt2"].cost() == catalogue.Cost(
        flops=2 * (12 * 12 * d**2 + 50257 * d) + 12 * 4 * d * s, per="token", by="closed form", tokens=s
    )


@pytest.mark.parametrize("name", ["llama-3.1-405b", "deepseek-v3"])
def test_training_the_largest(name: str) -> None:
    """Each product runs forward once and backward twice: every input of one wants a gradient, the first layer's too."""
    row, seq = catalogue.entries()[name], 8192
    profile = flopprof.load(name, seq=seq).count(backward=True)
    shape = TransformerShape.from_config(row.facts(), seq=seq)
    assert profile.forward_flops == catalogue.forward_flops_per_token(shape) * seq
    assert profile.backward_flops == 2 * profile.forward_flops


def test_t5_1_1_has_a_head_of_its_own() -> None:
    model = flopprof.load("flan-t5-small").model
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    tied = flopprof.load("t5-small").model
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


# --- finding a row ---------------------------------------------------------------------------------
def test_find_reads_text_or_a_glob() -> None:
    assert catalogue.find(None) == ROWS
    assert {row.family for row in catalogue.find("whisper")} == {"Whisper"}
    assert {row.family for row in catalogue.find("LLAMA-3*")} == {"Llama"}
    assert [row.name for row in catalogue.find("gpt2")] == [
        "gpt2",
        "gpt2-medium",
        "gpt2-large",
        "gpt2-xl",
        "distilgpt2",
    ]
    assert {row.kind for row in catalogue.find("vision")} == {"vision"}
    assert catalogue.find("no such model") == []


def test_a_name_is_a_target_in_any_case() -> None:
    assert flopprof.load("GPT2").name == "gpt2"


def test_a_misspelt_name_finds_its_row() -> None:
    assert "llama-3.1-405b" in suggestions("lama-3.1-405b")
    with pytest.raises(UnknownTarget, match=r"did you mean .*deepseek-v3"):
        flopprof.load("deepseek-v33")


# --- the command -----------------------------------------------------------------------------------
def test_models_prints_a_table_of_80_columns_without_torch_in_two_seconds() -> None:
    env = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"} | {"COLUMNS": "80"}
    command = [sys.executable, "-X", "importtime", "-m", "flopprof", "models"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=60)
    assert result.returncode == 0, result.stderr
    assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE)
    took_us = sum(int(own) for own in re.findall(r"import time: +(\d+) \|", result.stderr))
    assert took_us < 2_000_000
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "\x1b" not in result.stdout
    for row in ROWS:
        assert re.search(rf"^{re.escape(row.name)} ", result.stdout, re.MULTILINE), row.name


def test_models_prints_parameters_and_flops() -> None:
    lines = {line.split()[0]: line for line in run("models", "mixtral").stdout.splitlines() if line.strip()}
    assert re.search(r"Mixtral +46\.7B +12\.9B +27\.6 G +token of 4096$", lines["mixtral-8x7b"])
    llama = run("models", "llama-4*").stdout
    assert re.search(r"^llama-4-scout-17b-16e +Llama +109B +18\.0B +36\.3 G +token of 4096 \+$", llama, re.MULTILINE)
    swin = run("models", "swin-tiny").stdout
    assert re.search(r"^swin-tiny +Swin +28\.3M +[0-9.]+ G +image 224 \*$", swin, re.MULTILINE)


def test_models_json_holds_every_row() -> None:
    result = run("models", "--json", "-")
    rows = {row["name"]: row for row in json.loads(result.stdout)["models"]}
    assert list(rows) == [row.name for row in ROWS]
    assert rows["llama-3.1-405b"]["published"] == "405B"
    assert rows["llama-3.1-405b"]["forward"]["by"] == "closed form"
    assert rows["mamba-130m"]["forward"]["by"] == "count"
    assert rows["bert-base"]["source"].startswith("arXiv:1810.04805")


def test_models_refuses_a_pattern_that_nothing_matches() -> None:
    result = run("models", "nothing-like-this")
    assert result.exit_code == 2
    assert "no model of the catalogue matches 'nothing-like-this'" in result.stderr
