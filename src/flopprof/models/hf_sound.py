"""Sound as transformers models take it: waves and spectrograms, in every layout that their configs and pages allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flopprof.errors import UsageError
from flopprof.models.hf_documented import documented
from flopprof.models.hf_maker import RATE, Maker, every_part, length_of, part, token

_SECONDS = 10.0
_MEL_RATE = 100  # frames a second of a mel spectrogram with steps of 10 ms
_SOUND = ("audio_config", "encoder_config", "audio_encoder_config")
_BINS = ("input_feat_per_channel", "input_feat_size", "feature_size", "input_dim")
_ANY_BINS = ("num_mel_bins", "n_mels", "mel_bins", *_BINS, "feature_dim", "feat_dim", "num_mels", "input_feat_dim",
             "feature_projection_input_dim", "input_size")  # fmt: skip
_USUAL_BINS = (128, 80)
_WINDOW_FRAMES = 3000  # of 30 s, as Whisper takes them
_WHOLE_FRAMES = 9600  # samples: a multiple of every codec's frame, and of 10 ms


def seconds_of(maker: Maker) -> float:
    """--audio-seconds, or the usual length."""
    return maker.request.audio_seconds or _SECONDS


def wave(maker: Maker) -> torch.Tensor:
    """`input_values`: sound itself, or a spectrogram where the config counts mel bins and a length."""
    batch, config = maker.request.batch, maker.config
    bins, longest = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if isinstance(bins, int) and isinstance(longest, int):
        return maker.floats(batch, longest, bins)
    channels = getattr(config, "audio_channels", None)
    said = documented(maker.model.forward).get("input_values")
    if channels is None and said is not None and len(said.sizes) == 3 and said.sizes[1] in ("1", "channels"):
        channels = 1
    return maker.floats(*((batch, channels) if isinstance(channels, int) else (batch,)), _samples(maker))


def waves(maker: Maker) -> Iterator[torch.Tensor]:
    """Other layouts of a wave: one channel apart, and filled up to whole frames."""
    batch, samples = maker.request.batch, _samples(maker)
    filled = -(-samples // _WHOLE_FRAMES) * _WHOLE_FRAMES
    for length in (samples, filled):
        yield maker.floats(batch, length)
        yield maker.floats(batch, 1, length)
    for bins in _bins(maker):
        yield maker.floats(batch, round(seconds_of(maker) * _MEL_RATE), bins)


def states(maker: Maker) -> Iterator[torch.Tensor]:
    """What a part of a model may take that says nothing of it: rows for a text, the same across, or a wave."""
    width = token(maker.config, "hidden_size")
    if width:
        yield maker.floats(maker.request.batch, length_of(maker), width)
        yield maker.floats(maker.request.batch, width, length_of(maker))
    yield maker.floats(maker.request.batch, 1, _samples(maker))


def _samples(maker: Maker) -> int:
    rates = (getattr(config, "sampling_rate", None) for config in every_part(maker.config))
    return round(seconds_of(maker) * next((rate for rate in rates if isinstance(rate, int)), RATE))


def spectrogram(maker: Maker) -> tuple[torch.Tensor, int]:
    """(`input_features`, its frames): (batch, bins, time) in fixed windows as Whisper's; else (batch, time, bins).

    Raises UsageError where the config counts no bins, or the sound is longer than the window.
    """
    batch, config = maker.request.batch, maker.config
    encoder = part(config, _SOUND)
    seconds = seconds_of(maker)
    pairs = (getattr(inner, "feature_projection_input_dim", None) for inner in every_part(encoder))
    stacked = next((width for width in pairs if isinstance(width, int)), None)
    bins, window = getattr(encoder, "num_mel_bins", None), getattr(encoder, "max_source_positions", None)
    single = next((value for value in (getattr(encoder, name, None) for name in _BINS) if isinstance(value, int)), bins)
    if isinstance(stacked, int):  # pairs of frames side by side
        frames = round(seconds * _MEL_RATE / 2)
        return maker.floats(batch, frames, stacked), frames
    if isinstance(bins, int) and isinstance(window, int) and single is bins:
        frames = 2 * window  # the stride of the encoder's second convolution
        if maker.request.audio_seconds is not None and maker.request.audio_seconds * _MEL_RATE > frames:
            raise UsageError(
                f"--audio-seconds {maker.request.audio_seconds:g} is longer than the model's window of "
                f"{frames / _MEL_RATE:g} s: raise --batch, one sample a window."
            )
        return maker.floats(batch, bins, frames), frames
    if isinstance(single, int):
        frames = max(1, round(seconds * _MEL_RATE))
        return maker.floats(batch, frames, single), frames
    raise UsageError(f"the config of {type(maker.model).__name__} counts no mel bins: give --input SHAPE.")


def spectrograms(maker: Maker) -> Iterator[tuple[torch.Tensor, int]]:
    """Other layouts of a spectrogram: bins first or last, of what the config counts, of usual lengths."""
    batch = maker.request.batch
    asked = max(1, round(seconds_of(maker) * _MEL_RATE))
    lengths = (asked,) if maker.request.audio_seconds is not None else (asked, _WINDOW_FRAMES)
    for bins in dict.fromkeys((*_bins(maker), *_USUAL_BINS)):
        for frames in lengths:
            yield maker.floats(batch, frames, bins), frames
            yield maker.floats(batch, bins, frames), frames
            yield maker.floats(batch, 1, frames, bins), frames


def stacks(maker: Maker) -> Iterator[tuple[torch.Tensor, int, str]]:
    """(a spectrogram of frames side by side, its rows, a note): as many as the model's first layer multiplies."""
    first = next((module.in_features for module in maker.model.modules() if isinstance(module, nn.Linear)), 0)
    for bins in _bins(maker):
        each = first // bins
        if first % bins == 0 and each > 1:
            rows = max(1, round(seconds_of(maker) * _MEL_RATE) // each)
            note = f"a row of {first} numbers is taken to be {each} frames of {bins} mel bins"
            yield maker.floats(maker.request.batch, rows, first), rows, note


def _bins(maker: Maker) -> list[int]:
    found: dict[int, Any] = {}
    for config in every_part(maker.config):
        for name in _ANY_BINS:
            value = getattr(config, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 1:
                found[value] = None
    return list(found)
