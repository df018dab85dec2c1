"""Well-known models by name, from their published dimensions in data/models.toml: no network, and no torch to list."""

from __future__ import annotations

import datetime
import fnmatch
import functools
import importlib.resources
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from flopprof.analytic import TransformerShape

if TYPE_CHECKING:
    from flopprof.models.request import Request
    from flopprof.models.workload import Workload

Per = Literal["token", "sample"]
Kind = Literal["decoder", "encoder", "encoder-decoder", "vision", "audio", "image-text"]

_TOKENS = 4096  # what FLOPs per token are told at, where the model's positions reach so far
_POSITIONS = ("max_position_embeddings", "n_positions")


class Counted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """FLOPs of one forward of one sample of these sizes, as a run counted them."""

    flops: int
    tokens: int | None = None
    image: int | None = None
    seconds: float | None = None


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Forward FLOPs per token in a text of `tokens`, or per sample: an image of that side, so many seconds of sound.

    by: whether a closed form or a count says so.
    """

    flops: int
    per: Per
    by: Literal["closed form", "count"]
    tokens: int | None = None
    image: int | None = None
    seconds: float | None = None


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
    runs_every_expert: bool = False
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
        """FLOPs of a forward, attention over every pair: per token where there is only text, else per sample."""
        counted = self.forward
        if counted is None:
            tokens = self.tokens()
            shape = TransformerShape.from_config(self.facts(), seq=tokens)
            return Cost(flops=forward_flops_per_token(shape), per="token", by="closed form", tokens=tokens)
        per: Per = "token" if counted.image is None and counted.seconds is None else "sample"
        flops = counted.flops
        if per == "token" and counted.tokens is not None:
            flops = (2 * flops + counted.tokens) // (2 * counted.tokens)
        return Cost(
            flops=flops, per=per, by="count", tokens=counted.tokens, image=counted.image, seconds=counted.seconds
        )

    def tokens(self) -> int:
        """The sequence length that the closed form is evaluated at: 4,096 tokens, or as far as the model reaches."""
        text: dict[str, Any] = self.config.get("text_config", self.config)
        return min([_TOKENS, *(int(text[name]) for name in _POSITIONS if name in text)])


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


def to_json(rows: Sequence[Entry]) -> str:
    """The rows with everything that the catalogue says of them, and `forward` filled in with how it is known."""
    listed = [{**msgspec.to_builtins(row), "forward": msgspec.to_builtins(row.cost())} for row in rows]
    return msgspec.json.format(msgspec.json.encode({"models": listed}), indent=2).decode()


def load(name: str, request: Request) -> Workload:
    """The model, built by transformers from its published dimensions. Raises MissingPackage or ModelFailed."""
    from flopprof.models.huggingface import load_config

    entry = entries()[name.lower()]
    return _with_own_head(entry, load_config(entry.name, entry.facts(), request))


def _with_own_head(entry: Entry, workload: Workload) -> Workload:
    """With an output embedding of its own, where that was published so but transformers ties it (T5 1.1, Flan-T5)."""
    model: Any = workload.model  # a transformers model, whose accessors torch's own type does not have
    head = model.get_output_embeddings() if entry.config.get("tie_word_embeddings") is False else None
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return workload
    from torch import nn

    head.weight = nn.Parameter(head.weight.detach().clone())
    again = workload.on_cpu
    return replace(workload, on_cpu=None if again is None else lambda: _with_own_head(entry, again()))
