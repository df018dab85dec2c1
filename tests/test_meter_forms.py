"""Forms through the counts of a loop: what they tell is true, and they tell enough."""

import random
from collections.abc import Callable, Iterable

import pytest

from flopprof.meter.fitting import Forms

FLOPS, BYTES = ("float32", "forward"), ("", "bytes")
Cost = Callable[..., int]


def loop(cost: Cost, sizes: Iterable[tuple[int, ...]], nodes: Cost = lambda *_: 4) -> tuple[int, int]:
    """(sizes that were counted, those that a form told): as a meter does it. What is told must be true."""
    forms = Forms()
    counted: set[tuple[int, ...]] = set()
    told = 0
    for size in sizes:
        if size in counted:
            continue
        true = {FLOPS: cost(*size), BYTES: 4 * (512 + size[0])}
        found = forms.at((*size, -1 - nodes(*size)))
        if found is None:
            forms.add((*size, -1 - nodes(*size)), true)
            counted.add(size)
        else:
            assert found == true, size
            told += 1
    return len(counted), told


def linear(batch: int, length: int) -> int:
    return 2 * batch * length * 512


def attention(batch: int, length: int) -> int:
    return linear(batch, length) + 4 * batch * length * length * 8


def test_a_smaller_last_batch_is_told_by_counts_of_its_own() -> None:
    """(8, 4), (8, 8), (8, 12) and (5, 6) lie on a plane in (batch, length) that no other count lies on."""
    assert loop(linear, [(8, 4), (8, 8), (8, 12), (5, 6), (5, 10), (5, 8), (8, 10)]) == (6, 1)


def test_a_smaller_last_batch_does_not_spoil_what_is_known_of_the_others() -> None:
    lengths = [9, 4, 20, 17, 12]
    counted, told = loop(attention, [*((8, n) for n in lengths), (5, 6), *((8, n) for n in range(4, 21))])
    assert counted == 5  # three coefficients, a count that proves them, and the other batch
    assert told == 14


def test_sizes_on_a_line_tell_nothing_beside_it() -> None:
    """Lengths of twice the batch: batch x length and 2 x batch x batch are the same there."""
    forms = Forms()
    for batch in range(2, 9):
        forms.add((batch, 2 * batch, -5), {FLOPS: linear(batch, 2 * batch)})
    assert forms.at((3, 6, -5)) == {FLOPS: linear(3, 6)}
    assert forms.at((3, 10, -5)) is None


