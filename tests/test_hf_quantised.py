"""Quantised configs: the products that would run, in which type, what trains, and the bytes that are stored."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flopprof import Profile, Workload, load
from flopprof.errors import InvalidCheckpoint

pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.torch").save_file
pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

SEQ, D, FF, VOCAB, LAYERS = 24, 64, 128, 100, 2
K = 32  # 2 key heads of 16
WEIGHTS = 2 * D * D + 2 * D * K + 3 * D * FF  # of one layer's linear layers
WHOLE = 2 * VOCAB * D + (2 * LAYERS + 1) * D  # embedding, head, norms
LINEAR, HEAD, SCORES = 2 * SEQ * WEIGHTS, 2 * SEQ * D * VOCAB, 2 * SEQ * SEQ * D
FORWARD = LAYERS * (LINEAR + 2 * SCORES) + HEAD
LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": D,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": FF,
    "vocab_size": VOCAB,
}  # fmt: skip
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
W8A8 = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig"}}}


def written(folder: Path, found: Any, **facts: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **facts, "quantization_config": found}))
    return str(folder)


def quantised(folder: Path, found: Any, *, device: str | None = None, **facts: Any) -> Workload:
    return load(written(folder, found, **facts), seq=SEQ, device=device)


def by_dtype(profile: Profile, *operators: str) -> dict[str, int]:
    """Of the products with weights alone: unfused attention has a type of its own on meta."""
    found: dict[str, int] = {}
    for row in profile.operators:
        if row.phase == "forward" and row.op in operators:
            found[row.dtype] = found.get(row.dtype, 0) + row.flops
    return found


PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::_grouped_mm",
    "flopprof::quantised_linear",
    "flopprof::quantised_grouped_mm",
)


# --- what runs ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("found", "dtypes"),
    [
        (NF4, {"float32": LAYERS * LINEAR, "bfloat16": HEAD}),
        ({**NF4, "bnb_4bit_compute_dtype": "bfloat16"}, {"bfloat16": LAYERS * LINEAR + HEAD}),
        (INT8, {"int8": LAYERS * LINEAR, "bfloat16": HEAD}),
        (GPTQ, {"bfloat16": LAYERS * LINEAR + HEAD}),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, {"bfloat16": LAYERS * LINEAR + HEAD}),
        (FP8, {"float8_e4m3fn": LAYERS * LINEAR, "bfloat16": HEAD}),
        ({**FP8, "dequantize": True}, {"bfloat16": LAYERS * LINEAR + HEAD}),
        (W8A8, {"int8": LAYERS * LINEAR, "bfloat16": HEAD}),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, {"bfloat16": LAYERS * LINEAR + HEAD}),
        ({"quant_method": "new"}, {"bfloat16": LAYERS * LINEAR + HEAD}),
    ],
    ids=lambda value: str(value.get("quant_method", "")) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("device", ["meta", pytest.param("cpu", marks=pytest.mark.nightly)])
def test_the_same_products_in_the_types_that_run(tmp_path: Path, found: Any, dtypes: Any, device: str) -> None:
    profile = quantised(tmp_path, found, device=device).count()
    assert profile.forward_flops == FORWARD
    assert by_dtype(profile, *PRODUCTS) == dtypes
    assert not profile.uncounted
    assert len(profile.assumptions) == 1
    assert profile.n_params == LAYERS * WEIGHTS + WHOLE


@pytest.mark.parametrize("found", [NF4, INT8, GPTQ, FP8])
def test_stored_weights_do_not_train(tmp_path: Path, found: Any) -> None:
    """Of a quantised product the gradient of the input alone; of the head both, of attention both factors."""
    folded, every = (quantised(tmp_path, found).count(backward=True, fold=fold) for fold in (True, False))
    assert every.backward_flops == LAYERS * (LINEAR + 4 * SCORES) + 2 * HEAD
    assert folded.by_phase() == every.by_phase()
    assert folded.by_module() == every.by_module()
    assert every.n_params_trainable == WHOLE


def test_reading_a_weight_is_elementwise(tmp_path: Path) -> None:
    """One multiplication by its scale for each weight; and where factors are narrow, one for each activation."""
    plain = load(written(tmp_path, None), seq=SEQ).count().elementwise_flops
    assert quantised(tmp_path, GPTQ).count().elementwise_flops == plain + LAYERS * WEIGHTS
    inputs = LAYERS * SEQ * (6 * D + FF)  # of q, k, v, o, gate, up; of down
    assert quantised(tmp_path, INT8).count().elementwise_flops == plain + inputs


def test_adapters_train_on_quantised_layers(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    r = 3
    profile = load(written(tmp_path, FP8), seq=SEQ, lora=f"r={r},targets=q_proj").count(backward=True)
    assert profile.forward_flops == FORWARD + LAYERS * 2 * SEQ * r * 2 * D
    assert profile.n_params_trainable == LAYERS * r * 2 * D


def test_experts_are_multiplied_in_8_bits(tmp_path: Path) -> None:
    experts, chosen, inner = 4, 2, 48
    facts = {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": experts,
        "num_experts_per_tok": chosen, "intermediate_size": inner,
    }  # fmt: skip
    for device in ("meta", "cpu"):
        profile = quantised(tmp_path, FP8, device=device, **facts).count(backward=True)
        routed = LAYERS * 2 * SEQ * chosen * 3 * D * inner
        attention = LAYERS * 2 * SEQ * (2 * D * D + 2 * D * K)
        router = LAYERS * 2 * SEQ * D * experts
        assert by_dtype(profile, *PRODUCTS) == {"float8_e4m3fn": routed + attention, "bfloat16": router + HEAD}
        assert profile.backward_flops == routed + attention + 2 * (router + HEAD) + LAYERS * 4 * SCORES


MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2,
    "intermediate_size": 96,
}  # fmt: skip
LLAMA4: dict[str, Any] = {
    "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "num_local_experts": 4, "head_dim": 16,
    "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size": 96, "intermediate_size_mlp": 96,
}  # fmt: skip
APART = LAYERS * 4 * 3 * D * 96  # in experts
FBGEMM = {"quant_method": "fbgemm_fp8"}


@pytest.mark.parametrize(
    ("found", "facts", "packed"),
    [
        (NF4, MIXTRAL, False),
        (GPTQ, MIXTRAL, False),
        ({"quant_method": "hqq", "weight_bits": 4}, MIXTRAL, False),
        (W8A8, MIXTRAL, False),
        (FBGEMM, MIXTRAL, False),
        (FP8, MIXTRAL, True),
        (NF4, LLAMA4, True),
        (GPTQ, LLAMA4, False),
        (FBGEMM, LLAMA4, True),
    ],
)
def test_experts_are_stored_as_the_method_finds_them(
    tmp_path: Path, found: Any, facts: dict[str, Any], packed: bool
) -> None:
    """transformers' layers replace linear ones; of fused experts only fp8's, and Llama 4's, which it takes apart."""
    workload = quantised(tmp_path, found, **facts)
    assert workload.quantised is not None
    linear = LAYERS * (2 * D * D + 2 * D * K)  # no router is a plain linear layer
    shared = LAYERS * 3 * D * 96 if facts is LLAMA4 else 0
    assert workload.quantised.elements == linear + shared + packed * APART
    said = any("taken to be stored whole" in note for note in workload.assumptions)
    assert said is not packed
    whole = 2 * APART
    assert (workload.quantised.n_bytes is not None and workload.quantised.n_bytes > whole) is not packed


