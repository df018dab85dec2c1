"""What a device allows: the batch where FLOPs take as long as bytes, by brute force; steps on proved lines."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopprof.errors import UsageError
from flopprof.hardware import device
from flopprof.inference.bounds import Rates, bounded
from flopprof.inference.generation import Amounts, Walk
from flopprof.inference.result import Cache, CachePart, Inference
from flopprof.inference.traffic import Routed, Traffic

_FAR = 3000


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    experts = draw(st.integers(2, 16))
    shares = st.builds(
        Routed,
        experts=st.just(experts),
        chosen=st.integers(1, experts),
        bytes_each=st.integers(1, 500),
        flops=st.just(0),
    )
    return Traffic(
        flops=draw(st.integers(1, 400)),
        weight_bytes=draw(st.integers(0, 2000)),
        row_bytes=draw(st.integers(0, 3)),
        cache_read_bytes=draw(st.integers(0, 60)),
        cache_written_bytes=draw(st.integers(0, 3)),
        routed=tuple(draw(st.lists(shares, max_size=2))),
    )


@given(traffics(), st.integers(1, 40), st.integers(1, 40))
def test_the_crossing_is_the_first_batch_by_trying_all(traffic: Traffic, flops_per_s: int, bytes_per_s: int) -> None:
    def crossed(batch: int) -> bool:
        return Fraction(batch * traffic.flops, flops_per_s) >= traffic.bytes_at(batch) / bytes_per_s

    found = traffic.compute_bound_from(Fraction(flops_per_s), Fraction(bytes_per_s))
    first = next((batch for batch in range(1, _FAR) if crossed(batch)), None)
    if found is None or found >= _FAR:
        assert first is None
    else:
        assert found == first
        assert all(crossed(batch) for batch in range(found, found + 50))
    if found is None:
        assert traffic.most_intensity is not None
        assert traffic.most_intensity <= Fraction(flops_per_s, bytes_per_s)


def test_a_batch_reads_no_more_than_every_expert_and_no_less_than_one_token() -> None:
    share = Routed(experts=8, chosen=2, bytes_each=10, flops=0)
    assert share.expected(0) == 0
    assert share.expected(1) == 20
    assert all(share.expected(n) < share.expected(n + 1) < 80 for n in range(1, 40))


def _step(traffic: Traffic, batch: int, weights: int = 1000) -> Inference:
    part = CachePart(kind="attention", tensors=2, dtype="bfloat16", bytes=70, bytes_per_token=10)
    return Inference(
        target="toy", mode="decode", batch=batch, tokens=batch, flops=batch * traffic.flops,
        bytes_moved=round(traffic.bytes_at(batch)), weight_bytes=weights, dtype="bfloat16", device="meta",
        cache=Cache(cls="DynamicCache", tokens=7, parts=(part,)), traffic=traffic,
    )  # fmt: skip


def test_bounds_are_times_at_the_peaks() -> None:
    traffic = Traffic(flops=600, weight_bytes=900, row_bytes=10, cache_read_bytes=70, cache_written_bytes=20)
    found = bounded(
        _step(traffic, 3), Rates(None, Fraction(100), Fraction(50), 1250), [(1800, Fraction(1200))], traffic
    )
    bounds = found.bounds
    assert bounds is not None
    assert (bounds.compute_s, bounds.memory_s, bounds.time_s) == (18, 24, 24)
    assert bounds.bound == "memory"
    assert bounds.tokens_per_s == 3 / 24
    assert bounds.ridge == 2
    assert bounds.compute_bound_from == 5  # 600 b / 100 >= (900 + 100 b) / 50 from 4.5 on
    assert bounds.most_intensity == 6
    assert bounds.largest_batch == 3  # (1250 - 1000) // (70 + 10)


def test_a_model_that_does_not_fit_holds_no_cache() -> None:
    traffic = Traffic(flops=600, weight_bytes=900, row_bytes=10, cache_read_bytes=70, cache_written_bytes=20)
    found = bounded(_step(traffic, 1), Rates(None, Fraction(1), Fraction(1), 999), [(600, Fraction(1000))], traffic)
    assert found.bounds is not None
    assert found.bounds.largest_batch == 0


def test_a_named_device_is_that_of_the_table() -> None:
    row = device("H100")
    name, flops_per_s, bytes_per_s, memory = Rates.read("H100").of("bfloat16")  # type: ignore[union-attr]
    assert (name, flops_per_s, bytes_per_s, memory) == (
        row.name,
        row.peaks["bfloat16"],
        row.bytes_per_s,
        row.memory_bytes,
    )
    with pytest.raises(UsageError):
        Rates.read("H1000")
    assert Rates.read(None) is None


# --- steps on lines ---------------------------------------------------------------------------------
class _Toy:
    """Stands for a generator: its steps take what `flops` says."""

    def __init__(self, flops: Any, cache: str = "DynamicCache", windows: tuple[int, ...] = ()) -> None:
        self.flops, self.cache, self.windows, self.ran = flops, cache, windows, 0

    def steps(self, batch: int, contexts: Any, source: int | None) -> list[Any]:
        self.ran += len(contexts)
        layers = ("transformers.cache_utils.DynamicLayer",) if self.cache == "DynamicCache" else ("its.own.Layer",)
        return [
            SimpleNamespace(
                context=context,
                cache=self.cache,
                layers=layers,
                windows=self.windows,
                profile=SimpleNamespace(forward_flops=self.flops(context)),
                kept=(),
                reads={},
            )
            for context in contexts
        ]


_WEIGHTS: Any = SimpleNamespace(stacks=frozenset(), steady=frozenset())


def _walked(toy: _Toy, first: int, last: int) -> list[Amounts]:
    return Walk(toy, first, last, source=None, known=_WEIGHTS).all  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "flops",
    [
        lambda context: 7 * context + 3,
        lambda context: 7 * min(context + 1, 128) + 3,
        lambda context: 7 * min(context + 1, 128) + 3 * min(context, 700) + context,
        lambda context: context * context,  # on no line: each is run
        lambda context: 5 * (context // 64) + context,
    ],
)
@pytest.mark.parametrize("windows", [(), (128,)])
def test_steps_on_lines_are_those_that_would_be_run(flops: Any, windows: tuple[int, ...]) -> None:
    walked = _walked(_Toy(flops, windows=windows), 5, 1500)
    assert [each.flops for each in walked] == [flops(context) for context in range(5, 1501)]


def test_a_line_takes_few_steps() -> None:
    toy = _Toy(lambda context: 7 * min(context + 1, 4096) + 3, windows=(4096,))
    assert len(_walked(toy, 100, 100_000)) == 99_901
    assert toy.ran < 30


def test_a_cache_of_its_own_kind_is_watched_long_enough_to_see_what_comes_every_128_tokens() -> None:
    def flops(context: int) -> int:
        return 7 * context + (1000 if context % 128 == 0 else 0)

    walked = _walked(_Toy(flops, cache="ItsOwnCache"), 5, 900)
    assert [each.flops for each in walked] == [flops(context) for context in range(5, 901)]
