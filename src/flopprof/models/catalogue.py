"""Well-known models by name, from their published dimensions in data/models.toml: no network, and no torch to list."""

from __future__ import annotations

import datetime
import fnmatch
import functools
import importlib.resources
import tomllib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from flopprof.analytic import TransformerShape

if TYPE_CHECKING:
    from flopprof.models.request import Request
    from flopprof.models.workload import Workload

Kind = Literal["decoder", "encoder", "encoder-decoder", "vision", "audio", "image-text"]

_TOKENS = 4096  # what FLOPs per token are told at, where the model's positions reach so far
_POSITIONS = ("max_position_embeddings", "n_positions")


class Counted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """FLOPs of a forward: of one `per` (a token, an image), counted in a run of so many tokens where it has any."""

    flops: int
    per: str
    tokens: int | None = None


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Forward FLOPs of one `per`, in a sequence of `tokens`, and whether a closed form or a count says so."""

    flops: int
    per: str
    tokens: int | None
    by: Literal["closed form", "count"]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of the catalogue; data/models.toml says what each field means."""

    name: str
    family: str
    kind: Kind
    model_type: str
    architecture: str
    published: str
    parameters: int
    source: str
    date: datetime.date
    config: dict[str, Any]
    none: tuple[str, ...] = ()
    published_active: str | None = None
    active: int | None = None
    dtype: str = "float32"
    forward: Counted | None = None

    def facts(self) -> dict[str, Any]:
        """What a config.json of this model would hold."""
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "dtype": self.dtype,
            **self.config,
            **dict.fromkeys(self.none),
        }

    def cost(self) -> Cost:
        """FLOPs of one forward; per token of text, full attention, where the model is one of text."""
        if self.forward is not None:
            return Cost(flops=self.forward.flops, per=self.forward.per, tokens=self.forward.tokens, by="count")
        tokens = self.tokens()
        shape = TransformerShape.from_config(self.facts(), seq=tokens)
        return Cost(flops=forward_flops_per_token(shape), per="token", tokens=tokens, by="closed form")

    def tokens(self) -> int:
        """The sequence length that the closed form is evaluated at: 4,096 tokens, or as far as the model reaches."""
        text = self.config.get("text_config", self.config)
        return min(_TOKENS, *(text[name] for name in _POSITIONS if name in text), _TOKENS)


def forward_flops_per_token(shape: TransformerShape) -> int:
    """2 n + 2 L H (d_qk + d_v) s: n of the parameters that a token meets in a product, attention over every pair.

    Looking up an embedding is no product; one that is tied is multiplied as the head.
    """
    looked_up = shape.positions * shape.d_embedding + (0 if shape.tied else shape.vocab * shape.d_embedding)
    attention = 2 * shape.layers * shape.heads * (shape.d_head + shape.d_head_value) * shape.seq
    return 2 * (shape.n_params_active - looked_up) + attention


@functools.cache
def entries() -> Mapping[str, Entry]:
    """Every row by its name, in the order of the file."""
    text = importlib.resources.files("flopprof").joinpath("data", "models.toml").read_text(encoding="utf-8")
    rows = msgspec.convert(tomllib.loads(text)["model"], list[Entry])
    return {row.name: row for row in rows}


def knows(name: str) -> bool:
    """Whether the catalogue has a model of that name, in whatever case."""
    return name.lower() in entries()


def find(pattern: str | None) -> list[Entry]:
    """The rows whose name matches a glob (`llama-3*`), or whose name, family or kind holds the text; None: all."""
    if pattern is None:
        return list(entries().values())
    wanted = pattern.lower()
    if any(sign in wanted for sign in "*?["):
        return [row for row in entries().values() if fnmatch.fnmatchcase(row.name, wanted)]
    return [row for row in entries().values() if wanted in f"{row.name}\n{row.family}\n{row.kind}".lower()]


def load(name: str, request: Request) -> Workload:
    """The model, built by transformers from its published dimensions. Raises MissingPackage or ModelFailed."""
    from flopprof.models.huggingface import load_config

    entry = entries()[name.lower()]
    return load_config(entry.name, entry.facts(), request)