def test_mxfp4_is_of_experts_alone(tmp_path: Path) -> None:
    experts, inner = 4, 96
    facts = {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_local_experts": experts,
        "num_experts_per_tok": 2, "intermediate_size": inner, "head_dim": 16,
    }  # fmt: skip
    found = quantised(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, **facts).quantised
    assert found is not None
    assert found.elements == LAYERS * experts * 3 * D * inner
    # half a byte each, and one for 32
    assert sum(found.by_parameter.values()) == found.elements // 2 + found.elements // 32


def test_the_layers_of_gpt2_are_linear_too(tmp_path: Path) -> None:
    facts = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": D, "n_layer": LAYERS, "n_head": 4}
    for device in ("meta", "cpu"):
        profile = quantised(tmp_path, INT8, device=device, **facts).count()
        assert by_dtype(profile, *PRODUCTS) == {"int8": LAYERS * 2 * SEQ * 12 * D * D, "bfloat16": HEAD}


def test_modules_that_are_left_out(tmp_path: Path) -> None:
    for pattern, left in [
        ("down_proj", LAYERS * D * FF),
        ("model.layers.1", WEIGHTS),
        ("model.layers.*.mlp", LAYERS * 3 * D * FF),
        ("re:.*q_proj", LAYERS * D * D),
        ("layers.1", 0),  # neither a start nor an end
    ]:
        found = quantised(tmp_path, {**GPTQ, "modules_to_not_convert": [pattern, "lm_head"]}).quantised
        assert found is not None
        assert found.elements == LAYERS * WEIGHTS - left


