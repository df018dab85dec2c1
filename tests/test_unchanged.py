"""A counter changes nothing: results are bitwise those without it, and count() leaves everything as it was."""

# Longer than 400 lines: one table of cases, with the models that its rows name.
from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flopprof
from flopprof import FlopCounter

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    train: bool = True
    autocast: bool = False
    gradients: bool = True


class Attention(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Scaled(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.causal = causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class Recurrent(nn.Module):
    def __init__(self, kind: str, **kwargs: Any) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(16, 8, batch_first=True, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


def elementwise(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], nn.Module]:
    class Elementwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self.layer(x))

    return Elementwise


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=4), nn.GroupNorm(2, 8),
        nn.Hardswish(), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1), nn.GELU(),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def encoder(**kwargs: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def sequence() -> torch.Tensor:
    return torch.randn(2, 6, 16)


def image() -> torch.Tensor:
    return torch.randn(2, 3, 10, 10)


ACTIVATIONS = (
    "relu",
    "silu",
    "gelu",
    "hardswish",
    "mish",
    "elu",
    "softplus",
    "hardsigmoid",
    "leaky_relu",
    "celu",
    "selu",
)
NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(16),
    "rms norm": lambda: nn.RMSNorm(16),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "instance norm": lambda: nn.InstanceNorm1d(6, affine=True),
    "group norm": lambda: nn.GroupNorm(3, 6),
    "local response norm": lambda: nn.LocalResponseNorm(2),
}
CASES: dict[str, Case] = {
    "transformer, training": Case(encoder, sequence),
    "transformer, norm first, gelu": Case(lambda: encoder(norm_first=True, activation="gelu"), sequence),
    "transformer, fast path": Case(encoder, sequence, train=False, gradients=False),
    "transformer, eval": Case(encoder, sequence, train=False),
    "attention, training": Case(Attention, sequence),
    "attention with dropout": Case(lambda: Attention(dropout=0.2), sequence),
    "attention, fast path": Case(Attention, sequence, train=False, gradients=False),
    "sdpa": Case(lambda: Scaled(False), sequence),
    "sdpa causal": Case(lambda: Scaled(True), sequence),
    "cnn, training": Case(cnn, image),
    "cnn, eval": Case(cnn, image, train=False, gradients=False),
    "lstm": Case(lambda: Recurrent("LSTM", num_layers=2, bidirectional=True), sequence),
    "lstm with dropout": Case(lambda: Recurrent("LSTM", num_layers=2, dropout=0.3), sequence),
    "lstm projected": Case(lambda: Recurrent("LSTM", proj_size=4), sequence),
    "gru": Case(lambda: Recurrent("GRU"), sequence),
    "rnn": Case(lambda: Recurrent("RNN", nonlinearity="relu"), sequence),
    "lstm, eval": Case(lambda: Recurrent("LSTM"), sequence, train=False, gradients=False),
    "dropout": Case(lambda: nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.AlphaDropout(0.1)), sequence),
    "rrelu": Case(elementwise(lambda x: F.rrelu(x, training=True)), sequence),
    "softmax": Case(elementwise(lambda x: F.softmax(x, -1) * F.log_softmax(x, -2)), sequence),
    "einsum": Case(elementwise(lambda x: torch.einsum("bij,bkj->bik", x, x)), sequence),
    "cdist": Case(elementwise(lambda x: torch.cdist(x, x.flip(1))), sequence),
    "linalg": Case(elementwise(lambda x: torch.linalg.inv(x.mT @ x + torch.eye(16))), sequence),
    "fft": Case(elementwise(lambda x: torch.fft.rfft(x).abs()), sequence),
    "gather and sort": Case(elementwise(lambda x: x.sort(-1)[0].gather(-1, x.argsort(-1))), sequence),
    "autocast cnn": Case(cnn, image, autocast=True),
    "autocast transformer": Case(encoder, sequence, autocast=True),
    "autocast lstm": Case(lambda: Recurrent("LSTM"), sequence, autocast=True),
    **{name: Case(elementwise(getattr(F, name)), sequence) for name in ACTIVATIONS},
    **{
        name: Case(lambda build=build: nn.Sequential(nn.Linear(16, 16), build()), sequence)
        for name, build in NORMS.items()
    },
}


