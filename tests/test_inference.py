"""A prefill, a decoded token and a generation: against the mathematics of each kind of model."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import flopprof
from flopprof.errors import UsageError
from flopprof.inference import Inference, inference

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

WIDTH, HEADS, SHARED, HEAD, INNER, WORDS, LAYERS = 32, 4, 2, 8, 48, 100, 2
BYTES = 4  # float32
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": SHARED,
    "head_dim": HEAD,
    "intermediate_size": INNER,
    "vocab_size": WORDS,
    "dtype": "float32",
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
PAIR: dict[str, Any] = {
    "d_model": WIDTH,
    "d_ff": INNER,
    "d_kv": HEAD,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "vocab_size": WORDS,
    "dtype": "float32",
    "decoder_start_token_id": 0,
}
# Of one token: queries, keys, values, output, and a gated feed-forward; the head apart.
LINEAR = LAYERS * (WIDTH * HEAD * (2 * HEADS + 2 * SHARED) + 3 * WIDTH * INNER)
TOP = WIDTH * WORDS


STATES: dict[str, Any] = {**TEXT, "mamba_d_state": 4, "mamba_d_conv": 3, "mamba_expand": 2}
ROUTED: dict[str, Any] = {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BOTH: dict[str, Any] = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "vocab_size": WORDS,
    "dtype": "float32",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    **{name: value for name, value in TEXT.items() if name != "head_dim"},
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": LAYERS,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    row[0]: row
    for row in (
        ("llama", "LlamaForCausalLM", TEXT),
        ("gpt2", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": WORDS}),
        ("mistral", "MistralForCausalLM", {**TEXT, "sliding_window": 16}),
        ("gemma2", "Gemma2ForCausalLM", {**TEXT, "sliding_window": 16}),
        ("gemma3_text", "Gemma3ForCausalLM", {**TEXT, "sliding_window": 16}),
        ("mixtral", "MixtralForCausalLM", {**TEXT, "num_local_experts": 4}),
        ("qwen3_moe", "Qwen3MoeForCausalLM", ROUTED),
        ("deepseek_v3", "DeepseekV3ForCausalLM", {**LATENT, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
        (
            "mamba",
            "MambaForCausalLM",
            {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": WORDS},
        ),
        (
            "mamba2",
            "Mamba2ForCausalLM",
            {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": WORDS, "num_heads": 8}
            | {"head_dim": 8, "n_groups": 1, "chunk_size": 8},
        ),
        (
            "jamba",
            "JambaForCausalLM",
            {**STATES, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
        ),
        (
            "zamba2",
            "Zamba2ForCausalLM",
            {**STATES, "num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"], "n_mamba_heads": 8}
            | {"mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 8, "use_mamba_kernels": False, "num_mem_blocks": 1}
            | {
                "attention_hidden_size": 64,
                "attention_head_dim": 16,
                "num_key_value_heads": 4,
                "hybrid_layer_ids": [2],
            },
        ),
        (
            "nemotron_h",
            "NemotronHForCausalLM",
            {**STATES, "num_hidden_layers": 3, "hybrid_override_pattern": "M*-", "mamba_num_heads": 8, "n_groups": 1}
            | {"mamba_head_dim": 8, "ssm_state_size": 4, "conv_kernel": 3, "chunk_size": 8},
        ),
        (
            "recurrent_gemma",
            "RecurrentGemmaForCausalLM",
            {**TEXT, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "conv1d_width": 3},
        ),
        ("t5", "T5ForConditionalGeneration", PAIR),
        ("bart", "BartForConditionalGeneration", {**BOTH, "max_position_embeddings": 64}),
        (
            "whisper",
            "WhisperForConditionalGeneration",
            {**BOTH, "num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 16},
        ),
    )
}


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """A checkpoint's directory of a tiny model."""

    def make(kind: str, architecture: str, facts: dict[str, Any] | None = None, **more: Any) -> str:
        folder = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        text = {"model_type": kind, "architectures": [architecture], **(facts or {}), **more}
        (folder / "config.json").write_text(json.dumps(text))
        return str(folder)

    return make


