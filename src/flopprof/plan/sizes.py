"""The model of a plan: how many parameters, what a token costs, and the shape behind it where one is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from flopprof.analytic import TransformerShape
from flopprof.errors import UsageError
from flopprof.units import MOST

_TEXT = ("decoder", "encoder", "encoder-decoder")
_SEQ = 4096
_DECODERS = ("CausalLM", "LMHead")  # in the names of transformers' classes that write text


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a plan needs to know of a model.

    forward_per_token: FLOPs of a forward, on average in a text of `seq` tokens, attention over every pair; None: only
    the number of parameters is known. decodes: it writes token after token. assumption: what was taken for granted.
    """

    name: str | None
    params: int
    active: int
    seq: int
    shape: TransformerShape | None = None
    forward_per_token: int | None = None
    decodes: bool = True
    assumption: str = ""


def of_numbers(params: int, active: int | None, seq: int | None) -> Sizes:
    """A model of which only its parameters are known. Raises UsageError."""
    if params < 1:
        raise UsageError(f"params must be positive, got {params}.")
    if active is not None and not 0 < active <= params:
        raise UsageError(f"active params must be between 1 and all {params:,}, got {active:,}.")
    return Sizes(name=None, params=params, active=active or params, seq=seq or _SEQ)


def of_shape(shape: TransformerShape | Mapping[str, Any], seq: int | None, params: int | None) -> Sizes:
    """A model of the given sizes (fields of TransformerShape). Raises UsageError, naming what is wrong."""
    from flopprof.models.catalogue import forward_flops_per_token

    if isinstance(shape, Mapping):
        fields = TransformerShape.__struct_fields__
        if unknown := [name for name in shape if name not in fields]:
            raise UsageError(f"a shape has no {', '.join(unknown)} (fields: {', '.join(fields)}).")
        try:
            shape = msgspec.convert({"seq": seq or _SEQ, **shape}, TransformerShape, strict=False)
        except (msgspec.ValidationError, ValueError) as error:
            raise UsageError(f"not the shape of a transformer: {error} (fields: {', '.join(fields)}).") from error
    if seq is not None and seq != shape.seq:
        shape = msgspec.structs.replace(shape, seq=seq)
    active, total = shape.n_params_active, shape.n_params
    if max(total, shape.seq) > MOST:
        raise UsageError(f"a model of these sizes has more than {MOST:g} parameters or tokens: give smaller ones.")
    if params is not None:
        active, total = active + params - total, params
    return Sizes(
        name=None,
        params=total,
        active=active,
        seq=shape.seq,
        shape=shape,
        forward_per_token=None if shape.encoder_layers else forward_flops_per_token(shape),  # it has one stack
        decodes=not shape.encoder_layers,
    )


def shape_of_config(config: object, seq: int) -> TransformerShape | None:
    """The shape that a text model's own config describes; None where it is no such model's, or does not say all."""
    if config is None or getattr(config, "text_config", None) is not None:
        return None
    try:
        return TransformerShape.from_config(config, seq=seq)
    except ValueError:
        return None


def of_directory(name: str, seq: int | None) -> Sizes:
    """The text model that the config.json of a checkpoint directory describes. Raises UsageError."""
    file = Path(name) / "config.json"
    try:
        facts = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise UsageError(
            f"{name!r} is no checkpoint directory: {file.name} cannot be read ({error.strerror})."
        ) from error
    except msgspec.MsgspecError as error:
        raise UsageError(f"{str(file)!r} is no JSON object: {error}.") from error
    reach = facts.get("max_position_embeddings")
    length = seq or (min(_SEQ, reach) if isinstance(reach, int) and reach > 0 else _SEQ)
    try:
        if facts.get("text_config") is not None:
            raise ValueError("it reads more than text")
        found = of_shape(TransformerShape.from_config(facts, seq=length), seq, None)
    except ValueError as error:
        raise UsageError(
            f"no plan follows from {str(file)!r}: {error} Give params, or count it and give flops."
        ) from error
    assumption = f"parameters as {file.name} has them: biases and norms, under 0.1 %, are left out"
    if "tie_word_embeddings" not in facts:
        assumption += "; it does not say tie_word_embeddings: taken as tied"
    named = " ".join(map(str, facts.get("architectures") or ["LMHead"]))
    decodes = any(part in named for part in _DECODERS)
    return replace(found, name=Path(name).name, assumption=assumption, decodes=found.decodes and decodes)


def of_name(name: str, seq: int | None) -> Sizes:
    """A model of the catalogue, or of a checkpoint directory.

    Raises UsageError for names that are neither, and for models that read no text.
    """
    from flopprof.models import catalogue

    entry = catalogue.entries().get(name.lower())
    if entry is None and Path(name).is_dir():
        return of_directory(name, seq)
    if entry is None:
        near = ", ".join(row.name for row in catalogue.find(name)[:4])
        more = f" Near: {near}." if near else ""
        raise UsageError(
            f"no model goes by {name!r}: `flopprof models` lists them; else give params or a shape.{more} Of a model "
            "that is no text model, count a step (flopprof count) and give flops."
        )
    if entry.kind not in _TEXT:
        raise UsageError(f"{entry.name} is no text model ({entry.kind}): a plan is in tokens. Give params or flops.")
    active = entry.active or entry.parameters
    if entry.forward is None and entry.kind != "encoder-decoder":
        shape = TransformerShape.from_config(entry.facts(), seq=seq or entry.tokens())
        per_token = catalogue.forward_flops_per_token(shape)
        return Sizes(
            name=entry.name,
            params=entry.parameters,
            active=active,
            seq=shape.seq,
            shape=shape,
            forward_per_token=per_token,
            decodes=entry.kind == "decoder",
        )
    cost = entry.cost()
    at = cost.tokens or _SEQ
    assumption = "" if seq in (None, at) else f"FLOPs per token as in a text of {at} tokens: no closed form is known"
    return Sizes(
        name=entry.name,
        params=entry.parameters,
        active=active,
        seq=seq or at,
        forward_per_token=cost.flops,
        decodes=entry.kind == "decoder",
        assumption=assumption,
    )
