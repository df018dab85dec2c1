"""The sizes of a transformer, read from a Hugging Face config: the same thing has many names there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flopprof.analytic.families import KNOWN, LEARNED_POSITIONS, TWO_TABLES, WITH_HEAD_TRANSFORM

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim", "model_dim")
_FEED_FORWARD = (
    *("intermediate_size", "ffn_hidden_size", "n_inner", "d_ff", "decoder_ffn_dim", "ffn_dim", "encoder_ffn_dim"),
    "hidden_dim",
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_VISITED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
_EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size")

# Families whose feed-forward has a gate although their config names neither such an activation nor an RMS norm.
_GATED = {"cohere", "cohere2", "modernbert", "olmo", "stablelm", "nomic_bert"}
# Families with an RMS norm or such an activation and two matrices nevertheless.
_NOT_GATED = {"nemotron", "persimmon", "arcee", "phi", "starcoder2", "mamba", "mamba2"}
_GATED_ACTIVATIONS = {"silu", "swish", "swiglu", "geglu", "reglu"}
# What a config has where positions are computed and not looked up.
_COMPUTED_POSITIONS = ("rope_theta", "rope_parameters", "rope_scaling", "rotary_pct", "rotary_dim", "alibi",
                       "relative_attention_num_buckets")  # fmt: skip
_COMPUTED_POSITION_FAMILIES = (KNOWN - LEARNED_POSITIONS) | {"m2m_100", "modernbert", "nomic_bert"}


def sizes_of(config: Any, *, counted: bool = False) -> dict[str, Any]:
    """Fields of a TransformerShape, all but `seq`. Raises ValueError, naming what the config does not say.

    counted: the number of parameters is known otherwise, so that the sizes need not tell it.
    """
    facts = _facts(config)
    family = facts.get("model_type") or None
    both = bool(facts.get("is_encoder_decoder"))
    d_model, heads = _first(facts, "hidden size", *_WIDTH), _first(facts, "number of attention heads", *_HEADS)
    decoder = ("num_decoder_layers", "decoder_layers") if both else ()
    layers = _first(facts, "number of layers", *decoder, *_LAYERS)
    found = {
        "layers": layers,
        "d_model": d_model,
        "heads": heads,
        "vocab": _first(facts, "vocabulary size", "vocab_size"),
        "kv_heads": _kv_heads(facts),
        "d_ff": _maybe(facts, *_FEED_FORWARD),
        "gated": _gated(facts),
        "tied": bool(facts.get("tie_word_embeddings", True)),
        "positions": _learned_positions(facts),
        "d_embedding": _maybe(facts, "embedding_size", "word_embed_proj_dim"),
        "encoder_layers": _first(facts, "number of encoder layers", "encoder_layers", *_LAYERS) if both else 0,
        **_attention(facts, d_model, heads),
    }
    if not counted and family not in KNOWN | WITH_HEAD_TRANSFORM | TWO_TABLES.keys() | {None, "m2m_100"}:
        raise ValueError(
            f"the parameters of a {family} model do not follow from its config: give n_params= too, or the sizes "
            "themselves, TransformerShape(...)."
        )
    if family in WITH_HEAD_TRANSFORM:
        found["other_parameters"] = d_model * (d_model + _maybe(facts, "type_vocab_size"))
    return {**found, **_experts(facts, layers)}


def _facts(config: Any) -> Mapping[str, Any]:
    inner = config.get("text_config") if isinstance(config, Mapping) else getattr(config, "text_config", None)
    if inner is not None:
        return _facts(inner)
    if isinstance(config, Mapping):
        return _flat(config)
    if not hasattr(config, "to_dict"):
        raise ValueError(f"{type(config).__name__} is no Hugging Face config: it has no to_dict().")
    return _flat(config.to_dict())


def _flat(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the sizes of attention and feed-forward that some families keep in a config of their own."""
    parts = [facts.get(name) for name in ("attn_config", "ffn_config")]
    return {**{key: value for part in parts if isinstance(part, Mapping) for key, value in part.items()}, **facts}