def llama(make: Any, **facts: Any) -> str:
    return make("llama", "LlamaForCausalLM", **{**TEXT, **facts})


def attended(pairs: int) -> int:
    """FLOPs of scores and weighted values of so many query-key pairs."""
    return 4 * LAYERS * HEADS * HEAD * pairs


# --- decoder-only -----------------------------------------------------------------------------------
def test_a_decoded_token_multiplies_every_weight_and_attends_to_all_before_it_and_itself(made: Any) -> None:
    step = inference(llama(made), mode="decode", context=37, batch=3)
    assert step.flops == 3 * (2 * (LINEAR + TOP) + attended(38))
    assert step.tokens == 3
    (part,) = step.cache.parts
    entry = 2 * LAYERS * SHARED * HEAD * BYTES
    assert (part.kind, part.tensors, part.bytes, part.bytes_per_token) == ("attention", 2 * LAYERS, 37 * entry, entry)
    assert step.cache_bytes == 3 * 37 * entry
    traffic = step.traffic
    assert traffic is not None
    assert (traffic.cache_read_bytes, traffic.cache_written_bytes) == (37 * entry, entry)
    norms, rotations = (2 * LAYERS + 1) * WIDTH, HEAD // 2
    assert traffic.weight_bytes == BYTES * (LINEAR + TOP + norms + rotations)
    assert traffic.row_bytes == BYTES * WIDTH
    assert step.bytes_moved == traffic.weight_bytes + 3 * (traffic.row_bytes + 38 * entry)


