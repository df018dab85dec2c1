"""Variants of transformers models: kinds of attention, its own checkpoints, adapters; on meta and folded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flopprof import Profile, load
from flopprof.errors import UsageError
from flopprof.models import hf_flash

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

SEQ, D, FF, VOCAB, LAYERS = 24, 64, 96, 100, 3
K = 32  # 2 key heads of 16
# One layer on SEQ tokens: every product forward, and scores and mixing, 2 SEQ SEQ D each.
SCORES = 2 * SEQ * SEQ * D
LINEAR = 2 * SEQ * (2 * D * D + 2 * D * K + 3 * D * FF)
HEAD = 2 * SEQ * D * VOCAB


TEXT = {
    "dtype": "bfloat16", "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": FF, "vocab_size": VOCAB,
}  # fmt: skip


def written(folder: Path, kind: str, architecture: str, **facts: Any) -> str:
    """A directory with the config of a small model, and no weights."""
    found = {"model_type": kind, "architectures": [architecture], **TEXT, **facts}
    (folder / "config.json").write_text(json.dumps(found))
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: Any) -> str:
    return written(tmp_path_factory.mktemp("llama"), "llama", "LlamaForCausalLM")


@pytest.fixture(scope="module")
def plain(llama: str) -> Profile:
    return load(llama, seq=SEQ).count(backward=True)


def counted(name: str, *, fold: bool | None = None, seq: int | None = SEQ, **how: Any) -> Profile:
    return load(name, seq=seq, **how).count(backward=True, fold=fold)


# --- attention ----------------------------------------------------------------------------------
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_unfused_kinds_of_attention_do_the_same(attn: str, llama: str, plain: Profile) -> None:
    found = counted(llama, attn=attn)
    assert found.by_phase() == plain.by_phase()
    assert found.by_module() == plain.by_module()
    assert found.exact


def test_flash_attention_does_the_same_mathematics_and_computes_the_scores_again(llama: str, plain: Profile) -> None:
    found = counted(llama, attn="flash")
    assert found.forward_flops == plain.forward_flops == LAYERS * (LINEAR + 2 * SCORES) + HEAD
    assert found.backward_flops == plain.backward_flops == 2 * plain.forward_flops
    assert found.recompute_flops == LAYERS * SCORES
    assert found.by_operator("forward")["flash_attn::_flash_attn_forward"] == LAYERS * 2 * SCORES
    assert found.by_module("forward") == plain.by_module("forward")
    assert not found.uncounted
    assert found.assumptions == (hf_flash.NOTE,)
    # The kernel is told the mask: of SEQ^2 pairs it lets the lower triangle through.
    causal = load(llama, seq=SEQ, attn="flash").count(attention="causal")
    assert causal.forward_flops == LAYERS * (LINEAR + 2 * 2 * D * (SEQ * (SEQ + 1) // 2)) + HEAD


def test_flash_attention_is_folded_as_it_runs(llama: str) -> None:
    folded, every = (counted(llama, attn="flash", fold=fold) for fold in (True, False))
    assert folded.by_phase() == every.by_phase()
    assert folded.by_module() == every.by_module()


def test_windows_reach_the_kernel(tmp_path: Path) -> None:
    """Mistral sees so many tokens back, itself included."""
    window, seq = 16, 40
    target = written(tmp_path, "mistral", "MistralForCausalLM", sliding_window=window)
    pairs = sum(min(token + 1, window) for token in range(seq))
    found = load(target, seq=seq, attn="flash").count(attention="causal")
    assert found.by_operator()["flash_attn::_flash_attn_forward"] == LAYERS * 4 * D * pairs


def test_flash_attention_pads_values_to_the_width_of_queries(tmp_path: Path) -> None:
    """Queries of 8 + 16, values of 8: transformers pads them, and the kernel multiplies the zeros."""
    sizes = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
    facts = {**sizes, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 4, "moe_intermediate_size": 16}
    target = written(tmp_path, "deepseek_v3", "DeepseekV3ForCausalLM", **facts)
    dense, flash = (load(target, seq=SEQ, attn=attn).count().forward_flops for attn in ("sdpa", "flash"))
    assert flash - dense == LAYERS * 2 * SEQ * SEQ * 4 * (24 - 8)


@pytest.mark.nightly
def test_packed_pictures_are_counted_by_their_lengths() -> None:
    """Qwen2-VL gives its picture as one sequence among others, by running sums of lengths."""
    found = [counted("qwen2-vl-2b", seq=300, attn=attn, dtype="bfloat16") for attn in ("sdpa", "flash")]
    assert found[0].model_flops == found[1].model_flops
    assert found[1].by_operator()["flash_attn::_flash_attn_varlen_forward"] > 0


@pytest.mark.nightly
def test_modeling_files_that_import_flash_attention_beside_its_package() -> None:
    found = [counted("falcon-7b", attn=attn) for attn in ("sdpa", "flash")]
    assert found[0].model_flops == found[1].model_flops


def test_flash_attention_on_the_cpu_attends() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, heads, 8, dtype=torch.bfloat16) for length, heads in ((3, 4), (5, 2), (5, 2)))
    found = hf_flash.flash_attn_func(q, k, v, causal=True, window_size=(1, 1))
    wanted = torch.empty_like(q)
    for row in range(3):
        seen = slice(row + 1, row + 3)  # the diagonal ends in the corner; one key back, none ahead
        for head in range(4):
            keys, values = k[:, seen, head // 2].float(), v[:, seen, head // 2].float()
            scores = (q[:, row, head].float()[:, None] * keys).sum(-1) / 8**0.5
            wanted[:, row, head] = (scores.softmax(-1)[..., None] * values).sum(1).to(torch.bfloat16)
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
    flat = [factor.flatten(0, 1) for factor in (q, k, v)]
    sums = torch.tensor([0, 3, 6]), torch.tensor([0, 5, 10])
    ragged = hf_flash.flash_attn_varlen_func(*flat, *sums, 3, 5, causal=True, window_size=(1, 1))
    assert torch.equal(ragged, found.flatten(0, 1))


def test_what_flash_attention_does_not_take_is_said() -> None:
    with pytest.raises(UsageError, match="takes float16 and bfloat16, and gpt2 is float32: add --dtype bfloat16"):
        load("gpt2", attn="flash")
    with pytest.raises(UsageError, match="t5-small cannot be built with --attn flash: T5ForConditionalGeneration"):
        load("t5-small", attn="flash", dtype="bfloat16")
    with pytest.raises(UsageError, match="gpt-oss-20b cannot be built with --attn sdpa: GptOssForCausalLM"):
        load("gpt-oss-20b", attn="sdpa")
    with pytest.raises(UsageError, match="--attn is for Hugging Face models"):
        load("resnet18", attn="eager")
    with pytest.raises(UsageError, match="'linear' is none of sdpa, eager, flash"):
        load("gpt2", attn="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 256"):
        hf_flash.flash_attn_func(*torch.empty(3, 1, 2, 1, 257, dtype=torch.float16, device="meta"))


def test_transformers_is_left_as_it_was(llama: str) -> None:
    from transformers import modeling_utils

    names = ("lazy_import_flash_attention", "is_kernels_available")
    before = [getattr(modeling_utils, name) for name in names]
    before.append(modeling_utils.PreTrainedModel._flash_attn_import_error)
    load(llama, seq=SEQ, attn="flash")
    after = [getattr(modeling_utils, name) for name in names]
    assert [*after, modeling_utils.PreTrainedModel._flash_attn_import_error] == before


# --- adapters and checkpoints -------------------------------------------------------------------
def test_adapters_of_a_decoder(llama: str, plain: Profile) -> None:
    r = 5
    found = counted(llama, lora=f"r={r},targets=q_proj,v_proj")
    added = LAYERS * 2 * SEQ * r * (D + D + D + K)
    assert found.forward_flops == plain.forward_flops + added
    # Of every weight of the base none; of the first layer's input none, of its k_proj none at all.
    inputs = plain.forward_flops + LAYERS * 2 * SCORES  # each product once, attention twice
    first = 2 * SEQ * (D * D + 2 * D * K)  # q, k, v of the first layer: their input wants nothing
    kept = SCORES  # the first layer's keys want no gradient: scores give one of the two
    adapters = 2 * added - 2 * SEQ * r * 2 * D  # A gives its input's gradient in all layers but the first
    assert found.backward_flops == inputs - first - kept + adapters


def test_a_transformers_model_checkpoints_itself(llama: str, plain: Profile) -> None:
    """Reentrant: each layer runs again whole; else up to what was saved last, the input of its down projection."""
    whole = counted(llama, checkpointing="reentrant")
    assert (whole.forward_flops, whole.backward_flops) == (plain.forward_flops, plain.backward_flops)
    assert whole.recompute_flops == LAYERS * (LINEAR + 2 * SCORES)
    early = counted(llama, checkpointing="non-reentrant")
    assert early.recompute_flops == LAYERS * (LINEAR + 2 * SCORES - 2 * SEQ * D * FF)
    assert early.model_flops == plain.model_flops


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_adapted_and_checkpointed_models_are_folded_as_they_run(kind: Any, tmp_path: Path) -> None:
    target = written(tmp_path, "vit", "ViTForImageClassification", image_size=32, patch_size=8, num_labels=5)
    how: Any = {"lora": "r=4,targets=all-linear", "checkpointing": kind, "frozen": ["*.lora_A.*"]}
    folded, every = (counted(target, seq=None, fold=fold, **how) for fold in (True, False))
    assert folded.by_phase() == every.by_phase()
    assert folded.by_module() == every.by_module()
    adapters = {name for name in folded.by_parameter("backward") if "lora_B" in name}
    assert len(adapters) == LAYERS * 6 + 1  # reentrant ones too: the first block's input is made to want a gradient


def test_the_heading_says_training_mode() -> None:
    workload = load("gpt2", seq=8, checkpointing="non-reentrant")
    assert workload.model.training
    assert workload.describe().endswith("train")


def test_a_model_without_checkpoints_says_so() -> None:
    with pytest.raises(UsageError, match="ConvNextForImageClassification does not support activation checkpointing"):
        load("convnext-tiny", checkpointing="reentrant")
