"""Calls under `no_grad`, one after the other: what runs behind them works on what all of them gave."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import flopprof

IN, OUT, CHUNK = 8, 4, 3


def encode(rows: int) -> int:
    """FLOPs of an encoder's forward: rows x IN times IN x OUT."""
    return 2 * rows * IN * OUT


def chunked(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(chunk) for chunk in x.split(CHUNK)])


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something was compiled in this process, fewer segments are counted as soon as they come."""
    monkeypatch.setattr("flopprof.meter.tracking.anything_compiled", lambda: False)


class Loop:
    """A loop over batches of so many rows; what its step multiplies is told by `expected`."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.encoder, self.second = nn.Linear(IN, OUT, bias=False), nn.Linear(IN, OUT, bias=False)
        self.head = nn.Linear(OUT, 1, bias=False)
        self.mix = nn.Parameter(torch.randn(OUT, OUT))
        parameters = [*self.encoder.parameters(), *self.second.parameters(), *self.head.parameters(), self.mix]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3)

    def finish(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def meter(self) -> flopprof.Meter:
        return flopprof.Meter(self.encoder, self.second, self.head, peak=1e12, skip=0)


class Pooled(Loop):
    """Attention over what a frozen encoder makes of all chunks, under a trained head."""

    def __call__(self, x: torch.Tensor) -> None:
        z = chunked(self.encoder, x)
        self.head(((z @ self.mix @ z.T).softmax(-1) @ z).mean(0, keepdim=True)).sum().backward()
        self.finish()

    @staticmethod
    def expected(rows: int) -> int:
        mixed = 2 * rows * OUT * OUT * 2  # z @ mix, and the gradient of mix
        scored = 2 * rows * rows * OUT * 2  # @ z.T, and the gradient of z @ mix
        summed = 2 * rows * rows * OUT * 2  # weights @ z, and the gradient of the weights
        return encode(rows) + mixed + scored + summed + 3 * 2 * OUT


class Mined(Loop):
    """Similarities of all rows under `no_grad`, by two encoders, then a step of one of them on a row."""

    def __call__(self, x: torch.Tensor) -> None:
        with torch.no_grad():
            z = chunked(self.encoder, x) + chunked(self.second, x)
            (z @ z.T).argmax(-1)
        self.head(self.encoder(x[:1])).sum().backward()
        self.finish()

    @staticmethod
    def expected(rows: int) -> int:
        return 2 * encode(rows) + 2 * rows * rows * OUT + 2 * encode(1) + 3 * 2 * OUT


class Cached(Loop):
    """GradCache: a contrastive loss over all rows, whose gradient goes back through one chunk after the other."""

    def __call__(self, x: torch.Tensor) -> None:
        z, y = chunked(self.encoder, x).requires_grad_(), chunked(self.second, x).requires_grad_()
        torch.nn.functional.cross_entropy(z @ y.T, torch.arange(len(x))).backward()
        for model, cached in ((self.encoder, z), (self.second, y)):
            assert cached.grad is not None
            for chunk, gradient in zip(x.split(CHUNK), cached.grad.split(CHUNK), strict=True):
                (model(chunk) * gradient).sum().backward()
        self.finish()

    @staticmethod
    def expected(rows: int) -> int:
        return 2 * 3 * encode(rows) + 3 * 2 * rows * rows * OUT  # twice forward and once backward; the loss


LOOPS = [Pooled, Mined, Cached]


def counts(make: Callable[[], Loop], sizes: Sequence[int]) -> tuple[list[int | None], list[int]]:
    """FLOPs of the steps of these rows, and which were counted."""
    loop = make()
    with loop.meter() as meter:
        for x in meter.track([torch.randn(rows, IN) for rows in sizes], progress=False):
            loop(x)  # type: ignore[operator]
        return flops(meter), [i for i, record in enumerate(meter.records) if "counted" in record.left_out]


def flops(meter: flopprof.Meter) -> list[int | None]:
    meter.summary()
    return [record.model_flops for record in meter.records]


def wrong(found: Sequence[int | None], expected: Sequence[int]) -> list[int]:
    return [i for i, (told, right) in enumerate(zip(found, expected, strict=True)) if told not in {None, right}]


@pytest.mark.parametrize("make", LOOPS)
@pytest.mark.parametrize(
    "sizes",
    [
        [6] * 5 + [12] * 5 + [3] * 5 + [24] * 5,
        [3, 12, 24] * 6,
        [3] * 3 + [6, 9, 3, 12] * 6,
        ([12] * 6 + [7]) * 3,
    ],
    ids=["steady", "in turns", "one chunk first", "a ragged last one"],
)
def test_work_behind_chunks_is_of_all_of_them(make: type[Loop], sizes: list[int]) -> None:
    found, _ = counts(make, sizes)
    assert not wrong(found, [make.expected(rows) for rows in sizes])  # type: ignore[attr-defined]
    assert found.count(None) <= 2  # of a new number of chunks, perhaps not the first


@pytest.mark.parametrize("make", LOOPS)
@pytest.mark.parametrize("ragged", [False, True])
def test_any_number_of_chunks_is_soon_known(make: type[Loop], ragged: bool) -> None:
    numbers = random.Random(0)
    sizes = [CHUNK * numbers.randint(1, 12) - ragged * numbers.randint(0, 2) for _ in range(200)]
    found, counted = counts(make, sizes)
    assert not wrong(found, [make.expected(rows) for rows in sizes])  # type: ignore[attr-defined]
    assert None not in found
    assert len(counted) <= 35
    assert len([i for i in counted if i >= 100]) <= 5


def test_micro_batches_of_chunks() -> None:
    """Each with a backward pass of its own, through what the loop made of them: the one before tells nothing of it."""
    loop = Loop()
    numbers = random.Random(5)
    batches = [[CHUNK * numbers.randint(1, 5) for _ in range(2)] for _ in range(60)]
    with loop.meter() as meter:
        for sizes in meter.track(batches, progress=False):
            for rows in sizes:
                z = chunked(loop.encoder, torch.randn(rows, IN))
                (z @ loop.mix @ z.T).square().mean().backward()
            loop.finish()
        assert flops(meter) == [
            sum(encode(n) + 2 * 2 * n * OUT * OUT + 2 * 2 * n * n * OUT for n in sizes) for sizes in batches
        ]


@pytest.mark.parametrize("number", [4, None])
@pytest.mark.parametrize("behind", ["encoder", "head", "backward"])
def test_documents_of_any_length_tell_what_each_of_them_is_multiplied_by(behind: str, number: int | None) -> None:
    """By its own transpose: the sum of their lengths alone does not say."""
    loop = Loop()
    lengths = random.Random(1)
    batches = [[lengths.randint(2, 9) for _ in range(number or lengths.randint(1, 6))] for _ in range(200)]
    with loop.meter() as meter:
        for batch in meter.track(batches, progress=False):
            with torch.no_grad():
                documents = [loop.encoder(torch.randn(length, IN)) for length in batch]
            for place in ("encoder", "head", "backward"):
                if place == "head":
                    loss = loop.head(torch.ones(2, OUT)).sum()
                if place == "backward":
                    loss.backward()
                if place == behind:
                    [document @ document.T for document in documents]
            loop.finish()
        found = flops(meter)
        head = 2 * 2 * 2 * OUT
    assert not wrong(found, [sum(encode(n) + 2 * n * n * OUT for n in batch) + head for batch in batches])
    assert found[100:].count(None) <= 2
    assert len([i for i, record in enumerate(meter.records) if i >= 100 and "counted" in record.left_out]) <= 4


@pytest.mark.parametrize("number", [4, 8, None])
def test_documents_that_are_padded_to_the_longest(number: int | None) -> None:
    loop = Loop()
    lengths = random.Random(2)
    batches = [[lengths.randint(2, 9) for _ in range(number or lengths.randint(1, 6))] for _ in range(200)]
    with loop.meter() as meter:
        for batch in meter.track(batches, progress=False):
            with torch.no_grad():
                documents = [loop.encoder(torch.randn(length, IN)) for length in batch]
            (nn.utils.rnn.pad_sequence(documents, batch_first=True) @ loop.mix).sum().backward()
            loop.finish()
        found = flops(meter)
    expected = [sum(map(encode, batch)) + 2 * 2 * len(batch) * max(batch) * OUT * OUT for batch in batches]
    assert not wrong(found, expected)
    assert found[100:].count(None) <= 6
    assert len([i for i, record in enumerate(meter.records) if i >= 100 and "counted" in record.left_out]) <= 25


def test_numbers_of_chunks_are_known_to_a_resumed_meter() -> None:
    sizes = [3, 12, 24, 6, 9, 15] * 4
    loop = Pooled()
    meter = loop.meter()
    for x in meter.track([torch.randn(rows, IN) for rows in sizes], progress=False):
        loop(x)
    again = loop.meter()
    again.load_state_dict(meter.state_dict())
    for x in again.track([torch.randn(rows, IN) for rows in sizes[:6]], progress=False):
        loop(x)
    new = again.records[len(sizes) :]
    assert [record.model_flops for record in new] == [Pooled.expected(rows) for rows in sizes[:6]]
    assert not any("counted" in record.left_out for record in new)


def test_a_backward_without_a_recorded_call_is_told_by_the_calls_before_it() -> None:
    """A teacher's results are all that a product of the loop's own is made of."""
    loop = Loop()
    meter = loop.meter()
    sizes = [5, 9] * 6
    for x in meter.track([torch.randn(rows, IN) for rows in sizes], progress=False):
        with torch.no_grad():
            z = loop.encoder(x)
        (z @ loop.mix).square().sum().backward()
        loop.finish()
    meter.summary()
    assert [record.model_flops for record in meter.records] == [
        encode(rows) + 2 * 2 * rows * OUT * OUT for rows in sizes
    ]
