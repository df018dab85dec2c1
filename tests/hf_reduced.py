"""Default configurations of transformers with fewer layers: as few as still hold every kind of layer there is.

Some defaults contradict themselves, so that no device runs them (an image encoder that ends wider than the text, turns
of more pairs than a head has): `consistent` changes one of the two fields, and nothing else.
"""

from __future__ import annotations

import copy
import itertools
import math
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
    r"conv_dim|rotary_dim|kv_lora_rank|q_lora_rank|qk_(rope|nope)_head_dim|v_head_dim|moe_intermediate_size|"
    r"hidden_size_per_layer_input)$"
)
_HEADS = re.compile(r"(^|_)heads$|^n_head$")
_OF_A_HEAD = re.compile(r"(^|_)(head|key|value|rope|state|rotary|conv)_(size|dim)$|^d_kv$|rank$|section$")
_EXPERTS = re.compile(r"(^|_)experts$")
_CHOSEN = re.compile(r"experts_per_tok(en)?$|top_?k(_experts)?$")
_NO_WIDTH = re.compile(r"vocab|position|token|image|length|window|seconds|_ids?$|max_|min_|chunk|num_")
_WIDE = 256  # smaller numbers are often others
_SIDES = (400, 160, 10_000)  # of pictures; a whole one at last
_FEW = 2
_DEEP = 6  # stacks of so many are left as they are: stages are counted by the same names
_LONGEST_PERIOD = 12
_SHARING = "num_kv_shared_layers"  # the last ones take keys and values of earlier ones
_MOST_STAGES = 8  # more are layers
_SHORT_NAME = 6


def reduced(config: Any) -> Iterator[dict[str, Any]]:
    """The fields of its config.json with few layers; then made to agree; then as they are, for whom few are too few."""
    facts = config.to_dict()
    fewer = _cut(facts, _needed(config))
    tried: list[dict[str, Any]] = []
    for make in (lambda: fewer, lambda: consistent(fewer), lambda: facts, lambda: consistent(facts)):
        made = make()
        if made not in tried:
            tried.append(made)
            yield made


def consistent(facts: dict[str, Any]) -> dict[str, Any]:
    """The same where no field contradicts another: of those known to, the one that says less is changed."""
    made = copy.deepcopy(facts)
    for part in _dicts(made):
        _spelt(part)
        _as_wide(part)
        _as_heard(part)
        _as_many_patches(part)
        _all_stages(part)
        _filled(part)
    for part in (made, _text(made)):
        _turned(part, seen="vision_config" in made or str(made.get("model_type")).endswith("_text"))
    return made