def test_a_prefill_makes_the_logits_of_its_last_position_and_fills_the_cache(made: Any) -> None:
    found = inference(llama(made), mode="prefill", prompt=19, batch=2)
    assert found.flops == 2 * (19 * 2 * LINEAR + 2 * TOP + attended(19 * 19))
    assert found.logits == "last"
    assert found.cache.tokens == 19
    assert found.cache.bytes == 19 * 2 * LAYERS * SHARED * HEAD * BYTES
    again = inference(llama(made), mode="prefill", prompt=19, batch=2, attention="causal")
    assert again.flops == 2 * (19 * 2 * LINEAR + 2 * TOP + attended(19 * 20 // 2))


@pytest.mark.parametrize("new", [1, 60])
def test_a_generation_is_its_prefill_and_a_step_for_each_further_token(made: Any, new: int) -> None:
    found = inference(llama(made), mode="generate", prompt=11, new=new, batch=2)
    steps = sum(2 * (LINEAR + TOP) + attended(context + 1) for context in range(11, 11 + new - 1))
    assert found.flops == 2 * (11 * 2 * LINEAR + 2 * TOP + attended(121) + steps)
    assert found.tokens == 2 * new
    assert found.cache.tokens == 11 + new - 1
    if new > 1:
        assert found.steps is not None
        assert found.steps.flops == 2 * steps
        assert found.steps.counted < 20
        entry = 2 * LAYERS * SHARED * HEAD * BYTES
        moved = sum(entry * (context + 1) for context in range(11, 11 + new - 1))
        assert found.traffic is not None
        assert found.steps.bytes_moved == (new - 1) * (found.traffic.weight_bytes + 2 * BYTES * WIDTH) + 2 * moved


def test_prefill_and_steps_are_the_forward_of_the_whole_text_with_the_pairs_that_the_mask_lets_through(
    made: Any,
) -> None:
    target = llama(made)
    whole = flopprof.load(target, seq=40).count(attention="causal")
    found = inference(target, mode="generate", prompt=13, new=28, attention="causal")
    assert whole.forward_flops == found.flops + 12 * 2 * TOP  # logits of the prompt's other positions


def test_a_window_bounds_the_cache_and_the_pairs_and_bends_the_line(made: Any) -> None:
    window, facts = 16, {**TEXT, "sliding_window": 16}
    target = made("mistral", "MistralForCausalLM", **facts)
    entry = 2 * LAYERS * SHARED * HEAD * BYTES
    for context in (14, 15, 40):
        step = inference(target, mode="decode", context=context)
        assert step.flops == 2 * (LINEAR + TOP) + attended(min(context + 1, window))
        (part,) = step.cache.parts
        assert part.kind == "sliding window"
        assert part.bytes == min(context, window - 1) * entry
        assert part.bytes_per_token == (entry if context < window - 1 else 0)
    found = inference(target, mode="generate", prompt=3, new=80)
    assert found.steps is not None
    assert found.steps.flops == sum(2 * (LINEAR + TOP) + attended(min(c + 1, window)) for c in range(3, 82))
    assert found.steps.counted < 40
    long = inference(target, mode="prefill", prompt=64)
    assert long.cache.bytes == (window - 1) * entry
    assert long.cache.allocated_bytes == 64 * entry  # the window is a view of the whole prompt's keys


def test_layers_of_both_kinds_are_told_apart(made: Any) -> None:
    kinds = ["sliding_attention", "full_attention"]
    facts = {**TEXT, "sliding_window": 16, "layer_types": kinds}
    step = inference(made("gemma2", "Gemma2ForCausalLM", **facts), mode="decode", context=40)
    entry = 2 * SHARED * HEAD * BYTES
    assert [(p.kind, p.bytes, p.bytes_per_token) for p in step.cache.parts] == [
        ("attention", 40 * entry, entry),
        ("sliding window", 15 * entry, 0),
    ]
    assert step.flops == 2 * (LINEAR + TOP) + attended(41 + 16) // LAYERS


def test_compressed_keys_and_values_are_called_latent(made: Any) -> None:
    rank, turned, plain, values = 16, 4, 8, 8
    step = inference(made("deepseek_v3", "DeepseekV3ForCausalLM", LATENT), mode="decode", context=21)
    entry = LAYERS * (rank + turned) * BYTES
    assert step.cache.latent_bytes in (None, 21 * entry)
    if step.cache.latent_bytes is None:
        (part,) = step.cache.parts
        assert (part.kind, part.bytes, part.bytes_per_token) == ("latent", 21 * entry, entry)
        query = WIDTH * HEADS * (plain + turned)
        down, up = WIDTH * (rank + turned), rank * HEADS * (plain + values)
        weights = query + down + HEADS * values * WIDTH + 3 * WIDTH * INNER
        pairs = 2 * HEADS * (plain + turned + values)
        assert step.flops == 2 * TOP + LAYERS * (2 * weights + 22 * (2 * up + pairs))


# --- experts ----------------------------------------------------------------------------------------
def test_experts_are_read_as_often_as_tokens_meet_them_on_average(made: Any) -> None:
    target = made("mixtral", "MixtralForCausalLM", **TEXT, num_local_experts=4, num_experts_per_tok=2)
    step = inference(target, mode="decode", context=9, batch=3)
    share = 3 * WIDTH * INNER
    router = WIDTH * 4
    dense = LINEAR - LAYERS * share + LAYERS * router
    assert step.flops == 3 * (2 * (dense + LAYERS * 2 * share + TOP) + attended(10))
    assert step.traffic is not None
    (routed,) = step.traffic.routed
    assert (routed.experts, routed.chosen, routed.bytes_each) == (4, 2, LAYERS * share * BYTES)
    assert routed.flops == 2 * LAYERS * 2 * share
    assert any("evenly" in note for note in step.notes)
    for tokens in (1, 2, 3):
        met = [
            len(set().union(*sets)) for sets in itertools.product(itertools.combinations(range(4), 2), repeat=tokens)
        ]
        assert routed.expected(tokens) == Fraction(sum(met), len(met)) * routed.bytes_each


# --- recurrent models -------------------------------------------------------------------------------
def test_a_recurrence_keeps_a_state_of_one_size(made: Any) -> None:
    facts = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4, "conv_kernel": 3, "vocab_size": WORDS}
    target = made("mamba", "MambaForCausalLM", **facts, expand=2, time_step_rank=2, dtype="float32")
    short, long = (inference(target, mode="decode", context=context) for context in (7, 5000))
    inside = 2 * WIDTH
    for step in (short, long):
        assert {part.kind: (part.bytes, part.bytes_per_token) for part in step.cache.parts} == {
            "convolution state": (LAYERS * inside * 3 * BYTES, 0),
            "state": (LAYERS * inside * 4 * BYTES, 0),
        }
    assert short.flops == long.flops
    assert short.traffic == long.traffic


@pytest.mark.parametrize("kind", ["jamba", "recurrent_gemma"])
def test_a_lengthened_cache_is_that_of_the_whole_prompt(made: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flopprof.models import hf_steps

    target = made(*TINY[kind])
    found = inference(target, mode="decode", context=70)
    monkeypatch.setattr(hf_steps, "_SHORT", (24, 10**9))
    whole = inference(target, mode="decode", context=70)
    assert found.cache.allocated_bytes is None  # it was not run
    assert found.cache.parts == whole.cache.parts
    assert (found.flops, found.traffic) == (whole.flops, whole.traffic)


@pytest.mark.parametrize("prompt", [30, 60])
def test_a_recurrent_prefill_reads_each_weight_once(made: Any, prompt: int) -> None:
    """Also where short prompts tell what a long one reads; the head is the embedding, which is looked up besides."""
    found = inference(made(*TINY["mamba"]), mode="prefill", prompt=prompt)
    rows = prompt * TINY["mamba"][2]["hidden_size"] * BYTES
    assert found.bytes_moved == found.weight_bytes + rows + found.cache.bytes


# --- encoder-decoders -------------------------------------------------------------------------------
def test_an_encoder_decoder_keeps_both_caches(made: Any) -> None:
    target = made("t5", "T5ForConditionalGeneration", **PAIR)
    inside, up = HEADS * HEAD, 2 * WIDTH * INNER
    entry = 2 * LAYERS * inside * BYTES
    for source, context in ((9, 6), (25, 1)):
        step = inference(target, mode="decode", context=context, seq=source)
        assert {part.kind: (part.bytes, part.bytes_per_token) for part in step.cache.parts} == {
            "attention": (context * entry, entry),
            "cross-attention": (source * entry, 0),
        }
        own = 4 * WIDTH * inside + 2 * WIDTH * inside + up  # the encoder's keys and values are made once
        assert step.flops == 2 * (LAYERS * own + TOP) + attended(context + 1 + source)
    prefill = inference(target, mode="prefill", prompt=9)
    encoder = 9 * 2 * LAYERS * (4 * WIDTH * inside + up) + attended(81)
    first = 2 * (LAYERS * (6 * WIDTH * inside + up) + TOP) + 9 * 2 * LAYERS * 2 * WIDTH * inside + attended(1 + 9)
    assert prefill.flops == encoder + first
    found = inference(target, mode="generate", prompt=9, new=3)
    own = 6 * WIDTH * inside + up
    assert found.flops == prefill.flops + sum(2 * (LAYERS * own + TOP) + attended(c + 1 + 9) for c in (1, 2))
    assert found.cache.bytes == (3 + 9) * entry


def test_sound_is_heard_once(made: Any) -> None:
    target = made(*TINY["whisper"])
    step = inference(target, mode="decode", context=4)
    entry = 2 * LAYERS * WIDTH * BYTES
    parts = {part.kind: part.bytes for part in step.cache.parts}
    assert parts == {"attention": 4 * entry, "cross-attention": 30 * entry}
    assert step.prompt is None
    with pytest.raises(UsageError, match="reads no text"):
        inference(target, mode="prefill", prompt=4)


# --- every kind, on meta and on the CPU -------------------------------------------------------------
SAMPLE = {"mistral", "mixtral", "deepseek_v3", "mamba", "jamba", "recurrent_gemma", "t5", "whisper"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in SAMPLE else pytest.mark.nightly) for kind in TINY]
)
def test_meta_tells_what_a_run_on_real_numbers_does(made: Any, kind: str) -> None:
    target = made(*TINY[kind])
    sizes = {"context": 13, "batch": 2}
    meta, real = (inference(target, mode="decode", **sizes, device=device) for device in (None, "cpu"))
    assert (meta.device, real.device) == ("meta", "cpu")
    assert meta.flops == real.flops > 0
    assert meta.cache == real.cache
    assert meta.cache.bytes > 0
    assert meta.decode is not None
    assert not meta.decode.uncounted
    if not any("chosen" in note for note in meta.notes):  # real routers choose what they choose
        assert meta.traffic == real.traffic


