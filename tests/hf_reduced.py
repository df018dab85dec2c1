"""Default configurations of transformers with fewer layers: as few as still hold every kind of layer there is.

Some defaults contradict themselves, so that no device runs them (an image encoder that ends wider than the text, turns
of more pairs than a head has): `consistent` changes one of the two fields, and nothing else.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

# `num_hidden_layers`, `encoder_layers`, `n_layer`, `depth`: a stack. `depths`, `encoder_layers` as a list: of stages.
_STACK = re.compile(
    r"^(num_|n_)?((text|vision|audio|semantic|acoustic|hidden|encoder|decoder|attention|conv|transformer|dit|query|"
    r"memory|mask|language|cross|speech|prompt|codec|flow)_)*(layers?|depth|blocks?)$"
)
_STAGES = re.compile(r"(^|_)(layers|depths|blocks)$")
_PERIOD = re.compile(r"period|interval|offset|frequency|every|_step$|first_k_dense_replace|pattern|_freq$")
_WIDTH = re.compile(
    r"(^|_)(hidden|intermediate|embed|embedding|ffn|model|head|inner|mlp|projection|proj|lora|state|key|value|output|"
    r"bottleneck|decoder|encoder|conv|attention|out_hidden)_(size|sizes|dim|dims|channels|rank)$"
    r"|^(d_model|d_ff|d_kv|d_inner|n_embd|n_inner|dim|hidden_sizes|embed_dims|(encoder|decoder)_ffn_dim|mrope_section|"
    r"conv_dim|rotary_dim|kv_lora_rank|q_lora_rank|qk_(rope|nope)_head_dim|v_head_dim|moe_intermediate_size)$"
)
_FEW = 2
_DEEP = 6  # stacks of so many are left as they are: stages are counted by the same names
_LONGEST_PERIOD = 12


def reduced(config: Any) -> Iterator[dict[str, Any]]:
    """The fields of its config.json with few layers; then made to agree; then as they are, for whom few are too few."""
    facts = config.to_dict()
    fewer = _cut(facts, _needed(config))
    tried = [fewer]
    yield fewer
    for other in (consistent(fewer), facts):
        if other not in tried:
            tried.append(other)
            yield other


def consistent(facts: dict[str, Any]) -> dict[str, Any]:
    """The same where no field contradicts another: of those known to, the one that says less is changed."""
    made = copy.deepcopy(facts)
    text = made.get("text_config") if isinstance(made.get("text_config"), dict) else made
    assert text is not None
    vision = made.get("vision_config")
    width = text.get("hidden_size")
    if isinstance(vision, dict) and isinstance(width, int):
        inner = "embed_dim" in vision and "out_hidden_size" not in vision
        ends = "hidden_size" if inner else "out_hidden_size"
        if isinstance(vision.get(ends), int):  # the encoder ends as wide as the text
            vision[ends] = width
    tokens = made.get("mm_tokens_per_image")
    if isinstance(tokens, int) and isinstance(vision, dict):  # no more than there are patches
        side = vision.get("image_size", 224) // vision.get("patch_size", 16)
        made["mm_tokens_per_image"] = min(tokens, (side // 2) ** 2)
    for name in ("scale_factor", "pixel_shuffle_factor"):
        if type(made.get(name)) is int and isinstance(vision, dict):  # squares of patches become one
            side = vision.get("image_size", 224) // vision.get("patch_size", 16)
            made[name] = next(factor for factor in range(made[name], 0, -1) if side % factor == 0)
    for part in (made, text):
        turns = part.get("rope_parameters")
        if isinstance(turns, dict):  # as many turns as the sections hold
            heads = part.get("num_attention_heads") or 1
            wide = part.get("head_dim") or part.get("hidden_size", 0) // heads
            sections = turns.get("mrope_section") or [8, 12, 12]
            part["head_dim"] = wide = max(wide, 2 * sum(sections))
            turns["partial_rotary_factor"] = part["partial_rotary_factor"] = 2 * sum(sections) / wide
        if type(part.get("moe_intermediate_size")) is int:  # grouped products take rows of 16 bytes
            part["moe_intermediate_size"] = -(-part["moe_intermediate_size"] // 16) * 16
        if "num_experts_per_tok" in part and part["num_experts_per_tok"] is None:
            part["num_experts_per_tok"] = 2
    words = text.get("vocab_size")
    for name in ("image_token_index", "image_token_id"):
        if isinstance(words, int) and name in made and made[name] is None:
            made[name] = words - 1
    return made


def _needed(config: Any) -> int:
    """Layers that hold every kind: all of those listed, and one whole period of those that take turns."""
    needed = _FEW
    for part in parts(config):
        facts = part.to_dict()
        for name, value in facts.items():
            if isinstance(name, str) and _PERIOD.search(name) and type(value) is int and value < _LONGEST_PERIOD:
                needed = max(needed, value + 1)
        for name in (*facts, "layer_types", "layers_block_type"):
            value = getattr(part, str(name), None)
            if isinstance(value, list) and value and all(isinstance(item, str | bool) for item in value):
                needed = max(needed, max(value.index(kind) for kind in set(value)) + 1)
    return needed


def parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from parts(value)


def _cut(facts: Any, depth: int) -> Any:
    """The same with stacks of at most `depth` layers, and what is listed for each layer as long."""
    if isinstance(facts, list):
        return [_cut(item, depth) for item in facts]
    if not isinstance(facts, dict):
        return facts
    deep = {
        name: value
        for name, value in facts.items()
        if isinstance(name, str) and _STACK.search(name) and type(value) is int and value > max(depth, _DEEP)
    }
    made = {}
    for name, value in facts.items():
        if name in deep:
            made[name] = depth
        elif isinstance(value, list) and value and all(type(item) is int for item in value) and _STAGES.search(name):
            made[name] = [min(item, _FEW) for item in value]
        elif isinstance(value, list) and len(value) in deep.values():
            made[name] = value[:depth]
        else:
            made[name] = _cut(value, depth)
    return made


def narrowed(facts: Any, by: int) -> Any:
    """The same with widths divided: of layers, heads and embeddings, not of pictures, patches, windows or kernels."""
    if isinstance(facts, list):
        return [narrowed(item, by) for item in facts]
    if not isinstance(facts, dict):
        return facts
    made = {}
    for name, value in facts.items():
        if isinstance(name, str) and _WIDTH.search(name):
            made[name] = _divided(value, by)
        else:
            made[name] = narrowed(value, by)
    return made


def _divided(value: Any, by: int) -> Any:
    if isinstance(value, list):
        return [_divided(item, by) for item in value]
    return value // by if type(value) is int and value >= by and value % by == 0 else value
