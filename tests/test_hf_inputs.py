"""Inputs made from a config: every family runs on them, and counts on meta what it counts on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flopprof import load
from flopprof.counting.guesses import UNEQUAL
from flopprof.errors import UsageError
from flopprof.models.workload import Workload

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEEN: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
PAIR: dict[str, Any] = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 100,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "forced_eos_token_id": 1,
    "max_position_embeddings": 64,
}
ROUTED: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_local_experts": 4,
}
WAVE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 32,
}
READ: dict[str, Any] = {**TEXT, "max_position_embeddings": 128}
TURNED: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
PATCHED: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "embed_dim": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "mlp_ratio": 2,
}
BACKBONE: dict[str, Any] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone_config": {
        "model_type": "resnet",
        "hidden_sizes": [8, 16, 16, 16],
        "depths": [1] * 4,
        "embedding_size": 8,
        "layer_type": "basic",
        "out_features": ["stage4"],
    },
}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", TEXT, {}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}, {}),
    "mixtral": ("MixtralForCausalLM", {**TEXT, **ROUTED}, {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**TEXT, **ROUTED}, {}),
    "gpt_oss": ("GptOssForCausalLM", {**TEXT, **ROUTED, "head_dim": 8}, {}),
    "bert": ("BertForMaskedLM", TEXT, {}),
    "roberta": ("RobertaForSequenceClassification", TEXT, {}),
    "deberta-v2": ("DebertaV2ForMaskedLM", TEXT, {}),
    "modernbert": ("ModernBertForMaskedLM", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}, {}),
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 4}, {}),
    "mamba2": (
        "Mamba2ForCausalLM",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "vocab_size": 100,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        {},
    ),
    "t5": ("T5ForConditionalGeneration", PAIR, {}),
    "bart": ("BartForConditionalGeneration", PAIR, {}),
    "bart:cls": ("BartForSequenceClassification", PAIR, {}),
    "marian": ("MarianMTModel", PAIR, {}),
    "vit": ("ViTForImageClassification", SEEN, {}),
    "vit:64": ("ViTForImageClassification", SEEN, {"image_size": 64}),
    "resnet": (
        "ResNetForImageClassification",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4, "embedding_size": 8, "layer_type": "basic"},
        {"image_size": 64},
    ),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2},
        {},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        {},
    ),
    "dinov2": ("Dinov2ForImageClassification", SEEN, {}),
    "videomae": ("VideoMAEForVideoClassification", {**SEEN, "num_frames": 4}, {}),
    "timesformer": ("TimesformerForVideoClassification", {**SEEN, "num_frames": 4}, {}),
    "vjepa2": (
        "VJEPA2Model",
        {
            **SEEN,
            "crop_size": 32,
            "frames_per_clip": 4,
            "pred_hidden_size": 32,
            "pred_num_attention_heads": 4,
            "pred_num_hidden_layers": 1,
        },
        {},
    ),
    "clip": (
        "CLIPModel",
        {"text_config": {**TEXT, "max_position_embeddings": 16}, "vision_config": SEEN, "projection_dim": 16},
        {},
    ),
    "siglip": ("SiglipModel", {"text_config": {**TEXT, "max_position_embeddings": 16}, "vision_config": SEEN}, {}),
    "siglip2": (
        "Siglip2ForImageClassification",
        {"text_config": {**TEXT, "max_position_embeddings": 16}, "vision_config": {**SEEN, "num_patches": 16}},
        {},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**PAIR, "num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 20},
        {},
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", WAVE, {"audio_seconds": 0.5}),
    "hubert": ("HubertForCTC", WAVE, {"audio_seconds": 0.5}),
    "wav2vec2-bert": (
        "Wav2Vec2BertForCTC",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "feature_projection_input_dim": 16,
            "vocab_size": 32,
        },
        {"audio_seconds": 1},
    ),
    "audio-spectrogram-transformer": ("ASTForAudioClassification", {**SEEN, "max_length": 64, "num_mel_bins": 16}, {}),
    "speech_to_text": (
        "Speech2TextForConditionalGeneration",
        {
            **PAIR,
            "input_feat_per_channel": 16,
            "input_channels": 1,
            "max_source_positions": 64,
            "max_target_positions": 32,
        },
        {"audio_seconds": 0.5, "seq": 16},
    ),
    "parakeet_ctc": (
        "ParakeetForCTC",
        {
            "encoder_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "num_mel_bins": 16,
                "subsampling_conv_channels": 8,
            }
        },
        {"audio_seconds": 1},
    ),
    "moonshine": (
        "MoonshineForConditionalGeneration",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "encoder_num_hidden_layers": 1,
            "decoder_num_hidden_layers": 1,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "vocab_size": 100,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {"audio_seconds": 0.5},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**READ, "model_type": "llama"},
            "vision_config": {**SEEN, "model_type": "clip_vision_model"},
            "image_token_index": 99,
        },
        {},
    ),
    "llava_next": (
        "LlavaNextForConditionalGeneration",
        {
            "text_config": {**READ, "model_type": "llama"},
            "vision_config": {**SEEN, "model_type": "clip_vision_model"},
            "image_token_index": 99,
            "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
        },
        {},
    ),
    "llava_onevision": (
        "LlavaOnevisionForConditionalGeneration",
        {
            "text_config": {**READ, "model_type": "qwen2"},
            "vision_config": {**SEEN, "model_type": "siglip_vision_model"},
            "image_token_index": 99,
            "video_token_index": 98,
            "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
        },
        {},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**TEXT, **TURNED},
            "vision_config": PATCHED,
            "image_token_id": 55,
            "vision_start_token_id": 54,
            "vision_end_token_id": 56,
            "video_token_id": 57,
        },
        {"image_size": 32},
    ),
    "qwen2_vl:2": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**TEXT, **TURNED},
            "vision_config": PATCHED,
            "image_token_id": 55,
            "vision_start_token_id": 54,
            "vision_end_token_id": 56,
            "video_token_id": 57,
        },
        {"image_size": 32, "images": 2, "batch": 2},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**TEXT, **TURNED},
            "vision_config": {
                **PATCHED,
                "out_hidden_size": 32,
                "intermediate_size": 48,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": 55,
            "vision_start_token_id": 54,
            "vision_end_token_id": 56,
            "video_token_id": 57,
        },
        {"image_size": 32},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**TEXT, **TURNED, "head_dim": 8},
            "vision_config": {
                **PATCHED,
                "out_hidden_size": 32,
                "intermediate_size": 48,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            "image_token_id": 55,
            "vision_start_token_id": 54,
            "vision_end_token_id": 56,
            "video_token_id": 57,
        },
        {"image_size": 32},
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        {
            "text_config": {**READ, "model_type": "llama"},
            "vision_config": SEEN,
            "image_token_id": 99,
            "scale_factor": 2,
        },
        {},
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        {
            "text_config": {**READ, "model_type": "llama"},
            "vision_config": SEEN,
            "image_token_id": 99,
            "scale_factor": 2,
        },
        {"images": 2},
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**READ, "model_type": "gemma", "head_dim": 8},
            "vision_config": {**SEEN, "model_type": "siglip_vision_model", "projection_dim": 32},
            "image_token_id": 99,
            "projection_dim": 32,
        },
        {},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**READ, "head_dim": 8},
            "vision_config": {**SEEN, "model_type": "siglip_vision_model"},
            "image_token_index": 99,
            "boi_token_index": 98,
            "eoi_token_index": 97,
            "mm_tokens_per_image": 4,
        },
        {},
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        {
            "text_config": {**READ, "model_type": "qwen2"},
            "vision_config": {**SEEN, "image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": 99,
            "downsample_ratio": 0.5,
        },
        {},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**READ, "model_type": "mistral", "head_dim": 8},
            "vision_config": {**SEEN, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": 99,
            "spatial_merge_size": 2,
        },
        {},
    ),
    "blip-2": (
        "Blip2ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
            "vision_config": SEEN,
            "qformer_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "encoder_hidden_size": 32,
            },
            "num_query_tokens": 4,
            "image_token_index": 99,
            "image_token_id": 99,
        },
        {},
    ),
    "aya_vision": (
        "AyaVisionForConditionalGeneration",
        {
            "text_config": {**READ, "model_type": "cohere2", "head_dim": 8},
            "vision_config": {**SEEN, "model_type": "siglip_vision_model"},
            "image_token_index": 99,
            "downsample_factor": 2,
        },
        {},
    ),
    "got_ocr2": (
        "GotOcr2ForConditionalGeneration",
        {
            "text_config": {**READ, "model_type": "qwen2"},
            "vision_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 4,
                "mlp_dim": 48,
                "window_size": 2,
                "global_attn_indexes": [0],
            },
            "image_token_index": 99,
        },
        {},
    ),
    "detr": ("DetrForObjectDetection", {**PAIR, **BACKBONE, "num_queries": 5}, {"image_size": 64}),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [16, 32, 32, 32],
            "depths": [1] * 4,
            "num_attention_heads": [1, 2, 2, 2],
            "decoder_hidden_size": 16,
        },
        {"image_size": 64},
    ),
    "sam": (
        "SamModel",
        {
            "vision_config": {
                "hidden_size": 32,
                "output_channels": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 16,
                "mlp_dim": 48,
                "window_size": 2,
                "global_attn_indexes": [1],
                "num_pos_feats": 16,
            },
            "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 16},
            "mask_decoder_config": {
                "hidden_size": 32,
                "mlp_dim": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "iou_head_hidden_dim": 16,
            },
        },
        {},
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        {
            "text_config": {
                **READ,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision_config": {
                "hidden_size": 32,
                "attention_heads": 4,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "intermediate_size": 48,
                "vision_output_dim": 64,
                "image_size": 32,
                "patch_size": 8,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": 99,
        },
        {},
    ),
}

# These look at their pixels to tell real pictures from padding: without values none is taken to be blank.
LOOKING = ("idefics3", "smolvlm")
ROUTERS = ("mixtral", "qwen3_moe", "gpt_oss")


def written(name: str, folder: Path) -> str:
    cls, settings, _ = FAMILIES[name]
    config = transformers.AutoConfig.for_model(name.partition(":")[0], **settings)
    config.architectures = [cls]
    config.save_pretrained(folder)
    return str(folder)


def loaded(name: str, folder: Path, **sizes: Any) -> Workload:
    return load(written(name, folder), **{**FAMILIES[name][2], **sizes})


def short(name: str) -> dict[str, Any]:
    """Texts of few tokens where the family reads any; what pictures take is left to it."""
    cls, settings, sizes = FAMILIES[name]
    reads = "vocab_size" in settings and "conv_dim" not in settings and "seq" not in sizes and cls.find("ForCTC") < 0
    return {"seq": 12} if reads else {}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_counts_on_meta_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    workload = loaded(name, tmp_path, **short(name))
    assert workload.device == "meta"
    profile = workload.count(backward=True)
    real = loaded(name, tmp_path, device="cpu", **short(name)).count(backward=True)
    assert profile.device == "meta"
    assert profile.model_flops == real.model_flops > 0
    for phase in ("forward", "backward"):
        assert profile.by_module(phase) == real.by_module(phase)
    assert profile.uncounted == real.uncounted == {}
    if name not in ROUTERS:
        assert profile.assumptions == ((UNEQUAL,) if name in LOOKING else ())


def placeholders(workload: Workload, mark: int) -> list[int]:
    return (workload.kwargs["input_ids"] == mark).sum(1).tolist()


# (32 / 8)^2 patches; gemma3 pools them to 4, internvl and mistral3 merge 2 x 2; qwen2_vl (32 / 4 / 2)^2.
@pytest.mark.parametrize(
    ("name", "mark", "each"),
    [
        ("llava", 99, 16), ("paligemma", 99, 16), ("gemma3", 99, 4), ("internvl", 99, 4), ("mistral3", 99, 4),
        ("qwen2_vl", 55, 16), ("idefics3", 99, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("batch", "images"), [(1, 1), (2, 3)])
def test_a_text_holds_as_many_placeholders_as_its_pictures_take(
    name: str, mark: int, each: int, batch: int, images: int, tmp_path: Path
) -> None:
    workload = loaded(name, tmp_path, batch=batch, images=images, seq=100)
    assert placeholders(workload, mark) == [each * images] * batch
    assert workload.kwargs["input_ids"].shape == (batch, 100)
    assert (workload.tokens, workload.samples) == (100 * batch, batch)


def test_a_text_too_short_for_its_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --seq 17 or more"):
        loaded("llava", tmp_path, seq=16)
    assert placeholders(loaded("llava", tmp_path, seq=17), 99) == [16]
    assert placeholders(loaded("llava", tmp_path, seq=16, images=0), 99) == [0]


def test_a_larger_picture_takes_more_placeholders(tmp_path: Path) -> None:
    assert placeholders(loaded("qwen2_vl", tmp_path, image_size=64), 55) == [64]


def test_ids_are_ordinary_words(tmp_path: Path) -> None:
    ids = loaded("llama", tmp_path, batch=3, seq=200).kwargs["input_ids"]
    assert ids.shape == (3, 200)
    assert int(ids.min()) >= 3  # 0, 1 and 2 are padding, begin and end
    assert int(ids.max()) < 100
    again = loaded("llama", tmp_path, batch=3, seq=200).kwargs["input_ids"]
    assert torch.equal(ids, again)


def test_tokens_are_the_decoders(tmp_path: Path) -> None:
    workload = loaded("t5", tmp_path, batch=2, seq=12)
    assert (workload.kwargs["input_ids"].shape, workload.kwargs["decoder_input_ids"].shape) == ((2, 12), (2, 12))
    assert (workload.tokens, workload.samples) == (24, 2)
    heard = loaded("whisper", tmp_path, batch=2, seq=12)
    assert (heard.tokens, heard.samples) == (24, 2)
    assert heard.kwargs["input_features"].shape == (2, 8, 100)


@pytest.mark.parametrize(("name", "reach"), [("gpt2", 64), ("bart", 64), ("roberta", 511), ("whisper", 20)])
def test_texts_end_where_the_learned_positions_end(name: str, reach: int, tmp_path: Path) -> None:
    assert loaded(name, tmp_path, seq=reach, device="cpu").count().tokens == reach
    assert loaded(name, tmp_path).tokens == reach
    with pytest.raises(UsageError, match=f"longer than the model's {reach} learned positions"):
        loaded(name, tmp_path, seq=reach + 1)


def test_computed_positions_have_no_end(tmp_path: Path) -> None:
    assert loaded("llama", tmp_path, seq=100_000).count().tokens == 100_000


def test_sound_has_the_length_that_was_asked_for(tmp_path: Path) -> None:
    assert loaded("wav2vec2", tmp_path, audio_seconds=2, batch=3).kwargs["input_values"].shape == (3, 32_000)
    assert loaded("wav2vec2-bert", tmp_path, audio_seconds=2).kwargs["input_features"].shape == (1, 100, 16)
    assert loaded("parakeet_ctc", tmp_path, audio_seconds=2).kwargs["input_features"].shape == (1, 200, 16)
    with pytest.raises(UsageError, match="window of 1 s"):
        loaded("whisper", tmp_path, audio_seconds=2)


def test_no_cache_is_made(tmp_path: Path) -> None:
    assert loaded("llama", tmp_path).kwargs["use_cache"] is False