def execute(case: Case, module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Everything a run makes: output, gradients, buffers, and what the random state gives next."""
    torch.manual_seed(3)
    module.train(case.train)
    module.zero_grad()
    x = x.clone().requires_grad_(case.gradients)
    with torch.set_grad_enabled(case.gradients), torch.autocast("cpu", enabled=case.autocast):
        output = module(x)
        if case.gradients:
            output.float().square().mean().backward()
    gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
    found = [output, *(gradient for gradient in gradients if gradient is not None), *module.buffers(), torch.rand(3)]
    return [tensor.detach().clone() for tensor in found]


def bitwise(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """The same tensors: type, shape, strides and every bit."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("name", CASES)
def test_results_are_bitwise_those_without_the_counter(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    module, x = case.build(), case.inputs()
    bare = execute(case, copy.deepcopy(module), x)
    assert bitwise(bare, execute(case, copy.deepcopy(module), x)), "not deterministic by itself"
    under = copy.deepcopy(module)
    with FlopCounter(under):
        results = execute(case, under, x)
    assert bitwise(bare, results)
    twice = copy.deepcopy(module)
    with FlopCounter(twice), FlopCounter():
        results = execute(case, twice, x)
    assert bitwise(bare, results)


def test_the_comparison_rejects_a_difference() -> None:
    x = torch.randn(3, 4)
    assert bitwise([x], [x.clone()])
    assert not bitwise([x], [x + 1e-6])
    assert not bitwise([x], [x.double()])
    assert not bitwise([x], [x.mT.contiguous().mT])
    assert not bitwise([x], [x, x])


def test_strides_of_outputs_and_identity_of_views() -> None:
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    layer = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    bare = layer(x)
    with FlopCounter():
        under = layer(x)
        view = x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1)
        view.zero_()
    assert under.stride() == bare.stride()
    assert x.abs().sum() == 0


def test_saved_tensor_hooks_and_grad_functions_are_the_same() -> None:
    module = encoder()
    x = sequence()

    # Under any dispatch mode torch spells a reshape without a copy the other way; the view and its backward are one.
    spelled = {"ReshapeAliasBackward0": "ViewBackward0"}

    def graph(output: torch.Tensor) -> list[str]:
        seen, stack = [], [output.grad_fn]
        while stack:
            node = stack.pop()
            seen.append(spelled.get(node.name(), node.name()))
            stack += [after for after, _index in node.next_functions if after is not None]
        return seen

    bare = graph(module(x))
    with FlopCounter(module):
        under = graph(module(x))
    assert under == bare


# --- count() leaves everything as it was ----------------------------------------------------------------------------


class Stateful(nn.Module):
    """State of every sort: running statistics, a step counter, caches as attributes, and random numbers."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.cache: torch.Tensor | None = None
        self.history: list[torch.Tensor] = []
        self.table = {"calls": 0}
        self.nested = {"lists": [1, 2]}
        self.keys = torch.zeros(3, 4)  # a cache that is no buffer
        self.fails = fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.scratch = self.scratch + torch.rand(2)
        self.cache = self.layer(x)
        self.history.append(self.cache)
        self.table["calls"] += 1
        self.nested["lists"].append(3)
        self.made_in_forward = True
        self.keys += x.detach()
        random.random()
        if self.fails:
            raise ValueError("no luck")
        return F.dropout(self.norm(self.cache), 0.5, self.training)


def snapshot(module: Stateful) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "scratch": module.scratch.clone(),
        "cache": module.cache,
        "history": list(module.history),
        "table": dict(module.table),
        "nested": copy.deepcopy(module.nested),
        "keys": module.keys.clone(),
        "attributes": sorted(vars(module)),
        "modes": [submodule.training for submodule in module.modules()],
        "wanted": [parameter.requires_grad for parameter in module.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "random": random.getstate(),
        "torch random": torch.get_rng_state(),
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("graded", [True, False])
def test_count_leaves_a_module_as_it_was(training: bool, backward: bool, fails: bool, graded: bool) -> None:
    module = Stateful(fails=fails).train(training)
    module.norm.eval()
    if graded:
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
    identities = [id(parameter.grad) for parameter in module.parameters()]
    buffers = [id(buffer) for buffer in module.buffers()]
    before = snapshot(module)
    if fails:
        with pytest.raises(ValueError, match="no luck"):
            flopprof.count(module, torch.randn(3, 4), backward=backward)
        random.setstate(before["random"])
        torch.set_rng_state(before["torch random"])
    else:
        x = torch.randn(3, 4)
        before["torch random"] = torch.get_rng_state()
        flopprof.count(module, x, backward=backward)
    assert same(before, snapshot(module))
    assert [id(parameter.grad) for parameter in module.parameters()] == identities
    assert [id(buffer) for buffer in module.buffers()] == buffers


def test_count_restores_buffers_in_train_mode_only_by_value() -> None:
    module = nn.BatchNorm1d(4).train()
    mean = module.running_mean
    flopprof.count(module, torch.randn(8, 4) + 5)
    assert module.running_mean is mean
    assert torch.equal(mean, torch.zeros(4))
    assert int(module.num_batches_tracked) == 0


def test_count_restores_buffers_of_every_sort() -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("expanded", torch.ones(1).expand(3))
            self.register_buffer("eighth", torch.ones(3).to(torch.float8_e4m3fn))
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.register_buffer("whole", torch.arange(6.0))
            self.register_buffer("part", self.whole[2:4])
            self.register_buffer("nothing", None)
            with torch.inference_mode():
                self.register_buffer("inferred", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.eighth.copy_(x)
            self.part.zero_()
            self.inferred.zero_()
            return x + self.expanded

    module = Buffers()
    with torch.inference_mode():
        flopprof.count(module, torch.zeros(3))
    assert torch.equal(module.eighth.float(), torch.ones(3))
    assert torch.equal(module.whole, torch.arange(6.0))
    assert torch.equal(module.inferred, torch.ones(3))
    assert module.part.data_ptr() == module.whole[2:4].data_ptr()


class Remembered:
    """An object of a model's own kind that holds what was computed."""

    def __init__(self) -> None:
        self.found: dict[int, torch.Tensor] = {}
        self.asked = 0


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.memory = nn.Linear(4, 6), Remembered()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.memory.asked += 1
        if len(x) not in self.memory.found:
            self.memory.found[len(x)] = self.layer(x)
        return self.memory.found[len(x)] * 2


def test_count_leaves_the_objects_that_a_module_remembers_with() -> None:
    model, x = Remembering(), torch.ones(3, 4)
    memory = model.memory
    for _ in range(2):  # the second would find what the first has computed
        assert flopprof.count(model, x).forward_flops == 2 * 3 * 4 * 6
    assert model.memory is memory
    assert (memory.found, memory.asked) == ({}, 0)
    model(x)
    assert flopprof.count(model, x).forward_flops == 0
    assert (list(memory.found), memory.asked) == ([3], 1)


@pytest.mark.parametrize("registered", [False, True], ids=["attribute", "buffer"])
def test_count_leaves_no_graph_in_what_a_forward_writes_to(registered: bool) -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            if registered:
                self.register_buffer("cache", torch.zeros(2, 3))
            else:
                self.cache = torch.zeros(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache[:] = self.inner(x)
            return self.cache * 2

    module = Cached()
    cache = module.cache
    profiles = [flopprof.count(module, torch.randn(2, 3), backward=True) for _ in range(2)]
    assert profiles[0] == profiles[1]
    assert module.cache is cache
    assert (cache.grad_fn, cache.requires_grad, cache.grad) == (None, False, None)
    assert torch.equal(cache, torch.zeros(2, 3))


def test_count_leaves_the_random_state_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")

    class Draws(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(numpy.random.rand())

    numpy.random.seed(0)
    expected = numpy.random.rand()
    numpy.random.seed(0)
    flopprof.count(Draws(), torch.ones(2))
    assert numpy.random.rand() == expected


def test_count_adds_nothing_to_the_gradients_of_inputs() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    profile = flopprof.count(nn.Linear(4, 4, bias=False), x, backward=True)
    assert x.grad is None
    assert profile.backward_flops == 2 * (2 * 2 * 4 * 4)
    x.grad = torch.ones(2, 4)
    kept = x.grad
    flopprof.count(nn.Linear(4, 4), {"x": x}["x"], backward=True)
    assert x.grad is kept
    assert torch.equal(kept, torch.ones(2, 4))


def test_count_leaves_the_graph_behind_its_inputs() -> None:
    """The inputs are the result of a forward of the user's own, which a backward of his will need."""
    before, module = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    hidden = before(torch.randn(2, 4)).tanh()
    profile = flopprof.count(module, hidden, backward=True)
    assert profile.backward_flops == 2 * (2 * 2 * 4 * 4)
    assert before.weight.grad is None
    hidden.sum().backward()
    assert before.weight.grad is not None


@pytest.mark.parametrize("backward", [False, True])
def test_count_of_a_function_leaves_what_it_closes_over(backward: bool) -> None:
    module = nn.Linear(4, 4)
    module.weight.grad = torch.ones(4, 4)
    kept = module.weight.grad
    profile = flopprof.count(lambda x: module(x).square().sum(), torch.randn(2, 4), backward=backward)
    assert profile.forward_flops == 2 * 2 * 4 * 4
    assert module.weight.grad is kept
    assert torch.equal(kept, torch.ones(4, 4))
    assert module.bias.grad is None


def test_count_leaves_a_table_that_is_renormed_when_read() -> None:
    class Renormalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4, max_norm=0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x)

    module = Renormalising()
    before = module.table.weight.detach().clone()
    flopprof.count(module, torch.tensor([0, 1]))
    assert torch.equal(module.table.weight, before)


GLOBAL = nn.BatchNorm1d(4)


@pytest.mark.parametrize("how", ["closure", "global", "method", "partial", "argument", "list", "loss"])
def test_count_leaves_the_modules_that_a_function_uses(how: str) -> None:
    module, modules, x = nn.BatchNorm1d(4), [nn.BatchNorm1d(4)], torch.randn(8, 4)

    def call(function: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return function(x)

    functions: dict[str, Callable[[], object]] = {
        "closure": lambda: flopprof.count(lambda x: module(x).sum(), x),
        "global": lambda: flopprof.count(lambda x: GLOBAL(x).sum(), x),
        "method": lambda: flopprof.count(module.forward, x),
        "partial": lambda: flopprof.count(functools.partial(call, module), x),
        "argument": lambda: flopprof.count(call, module, x),
        "list": lambda: flopprof.count(lambda x: modules[0](x).sum(), x),
        "loss": lambda: flopprof.count(nn.Linear(4, 4), x, loss=lambda output: module(output).sum()),
    }
    functions[how]()
    for norm in (module, modules[0], GLOBAL):
        assert int(norm.num_batches_tracked) == 0
        assert torch.equal(norm.running_mean, torch.zeros(4))


def test_count_leaves_inputs_that_the_model_writes_to() -> None:
    x, cache = torch.randn(2, 4), torch.zeros(2, 4)
    before = x.clone()

    def run(x: torch.Tensor, *, state: list[torch.Tensor]) -> torch.Tensor:
        state[0] += x
        return F.relu_(x)

    flopprof.count(run, x, state=[cache])
    assert torch.equal(x, before)
    assert torch.equal(cache, torch.zeros(2, 4))


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_count_with_an_optimizer_takes_no_step(kind: str) -> None:
    module = Stateful()
    optimizer = getattr(torch.optim, kind)(module.parameters(), lr=0.1)
    module(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    before = snapshot(module), copy.deepcopy(optimizer.state_dict())
    states = [id(tensor) for state in optimizer.state.values() for tensor in state.values()]
    x = torch.randn(3, 4)
    state = torch.get_rng_state()
    flopprof.count(module, x, optimizer=optimizer)
    before[0]["torch random"] = state
    assert same(before[0], snapshot(module))
    assert same(before[1], optimizer.state_dict())
    assert [id(tensor) for state in optimizer.state.values() for tensor in state.values()] == states


def test_count_twice_is_the_same() -> None:
    module, x = Stateful(), torch.randn(3, 4)
    assert flopprof.count(module, x, backward=True) == flopprof.count(module, x, backward=True)


def test_count_says_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="a module or a callable, got int"):
        flopprof.count(3)
    with pytest.raises(ValueError, match="neither 'full' nor 'causal'"):
        flopprof.count(nn.Linear(2, 2), torch.ones(2, 2), attention="half")
    with pytest.raises(TypeError, match="a module or nothing, got function"):
        FlopCounter(lambda x: x)


def test_grad_mode_of_the_caller_is_kept() -> None:
    module = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        profile = flopprof.count(module, torch.ones(2, 4), backward=True)
        assert not torch.is_grad_enabled()
    assert profile.backward_flops == 2 * 2 * 4 * 4
