"""Sound made for models of transformers: its layout, and a text that agrees with it, on meta as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flopprof import load
from flopprof.errors import UsageError
from flopprof.models.workload import Workload

transformers = pytest.importorskip("transformers", "5.23")

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

TEXT: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {
    "d_model": 32,
    "hidden_size": 32,
    "encoder_layers": 1,
    "num_hidden_layers": 1,
    "encoder_attention_heads": 4,
    "num_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "intermediate_size": 48,
    "num_mel_bins": 16,
}
WINDOWED = {**TOWER, "max_source_positions": 20}
MARK = 99
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": TEXT,
            "audio_config": {**WINDOWED, "model_type": "qwen2_audio_encoder"},
            "audio_token_index": MARK,
        },
    ),
    "musicflamingo": (
        "MusicFlamingoForConditionalGeneration",
        {
            "text_config": TEXT,
            "audio_config": {**WINDOWED, "model_type": "audioflamingo3_encoder"},
            "audio_token_id": MARK,
        },
    ),
    "moss_transcribe_diarize": (
        "MossTranscribeDiarizeForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen3", "head_dim": 8},
            "audio_config": WINDOWED,
            "audio_token_id": MARK,
        },
    ),
    "voxtral_realtime": (
        "VoxtralRealtimeForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "voxtral_realtime_text", "head_dim": 8}, "audio_config": TOWER},
    ),
    "kyutai_speech_to_text": (
        "KyutaiSpeechToTextModel",
        {
            **TEXT,
            "model_type": "kyutai_speech_to_text",
            "ffn_dim": 48,
            "num_codebooks": 3,
            "codebook_vocab_size": 10,
            "audio_pad_token_id": 5,
            "audio_bos_token_id": 6,
            "sliding_window": 64,
        },
    ),
    "granite_speech5_encoder": (
        "GraniteSpeech5Encoder",
        {**TOWER, "num_hidden_layers": 2, "vocab_size": 40, "context_size": 16, "max_position_embeddings": 32},
    ),
    "speecht5": (
        "SpeechT5Model",
        {
            "hidden_size": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
        },
    ),
    "vibevoice_acoustic_tokenizer_encoder": (
        "VibeVoiceAcousticTokenizerEncoderModel",
        {"hidden_size": 8, "num_filters": 4, "downsampling_ratios": [2, 4], "depths": [1, 1, 1]},
    ),
    "vibevoice_acoustic_tokenizer_decoder": (
        "VibeVoiceAcousticTokenizerDecoderModel",
        {"hidden_size": 8, "num_filters": 4, "downsampling_ratios": [2, 4], "depths": [1, 1, 1]},
    ),
    "xcodec2": (
        "Xcodec2Model",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "encoder_hidden_size": 4,
            "quantization_dim": 64,
            "semantic_model_config": {
                "model_type": "wav2vec2-bert",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 48,
            },
        },
    ),
}


def heard(name: str, folder: Path, **sizes: Any) -> Workload:
    cls, settings = MODELS[name]
    config = transformers.AutoConfig.for_model(name, **{k: v for k, v in settings.items() if k != "model_type"})
    config.architectures = [cls]
    config.save_pretrained(folder)
    return load(str(folder), **sizes)


def shapes(workload: Workload) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in workload.kwargs.items() if hasattr(value, "shape")}


# One of each way in which a layout is found; the others at night.
QUICK = ("qwen2_audio", "kyutai_speech_to_text", "granite_speech5_encoder", "vibevoice_acoustic_tokenizer_decoder")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.nightly]) for name in MODELS]
)
def test_a_model_that_hears_counts_on_meta_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"seq": 24} if name in ("speecht5", "kyutai_speech_to_text") else {}
    if "audio_config" not in MODELS[name][1] or name == "voxtral_realtime":
        sizes["audio_seconds"] = 0.64
    meta, real = (heard(name, tmp_path, device=device, **sizes) for device in ("meta", "cpu"))
    assert shapes(meta) == shapes(real)
    counted, ran = meta.count(backward=True), real.count(backward=True)
    assert counted.uncounted == ran.uncounted == {}
    for phase in ("forward", "backward"):
        assert counted.by_module(phase) == ran.by_module(phase)
    assert counted.model_flops == ran.model_flops > 0


# 40 frames: the second convolution halves them; then pooled in pairs, or joined in fours.
@pytest.mark.parametrize(("name", "each"), [("qwen2_audio", 10), ("musicflamingo", 10), ("moss_transcribe_diarize", 5)])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_text_holds_as_many_placeholders_as_its_sound_takes(name: str, each: int, batch: int, tmp_path: Path) -> None:
    workload = heard(name, tmp_path, batch=batch, seq=32)
    assert (workload.kwargs["input_ids"] == MARK).sum(1).tolist() == [each] * batch
    assert shapes(workload)["input_features"] == (batch, 16, 40)
    counted = workload.count()
    assert counted.by_module("forward", depth=2)["model.audio_tower"] > 0
    assert (workload.tokens, workload.samples) == (32 * batch, batch)


def test_a_text_too_short_for_its_sound_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        heard("qwen2_audio", tmp_path, seq=10)  # ten placeholders, and a word before them
    assert heard("qwen2_audio", tmp_path, seq=11).tokens == 11


def test_a_text_that_is_added_to_its_sound_is_as_long(tmp_path: Path) -> None:
    workload = heard("voxtral_realtime", tmp_path, audio_seconds=1.6)
    assert shapes(workload)["input_features"] == (1, 16, 160)
    assert shapes(workload)["input_ids"] == (1, 160 // 2 // 4)  # halved by a convolution, joined in fours
    assert workload.tokens == 20


def test_a_text_of_several_codes_a_place_has_them(tmp_path: Path) -> None:
    workload = heard("kyutai_speech_to_text", tmp_path, batch=2, seq=12)
    assert shapes(workload)["input_ids"] == (2, 12, 3 + 1)  # three codes of sound, and the word
    assert workload.tokens == 24


def test_frames_side_by_side_are_said_to_be(tmp_path: Path) -> None:
    workload = heard("granite_speech5_encoder", tmp_path, audio_seconds=2.0)
    assert shapes(workload)["input_features"] == (1, 200 // 4, 4 * 16)
    assert workload.assumptions == ("a row of 64 numbers is taken to be 4 frames of 16 mel bins",)


def test_pairs_of_frames_are_as_long_as_the_wave(tmp_path: Path) -> None:
    assert shapes(heard("xcodec2", tmp_path, audio_seconds=1.6)) == {
        "input_values": (1, 1, 25_600),
        "input_features": (1, 80, 160),
    }


def test_hidden_states_stand_for_what_a_model_has_no_first_layer_for(tmp_path: Path) -> None:
    rows = (1, 24, 32)
    assert shapes(heard("speecht5", tmp_path, seq=24)) == {"input_values": rows, "decoder_input_values": rows}


@pytest.mark.parametrize(("part", "shape"), [("encoder", (1, 1, 16_000)), ("decoder", (1, 8, 24))])
def test_what_nothing_is_said_of_is_tried(part: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    workload = heard(f"vibevoice_acoustic_tokenizer_{part}", tmp_path, audio_seconds=1.0, seq=24)
    assert shapes(workload) == {"hidden_states": shape}
    assert workload.assumptions == (
        "hidden_states, of which nothing is said, is taken to be of the first shape that the model takes",
    )
