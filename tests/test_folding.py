"""A count that folds repeated blocks is the count that runs each, in every field, whatever the blocks do."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flopprof import FlopCounter, count
from folds import folds, same, to_meta
from zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

N, WIDTH = 6, 4


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_counts_the_same_folded(name: str, training: bool, backward: bool) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    same(model.to("meta").train(training), *to_meta(inputs), backward=backward)


# --- blocks that fold ---------------------------------------------------------------------------------------------
class Block(nn.Module):
    """A residual two-layer block."""

    def __init__(self, index: int = 0, **settings: Any) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return x + self.down(self.act(self.up(x)))


class Indexed(Block):
    """A block that knows its place."""

    def __init__(self, index: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.layer_idx = index


class Stack(nn.Module):
    """Blocks one after the other, of one class."""

    def __init__(self, kind: Callable[[int], nn.Module] = Block, n: int = N) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(index) for index in range(n))

    def forward(self, x: torch.Tensor) -> Any:
        x = x * 2  # no leaf, as what every later block gets
        for block in self.blocks:
            x = block(x)
        return x


def stack(kind: Callable[[int], nn.Module] = Block, n: int = N) -> nn.Module:
    return Stack(kind, n).to("meta")


def x(*, wants: bool = True) -> torch.Tensor:
    return torch.randn(3, WIDTH, device="meta", requires_grad=wants)


def blocks(*numbers: int) -> list[str]:
    return [f"blocks.{number}" for number in numbers]


def test_like_blocks_run_once_and_each_is_charged() -> None:
    model = stack()
    assert same(model, x()) == blocks(*range(1, N))
    assert same(model, x(), backward=True) == blocks(*range(1, N))
    # each of 2 products: 2 x 3 x 4 x 8, and in backward both gradients of each
    profile = count(model, x(), backward=True)
    assert profile.by_module("forward", depth=2, own=False)["blocks.4"] == 2 * 2 * 3 * WIDTH * 8
    assert profile.backward_flops == 2 * profile.forward_flops
    assert profile.by_parameter()["blocks.5.up.weight"] == 3 * 2 * 3 * WIDTH * 8


def test_many_like_blocks_are_proved_on_the_last() -> None:
    assert same(stack(n=9), x(), backward=True) == blocks(*range(1, 8))


def test_an_index_that_nobody_looks_at_is_proved_on_the_second_and_the_last() -> None:
    assert same(stack(Indexed), x(), backward=True) == blocks(2, 3, 4)


@pytest.mark.parametrize("wants", [False, True])
def test_the_first_gradient_may_be_unwanted(wants: bool) -> None:
    assert len(same(stack(), x(wants=wants), backward=True)) >= N - 2


def test_blocks_without_gradients_fold_in_every_mode() -> None:
    model = stack()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same(model, x(wants=False)) == blocks(*range(1, N))


def test_frozen_and_half_frozen_blocks() -> None:
    frozen = stack().requires_grad_(False)
    assert same(frozen, x(), backward=True) == blocks(*range(1, N))
    assert same(frozen, x(wants=False)) == blocks(*range(1, N))
    half = stack()
    for block in half.blocks[:3]:  # type: ignore[index]
        block.requires_grad_(False)
    assert same(half, x(), backward=True) == blocks(1, 2, 4, 5)


def test_an_optimizer_finds_the_gradients_of_folded_blocks() -> None:
    model = stack()
    for optimizer in (torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)):
        assert same(model, x(), optimizer=optimizer) == blocks(*range(1, N))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_repeated_parts_fold_inside_blocks_that_run() -> None:
    def kind(index: int) -> nn.Module:
        return nn.Sequential(*(Block() for _ in range(3)), nn.Linear(WIDTH, WIDTH))

    assert same(stack(kind), x(), backward=True) == ["blocks.0.1", "blocks.0.2", *blocks(*range(1, N))]


def test_tuples_dictionaries_and_inputs_pass_through() -> None:
    class Tuple(Block):
        def forward(self, x: torch.Tensor, bias: torch.Tensor, *, names: dict[str, Any]) -> Any:
            return super().forward(x + bias), {"bias": bias, "size": x.shape[0], "none": None}

    class Passing(Stack):
        def forward(self, x: torch.Tensor) -> Any:
            bias, x = x * 2, x * 2
            for block in self.blocks:
                x, out = block(x, bias, names={"a": [1, 2.0, "b"]})
                bias = out["bias"]
            return x, out

    model = Passing(Tuple, 9).to("meta")
    assert same(model, x()) == blocks(*range(1, 8))
    # the bias gets a gradient from each block: all but the one whose gradient comes first are added to it
    assert same(model, x(), backward=True) == blocks(*range(1, 8))


def test_called_twice_each() -> None:
    class Twice(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(super().forward(x))

    model = Twice().to("meta")
    assert same(model, x()) == blocks(*range(1, N)) * 2
    assert same(model, x(), backward=True) == blocks(*range(1, N)) * 2


def test_a_rate_that_grows_from_block_to_block() -> None:
    class Dropping(Block):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.drop = nn.Dropout(index / 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(super().forward(x))

    model = stack(Dropping)
    assert same(model.eval(), x(), backward=True) == blocks(3, 4)  # 0 is no rate; of the others two prove
    assert same(model.train(), x(), backward=True) == blocks(3, 4)


class Cache:
    """Keys of each layer, as language models keep them."""

    class Layer:
        def __init__(self) -> None:
            self.keys: torch.Tensor | None = None
            self.started = False

    def __init__(self, n: int) -> None:
        self.layers = [Cache.Layer() for _ in range(n)]

    def update(self, keys: torch.Tensor, index: int) -> torch.Tensor:
        layer = self.layers[index]
        layer.keys = keys if not layer.started else torch.cat([layer.keys, keys])
        layer.started = True
        return layer.keys


class Caching(Indexed):
    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        return super().forward(x) + cache.update(self.up(x), self.layer_idx).sum()


class Cached(Stack):
    steps = 1

    def forward(self, x: torch.Tensor) -> Any:
        cache, x = Cache(len(self.blocks)), x * 2
        for _ in range(self.steps):
            for block in self.blocks:
                x = block(x, cache)
        return x, *self.read(cache)

    def read(self, cache: Cache) -> Any:
        return ()


def test_a_cache_with_a_place_for_each_layer() -> None:
    model = Cached(Caching).to("meta")
    assert same(model, x(), backward=True) == blocks(2, 3, 4)
    model.steps = 3
    assert same(model, x()) == blocks(2, 3, 4) * 3


def test_a_cache_that_is_read_afterwards() -> None:
    class Reading(Cached):
        def read(self, cache: Cache) -> Any:
            return [layer.keys @ layer.keys.T for layer in cache.layers if layer.keys is not None]

    model = Reading(Caching).to("meta")
    assert same(model, x()) == blocks(2, 3, 4)
    assert same(model, x(), backward=True)[:3] == blocks(2, 3, 4)


# --- blocks that must not fold, or not all: each of these would be counted wrong -------------------------------------
def used(kind: type[Block]) -> nn.Module:
    return stack(kind)


class EveryThird(Indexed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.layer_idx % 3 else super().forward(super().forward(x))


class OnlyFour(Indexed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x)) if self.layer_idx in (3,) else super().forward(x)


class OnlyFourOfASet(Indexed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x)) if self.layer_idx in {3} else super().forward(x)


class ByName(Indexed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x)) if f"{self.layer_idx}" == "3" else super().forward(x)


class Config:
    def __init__(self) -> None:
        self.layer_types = ["thin", "thin", "thin", "thick", "thin", "thin"]


CONFIG = Config()


class ByTable(Indexed):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.config = CONFIG

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        thick = self.config.layer_types[self.layer_idx] == "thick"
        return super().forward(super().forward(x)) if thick else super().forward(x)


class ByTableBehind(ByTable):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        thick = self.config.layer_types[self.layer_idx - 1] == "thick"
        return Block.forward(self, Block.forward(self, x) if thick else x)


class AsManyAsItsIndex(Indexed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.layer_idx):
            x = super().forward(x)
        return x


class Counting(Block):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return super().forward(super().forward(x)) if type(self).calls % 4 == 0 else super().forward(x)


STATE = {"calls": 0}
COLLECTED: list[torch.Tensor] = []


class CountingInAModule(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        STATE["calls"] += 1
        return super().forward(super().forward(x)) if STATE["calls"] % 4 == 0 else super().forward(x)


class Rates(Block):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.rate = 0.0 if index == 3 else 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), self.rate)


class Random(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if random.random() < 0.5 else x


class RandomOfTorch(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if torch.rand(()).item() < 0.5 else x


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient @ torch.ones(WIDTH, WIDTH, device="meta")


class OwnFunction(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Double.apply(super().forward(x))


class Viewing(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().forward(x)
        return x.view(-1).view(x.shape)


class Writing(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(super().forward(torch.ones_like(x)))


class Keeping(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = super().forward(x)
        return self.kept


class Checkpointing(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + checkpoint(lambda y: self.down(self.act(self.up(y))), x, use_reentrant=False)


class Differentiating(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + torch.autograd.grad(y.sum(), x, create_graph=True)[0]


KINDS: dict[str, tuple[type[Block], int]] = {  # and how many of the 6 are folded in the end
    "every third": (EveryThird, -1),
    "only the fourth": (OnlyFour, -1),
    "only the fourth, of a set": (OnlyFourOfASet, 0),
    "by name": (ByName, 0),
    "by a table of the configuration": (ByTable, -1),
    "by the table's place before": (ByTableBehind, -1),
    "as many times as its index": (AsManyAsItsIndex, -1),
    "counting calls in its class": (Counting, 0),
    "counting calls in its Python module": (CountingInAModule, 0),
    "a rate of 0": (Rates, -1),
    "Python's random numbers": (Random, 0),
    "torch's random numbers": (RandomOfTorch, 0),
    "an autograd.Function": (OwnFunction, 0),
    "a view of its input": (Viewing, 0),
    "writing to its input": (Writing, 0),
    "keeping its output": (Keeping, 0),
    "a checkpoint inside": (Checkpointing, 0),
    "a gradient inside": (Differentiating, -1),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_block_of_its_own_mind(name: str) -> None:
    kind, expected = KINDS[name]
    for backward in (False, True):
        Counting.calls = STATE["calls"] = 0
        random.seed(0)
        torch.manual_seed(0)
        model = stack(kind)
        with folds() as names:
            folded = count(model, x(), backward=backward)
        Counting.calls = STATE["calls"] = 0
        assert folded == count(model, x(), backward=backward, fold=False)
        if expected >= 0:
            assert len(names) == expected


def hooked(model: nn.Module) -> nn.Module:
    model.blocks[2].register_forward_hook(lambda module, args, output: output @ torch.ones(WIDTH, WIDTH, device="meta"))  # type: ignore[index]
    return model


def backward_hooked(model: nn.Module) -> nn.Module:
    model.blocks[3].up.weight.register_hook(lambda gradient: gradient @ gradient.T @ gradient)  # type: ignore[index]
    return model


def shared(model: nn.Module) -> nn.Module:
    model.blocks[4].up = model.blocks[1].up  # type: ignore[index]
    return model


def tied(model: nn.Module) -> nn.Module:
    model.blocks[4].up.weight = model.blocks[1].up.weight  # type: ignore[index]
    return model


def patched(model: nn.Module) -> nn.Module:
    block = model.blocks[3]  # type: ignore[index]
    block.forward = lambda x: Block.forward(block, Block.forward(block, x))
    return model


def parametrized(model: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.blocks[3].up)  # type: ignore[index]
    return model


def evaluating(model: nn.Module) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.act = nn.Sequential(nn.GELU(), nn.Dropout(0.5))
    model.blocks[3].eval()  # type: ignore[index]
    return model


@pytest.mark.parametrize("change", [hooked, backward_hooked, shared, tied, patched, parametrized, evaluating])
def test_one_block_is_not_like_the_others(change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(Stack().to("meta"))
    for backward in (False, True):
        names = same(model, x(), backward=backward)
        assert names or change in (shared, tied)


class Outside(Stack):
    """The model does something with its blocks besides calling them one after the other."""

    def __init__(self, how: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.how = [how]

    def forward(self, x: torch.Tensor) -> Any:
        return self.how[0](self, x)


def collects(model: Outside, x: torch.Tensor) -> Any:
    return [x := block(x) for block in model.blocks]


def collects_some(model: Outside, x: torch.Tensor) -> Any:
    outputs = [x := block(x) for block in model.blocks]
    return outputs[-1], outputs[2]


def skips(model: Outside, x: torch.Tensor) -> Any:
    outputs = [x := block(x) for block in model.blocks]
    return outputs[-1] + outputs[0] + outputs[3] @ torch.ones(WIDTH, WIDTH, device="meta")


def stops_the_gradient(model: Outside, x: torch.Tensor) -> Any:
    for number, block in enumerate(model.blocks):
        x = block(x).detach() if number == 2 else block(x)
    return x


def drops_one(model: Outside, x: torch.Tensor) -> Any:
    for number, block in enumerate(model.blocks):
        y = block(x)
        x = x if number == 3 else y
    return x


def without_gradients(model: Outside, x: torch.Tensor) -> Any:
    for number, block in enumerate(model.blocks):
        with torch.set_grad_enabled(number != 3):
            x = block(x)
    return x


def grows(model: Outside, x: torch.Tensor) -> Any:
    for number, block in enumerate(model.blocks):
        x = block(torch.cat([x, x]) if number == 3 else x)
    return x


def takes_a_part(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    return model.blocks[3].down(model.blocks[3].up(x))


def takes_a_part_first(model: Outside, x: torch.Tensor) -> Any:
    x = model.blocks[0].down(model.blocks[0].up(x))
    for block in model.blocks:
        x = block(x)
    return x


def takes_a_parameter(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    return x @ model.blocks[3].up.weight.T


def takes_the_templates_parameter(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    return x @ model.blocks[0].up.weight.T


def passes_parameters(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x + model.blocks[0].down.bias)
    return x


def calls_again(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    return model.blocks[0](x)


def calls_another_again(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    return model.blocks[3](x)


def checkpoints(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def checkpoints_reentrantly(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=True)
    return x


def checkpoints_pairs(model: Outside, x: torch.Tensor) -> Any:
    for number in range(0, N, 2):
        x = checkpoint(lambda x, n=number: model.blocks[n + 1](model.blocks[n](x)), x, use_reentrant=False)
    return x


def drops_layers(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        if random.random() < 0.7:
            x = block(x)
    return x


def forces(model: Outside, x: torch.Tensor) -> Any:
    y = x
    for block in model.blocks:
        y = block(y)
    return y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def maps(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = torch.func.vmap(block)(x)
    return x


def writes_after(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = F.relu_(block(x))
    return x


def transposes(model: Outside, x: torch.Tensor) -> Any:
    for number, block in enumerate(model.blocks):
        x = block(x.T.contiguous().T if number == 3 else x)
    return x


def catches(model: Outside, x: torch.Tensor) -> Any:
    for block in model.blocks:
        x = block(x)
    try:
        return model.blocks[3].down(model.blocks[3].up(x))
    except Exception:
        return x


@pytest.mark.parametrize(
    "how",
    [
        collects, collects_some, skips, stops_the_gradient, drops_one, without_gradients, grows, takes_a_part,
        takes_a_part_first, takes_a_parameter, takes_the_templates_parameter, passes_parameters, calls_again,
        calls_another_again, checkpoints, checkpoints_reentrantly, checkpoints_pairs, drops_layers, forces, maps,
        writes_after, transposes, catches,
    ],
)  # fmt: skip
def test_a_model_that_does_more_with_its_blocks(how: Callable[[Any, torch.Tensor], Any]) -> None:
    model = Outside(how).to("meta")
    for backward in (False, True):
        random.seed(0)
        names = same(model, x(), backward=backward)
        if how in (collects, writes_after, without_gradients, grows):
            assert names


def test_each_block_gets_a_parameter_of_its_own() -> None:
    class Biased(Stack):
        def __init__(self) -> None:
            super().__init__(Given)
            self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(N))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block, weight in zip(self.blocks, self.weights, strict=True):
                x = block(x, weight)
            return x

    class Given(Block):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return super().forward(x) @ weight

    assert same(Biased().to("meta"), x(), backward=True) == []


def test_blocks_that_hand_tensors_over_behind_the_models_back() -> None:
    class Collecting(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            COLLECTED.append(y)
            return y

    class Summing(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            COLLECTED.clear()
            x = super().forward(x)
            return x + sum(y @ y.T for y in COLLECTED).sum()  # type: ignore[union-attr]

    model = Summing(Collecting).to("meta")
    for backward in (False, True):
        assert same(model, x(), backward=backward) == []


def test_a_list_among_the_arguments_that_blocks_fill() -> None:
    class Filling(Block):
        def forward(self, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
            seen.append(x)
            return super().forward(x) + sum(seen)

    class Filled(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen: list[torch.Tensor] = []
            for block in self.blocks:
                x = block(x, seen)
            return x

    assert same(Filled(Filling).to("meta"), x(), backward=True) == []


def test_a_loss_that_weighs_parameters() -> None:
    model = stack()

    def decay(output: torch.Tensor) -> torch.Tensor:
        return output.sum() + sum((p @ p.T).sum() for p in model.parameters() if p.dim() == 2)

    same(model, x(), loss=decay)


def test_an_outer_counter_sees_every_block() -> None:
    model = stack()
    with FlopCounter(model) as outer, folds() as names:
        inner = count(model, x(), backward=True)
    assert names == []
    assert outer.profile.model_flops == inner.model_flops


def test_nothing_is_folded_off_meta() -> None:
    model = Stack()
    with folds() as names:
        count(model, torch.randn(3, WIDTH), backward=True, fold=True)
    assert names == []


def test_the_model_is_left_as_it_was() -> None:
    model = stack(Indexed)
    before = [OrderedDict(vars(module)) for module in model.modules()]
    call = nn.Module._call_impl
    count(model, x(), backward=True)
    assert [OrderedDict(vars(module)) for module in model.modules()] == before
    assert all(type(block.layer_idx) is int for block in model.blocks)  # type: ignore[union-attr]
    assert nn.Module._call_impl is call
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_of_the_model_is_its_own() -> None:
    class Failing(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            raise ZeroDivisionError("mine")

    model = Failing().to("meta")
    with pytest.raises(ZeroDivisionError, match="mine"):
        count(model, x())
    assert same(stack(), x()) == blocks(*range(1, N))


# --- whole collections, nightly -------------------------------------------------------------------------------------
TIMM = [
    "beit_base_patch16_224", "cait_xxs24_224", "coat_lite_tiny", "coatnet_nano_rw_224", "convit_tiny",
    "convmixer_768_32", "convnext_tiny", "convnextv2_atto", "crossvit_9_240", "cspresnet50", "davit_tiny",
    "deit3_small_patch16_224", "densenet121", "dla34", "dm_nfnet_f0", "dpn68", "edgenext_xx_small",
    "efficientformer_l1", "efficientnet_b0", "efficientvit_b0", "eva02_tiny_patch14_224", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_100", "hardcorenas_a", "hgnet_tiny", "hrnet_w18_small",
    "inception_v4", "levit_128s", "maxvit_tiny_tf_224", "mixer_b16_224", "mobilenetv4_conv_small", "mobileone_s0",
    "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnety_002",
    "repvgg_a0", "resmlp_12_224", "resnest14d", "resnet50", "rexnet_100", "skresnet18", "res2net50_14w_8s",
    "samvit_base_patch16", "seresnet50", "sequencer2d_s", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "tiny_vit_5m_224", "tnt_s_patch16_224", "twins_pcpvt_small", "vgg11", "visformer_tiny", "vit_small_patch16_224",
    "volo_d1_224", "vovnet39a", "xception41", "xcit_tiny_12_p8_224",
]  # fmt: skip

GROUPED = ("mistral", "qwen2", "qwen3", "gemma", "mixtral", "stablelm")
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(
        ("llama", "gemma2", "phi", "gpt_neox", "gpt2", "opt", "bloom",
         "falcon", "mamba", "olmo2", "cohere", "starcoder2", "smollm3", "granite"),
        ("AutoModelForCausalLM", {}),
    ),
    **{kind: ("AutoModelForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}) for kind in GROUPED},
    "gptj": ("AutoModelForCausalLM", {"rotary_dim": 4}),
    **dict.fromkeys(
        ("bert", "roberta", "electra", "distilbert", "albert", "modernbert", "deberta-v2", "mpnet"),
        ("AutoModel", {}),
    ),
    "t5": ("AutoModelForTextEncoding", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 6, "num_heads": 4}),
}  # fmt: skip


def every_vision_model() -> list[str]:
    from flopprof.models import vision

    models = pytest.importorskip("torchvision.models")
    names = models.list_models(module=models)
    return [name for name in vision.names() if name in names and not name.startswith("quantized_")]


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*every_vision_model(), *(f"timm:{name}" for name in TIMM)])
def test_every_vision_model_counts_the_same_folded(name: str) -> None:
    from flopprof.models import load

    workload = load(name, batch=2)
    same(workload.model, *workload.args, backward=True)
    same(workload.model.train(), *workload.args)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", HEADS)
def test_every_language_model_counts_the_same_folded(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    head, sizes = HEADS[kind]
    common: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 48,
        "vocab_size": 60, "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**common, **sizes})
    with torch.device("meta"):
        model = getattr(transformers, head).from_config(config).eval()
    ids = torch.zeros(2, 12, dtype=torch.long, device="meta")
    for backward in (False, True):
        same(model, ids, backward=backward)
    same(model.train(), ids, backward=True)