@pytest.mark.nightly
@pytest.mark.parametrize("kind", TINY)
def test_a_prefill_on_meta_is_that_of_real_numbers(made: Any, kind: str) -> None:
    sizes = {} if kind == "whisper" else {"prompt": 13}
    meta, real = (inference(made(*TINY[kind]), mode="prefill", device=device, **sizes) for device in (None, "cpu"))
    assert meta.flops == real.flops
    assert meta.cache == real.cache


# --- what is refused, and what comes out ------------------------------------------------------------
def test_a_result_survives_its_json_and_is_called_by_the_name_of_its_package(made: Any) -> None:
    found = flopprof.inference(llama(made), mode="generate", prompt=5, new=3, flops_per_s=1e12, bytes_per_s=1e11)
    assert Inference.from_json(found.to_json()) == found
    with pytest.raises(UsageError, match="schema"):
        Inference.from_json(found.to_json().replace("flopprof.inference/1", "flopprof.inference/9"))


DIA: dict[str, Any] = {
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "delay_pattern": [0, 1, 2],
    "encoder_config": {
        **{name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "head_dim", "intermediate_size")},
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": WORDS,
        "max_position_embeddings": 64,
    },
    "decoder_config": {
        **{name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "head_dim", "intermediate_size")},
        "num_attention_heads": HEADS,
        "num_key_value_heads": SHARED,
        "vocab_size": 60,
        "num_channels": 3,
        "cross_num_attention_heads": HEADS,
        "cross_num_key_value_heads": HEADS,
        "cross_head_dim": HEAD,
        "cross_hidden_size": WIDTH,
        "max_position_embeddings": 64,
    },
}


