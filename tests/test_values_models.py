"""Models that ask tensors questions count on meta as they do on the CPU, module by module; or refuse to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flopprof import count, load
from flopprof.counting.guesses import EVEN
from flopprof.errors import ModelFailed, ValuesUnknown
from flopprof.profile import Profile

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs


def by_module(profile: Profile) -> dict[str, dict[str, int]]:
    return {phase: profile.by_module(phase) for phase in ("forward", "backward")}


TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60,
    "pad_token_id": 0,
}  # fmt: skip
PAIR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
ROUTED = {**TEXT, "num_key_value_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def ids(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 50, (batch, length))


def seen_and_read() -> dict[str, torch.Tensor]:
    tokens = ids(1, 24)
    tokens[0, 0], tokens[0, 1:5], tokens[0, 5] = 54, 55, 56
    return {
        "input_ids": tokens,
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (tokens == 55).int(),
    }


VISION = {
    "depth": 2, "hidden_size": 32, "embed_dim": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "in_channels": 3, "mlp_ratio": 2,
}  # fmt: skip

# configuration name, class, settings, inputs; whether their routing is guessed, or their ids
MODELS: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, torch.Tensor]]]] = {
    "bart": ("bart", "AutoModelForSeq2SeqLM", PAIR, lambda: {"input_ids": ids()}),
    "pegasus": ("pegasus", "AutoModelForSeq2SeqLM", PAIR, lambda: {"input_ids": ids(), "decoder_input_ids": ids(2, 5)}),
    "deberta": ("deberta-v2", "AutoModel", TEXT, lambda: {"input_ids": ids()}),
    "longformer": ("longformer", "AutoModel", {**TEXT, "attention_window": 4}, lambda: {"input_ids": ids()}),
    "big_bird": (
        "big_bird", "AutoModel", {**TEXT, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 2},
        lambda: {"input_ids": ids(2, 64)},
    ),
    "nystromformer": ("nystromformer", "AutoModel", TEXT, lambda: {"input_ids": ids(2, 64)}),
    "mra": ("mra", "AutoModel", TEXT, lambda: {"input_ids": ids(2, 64)}),
    "roformer": ("roformer", "AutoModel", TEXT, lambda: {"input_ids": ids()}),
    "masked bert": (
        "bert", "AutoModel", TEXT, lambda: {"input_ids": ids(), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    ),
    "jetmoe": ("jetmoe", "AutoModelForCausalLM", {**ROUTED, "num_local_experts": 4}, lambda: {"input_ids": ids()}),
    "mixtral": ("mixtral", "AutoModelForCausalLM", {**ROUTED, "num_local_experts": 4}, lambda: {"input_ids": ids()}),
    "gpt-oss": (
        "gpt_oss", "AutoModelForCausalLM", {**ROUTED, "num_local_experts": 4, "head_dim": 8},
        lambda: {"input_ids": ids()},
    ),
    "qwen2-vl": (
        "qwen2_vl", "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **TEXT, "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": VISION, "image_token_id": 55, "vision_start_token_id": 54, "vision_end_token_id": 56,
            "video_token_id": 57,
        },
        seen_and_read,
    ),
}  # fmt: skip
EAGER = ("mixtral", "gpt-oss")
ROUTERS = ("jetmoe", *EAGER)


def built(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    transformers = pytest.importorskip("transformers")
    kind, cls, settings, inputs = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy(settings))
    make = getattr(transformers, cls)
    make = make.from_config if cls.startswith("Auto") else make._from_config
    torch.manual_seed(0)
    model = make(config, **({"experts_implementation": "eager"} if name in EAGER else {}))
    return model.eval(), inputs()


@pytest.mark.parametrize("name", MODELS)
def test_models_that_ask_count_on_meta_as_on_the_cpu(name: str) -> None:
    model, inputs = built(name)
    on_cpu = count(model, **inputs, backward=True)
    model.to("meta")
    given = count(model, **inputs, backward=True)  # inputs on the CPU: their values are carried
    assert by_module(given) == by_module(on_cpu)
    assert on_cpu.backward_flops > 0
    assert given.assumptions == ((EVEN,) if name in ROUTERS else ())
    assert len(given.uncounted) == len(on_cpu.uncounted) == 0
    if name != "qwen2-vl":
        guessed = count(model, **{key: value.to("meta") for key, value in inputs.items()}, backward=True)
        assert by_module(guessed) == by_module(on_cpu)


def test_sizes_asked_of_meta_inputs_are_refused() -> None:
    model, inputs = built("qwen2-vl")
    with pytest.raises(ValuesUnknown):
        count(model.to("meta"), **{key: value.to("meta") for key, value in inputs.items()})


def test_detection_does_not_run_on_guesses() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ModelFailed, match="values that the meta device does not have"):
        load("ssdlite320_mobilenet_v3_large", device="meta").count()
    assert load("ssdlite320_mobilenet_v3_large").count().device == "cpu"
