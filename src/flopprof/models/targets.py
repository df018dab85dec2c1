"""Read a target: a bare name, `timm:`, `hf:`, a checkpoint, a Python file; suggest a name where none fits."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flopprof.counting.routing import checked
from flopprof.errors import UnknownTarget, UsageError
from flopprof.models import catalogue, exported, huggingface, pyfile, timm, vision
from flopprof.models.adapters import parse_lora
from flopprof.models.inputs import parse_dtype, parse_input
from flopprof.models.request import Attn, Request
from flopprof.models.routing import read_routing, routed
from flopprof.models.variants import Checkpointing, Variants, varied
from flopprof.models.workload import Workload

# Of two names that are about as near, the one that needs no prefix is the likelier.
_TIMM_HANDICAP = 0.1


def load(
    target: str,
    *,
    batch: int = 1,
    image_size: int | None = None,
    inputs: Sequence[str] = (),
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    train: bool = False,
    model_args: Mapping[str, object] | None = None,
    seq: int | None = None,
    audio_seconds: float | None = None,
    images: int = 1,
    trust_remote_code: bool = False,
    attn: Attn | None = None,
    lora: str | None = None,
    frozen: Sequence[str] = (),
    checkpointing: Checkpointing | None = None,
    routing: str | Mapping[str, Sequence[Any]] | None = None,
) -> Workload:
    """The workload that `target` names.

    `resnet50`, `llama-3.1-8b` (what `flopprof models` lists), `timm:NAME`, `hf:ORG/NAME[@revision]`, a checkpoint's
    directory, `path/to/file.py:attribute` or `model.pt2`.

    seq: tokens of text, image placeholders included; of both sides for encoder-decoders. audio_seconds, images: how
    much a Hugging Face model hears, and sees in each text. trust_remote_code: run the checkpoint's own Python code.

    attn: how a Hugging Face model computes attention: `sdpa`, `eager` or `flash`. lora: adapters that peft adds,
    `r=16,targets=q_proj,v_proj`. frozen: globs of parameters or modules that do not train. checkpointing: blocks run
    again in the backward, `non-reentrant` or `reentrant`. routing: tokens for each expert, by patterns of the modules
    that route, or the JSON file of them; for meta.

    inputs: one shape per positional input (`2x8`, `1x128:int64`) instead of the model's own. device None: meta
    where that works, else CPU. Raises UnknownTarget, UsageError, MissingPackage or ModelFailed.
    """
    request = Request(
        batch=batch,
        image_size=image_size,
        inputs=tuple(parse_input(text) for text in inputs),
        device=device,
        dtype=parse_dtype(dtype),
        train=train,
        model_args=dict(model_args or {}),
        seq=seq,
        audio_seconds=audio_seconds,
        images=images,
        trust_remote_code=trust_remote_code,
        attn=attn,
    )
    request.check()
    variants = Variants(
        lora=None if lora is None else parse_lora(lora), frozen=tuple(frozen), checkpointing=checkpointing
    )
    workload = _named(target, request)
    if routing is not None:
        workload = routed(workload, read_routing(routing) if isinstance(routing, str) else checked(routing, "routing"))
    if not variants:
        return workload
    if workload.program is not None:
        raise UsageError(f"{target} is an exported graph, which cannot be varied: leave the training variants out.")
    return varied(workload, variants.apply)


def _named(target: str, request: Request) -> Workload:
    kind, _, rest = target.partition(":")
    if kind in ("hf", "huggingface") and rest:
        return huggingface.load_hub(rest, request)
    if huggingface.names_directory(target):
        return huggingface.load_directory(target, request)
    if catalogue.knows(target):
        return catalogue.load(target, request)
    others = (exported.names_file, pyfile.names_file, vision.knows)
    if not (kind == "timm" and rest) and not any(known(target) for known in others):
        return _unknown(target)
    request.refuse_sizes_of_text(target)
    if kind == "timm" and rest:
        return timm.load(rest, request) if timm.knows(rest) else _unknown(target)
    if exported.names_file(target):
        return exported.load(target, request)
    if pyfile.names_file(target):
        return pyfile.load(target, request)
    return vision.load(target.lower(), request)


def suggestions(target: str, limit: int = 3) -> list[str]:
    """The known targets nearest to a misspelt one, best first."""
    query = target.lower().removeprefix("timm:")
    timm_names = {name: f"timm:{name}" for name in timm.names()}
    bare = {} if query != target.lower() else {name: name for name in [*vision.names(), *catalogue.entries()]}
    scored = [
        (difflib.SequenceMatcher(None, query, name).ratio() - handicap * (name != query), shown[name])
        for handicap, shown in ((0.0, bare), (_TIMM_HANDICAP, timm_names))
        for name in difflib.get_close_matches(query, shown, n=limit)
    ]
    return [shown for _, shown in sorted(scored, key=lambda item: item[0], reverse=True)[:limit]]


def _unknown(target: str) -> Workload:
    near = suggestions(target)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else "give a torchvision name, one that flopprof models lists, timm:NAME, hf:ORG/NAME, a directory "
        "or path/to/file.py:function."
    )
    raise UnknownTarget(f"no model is called {target!r}: {hint}")