def _first(facts: Mapping[str, Any], what: str, *names: str) -> int:
    value = _maybe(facts, *names)
    if not value:
        raise ValueError(f"the config of a {facts.get('model_type', 'model')} says no {what} ({', '.join(names)}).")
    return value


def _maybe(facts: Mapping[str, Any], *names: str) -> int:
    """The first of these that is a number; 0 where none is. Of a number per layer, they must be equal."""
    for name in names:
        value = facts.get(name)
        if isinstance(value, list | tuple) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0


def _kv_heads(facts: Mapping[str, Any]) -> int:
    if facts.get("multi_query") and not facts.get("new_decoder_architecture"):
        return 1
    return _maybe(facts, "num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")


def _gated(facts: Mapping[str, Any]) -> bool:
    if "is_gated_act" in facts:
        return bool(facts["is_gated_act"])
    if "gated" in str(facts.get("feed_forward_proj", "")):
        return True
    family = facts.get("model_type")
    if family in _GATED or family in _NOT_GATED:
        return family in _GATED
    return facts.get("hidden_act") in _GATED_ACTIVATIONS or "rms_norm_eps" in facts


def _learned_positions(facts: Mapping[str, Any]) -> int:
    computed = any(facts.get(name) not in (None, False) for name in _COMPUTED_POSITIONS)
    relative = facts.get("position_embedding_type", "absolute") != "absolute"
    if computed or relative or facts.get("model_type") in _COMPUTED_POSITION_FAMILIES:
        return 0
    positions = _maybe(facts, "n_positions", "max_position_embeddings")
    others = TWO_TABLES.get(str(facts.get("model_type")))
    return positions if others is None else 2 * (positions + others)


def _attention(facts: Mapping[str, Any], d_model: int, heads: int) -> dict[str, Any]:
    latent = _maybe(facts, "kv_lora_rank")
    if not latent:
        return {"d_head": _maybe(facts, "head_dim", "d_kv", "kv_channels")}
    # Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values through a bottleneck.
    turned, plain, value = (_maybe(facts, f"{part}_head_dim") for part in ("qk_rope", "qk_nope", "v"))
    query = _maybe(facts, "q_lora_rank")
    wide = heads * (turned + plain)
    parameters = query * (d_model + wide) if query else d_model * wide
    parameters += d_model * (latent + turned) + latent * heads * (plain + value) + heads * value * d_model
    return {"d_head": turned + plain, "d_head_value": value, "attention_parameters": parameters}


def _experts(facts: Mapping[str, Any], layers: int) -> dict[str, Any]:
    experts = _maybe(facts, *_EXPERTS)
    if not experts:
        return {}
    width = _maybe(facts, *_EXPERT_WIDTH)
    shared = _maybe(facts, "n_shared_experts", "num_shared_experts")
    shared_width = _maybe(facts, "shared_expert_intermediate_size")
    if shared_width and width and not shared:
        shared = shared_width // width
    dense = _maybe(facts, "first_k_dense_replace")
    step = _maybe(facts, "decoder_sparse_step", "interleave_moe_layer_step")
    if step > 1:  # every step-th layer has experts
        dense = layers - layers // step
    only = facts.get("mlp_only_layers")
    if isinstance(only, list) and only:
        dense = len(only)
    found = {}
    if facts.get("model_type") == "llama4_text":  # one shared expert, unmentioned; intermediate_size is the experts'
        shared, width = 1, _maybe(facts, "intermediate_size")
        found["d_ff"] = _maybe(facts, "intermediate_size_mlp")
    return {
        **found,
        "experts": experts,
        "experts_per_token": _first(facts, "number of experts per token", *_VISITED),
        "shared_experts": shared,
        "d_ff_expert": width,
        "dense_layers": dense,
    }