def _dicts(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those of a configuration and of the ones inside it."""
    yield facts
    for name, value in facts.items():
        if isinstance(value, dict) and name.endswith(("config", "encoder", "decoder")):
            yield from _dicts(value)


def _text(facts: dict[str, Any]) -> dict[str, Any]:
    text = facts.get("text_config")
    return text if isinstance(text, dict) else facts


def _spelt(facts: dict[str, Any]) -> None:
    """A name that was given beside the one that it was meant for, a letter away."""
    words = [name for name, value in facts.items() if isinstance(value, str) and len(name) > _SHORT_NAME]
    for right, wrong in itertools.permutations(words, 2):
        letters = [pair for pair in zip(right, wrong, strict=False) if pair[0] != pair[1]]
        if len(right) == len(wrong) and len(letters) == 1 and words.index(right) < words.index(wrong):
            facts[right] = facts.pop(wrong)


def _as_wide(facts: dict[str, Any]) -> None:
    """The encoder of pictures ends as wide as the text, or as what its adapter makes of it."""
    text, vision = _text(facts), facts.get("vision_config")
    width = text.get("hidden_size")
    if not isinstance(vision, dict):
        return
    inner = "embed_dim" in vision and "out_hidden_size" not in vision
    ends = "hidden_size" if inner else "out_hidden_size"
    if isinstance(width, int) and isinstance(vision.get(ends), int):
        vision[ends] = width
    ratio = vision.get("pixel_shuffle_ratio")
    if isinstance(ratio, float) and isinstance(vision.get("intermediate_size"), int):  # what is joined is its width
        vision["hidden_size"] = int(vision["intermediate_size"] * ratio**2)
    if "projector_output_dim" in vision and "vision_output_dim" in vision:
        vision["vision_output_dim"] = vision["projector_output_dim"]


def _as_heard(facts: dict[str, Any]) -> None:
    """The encoder of sound ends as wide as the text, and what reads an encoder reads as much as that gives."""
    width, sound, encoder = _text(facts).get("hidden_size"), facts.get("audio_config"), facts.get("encoder_config")
    if isinstance(sound, dict) and isinstance(width, int) and type(sound.get("output_dim")) is int:
        sound["output_dim"] = width
    if isinstance(encoder, dict) and type(encoder.get("hidden_dim")) is int:
        for reader in facts.values():
            if isinstance(reader, dict) and "encoder_hidden_size" in reader:
                reader["encoder_hidden_size"] = encoder["hidden_dim"]


def _as_many_patches(facts: dict[str, Any]) -> None:
    """Patches are joined to no more tokens than there are, in squares that they fill."""
    vision = facts.get("vision_config")
    if not isinstance(vision, dict):
        return
    size, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
    if not isinstance(size, int) or not isinstance(patch, int):
        return
    side = size // patch
    tokens = facts.get("mm_tokens_per_image")
    if isinstance(tokens, int):
        facts["mm_tokens_per_image"] = min(tokens, (side // 2) ** 2)
    for name in ("scale_factor", "pixel_shuffle_factor"):
        if type(facts.get(name)) is int:
            facts[name] = next(factor for factor in range(facts[name], 0, -1) if side % factor == 0)


def _all_stages(facts: dict[str, Any]) -> None:
    """A backbone gives all of its stages, as wide as they are, where what reads it counts on several."""
    backbone = facts.get("backbone_config")
    if not isinstance(backbone, dict) or "stage_names" not in backbone:
        return
    stages = backbone["stage_names"][1:]
    if len(stages) < _MOST_STAGES:
        backbone["out_features"], backbone["out_indices"] = stages, [*range(1, len(stages) + 1)]
    wide = backbone.get("stage_out_channels")
    for name, value in facts.items():
        if name.endswith("_channels") and isinstance(value, list | tuple) and isinstance(wide, list):
            facts[name] = wide if len(value) == len(wide) else value


def _filled(facts: dict[str, Any]) -> None:
    """What must be given, and is not."""
    if isinstance(facts.get("projector_scale_factors"), list | tuple):  # at least one level
        facts["projector_scale_factors"] = [*facts["projector_scale_factors"]] or [1.0]
        facts["num_feature_levels"] = len(facts["projector_scale_factors"])
    if "sliding_window" in facts and facts["sliding_window"] is None:  # as far as the text reaches
        facts["sliding_window"] = facts.get("max_position_embeddings")
    if type(facts.get("moe_intermediate_size")) is int:  # grouped products take rows of 16 bytes
        facts["moe_intermediate_size"] = -(-facts["moe_intermediate_size"] // 16) * 16
    if "num_experts_per_tok" in facts and facts["num_experts_per_tok"] is None:
        facts["num_experts_per_tok"] = 2
    words = _text(facts).get("vocab_size")
    for name in ("image_token_index", "image_token_id", "video_token_index"):
        if isinstance(words, int) and name in facts and (facts[name] is None or facts[name] >= words):
            facts[name] = words - 1


def _turned(facts: dict[str, Any], *, seen: bool) -> None:
    """Heads have as many turns as the sections hold, also where a model that sees, or its text, assumes some."""
    turns = facts.get("rope_parameters")
    if not isinstance(turns, dict) or any(isinstance(value, dict) for value in turns.values()):  # one for each kind
        return
    if not seen and "mrope_section" not in turns:
        return
    heads = facts.get("num_attention_heads") or 1
    wide = facts.get("head_dim") or facts.get("hidden_size", 0) // heads
    sections = turns.get("mrope_section") or [8, 12, 12]
    facts["head_dim"] = wide = max(wide + wide % 2, 2 * sum(sections))
    turns["partial_rotary_factor"] = facts["partial_rotary_factor"] = 2 * sum(sections) / wide


def _needed(config: Any) -> int:
    """Layers that hold every kind: all of those listed, and one whole period of those that take turns."""
    needed = _FEW
    for part in parts(config):
        facts = part.to_dict()
        for name, value in facts.items():
            if isinstance(name, str) and _PERIOD.search(name) and type(value) is int and value < _LONGEST_PERIOD:
                needed = max(needed, value + 1)
        for value in (*facts.values(), *(getattr(part, name, None) for name in ("layer_types", "layers_block_type"))):
            if isinstance(value, list) and value and all(isinstance(item, str | bool) for item in value):
                needed = max(needed, max(value.index(kind) for kind in set(value)) + 1)
    return 2 * needed if any(getattr(part, _SHARING, 0) for part in parts(config)) else needed


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
    made: dict[Any, Any] = {}
    for name, value in facts.items():
        if name in deep:
            made[name] = depth
        elif name == _SHARING and deep and value:
            made[name] = depth // 2
        elif name == "per_layer_config" and deep and isinstance(value, dict):
            made[name] = {layer: given for layer, given in value.items() if int(layer) < depth}
        elif isinstance(value, list) and value and all(type(item) is int for item in value) and _STAGES.search(name):
            made[name] = [min(item, _FEW) for item in value]
        elif isinstance(value, list) and len(value) in deep.values():
            made[name] = value[:depth]
        else:
            made[name] = _cut(value, depth)
    return made


def narrowings(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same, less wide: heads narrower, or fewer; or, where that is small enough, as wide as it was.

    Widths that must divide each other may not do so any more: the next may.
    """
    tried: list[dict[str, Any]] = []
    for side in _SIDES:
        few = _fewer(facts, side)
        for by, heads in ((8, False), (8, True), (1, False), (4, True), (4, False), (16, False), (2, True), (2, False)):
            made = narrowed(few, by, heads=heads)
            if made not in tried:
                tried.append(made)
                yield made


def narrowed(facts: Any, by: int, *, heads: bool = False) -> Any:
    """The same with widths divided: of layers, heads and embeddings, not of pictures, patches, windows or kernels.

    What is as large as a width is one, unless its name says otherwise. heads: there are fewer, each as wide as it was.
    """
    return _narrowed(facts, by, heads, set(_widths(facts)))


def _narrowed(facts: Any, by: int, heads: bool, widths: set[int]) -> Any:
    if isinstance(facts, list):
        return [_narrowed(item, by, heads, widths) for item in facts]
    if not isinstance(facts, dict) or "architecture" in facts:  # a model of timm's, of the width that it has there
        return facts
    made = {}
    for name, value in facts.items():
        wide = type(value) is int and value in widths and not _NO_WIDTH.search(str(name))
        if heads and _HEADS.search(str(name)) and type(value) is int and value > 0:
            made[name] = value // math.gcd(value, by)
        elif (wide or _WIDTH.search(str(name))) and not (heads and _OF_A_HEAD.search(str(name))):
            made[name] = _divided(value, by)
        else:
            made[name] = _narrowed(value, by, heads, widths)
    return made


def _widths(facts: Any) -> Iterator[int]:
    if isinstance(facts, dict):
        for name, value in facts.items():
            if _WIDTH.search(str(name)) and type(value) is int and value >= _WIDE:
                yield value
            yield from _widths(value)


def _fewer(facts: Any, side: int) -> Any:
    """The same with fewer experts, of which each token still leaves half, and pictures of at most this side."""
    if isinstance(facts, list):
        return [_fewer(item, side) for item in facts]
    if not isinstance(facts, dict):
        return facts
    chosen = max(
        (value for name, value in facts.items() if _CHOSEN.search(str(name)) and type(value) is int), default=1
    )
    groups = facts.get("n_group") or 1
    made = {}
    for name, value in facts.items():
        made[name] = _fewer(value, side)
        if type(value) is not int:
            continue
        if _EXPERTS.search(str(name)):
            least = max(4, 2 * chosen, 2 * groups)
            made[name] = next((n for n in (value // 16, value // 8, value // 4, value // 2) if n >= least), value)
        elif name == "image_size":
            while made[name] > side and made[name] % 2 == 0:
                made[name] //= 2
    return made


def _divided(value: Any, by: int) -> Any:
    if isinstance(value, list):
        return [_divided(item, by) for item in value]
    return value // by if type(value) is int and value >= by and value % by == 0 else value
