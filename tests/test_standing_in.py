"""What stands in for torch's functions while a counter is open: unseen by those who override, replace or save them.

Attention of one head on 5 queries and keys of width 8: Q K^T and P V are 2 * 5*5*8 each, 800 in all. A causal mask lets
15 of the 25 pairs through: 480.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode, resolve_name

from doubling import Double
from flopprof import FlopCounter

FULL, CAUSAL = 2 * 2 * 5 * 5 * 8, 2 * 2 * 15 * 8
ORIGINAL = F.scaled_dot_product_attention


@pytest.fixture
def q() -> torch.Tensor:
    return torch.randn(1, 1, 5, 8)


@pytest.fixture(autouse=True)
def originals() -> Iterator[None]:
    kept = [
        (nn.Module, "_call_impl", nn.Module._call_impl),
        (torch.autograd.Function, "apply", torch.autograd.Function.__dict__["apply"]),
        (F, "scaled_dot_product_attention", ORIGINAL),
    ]
    yield
    for owner, name, value in kept:
        setattr(owner, name, value)


class Causal(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Duck:
    """No tensor: known by its override alone."""

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {name: getattr(item, "held", item) for name, item in (kwargs or {}).items()}
        return func(*(getattr(item, "held", item) for item in args), **named)


# --- overrides ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("keys", [5, 7])
def test_a_causal_bias_masks_as_it_does_without_a_counter(bias: Callable[..., Any], keys: int, q: torch.Tensor) -> None:
    k, mask = torch.randn(1, 1, keys, 8), bias(5, keys)
    plain = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
    with FlopCounter() as counter:
        assert torch.equal(plain, F.scaled_dot_product_attention(q, k, k, attn_mask=mask))
    assert counter.profile.forward_flops == 2 * 2 * 5 * keys * 8


def test_another_thread_sees_nothing_of_a_counter(q: torch.Tensor) -> None:
    k, mask, same = torch.randn(1, 1, 7, 8), causal_lower_right(5, 7), []
    plain = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    def other() -> None:
        same.append(torch.equal(plain, F.scaled_dot_product_attention(q, k, k, attn_mask=mask)))

    with FlopCounter():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert same == [True]


def test_another_thread_compiles_attention_with_an_override(q: torch.Tensor) -> None:
    mask, found = causal_upper_left(5, 5), []
    attend = torch.compile(
        lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=mask), backend="eager", fullgraph=True
    )
    with FlopCounter():
        thread = threading.Thread(target=lambda: found.append(attend(q)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], ORIGINAL(q, q, q, is_causal=True))
    torch._dynamo.reset()


@pytest.mark.parametrize("known", ["identity", "equality", "table", "name"])
def test_a_function_mode_knows_the_function(known: str, q: torch.Tensor) -> None:
    tests: dict[str, Callable[[Any], bool]] = {
        "identity": lambda func: func is F.scaled_dot_product_attention,
        "equality": lambda func: func == ORIGINAL and func == ORIGINAL,
        "table": lambda func: func in {ORIGINAL: "attention"},
        "name": lambda func: resolve_name(func) == "torch.nn.functional.scaled_dot_product_attention",
    }

    class Sevenfold(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return 7 * args[2] if tests[known](func) else func(*args, **(kwargs or {}))

    with Sevenfold(), FlopCounter() as counter:
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=True), 7 * q)
    assert counter.profile.forward_flops == 0


def test_what_is_no_tensor_attends_by_its_override(q: torch.Tensor) -> None:
    given = Duck(q)
    with FlopCounter(attention="causal") as counter:
        out = F.scaled_dot_product_attention(given, given, given, is_causal=True)
    assert torch.equal(out, ORIGINAL(q, q, q, is_causal=True))
    assert counter.profile.forward_flops == CAUSAL


def test_a_symbolic_trace_holds_the_original(q: torch.Tensor) -> None:
    with FlopCounter() as counter:
        traced = torch.fx.symbolic_trace(Causal())
        out = traced(q, q, q)
    assert torch.equal(out, ORIGINAL(q, q, q, is_causal=True))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [ORIGINAL]
    assert all(node.target is ORIGINAL for node in traced.graph.nodes if node.op == "call_function")
    assert counter.profile.forward_flops == FULL


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_script_made_inside_a_counter_calls_the_operator(q: torch.Tensor) -> None:
    with FlopCounter() as counter:
        scripted = torch.jit.script(Causal())
        out = scripted(q, q, q)
    assert torch.equal(out, ORIGINAL(q, q, q, is_causal=True))
    assert counter.profile.forward_flops == FULL
    assert torch.equal(torch.jit.script(Causal())(q, q, q), out)


def test_what_is_copied_or_saved_is_the_original() -> None:
    with FlopCounter():
        found = F.scaled_dot_product_attention
        assert (found.__name__, found.__module__, repr(found)) == (
            ORIGINAL.__name__,
            ORIGINAL.__module__,
            repr(ORIGINAL),
        )
        assert found.__doc__ == ORIGINAL.__doc__
        assert copy.deepcopy(found) is ORIGINAL
        assert pickle.loads(pickle.dumps(found)) is ORIGINAL
        assert pickle.loads(pickle.dumps(ORIGINAL)) is ORIGINAL
    assert F.scaled_dot_product_attention is ORIGINAL


# --- replacements ---------------------------------------------------------------------------------------------------
def sevenfold(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False) -> Any:
    return 7 * v


def test_a_replacement_is_what_runs_between_and_within_counters(q: torch.Tensor) -> None:
    F.scaled_dot_product_attention = sevenfold
    for _ in range(2):
        with FlopCounter() as counter:
            assert torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=True), 7 * q)
        assert counter.profile.forward_flops == 0
        assert F.scaled_dot_product_attention is sevenfold
    F.scaled_dot_product_attention = ORIGINAL
    with FlopCounter() as counter:
        F.scaled_dot_product_attention(q, q, q)
    assert counter.profile.forward_flops == FULL


def test_a_replacement_put_there_while_a_counter_is_open_stays(q: torch.Tensor) -> None:
    with FlopCounter() as counter:
        before = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = sevenfold
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), 7 * q)
    assert F.scaled_dot_product_attention is sevenfold
    assert counter.profile.forward_flops == 0
    F.scaled_dot_product_attention = before  # as whoever patched it will put back what was there
    with FlopCounter(attention="causal") as counter:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert counter.profile.forward_flops == CAUSAL


def test_a_replacement_taken_away_while_a_counter_is_open_is_gone(q: torch.Tensor) -> None:
    F.scaled_dot_product_attention = sevenfold
    with FlopCounter():
        F.scaled_dot_product_attention = ORIGINAL
    assert F.scaled_dot_product_attention is ORIGINAL


def test_a_replaced_call_of_modules_is_what_runs() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    original = nn.Module._call_impl
    nn.Module._call_impl = lambda self, *args, **kwargs: original(self, *args, **kwargs) * 3
    plain = layer(x)
    with FlopCounter(layer) as counter:
        assert torch.equal(layer(x), plain)
    assert counter.profile.forward_flops == 2 * 2 * 4 * 4


def test_a_call_wrapped_inside_a_counter_counts_once_in_the_next() -> None:
    layer, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    with FlopCounter():
        ours = nn.Module._call_impl
        nn.Module._call_impl = lambda self, *args, **kwargs: ours(self, *args, **kwargs).clone()
        theirs = nn.Module._call_impl
    assert nn.Module._call_impl is theirs
    with FlopCounter(layer) as counter:
        layer(x)
    assert nn.Module._call_impl is theirs
    assert {row.fqn: row.calls for row in counter.profile.modules} == {"": 1, "0": 1}
    assert counter.profile.forward_flops == 2 * 2 * 4 * 4


def test_a_replaced_apply_of_functions_is_what_runs() -> None:
    x, original = torch.randn(2, 4), torch.autograd.Function.__dict__["apply"]
    torch.autograd.Function.apply = classmethod(lambda cls, *args: original.__get__(None, cls)(*args) * 3)
    with FlopCounter():
        assert torch.equal(Double.apply(x), x * 2 * 3)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="built without torch.distributed")
@pytest.mark.parametrize("counter", ["outside", "inside"])
def test_context_parallel_reaches_its_own_attention(counter: str) -> None:
    attention = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._attention")
    if not hasattr(attention, "_distribute_function"):
        pytest.skip("this torch shards the context in another way")
    seen: list[str] = []

    def enter(*call: Any) -> Any:
        seen.append("sharded")
        return call[1], call[2]

    def distribute() -> None:
        attention._distribute_function(F.scaled_dot_product_attention, F, None, enter, lambda *call: call[2])

    q = torch.randn(1, 1, 5, 8)
    try:
        if counter == "inside":
            distribute()
        with FlopCounter() as opened:
            if counter == "outside":
                distribute()
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
            attention._restore_function(F.scaled_dot_product_attention, F)
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
    finally:
        attention._replaced_functions.clear()
    assert seen == ["sharded"]
    assert opened.profile.forward_flops == 2 * FULL
    assert F.scaled_dot_product_attention is ORIGINAL
