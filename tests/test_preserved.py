"""count() leaves what a forward changes as it was: objects, shapes and flags of modules, and whatever it is given."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import flopprof
from flopprof.counting.preserve import Keep

ROWS, WIDTH = 3, 4
EACH = 2 * ROWS * WIDTH * WIDTH  # the layer, once


class Slotted:
    __slots__ = ("later", "steps")

    def __init__(self) -> None:
        self.steps = 0


class Listed(list[int]):
    """A list of a class of its own."""


class Pair(NamedTuple):
    scale: torch.Tensor
    seen: list[int]


class OtherPackageCache:
    """As the caches of a library: made of parts of the same library."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def grow(self) -> None:
        self.layers.append(torch.ones(1))


OtherPackageCache.__module__ = "library.caches"


class Writing(nn.Module):
    def __init__(self, held: Any, write: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer, self.held, self.write = nn.Linear(WIDTH, WIDTH), held, write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.write(self.held)
        return self.layer(x)


def x() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH)


class Case(NamedTuple):
    held: Callable[[], Any]
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def later(held: Slotted) -> None:
    held.later = 1
    held.steps += 1


def deranged(held: OrderedDict[str, int]) -> None:
    held.move_to_end("a")


CASES = {
    "tensor in a tuple": Case(lambda: (torch.zeros(3),), lambda t: t[0].add_(1), lambda t: t[0].tolist()),
    "list in a tuple": Case(lambda: ([],), lambda t: t[0].append(1), lambda t: list(t[0])),
    "named tuple": Case(lambda: Pair(torch.ones(2), [1]), lambda t: (t.scale.mul_(2), t.seen.clear()), repr),
    "namespace": Case(lambda: SimpleNamespace(n=0), lambda held: setattr(held, "n", 1), lambda held: held.n),
    "slots": Case(Slotted, later, lambda held: (held.steps, hasattr(held, "later"))),
    "own list": Case(lambda: Listed([1]), lambda held: held.append(2), list),
    "counter": Case(lambda: Counter("a"), lambda held: held.update("ab"), dict),
    "order": Case(lambda: OrderedDict(a=1, b=2), deranged, list),
    "deque": Case(lambda: deque([1, 2], maxlen=2), lambda held: held.append(3), list),
    "cache of another package": Case(OtherPackageCache, OtherPackageCache.grow, lambda held: len(held.layers)),
    "torch generator": Case(
        lambda: torch.Generator().manual_seed(0),
        lambda held: torch.rand(2, generator=held),
        lambda held: held.get_state().tolist(),
    ),
    "python generator": Case(lambda: random.Random(0), lambda held: held.random(), lambda held: held.getstate()),
    "data of a tensor": Case(lambda: torch.zeros(3), lambda t: setattr(t, "data", torch.ones(2)), lambda t: t.tolist()),
    "gradient wanted": Case(lambda: torch.zeros(3), lambda t: t.requires_grad_(), lambda t: t.requires_grad),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("where", ["attribute", "input"])
def test_what_a_forward_changes_is_put_back(name: str, where: str) -> None:
    case = CASES[name]
    held = case.held()
    before = case.read(held)
    if where == "attribute":
        model = Writing(held, case.write)
        profile = flopprof.count(model, x())
        assert model.held is held
    else:
        layer = nn.Linear(WIDTH, WIDTH)

        def written(x: torch.Tensor, given: Any) -> torch.Tensor:
            case.write(given)
            return layer(x)

        profile = flopprof.count(written, x(), held)
    assert case.read(held) == before
    assert profile.forward_flops == EACH


@pytest.mark.parametrize("name", ["array", "generator", "legacy generator"])
def test_what_a_forward_changes_of_numpys_is_put_back(name: str) -> None:
    numpy = pytest.importorskip("numpy")
    case = {
        "array": Case(lambda: numpy.zeros(2), lambda a: a.__iadd__(1), lambda a: a.tolist()),
        "generator": Case(
            lambda: numpy.random.default_rng(0), lambda g: g.random(), lambda g: str(g.bit_generator.state)
        ),
        "legacy generator": Case(lambda: numpy.random.RandomState(0), lambda g: g.rand(), lambda g: str(g.get_state())),
    }[name]
    held = case.held()
    before = case.read(held)
    flopprof.count(Writing(held, case.write), x())
    assert case.read(held) == before


def test_a_parameter_frozen_in_forward_wants_its_gradient_again() -> None:
    model = Writing(None, lambda _: model.layer.weight.requires_grad_(False))
    flopprof.count(model, x())
    assert model.layer.weight.requires_grad


def test_an_array_mapped_from_a_file_is_not_copied(tmp_path: Any) -> None:
    numpy = pytest.importorskip("numpy")
    data = numpy.memmap(tmp_path / "data", dtype="int32", mode="w+", shape=(4,))
    keep = Keep()
    keep.held([data[:2], numpy.asarray(data)], own=frozenset())
    data[0] = 5
    keep.restore()
    assert data[0] == 5


# --- shapes ---------------------------------------------------------------------------------------------------------
class Resized(nn.Module):
    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("first", torch.arange(3.0))
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("last", torch.arange(3.0))
        self.fails = fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for buffer in (self.first, self.scale, self.last):
            buffer.resize_(WIDTH).fill_(1)
        if self.fails:
            raise ValueError("no luck")
        return self.layer(x) * self.scale


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_buffer_that_a_forward_resizes(device: str, fails: bool) -> None:
    model = Resized(fails=fails).to(device)
    if fails:
        with pytest.raises(ValueError, match="no luck"):
            flopprof.count(model, x().to(device))
    else:
        assert flopprof.count(model, x().to(device)).forward_flops == EACH
    assert [tuple(buffer.shape) for buffer in model.buffers()] == [(3,), (0,), (3,)]
    if device == "cpu":
        assert [buffer.tolist() for buffer in model.buffers()] == [[0, 1, 2], [], [0, 1, 2]]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning", "ignore:.*:FutureWarning")
def test_a_fresh_model_for_quantisation_aware_training() -> None:
    quantisation = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).train()
    model.qconfig = quantisation.get_default_qat_qconfig("fbgemm")
    model = quantisation.prepare_qat(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert flopprof.count(model, x()).forward_flops == EACH
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_all_the_rest_is_put_back_where_one_thing_cannot_be() -> None:
    keep, tensor, items = Keep(), torch.zeros(2), [1]
    keep.held(items, own=frozenset())
    keep._undo.append(lambda: 1 // 0)
    keep.values(tensor)
    items.append(2)
    tensor.add_(1)
    with pytest.raises(ZeroDivisionError):
        keep.restore()
    assert items == [1]
    assert tensor.tolist() == [0, 0]


# --- inputs ---------------------------------------------------------------------------------------------------------
class Appending(nn.Module):
    """Runs its layer on x and on all that it was given, once more where the mask hides something."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, seen: list[torch.Tensor], attention_mask: torch.Tensor) -> torch.Tensor:
        seen.append(self.layer(x))
        y = sum(self.layer(each) for each in seen)
        return y if attention_mask.all() else self.layer(y)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_list_that_is_given_is_as_long_as_before_at_every_try(device: str) -> None:
    seen: list[torch.Tensor] = []
    mask = torch.ones(ROWS, dtype=torch.bool, device=device)
    for _ in range(2):
        profile = flopprof.count(Appending().to(device), x().to(device), seen, mask)
        assert profile.forward_flops == 2 * EACH
        assert seen == []


def test_a_cache_that_is_given_does_not_grow() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=20
    )
    model, cache = transformers.LlamaForCausalLM(config).eval(), transformers.DynamicCache(config=config)
    with torch.no_grad():
        model(torch.arange(6)[None], past_key_values=cache)
        counts = {flopprof.count(model, torch.tensor([[5]]), past_key_values=cache).forward_flops for _ in range(3)}
    assert cache.get_seq_length() == 6
    # q, k, v and o of 16 x 16, three of 16 x 24, scores and their sums over 7 keys; the head.
    assert counts == {2 * (2 * 4 * 16 * 16 + 2 * 3 * 16 * 24 + 2 * 2 * 7 * 16) + 2 * 16 * 20}