@pytest.mark.nightly
def test_several_codes_may_stand_at_each_place(made: Any) -> None:
    """Dia's decoder adds up three codes a place, and keeps a cache only where the call says so."""
    source, context = 20, 9
    step = inference(made("dia", "DiaForConditionalGeneration", DIA), mode="decode", context=context, seq=source)
    own = WIDTH * HEAD * (2 * HEADS + 2 * SHARED) + 2 * WIDTH * HEADS * HEAD + 3 * WIDTH * INNER
    pairs = context + 1 + source
    assert step.flops == 2 * (LAYERS * own + WIDTH * 3 * 60) + attended(pairs)
    assert {part.kind: part.bytes for part in step.cache.parts} == {
        "attention": context * 2 * LAYERS * SHARED * HEAD * BYTES,
        "cross-attention": source * 2 * LAYERS * HEADS * HEAD * BYTES,
    }


@pytest.mark.nightly
def test_a_part_may_make_the_tokens(made: Any) -> None:
    """Kosmos-2 sees the picture once; then generate() hands over to its text model."""
    facts = {
        "dtype": "float32",
        "latent_query_num": 4,
        "text_config": {
            "vocab_size": WORDS,
            "embed_dim": WIDTH,
            "layers": LAYERS,
            "ffn_dim": INNER,
            "attention_heads": HEADS,
            "max_position_embeddings": 64,
        },
        "vision_config": {
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "image_size": 16,
            "patch_size": 8,
        },
    }
    step = inference(made("kosmos-2", "Kosmos2ForConditionalGeneration", facts), mode="decode", context=9)
    assert step.flops == 2 * (LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER) + TOP) + attended(10)
    assert step.cache.bytes == 9 * 2 * LAYERS * WIDTH * BYTES