# --- what is stored -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("found", "bits", "groups", "scale"),
    [
        (NF4, 4, WEIGHTS // 64, 32),
        ({**NF4, "bnb_4bit_use_double_quant": True}, 4, WEIGHTS // 64, 8),
        (INT8, 8, 3 * D + 2 * K + 2 * FF, 32),  # a row: q, o, down; k, v; gate, up
        (GPTQ, 4, WEIGHTS // 32, 20),
        (FP8, 8, WEIGHTS // 32**2, 32),
    ],
)
def test_bytes_by_the_config(tmp_path: Path, found: Any, bits: int, groups: int, scale: int) -> None:
    workload = quantised(tmp_path, found)
    assert workload.quantised is not None
    assert workload.quantised.n_bytes == 2 * WHOLE + LAYERS * (WEIGHTS * bits + groups * scale) // 8
    assert "weights quantised; all weights take" in workload.stored()["quantised"]


def packed(*, layers: int = LAYERS) -> dict[str, torch.Tensor]:
    """What GPTQ writes: 8 weights of 4 bits in each int32, beside scales, zero points and an order."""
    stored = {"model.embed_tokens.weight": torch.zeros(VOCAB, D), "lm_head.weight": torch.zeros(VOCAB, D)}
    stored["model.norm.weight"] = torch.zeros(D)
    sizes = {"q": (D, D), "k": (D, K), "v": (D, K), "o": (D, D), "gate": (D, FF), "up": (D, FF), "down": (FF, D)}
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            stored[f"model.layers.{layer}.{norm}.weight"] = torch.zeros(D)
        for name, (rows, columns) in sizes.items():
            part = "self_attn" if name in "qkvo" else "mlp"
            prefix = f"model.layers.{layer}.{part}.{name}_proj"
            stored[f"{prefix}.qweight"] = torch.zeros(rows // 8, columns, dtype=torch.int32)
            stored[f"{prefix}.qzeros"] = torch.zeros(rows // 32, columns // 8, dtype=torch.int32)
            stored[f"{prefix}.scales"] = torch.zeros(rows // 32, columns, dtype=torch.float16)
            stored[f"{prefix}.g_idx"] = torch.zeros(rows, dtype=torch.int32)
    return stored


def test_packed_elements_are_compared(tmp_path: Path) -> None:
    save_file(packed(), tmp_path / "model.safetensors")
    checkpoint = quantised(tmp_path, GPTQ).checkpoint
    assert checkpoint is not None
    assert checkpoint.mismatch is None
    assert checkpoint.quantisation == "gptq, 4 bits"
    save_file(packed(layers=1), tmp_path / "model.safetensors")
    checkpoint = quantised(tmp_path, GPTQ).checkpoint
    assert checkpoint is not None
    assert f"{WEIGHTS + 2 * D:,} fewer are stored" in (checkpoint.mismatch or "")
    other = quantised(tmp_path, {**GPTQ, "bits": 8}).checkpoint
    assert other is not None
    assert "fewer are stored" in (other.mismatch or "")


def test_narrow_and_byte_packed_weights_are_compared(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    state = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "architectures"})).state_dict()
    projections = [name for name in state if "_proj" in name]
    narrow = {**state, **{name: state[name].to(torch.float8_e4m3fn) for name in projections}}
    scales = {f"{name}_scale_inv": torch.ones(2, 2) for name in projections}
    save_file({**narrow, **scales}, tmp_path / "model.safetensors")
    checkpoint = quantised(tmp_path, FP8).checkpoint
    assert checkpoint is not None
    assert checkpoint.mismatch is None
    halves = {name: torch.zeros(state[name].numel() // 2, 1, dtype=torch.uint8) for name in projections}
    beside = {f"{name}.absmax": torch.zeros(3) for name in projections}
    beside |= {f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8) for name in projections}
    save_file({**state, **halves, **beside}, tmp_path / "model.safetensors")
    checkpoint = quantised(tmp_path, NF4).checkpoint
    assert checkpoint is not None
    assert checkpoint.mismatch is None


def test_layers_that_the_files_hold_whole_are_not_quantised(tmp_path: Path) -> None:
    stored = packed()
    del stored["model.layers.0.mlp.down_proj.qweight"]
    stored["model.layers.0.mlp.down_proj.weight"] = torch.zeros(D, FF, dtype=torch.bfloat16)
    save_file(stored, tmp_path / "model.safetensors")
    workload = quantised(tmp_path, GPTQ)
    assert workload.quantised is not None
    assert workload.quantised.elements == LAYERS * WEIGHTS - D * FF


# --- what is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ([4], "quantization_config is a list"),
        ({"bits": 4}, "quant_method is 'None'"),
        ({"quant_method": 8}, "quant_method is '8'"),
        ({**GPTQ, "bits": "four"}, "bits is 'four': a whole number of 1 to 16"),
        ({**GPTQ, "bits": 10**9}, "bits is '1000000000'"),
        ({**GPTQ, "bits": True}, "bits is 'True'"),
        ({**GPTQ, "group_size": -7}, "group_size is '-7'"),
        ({**GPTQ, "modules_to_not_convert": "lm_head"}, "by no list of names"),
        ({**GPTQ, "modules_to_not_convert": [3]}, "by no list of names"),
        ({**GPTQ, "modules_to_not_convert": ["x"] * 10_001}, "more modules than any model has"),
        ({**GPTQ, "modules_to_not_convert": ["x" * 300]}, "more modules than any model has"),
        ({**GPTQ, "modules_to_not_convert": ["x.*y"] * 300}, "more patterns than are read"),
    ],
)
def test_configs_that_cannot_be_right_are_refused(tmp_path: Path, found: Any, reason: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=reason):
        quantised(tmp_path, found)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", "(" * 100, ".*.*.*.*.*.*.*.*.*.*x", "[", "(?P<x>.*.*)+y"])
def test_patterns_that_a_regex_engine_would_spend_long_on(tmp_path: Path, pattern: str) -> None:
    quantised(tmp_path, GPTQ)
    start = time.perf_counter()
    found = quantised(tmp_path, {**GPTQ, "modules_to_not_convert": [pattern] * 100}, num_hidden_layers=24).quantised
    assert found is not None
    assert time.perf_counter() - start < 2  # with building 24 layers
    assert found.elements == 24 * WEIGHTS + VOCAB * D  # taken as text, it leaves out nothing, not even the head


@pytest.mark.parametrize(("found", "each"), [(NF4, 4 + 32 / 64), (GPTQ, 4 + 20 / 32), (FP8, 8 + 32 / 32**2)])
def test_a_decoded_token_reads_what_is_stored(tmp_path: Path, found: Any, each: float) -> None:
    from flopprof import inference

    traffic = inference(quantised(tmp_path, found), mode="decode", context=SEQ).traffic
    assert traffic is not None
    rotations = 16 // 2 * 4  # inverse frequencies, half a head of float32
    whole = 2 * (VOCAB * D + (2 * LAYERS + 1) * D) + rotations
    assert traffic.weight_bytes == LAYERS * WEIGHTS * each / 8 + whole
    assert traffic.row_bytes == 2 * D


def test_a_decoded_token_reads_the_narrow_experts_that_it_meets(tmp_path: Path) -> None:
    from flopprof import inference

    facts = {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
        "num_experts_per_tok": 2, "intermediate_size": FF,
    }  # fmt: skip
    traffic = inference(quantised(tmp_path, FP8, **facts), mode="decode", context=SEQ).traffic
    assert traffic is not None
    (routed,) = traffic.routed
    each = LAYERS * 3 * D * FF  # a byte each, and four for 32 by 32
    assert (routed.experts, routed.chosen, routed.bytes_each) == (4, 2, each + each // 256)
