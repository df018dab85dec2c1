"""What the inputs of a transformers model are made with: the sizes of its config, ids and pixels."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flopprof.errors import UsageError
from flopprof.models.inputs import InputSpec, make_input
from flopprof.models.request import Request

_TOKENS = 512  # where neither --seq nor the model's positions say less
SIDE = 224
RATE = 16_000  # samples a second, of every speech model
_MOST_IDS = 1 << 22  # beyond, ids have no values
_VISION = (
    "vision_config",
    "vision_tower_config",
    "visual_config",
    "backbone_config",
    "image_encoder_config",
    "encoder",
)
TEXT_PARTS = ("text_config", "thinker_config", "llm_config", "decoder", "language_config")
_POSITIONS = re.compile(r"(^|[._])(wpe|pos|positions?|position_embeddings?|embed_positions?|pos_embeddings?)$")
_OTHER_TOWER = re.compile(r"vision|visual|image|audio|speech|qformer|patch")
_SPECIAL = re.compile(r"(token|start|end|bos|eos|pad|cls|sep|mask|image|video|audio)_(token_)?(id|ids|index|indices)$")


@dataclass(frozen=True)
class Inputs:
    """Keyword arguments of `forward`, the tokens and samples in them, and what was chosen in making them."""

    kwargs: Mapping[str, Any]
    tokens: int | None
    samples: int
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Maker:
    """The model, what was asked for, and where the tensors go."""

    model: Any
    request: Request
    device: str
    side: int | tuple[int, int] | None = None  # of pictures, where the config's is not right

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def text(self) -> Any:
        """The config of what reads text."""
        return part(self.config, TEXT_PARTS)

    @property
    def vision(self) -> Any:
        """The config of what sees."""
        return part(self.config, _VISION)

    @property
    def taken(self) -> Mapping[str, inspect.Parameter]:
        """What `forward` takes, by name."""
        return inspect.signature(self.model.forward).parameters

    def floats(self, *shape: int) -> torch.Tensor:
        """Pixels or sound, in the model's own type."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        return make_input(InputSpec(shape, dtype), self.device, None)

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """Ids and sizes: on meta they stay on the CPU, where the count reads them."""
        return values if self.device == "meta" else values.to(self.device)


def length_of(maker: Maker, least: int = 0) -> int:
    """--seq, or the usual length where the positions reach so far. Raises UsageError where they do not."""
    limit = reach(maker.model)
    asked = maker.request.seq
    if asked is None:
        wanted = max(_TOKENS, least + 64 if least else 0)
        return wanted if limit is None else min(wanted, limit)
    if limit is not None and asked > limit:
        raise UsageError(f"--seq {asked} is longer than the model's {limit} learned positions.")
    return asked


def is_learned(maker: Maker) -> bool:
    """Are positions rows of a table?"""
    return reach(maker.model) is not None


def reach(model: Any) -> int | None:
    """The longest text that the tables of positions allow; None where positions are computed.

    On meta nobody notices an index beyond a table, so that the limit must be known.
    """
    spoken = model.main_input_name not in ("input_ids", ["input_ids"])
    limits = [
        module.num_embeddings
        - (module.padding_idx + 1 if module.padding_idx is not None else int(getattr(module, "offset", 0)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and _POSITIONS.search(name)
        and not _OTHER_TOWER.search(name)
        and (not spoken or any(word in name for word in ("decoder", "text", "language")))
    ]
    said = None if spoken else token(part(model.config, TEXT_PARTS), "max_position_embeddings")
    if limits and said:  # some tables have rows to spare
        limits.append(said)
    return min(limits, default=None)


def ids(maker: Maker, batch: int, length: int) -> torch.Tensor:
    """Ids of ordinary words: none of the config's special tokens."""
    if batch * length > _MOST_IDS:
        return torch.empty(batch, length, dtype=torch.int64, device=maker.device)
    try:
        words = int(maker.model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        words = int(getattr(maker.text, "vocab_size", 0) or 2)
    words = min(words, int(getattr(maker.text, "vocab_size", words) or words))
    special = set(_special(maker.config)) | set(_special(maker.text))
    ordinary = torch.tensor([word for word in range(min(words, 4096)) if word not in special] or [0])
    chosen = torch.randint(len(ordinary), (batch, length), generator=torch.Generator().manual_seed(0))
    return maker.whole(ordinary[chosen])


def _special(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if _SPECIAL.search(name):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (item for item in values if isinstance(item, int))


def sides(maker: Maker) -> tuple[int, int]:
    """(height, width) of every picture."""
    if maker.request.image_size is not None:
        return maker.request.image_size, maker.request.image_size
    native = maker.side or side(maker.vision)
    return native if isinstance(native, tuple) else (native, native)


def side(vision: Any) -> Any:
    """The config's picture size, as one number or (height, width)."""
    for config in every_part(vision):
        for name in ("image_size", "img_size", "input_size", "crop_size"):
            value = getattr(config, name, None)
            if isinstance(value, Mapping):
                value = [value.get("height"), value.get("width")]
            if isinstance(value, list | tuple) and len(value) >= 2 and all(isinstance(n, int) for n in value):
                return (value[-2], value[-1]) if value[-2] != value[-1] else value[-1]
            if isinstance(value, list | tuple) and len(value) == 1:
                value = value[0]
            if isinstance(value, int) and value > 0:
                return value
    return SIDE


def channels(vision: Any) -> int:
    """Colours of a picture."""
    names = ("num_channels", "in_channels", "in_chans", "num_input_channels")
    return next((value for value in (getattr(vision, name, None) for name in names) if isinstance(value, int)), 3)


def part(config: Any, names: tuple[str, ...]) -> Any:
    """The config of one tower, or the whole where there are none."""
    for name in names:
        inner = getattr(config, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            return inner
    return config


def every_part(config: Any) -> Iterator[Any]:
    """A config and those inside it, outermost first."""
    waiting = [config]
    while waiting:
        config = waiting.pop(0)
        yield config
        inner = vars(config).values()
        waiting += [value for value in inner if hasattr(value, "to_dict") and hasattr(value, "model_type")]


def token(config: Any, name: str) -> int | None:
    """A config's id of a special token; None where it has none."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
