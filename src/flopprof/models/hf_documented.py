"""What the documentation of a transformers model says of its inputs: dtype, shape, and whether they may be left out."""

from __future__ import annotations

import ast
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from flopprof.models.hf_maker import Maker, channels, every_part, ids, length_of, side, sides

_ITEM = re.compile(r"^ {2,12}(\w+) \((.*?)\)\s*:\s*$", re.MULTILINE)
_SHAPE = re.compile(r"of shape\s*`?[(\[](.*?)[)\]]`")
_AT_LEAST = re.compile(r"\w+ \(>= (\w+)\)")  # `total_classes (>= batch_size)`
_WORDS_IN_BRACKETS = re.compile(r"\((?!config\.)[^()]*[^\w\s*+/()-][^()]*\)")
_PATCHES = re.compile(r"\(in patches\)|\bpatch grid\b|\bgrid of patches\b", re.IGNORECASE)
_ANY = 16  # of what the config does not count
_ARITHMETIC: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv, ast.Pow: operator.pow,
}  # fmt: skip
_LENGTHS = frozenset(
    {"sequence_length", "seq_len", "seq_length", "text_length", "target_sequence_length", "episode_length"}
)


@dataclass(frozen=True)
class Documented:
    """One input: its kind of tensor, the sizes as they are spelled, whether it may be left out, and what is said."""

    kind: str
    sizes: tuple[str, ...]
    optional: bool
    says: str = ""

    @property
    def counts_patches(self) -> bool:
        """Are these the rows and columns of each picture's patches?"""
        return bool(self.sizes) and self.sizes[-1] in ("2", "3") and _PATCHES.search(self.says) is not None

    @property
    def is_picture(self) -> bool:
        """Has it colours, rows and columns, whatever else its name says?"""
        return {"num_channels", "height", "width"} <= set(self.sizes)


def documented(function: Any) -> dict[str, Documented]:
    """What the docstring of `function` says of its tensors, by name; empty where it says nothing."""
    found = {}
    text = (inspect.getdoc(function) and (function.__doc__ or "")) or ""
    items = list(_ITEM.finditer(text))
    for item, after in zip(items, [*items[1:], None], strict=False):
        name, said = item.groups()
        shape = _SHAPE.search(said + "`")
        if shape is not None:
            sizes = _WORDS_IN_BRACKETS.sub("", _AT_LEAST.sub(r"\1", shape.group(1)))
            kind = re.search(r"(Long|Int|Bool|Float)?Tensor", said)
            found[name] = Documented(
                (kind.group(1) if kind else None) or "",
                tuple(size.strip() for size in sizes.split(",") if size.strip()),
                "optional" in said,
                " ".join(text[item.end() : after.start() if after else None].partition("Returns:")[0].split()),
            )
    return found


def required(function: Any) -> list[str]:
    """The names of the arguments without which `function` cannot be called."""
    return [
        name
        for name, item in inspect.signature(function).parameters.items()
        if item.default is item.empty and item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
    ]


class Unsaid(Exception):
    """Neither the documentation nor the config says what this input is."""