def test_a_workload_is_left_as_it_was(made: Any) -> None:
    workload = flopprof.load(made(*TINY["recurrent_gemma"]))
    before = {name: dict(vars(module)) for name, module in workload.model.named_modules()}
    inference(workload, mode="decode", context=5)
    assert {name: dict(vars(module)) for name, module in workload.model.named_modules()} == before
    assert all(parameter.grad is None for parameter in workload.model.parameters())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mode": "decode", "context": 64}, "65 tokens are more than the model's 64 learned positions"),
        ({"mode": "prefill", "prompt": 65}, "65 tokens are more than"),
        ({"mode": "generate", "prompt": 60, "new": 6}, "65 tokens are more than"),
        ({"mode": "decode", "prompt": 4}, "takes --context"),
        ({"mode": "decode", "seq": 4}, "takes --context"),
        ({"mode": "prefill", "context": 4}, "--mode prefill takes --prompt"),
        ({"mode": "prefill", "prompt": 4, "seq": 4}, "leave one of them out"),
        ({"mode": "prefill", "new": 4}, "--new is for --mode generate"),
        ({"mode": "generate"}, "needs --new"),
        ({"mode": "generate", "new": 0}, "--new is 0"),
        ({"mode": "decode", "batch": 0}, "--batch is 0"),
        ({"mode": "encode"}, "none of prefill, decode, generate"),
        ({"mode": "decode", "flops_per_s": 1e12}, "both flops_per_s and bytes_per_s"),
        ({"mode": "decode", "hardware": "H100", "flops_per_s": 1e12}, "leave one of them out"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(made: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        inference(made(*TINY["gpt2"]), **arguments)


def test_positions_are_used_to_the_last(made: Any) -> None:
    target = made(*TINY["gpt2"])
    entry = 2 * 2 * 32 * BYTES
    assert inference(target, mode="decode", context=63).cache.bytes == 63 * entry
    assert inference(target, mode="prefill", prompt=64).cache.bytes == 64 * entry
    assert inference(target, mode="generate", prompt=60, new=5).cache.bytes == 64 * entry
    assert inference(target, mode="decode").context == 63


def test_models_that_generate_nothing_are_refused(made: Any) -> None:
    bert = made("bert", "BertForMaskedLM", hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(UsageError, match="generates no text"):
        inference(bert, mode="decode")
    with pytest.raises(UsageError, match="Hugging Face models"):
        inference("resnet18", mode="decode")
    cacheless = made("openai-gpt", "OpenAIGPTLMHeadModel", n_embd=32, n_layer=1, n_head=4)
    with pytest.raises(UsageError, match="keeps no cache"):
        inference(cacheless, mode="decode", context=4)


def test_what_is_not_proportional_to_the_batch_is_said(made: Any) -> None:
    """rwkv of this release mixes each token with every sequence's state: its work grows with the batch's square."""
    target = made("rwkv", "RwkvForCausalLM", hidden_size=32, num_hidden_layers=1, vocab_size=WORDS, context_length=64)
    one, two = (inference(target, mode="decode", context=5, batch=batch) for batch in (1, 2))
    if two.flops == 2 * one.flops:
        pytest.skip("this release of transformers runs it for each sequence")
    assert two.traffic is None
    assert any("not proportional" in note for note in two.notes)
    with pytest.raises(UsageError, match="cannot be summed up"):
        inference(target, mode="generate", prompt=4, new=4, batch=2)


@pytest.mark.nightly
def test_the_largest_models_take_seconds() -> None:
    found = inference("llama-3.1-405b", mode="decode", context=8192)
    width, layers, heads, shared, inner, words = 16384, 126, 128, 8, 53248, 128256
    each = width * (2 * width + 2 * shared * 128) + 3 * width * inner
    assert found.flops == 2 * (layers * each + width * words) + 4 * layers * heads * 128 * 8193
    assert found.cache.bytes_per_token == 2 * layers * shared * 128 * 2