def test_a_budget_of_tokens_tells_nothing_of_another_budget() -> None:
    """As many tokens in each batch, and as many FLOPs: that is no reason to think these constant."""
    forms = Forms()
    for batch in (2, 3, 4, 6, 8):
        forms.add((batch, 24 // batch, -5), {FLOPS: linear(batch, 24 // batch)})
    assert forms.at((6, 12, -5)) is None
    assert forms.at((5, 5, -5)) is None


def test_beside_the_hull_of_what_was_counted_nothing_is_told() -> None:
    corners = [(b, n) for b in (2, 4, 6, 8) for n in (4, 8, 12, 16) if n <= 2 * b]
    forms = Forms()
    for size in corners:
        forms.add((*size, -5), {FLOPS: linear(*size)})
    assert forms.at((6, 10, -5)) is None  # lengths on the lattice of fours
    assert forms.at((7, 12, -5)) is None
    assert forms.at((4, 8, -5)) == {FLOPS: linear(4, 8)}
    assert forms.at((2, 12, -5)) is None


def test_steps_that_made_other_nodes_are_no_proof() -> None:
    """Checkpointing switched off: four counts with it say nothing of one without, whose sizes they span."""
    forms = Forms()
    for batch, length in ((1, 10), (2, 7), (4, 7), (1, 13)):
        forms.add((batch, length, -42), {FLOPS: 4 * linear(batch, length)})
    forms.add((4, 11, -2), {FLOPS: 3 * linear(4, 11)})
    assert forms.at((1, 12, -2)) is None
    for length in (7, 9, 10):
        forms.add((4, length, -2), {FLOPS: 3 * linear(4, length)})
    assert forms.at((4, 8, -2)) == {FLOPS: 3 * linear(4, 8)}
    assert forms.at((4, 8, -42)) is None


def test_a_loop_over_the_length_makes_nodes_in_proportion() -> None:
    counted, told = loop(linear, [(4, n) for n in (3, 12, 7, 5, 9, 4, 6, 8, 10, 11)], nodes=lambda _, n: 3 * n + 1)
    assert (counted, told) == (3, 7)


def test_layers_that_are_skipped_at_random_are_told_by_their_number() -> None:
    """Same inputs, one node per layer: nodes are a size like others once no form does without."""
    forms = Forms()
    for layers in (4, 2, 1):
        forms.add((3, -1 - layers), {FLOPS: 100 * layers})
    assert forms.at((3, -1 - 3)) == {FLOPS: 300}
    assert forms.at((3,)) is not None
    assert forms.at((3, -1 - 5)) is None


def test_counts_that_made_no_nodes_are_a_kind_like_others() -> None:
    """Of a model that is called in some steps and bypassed in others: what made none multiplied nothing."""
    forms = Forms()
    forms.add((3, 8, -1), {FLOPS: 0})
    forms.at((5, 8))
    forms.add((5, 8, -1), {FLOPS: 0})
    assert forms.at((3, 8)) is not None
    forms.add((9, 8, -4), {FLOPS: 1152})
    assert forms.at((3, 8, -1)) == {FLOPS: 0}
    assert forms.at((9, 8)) is None


def test_a_number_that_grows_in_every_step_is_counted_ever_less_often() -> None:
    """The number of the step, given to the model: of 0 to 16 no count is another, then of 33, 67 and 135."""
    assert loop(lambda n, i: 7 * n, [(8, i) for i in range(200)]) == (17 + 3, 200 - 20)


def test_a_number_that_grows_beside_lengths_makes_no_difference_to_them() -> None:
    chance = random.Random(0)
    steps = [(8, chance.randrange(8, 65, 4), i) for i in range(600)]
    counted, told = loop(lambda batch, length, i: attention(batch, length), steps)
    assert counted <= 30
    assert told == 600 - counted


def test_how_many_boxes_each_image_has_makes_no_difference() -> None:
    """Eight images, and targets of 1 to 20 boxes that no product depends on."""
    chance = random.Random(0)
    steps = [tuple(chance.randint(1, 20) for _ in range(8)) for _ in range(400)]
    assert loop(lambda *boxes: 8 * 4000, steps)[0] <= 24


@pytest.mark.parametrize("cost", [lambda *boxes: 100 * sum(boxes), lambda *boxes: 100 * len(boxes) * max(boxes)])
def test_where_it_does_nothing_wrong_is_told(cost: Cost) -> None:
    """In proportion to all boxes, or to those of the image with most (padded)."""
    chance = random.Random(1)
    loop(cost, [tuple(chance.randint(1, 20) for _ in range(6)) for _ in range(60)])


def test_a_count_that_is_another_now_is_what_holds() -> None:
    forms = Forms()
    for length in (2, 9, 4, 6):
        forms.add((length, -1), {FLOPS: 5 * length})
    assert forms.at((5, -1)) == {FLOPS: 25}
    forms.add((4, -1), {FLOPS: 21})
    assert forms.at((5, -1)) is None


SHAPES = {
    "fixed batch": lambda r, n: 8,
    "smaller last batch": lambda r, n: r.choice([8] * 9 + [5]),
    "any batch": lambda r, n: r.choice([1, 2, 3, 4, 6, 8]),
    "budget of tokens": lambda r, n: max(1, 128 // n) if r.random() < 0.95 else 3,
    "near a line": lambda r, n: n // 2 if r.random() < 0.95 else 4,
}
COSTS: dict[str, Cost] = {
    "linear": linear,
    "attention": attention,
    "window": lambda b, n: b * n * min(n, 6) * 8 + b * n * 192,
    "truncated": lambda b, n: b * min(n, 12) * 8,
    "padded": lambda b, n: b * (-(-n // 8) * 8) * 8,
    "strided": lambda b, n: b * ((n - 1) // 2 + 1) * 8,
    "padded batch": lambda b, n: (-(-b // 4) * 4) * n * 8,
    "another algorithm for large ones": lambda b, n: b * n * (8 if b * n < 64 else 12),
}
LENGTHS = [range(4, 20), range(4, 64), range(4, 40, 4), [5, 9, 16, 20], range(8, 200, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cost", COSTS)
def test_no_form_of_a_random_loop_is_wrong(cost: str, shape: str) -> None:
    for seed in range(4):
        chance = random.Random(f"{seed} {cost} {shape}")
        lengths = [chance.choice(chance.choice(LENGTHS)) for _ in range(80)]
        counted, told = loop(COSTS[cost], [(SHAPES[shape](chance, n), n) for n in lengths])
        if cost in ("linear", "attention") and shape == "fixed batch":
            assert counted <= told + 12


def test_two_lengths_and_a_smaller_last_batch() -> None:
    """An encoder and a decoder: cross attention multiplies the two lengths."""

    def cost(batch: int, source: int, target: int) -> int:
        return batch * (100 * source + 90 * target + 8 * source * target + source**2 + target**2)

    chance = random.Random(1)
    sizes = [(3 if i % 10 == 9 else 8, chance.randint(4, 30), chance.randint(4, 30)) for i in range(300)]
    counted, told = loop(cost, sizes)
    assert told > 4 * counted