def made(
    maker: Maker, name: str, function: Any, notes: list[str], given: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """The input of `function` of that name, sized by its documentation, the config and what is given already.

    Notes a size that nothing tells. Raises Unsaid.
    """
    pages = documented(function)
    said, given = pages.get(name), given or {}
    if name.endswith("pixel_values"):  # of a second encoder, which has a config of its own
        vision = getattr(maker.config, f"{name.removesuffix('pixel_values')}vision_config", maker.vision)
        height, width = sides(maker if vision is maker.vision else replace(maker, side=side(vision)))
        return maker.floats(maker.request.batch, channels(vision), height, width)
    if said is None:
        raise Unsaid(name)
    bound = _bound(pages, given)
    shape = [_size(maker, spelled, name, notes, bound) for spelled in said.sizes]
    masked = given.get(name.replace("attention_mask", "input_ids")) if name.endswith("_attention_mask") else None
    if masked is not None:  # a mask of these ids
        shape = list(masked.shape)
    if name.endswith("input_ids") and len(shape) == 2:
        return ids(maker, *shape)
    if said.is_picture:
        return maker.floats(*shape)
    if "mask" in name and "pixel" not in name and said.kind != "Float":
        return maker.whole(torch.ones(shape, dtype=torch.bool if said.kind == "Bool" else torch.int64))
    if said.kind == "Bool":
        return maker.whole(torch.ones(shape, dtype=torch.bool))
    if name.endswith(("position_ids", "timesteps")) and shape:
        return maker.whole(torch.arange(shape[-1]).expand(shape).contiguous())
    if said.kind in ("Long", "Int") or name.endswith(("_ids", "_sizes")):
        value = 1 if name.endswith("_sizes") or "the number of" in said.says else 0
        return maker.whole(torch.full(shape, value, dtype=torch.int64))
    return maker.floats(*shape)


def _bound(pages: Mapping[str, Documented], given: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The sizes that what is given has, by the names that its documentation gives them."""
    found: dict[str, int] = {}
    for name, tensor in given.items():
        said = pages.get(name)
        if said is not None and isinstance(tensor, torch.Tensor) and len(said.sizes) == tensor.dim():
            for spelled, size in zip(said.sizes, tensor.shape, strict=True):
                found.setdefault(spelled, size)
    return found


def _size(maker: Maker, spelled: str, name: str, notes: list[str], bound: Mapping[str, int]) -> int:
    words = spelled.strip("` ")
    try:
        prefixed = _numbers(maker, _prefixed(name, words))
        known = next(prefixed, None) if words.isidentifier() else None
        if known is None:
            known = _value(maker, ast.parse(words.replace(" ", "_") if " of " in words else words).body[0])
        return max(1, known)
    except (LookupError, SyntaxError, IndexError, ZeroDivisionError, RecursionError):
        if words in bound:
            return bound[words]
        notes.append(f"{spelled} of {name} is taken to be {_ANY}, which the config does not say")
        return _ANY


def _prefixed(name: str, size: str) -> tuple[str, ...]:
    """Names that a config may have for this size of this input alone: `task_seq_len`, `encoder_hidden_size`."""
    prefix = name.partition("_")[0]
    spelled = ("seq_len", "sequence_length") if size in _LENGTHS else (size,)
    own = ("context_length",) if size in _LENGTHS and prefix in ("past", "future") else ()
    return (*(f"{prefix}_{word}" for word in spelled), *own)


def _value(maker: Maker, node: Any) -> int:
    if isinstance(node, ast.Expr):
        return _value(maker, node.value)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_value(maker, node.left), _value(maker, node.right))
    if isinstance(node, ast.Attribute):  # config.block_size
        return _named(maker, node.attr)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len" and len(node.args) == 1:
        held = getattr(maker.config, getattr(node.args[0], "attr", ""), None)  # len(config.target_layer_ids)
        if isinstance(held, list | tuple):
            return len(held)
    if isinstance(node, ast.Name):
        return _named(maker, node.id)
    raise LookupError(ast.dump(node))


def _named(maker: Maker, name: str) -> int:
    """The number that a name of the documentation stands for. Raises LookupError."""
    if name in ("batch_size", "batch", "bs"):
        return maker.request.batch
    if name in _LENGTHS:
        return length_of(maker)
    if name in ("num_images", "num_images_or_videos", "num_videos"):
        return maker.request.batch * max(1, maker.request.images)
    if name in ("height", "width", "image_size", "frame_size"):
        return sides(maker)[name == "width"]
    if name in ("num_channels", "in_channels"):
        return channels(maker.vision)
    names = (name, f"num_{name}", name.removeprefix("num_"), f"{name}s", f"{name}_length")
    value = next(_numbers(maker, (*names, *(("hidden_size", "d_model") if name == "dim" else ()))), None)
    if value is None:
        raise LookupError(name)
    return value


def _numbers(maker: Maker, names: tuple[str, ...]) -> Iterator[int]:
    for config in every_part(maker.config):
        for name in names:
            value = getattr(config, name, None)
            if type(value) is int and value > 0:
                yield value
