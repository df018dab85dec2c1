"""Meta tensors that carry values: they answer as CPU tensors do, are never stale, and guesses are owned up to."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cases_values import QUESTIONS, program
from flopprof import FlopCounter, count
from flopprof.counting import count as counting
from flopprof.counting.guesses import EVEN, FINITE, UNEQUAL
from flopprof.counting.values import Values, carried, holds_numbers, remembering
from flopprof.errors import ValuesUnknown
from flopprof.profile import Profile
from zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs


@contextmanager
def noting(**inputs: torch.Tensor) -> Iterator[list[str]]:
    """Values carried under a counter; gives the sentences noted so far."""
    notes: list[str] = []
    with FlopCounter(), carried(notes.append, inputs):
        yield notes


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# --- answers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_on_meta_is_answered_as_on_the_cpu(name: str, mode: Callable[[], Any]) -> None:
    with mode():
        expected = QUESTIONS[name]("cpu")
        with noting() as notes:
            assert QUESTIONS[name]("meta") == expected
    assert notes == []


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_of_views_and_writes_give_the_cpus_numbers(seed: int) -> None:
    expected = program(seed, "cpu")
    with noting():
        assert program(seed, "meta") == expected


def test_without_values_the_questions_fail() -> None:
    """The answers above are the work of what is tested."""
    for question in QUESTIONS.values():
        with pytest.raises((RuntimeError, NotImplementedError)):
            question("meta")


def test_the_carriers_place_does_not_matter() -> None:
    notes: list[str] = []
    with carried(notes.append), FlopCounter() as counter:
        assert torch.tensor([1, 2], device="meta").tolist() == [1, 2]
        meta(2, 3) @ meta(3, 4)
    assert counter.profile.forward_flops == 48


def test_control_flow_operators_read_their_predicate() -> None:
    def branches(predicate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(predicate, lambda x: x @ x, lambda x: x.sin(), (x,))

    def model(x: torch.Tensor) -> torch.Tensor:
        return branches(torch.tensor(True, device="meta"), x) + branches(torch.tensor(False, device="meta"), x)

    assert count(model, meta(4, 4)).forward_flops == 2 * 4 * 4 * 4


def test_vmap_carries_values() -> None:
    with noting():
        row = torch.arange(3, device="meta")
        mask = torch.vmap(lambda i: torch.vmap(lambda j: i >= j)(row))(row)
        assert mask.tolist() == [[True, False, False], [True, True, False], [True, True, True]]


# --- never stale ----------------------------------------------------------------------------------------------------
@torch.library.custom_op("flopprof_values::scribble", mutates_args={"x"})
def scribble(x: torch.Tensor) -> None:
    """Writes where no operator of torch is seen to."""
    x.data.numpy()[:] = 3


@scribble.register_fake
def _(x: torch.Tensor) -> None:
    return None


def unknown_write(name: str, known: torch.Tensor, source: torch.Tensor) -> None:
    first = known[:1]
    {
        "copy_": lambda: first.copy_(source[:1]),
        "add_": lambda: first.add_(source[:1]),
        "assignment": lambda: known.__setitem__(0, source[0]),
        "masked": lambda: known.__setitem__(source > 0, 1),
        "index_put_": lambda: known.index_put_((torch.tensor([0], device="meta"),), source[:1]),
        "out": lambda: torch.add(source, source, out=known),
        "random_": lambda: known.random_(0, 5),
        "bernoulli_": lambda: known.bernoulli_(0.5),
        "foreach": lambda: torch._foreach_add_([known], [source]),
        "of a view": lambda: known.view(2, 2).t()[0].add_(source[:2]),
        "through data": lambda: known.data.add_(source),
        "by a custom operator": lambda: scribble(known),
        "set_": lambda: known.set_(source.untyped_storage(), 0, (4,)),
        "data": lambda: setattr(known, "data", source),
        "scatter_": lambda: known.scatter_(0, source, 1),
    }[name]()


WRITES = [
    "copy_", "add_", "assignment", "masked", "index_put_", "out", "random_", "bernoulli_", "foreach", "of a view",
    "through data", "by a custom operator", "set_", "data", "scatter_",
]  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
def test_what_an_unknown_write_reached_is_not_known_any_more(write: str, mode: Callable[[], Any]) -> None:
    with mode(), pytest.raises(ValuesUnknown), noting():
        known, source = torch.arange(4, device="meta"), meta(4, dtype=torch.long)
        other = known.view(2, 2)
        unknown_write(write, known, source)
        with pytest.raises(ValuesUnknown):
            known.tolist()
        if write not in ("set_", "data"):  # these give it another storage
            with pytest.raises(ValuesUnknown):
                other.sum().item()


def partly(x: torch.Tensor) -> torch.Tensor:
    """(2, 11), of which columns 4 to 6 are known."""
    return torch.cat([x, torch.arange(6.0, device=x.device).reshape(2, 3), x], dim=-1)


def test_what_is_joined_to_unknown_numbers_stays_known() -> None:
    expected = partly(torch.randn(2, 4))
    with noting():
        joined = partly(meta(2, 4))
        assert joined[:, 4:7].tolist() == expected[:, 4:7].tolist()
        assert joined.split([4, 3, 4], -1)[1].bool().sum().item() == 5
        assert joined.t()[5, 1].item() == 4.0


@pytest.mark.parametrize(
    "view",
    [lambda x: x, lambda x: x[:, 3:5], lambda x: x[1, 7], lambda x: x.view(torch.int16)[0, 10], lambda x: x.add_(1)],
    ids=["all", "edge", "behind", "other type", "written"],
)
def test_of_the_rest_nothing_is_known(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(ValuesUnknown), noting():
        view(partly(meta(2, 4))).sum().item()
    with pytest.raises(ValuesUnknown), noting():
        joined = partly(meta(2, 4))
        joined += meta(2, 1)
        joined[:, 4].sum().item()


def test_too_large_tensors_carry_nothing() -> None:
    with pytest.raises(ValuesUnknown), noting():
        with pytest.raises(ValuesUnknown):
            torch.zeros(1 << 26, dtype=torch.bool, device="meta").any().item()
        with pytest.raises(ValuesUnknown):
            torch.zeros(1 << 23, device="meta").sum().item()


# --- unknown values -------------------------------------------------------------------------------------------------
UNKNOWN: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "nonzero": lambda x: (x > 0).nonzero(),
    "select": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat": lambda x: x.repeat_interleave(x[:, 0].long(), dim=0),
    "random": lambda x: torch.rand(3, device="meta").gt(0.5).all().item(),
    "copy": lambda x: x.cpu(),
    "of a sorted list": lambda x: x.flatten().sort()[1].tolist(),
    "of a large choice": lambda x: meta(2, 2000).argmax(-1).tolist(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_nobody_can_know_is_refused(name: str) -> None:
    with pytest.raises(ValuesUnknown, match="values that the meta device does not have"), noting() as notes:
        UNKNOWN[name](meta(3, 4))
    assert notes == []
    with pytest.raises(ValuesUnknown):
        count(UNKNOWN[name], meta(3, 4))


@pytest.mark.parametrize("name", ["lengths", "grid_thw", "cu_seqlens", "num_items", "image_sizes"])
def test_sizes_are_not_guessed(name: str) -> None:
    lengths = meta(3, dtype=torch.long)
    with pytest.raises(ValuesUnknown), noting(**{name: lengths}):
        lengths.tolist()


@pytest.mark.parametrize(
    "ask",
    [
        lambda ids: ids.tolist(),
        lambda ids: ids.max().item(),
        lambda ids: bool((ids > 5).any()),
        lambda ids: torch.bincount(ids.flatten()),
        lambda ids: F.one_hot(ids, 100).sum().item(),
        lambda ids: range(ids[0, 0]),
        lambda ids: ids.float().mean().item(),
        lambda ids: torch.zeros(4, device="meta").repeat_interleave(ids[0, :4]),
        lambda ids: ids.cpu(),
    ],
)
def test_of_guessed_ids_only_their_being_different_is_known(ask: Callable[[torch.Tensor], Any]) -> None:
    ids = meta(2, 5, dtype=torch.long)
    with pytest.raises(ValuesUnknown), noting(input_ids=ids):
        ask(ids)


def swallowed(x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
    try:
        wide = bool(flag.any())
    except RuntimeError:
        return x
    return x @ x if wide else x @ x[:, :1]


@pytest.mark.parametrize("backward", [False, True])
def test_a_swallowed_question_is_asked_again_with_values(backward: bool) -> None:
    x = meta(4, 4).requires_grad_()
    known = count(swallowed, x, torch.tensor([False, False]), backward=backward)
    assert known.forward_flops == 2 * 4 * 4 * 1
    with pytest.raises(ValuesUnknown):
        count(swallowed, x, meta(2), backward=backward)


# --- guesses --------------------------------------------------------------------------------------------------------
def test_ids_are_taken_to_hold_no_special_token() -> None:
    ids = meta(2, 5, dtype=torch.long)
    with noting(input_ids=ids) as notes:
        shifted = ids.new_zeros(2, 5)
        shifted[:, 1:] = ids[:, :-1]
        assert notes == []  # nothing was asked
        assert 7 not in ids
        assert not (ids[:, [0, -1]] == 1).any()
        assert (ids != -100).sum().item() == 10
        assert bool((ids >= 0).all())
        assert not torch.isin(ids, torch.tensor([3, 4], device="meta")).any()
        assert torch.unique(ids).shape == (10,)
        assert (shifted == 0).nonzero().tolist() == [[0, 0], [1, 0]]
    assert len(notes) == 1
    assert "input_ids" in notes[0]


def test_masks_and_positions_are_taken_by_their_names() -> None:
    inputs = {
        "attention_mask": meta(2, 3, dtype=torch.long),
        "bool_masked_pos": meta(2, dtype=torch.bool),
        "src_key_padding_mask": meta(2, dtype=torch.bool),
        "position_ids": meta(2, 3, dtype=torch.long),
        "token_type_ids": meta(2, 2, dtype=torch.long),
    }
    answers = [[[1] * 3] * 2, [True] * 2, [False] * 2, [[0, 1, 2]] * 2, [[0, 0]] * 2]
    with noting(**inputs) as notes:
        for number, (tensor, answer) in enumerate(zip(inputs.values(), answers, strict=True), 1):
            assert tensor.tolist() == answer
            assert len(notes) == number
    assert [name for name, note in zip(inputs, notes, strict=True) if name in note] == list(inputs)


def test_a_guess_is_noted_once_and_only_when_used() -> None:
    def model(x: torch.Tensor, mask: torch.Tensor, ask: bool) -> torch.Tensor:
        for _ in range(3 * ask):
            if not mask.all():
                raise AssertionError
        return torch.tensor([1, 2], device="meta").sum().item() * x @ x

    x, mask = meta(3, 3), meta(3, dtype=torch.bool)
    assert count(model, x, mask, False).assumptions == ()
    assert count(model, x, mask, True).assumptions == (
        "every element of mask is taken to be True: its values were not given",
    )


def test_numbers_are_taken_to_be_finite() -> None:
    x = meta(3, 3)
    with noting() as notes:
        assert not x.isnan().any()
        assert not x.isinf().any()
        assert torch.isfinite(x).all()
    assert notes == [FINITE]


@pytest.mark.parametrize(("shape", "mask"), [((1, 2, 4), (1, 3)), ((3, 2), (2,)), ((2, 3, 4), (2, 4))])
def test_a_mask_of_another_shape_fails_as_on_the_cpu(shape: tuple[int, ...], mask: tuple[int, ...]) -> None:
    def select(device: str) -> torch.Tensor:
        return torch.ones(shape, device=device)[torch.ones(mask, dtype=torch.bool, device=device)]

    for device in ("cpu", "meta"):
        with pytest.raises(IndexError, match="shape of the mask"), noting():
            select(device)
        with pytest.raises(IndexError, match="shape of the mask"), carried(lambda _: None):
            select(device)


def test_pictures_are_taken_not_to_be_blank() -> None:
    pictures = meta(3, 2, 4, 4)
    with noting() as notes:
        assert ((pictures == 0.0).sum((-1, -2, -3)) != 2 * 4 * 4).tolist() == [True] * 3
        assert (pictures != 0).all()
        assert pictures[(pictures == 0).flatten(1).all(1).logical_not()].shape == pictures.shape
    assert notes == [UNEQUAL]


def test_a_tensor_made_on_the_cpu_joins_those_on_meta() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        filled = x.masked_fill(x > 0, torch.tensor(3.0, device="cpu"))
        return filled @ torch.ones(4, 5, device="cpu") + torch.where(x.sum() > 0, torch.tensor(1.0), x.sum())

    counted = count(model, meta(3, 4).requires_grad_(), backward=True)
    assert counted.forward_flops == 2 * 3 * 4 * 5
    assert counted.backward_flops == 2 * 3 * 4 * 5


def test_a_name_made_of_a_number_is_the_cpus() -> None:
    with noting():
        chosen = torch.tensor([4, 7], device="meta")
        assert [f"expert_{index}" for index in chosen] == ["expert_4", "expert_7"]
        assert f"{chosen[1]:03d}" == "007"
        assert "meta" in f"{chosen}"


class Stepping(nn.Module):
    """Asks a number that it was built with, as codecs ask for their stride."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("steps", torch.tensor(3), persistent=False)
        self.order = torch.tensor([2, 0, 1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(int(self.steps)):
            x = self.linear(x)
        return x[self.order.tolist()]


def test_what_a_model_was_built_with_is_remembered() -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            return Stepping()

    forgetful = build()
    assert holds_numbers(forgetful)
    assert not holds_numbers(forgetful.linear)
    with pytest.raises(ValuesUnknown):
        count(forgetful, meta(3, 4))
    model = remembering(build)
    for _ in range(2):
        assert count(model, meta(3, 4)).forward_flops == 3 * 2 * 3 * 4 * 4


@pytest.mark.parametrize(("tokens", "experts", "k"), [(12, 4, 2), (7, 3, 1), (64, 8, 3), (2, 8, 2)])
def test_routing_is_taken_to_be_even(tokens: int, experts: int, k: int) -> None:
    scores = meta(2, tokens, experts)
    least, most = 2 * tokens * k // experts, -(-2 * tokens * k // experts)
    with noting() as notes:
        for chosen in (
            scores.topk(k)[1],
            scores.transpose(1, 2).topk(k, dim=1)[1].transpose(1, 2),
            scores.softmax(-1).sort(descending=True)[1][..., :k],
            *([scores.argmax(-1), scores.max(dim=-1)[1], scores.argmax(-1, keepdim=True)] if k == 1 else []),
        ):
            rows = chosen.reshape(2 * tokens, k).tolist()
            assert all(len(set(row)) == k for row in rows)  # no expert twice for one token
            shares = torch.bincount(chosen.flatten(), minlength=experts).tolist()
            assert sum(shares) == 2 * tokens * k
            if (2 * tokens) % experts == 0:
                assert set(shares) == {2 * tokens * k // experts}
        assert set(torch.bincount(scores.topk(k)[1].flatten(), minlength=experts).tolist()) <= {least, most}
    assert notes == [EVEN]


# --- counts ---------------------------------------------------------------------------------------------------------
def by_module(profile: Profile) -> dict[str, dict[str, int]]:
    return {phase: profile.by_module(phase) for phase in ("forward", "backward")}


class Sparse(nn.Module):
    """Every way to pick rows by values, each followed by a product."""

    def __init__(self) -> None:
        super().__init__()
        self.picked, self.masked, self.repeated, self.placed = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor, repeats: torch.Tensor) -> torch.Tensor:
        picked = self.picked(x[mask])
        masked = self.masked(x.masked_select(mask.unsqueeze(-1)).view(-1, 6))
        repeated = self.repeated(x.repeat_interleave(repeats, dim=0))
        placed = self.placed(x).masked_scatter(mask.unsqueeze(-1), picked)
        rows, _ = torch.where(mask)
        x = x.index_put((mask,), masked)
        return placed.sum() + repeated.sum() + x[rows].sum() + torch.zeros_like(x).index_add(0, rows, x[rows]).sum()


@pytest.mark.parametrize("replay", [False, True])
def test_gradients_of_what_was_selected_count_as_on_the_cpu(replay: bool) -> None:
    model = Sparse()
    inputs = (
        torch.randn(3, 4, 6, requires_grad=True),
        torch.tensor([[True, False, True, True], [False] * 4, [True, False, False, False]]),
        torch.tensor([2, 0, 3]),
    )

    def run(*args: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, *args, use_reentrant=False) if replay else model(*args)

    on_cpu = count(run, *inputs, backward=True)
    model.to("meta")
    on_meta = count(run, inputs[0].to("meta").requires_grad_(), *inputs[1:], backward=True)
    assert by_module(on_meta) == by_module(on_cpu)
    assert on_meta.recompute_flops == on_cpu.recompute_flops == replay * on_cpu.forward_flops
    assert on_meta.exact
    assert on_cpu.forward_flops == 2 * 6 * 6 * (4 + 4 + 5 * 4 + 3 * 4)


def test_lengths_given_on_the_cpu_are_read() -> None:
    query, ends = meta(8, 2, 16), torch.tensor([0, 3, 8], dtype=torch.int32)

    def attend(query: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        run = torch.ops.aten._flash_attention_forward
        return run(query, query, query, ends, ends, 5, 5, 0.0, False, False)[0]

    assert count(attend, query, ends).forward_flops == 2 * 2 * (3 * 3 + 5 * 5) * (16 + 16)
    assert count(attend, query, ends.to("meta")).uncounted == {"aten::_flash_attention_forward": 1}


def test_lengths_that_must_be_on_the_cpu_stay_there() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 5, device="meta")

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.linear(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True).data)

    assert count(Packed(), meta(2, 3, 4), torch.tensor([3, 1])).forward_flops == 2 * 4 * 4 * 5


@pytest.mark.parametrize("name", ["gpt", "unet", "resnet18", "llama", "t5"])
def test_a_model_that_asks_nothing_counts_the_same_with_values(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.eval().to("meta")
    moved = [value.to("meta") for value in inputs]

    def run(*, values: bool) -> Profile:
        with FlopCounter(model) as counter:
            if values:
                with carried(counter.assume):
                    output = model(*moved)
            else:
                output = model(*moved)
        assert output is not None
        return counter.profile

    assert run(values=True) == run(values=False)


def test_a_model_that_asks_nothing_is_not_slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("values were carried")

    monkeypatch.setattr(counting, "carried", refuse)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).to("meta")
    assert count(model, meta(2, 3)).forward_flops == 48


def test_a_count_that_fails_leaves_nothing_behind() -> None:
    model = nn.BatchNorm1d(3).to("meta")
    model.seen = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        model.seen.append(1)
        x = nn.BatchNorm1d.forward(model, x)
        return x[x > 0]

    model.forward = forward
    with pytest.raises(ValuesUnknown):
        count(model, meta(2, 3), backward=True)
    assert model.seen == []


def test_inputs_on_the_cpu_run_where_the_model_is() -> None:
    """On the CPU this encoder packs what is padded; on meta it cannot, and says so."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval().to("meta")
    x, padding = torch.zeros(2, 3, 16), torch.tensor([[False, False, True], [False, True, True]])
    each = 2 * 2 * 3 * 16 * (3 * 16 + 16 + 2 * 32) + 2 * 2 * 2 * 3 * 3 * 16
    assert count(encoder, x).forward_flops == count(encoder, x.to("meta")).forward_flops == 2 * each
    with torch.no_grad(), pytest.raises(ValuesUnknown):
        count(encoder, x, src_key_padding_mask=padding)


def test_a_guess_stays_with_what_it_was_written_to() -> None:
    mask = meta(3, dtype=torch.bool)
    with noting(mask=mask) as notes:
        target = torch.zeros(2, 3, dtype=torch.long, device="meta")
        target[0].copy_(mask)
        chosen = torch.where(target[0] > 0)[0]
        assert len(notes) == 1
        assert chosen.tolist() == [0, 1, 2]
    with noting(mask=mask) as notes:
        flags = torch.zeros(3, dtype=torch.bool, device="meta").logical_or_(mask)
        assert notes == []
        assert flags.all()
        assert len(notes) == 1


# --- the context ----------------------------------------------------------------------------------------------------
def test_values_die_with_their_tensors_and_with_the_context() -> None:
    with noting():
        mode = torch._C._get_dispatch_stack_at(0)
        assert type(mode) is Values
        kept = torch.arange(3, device="meta")
        for _ in range(2000):
            torch.arange(10, device="meta").add_(1)
        gc.collect()
        assert len(mode.store) == 1
        assert kept.tolist() == [0, 1, 2]
    assert len(mode.store) == 0
    with pytest.raises(RuntimeError):
        kept.tolist()
    with pytest.raises(ValuesUnknown), noting():
        kept.tolist()


def test_contexts_nest_and_share_what_they_know() -> None:
    mask = meta(3, dtype=torch.bool)
    outer: list[str] = []
    inner: list[str] = []
    with FlopCounter() as counter, carried(outer.append, {"mask": mask}):
        known = torch.arange(3, device="meta")
        with FlopCounter() as second, carried(inner.append):
            assert known.tolist() == [0, 1, 2]
            assert mask.all()
            meta(2, 3) @ meta(3, 4)
        meta(2, 3) @ meta(3, 4)
    assert outer == inner == ["every element of mask is taken to be True: its values were not given"]
    assert (counter.profile.forward_flops, second.profile.forward_flops) == (96, 48)


def test_an_error_closes_the_context() -> None:
    def fail() -> None:
        with FlopCounter(), carried(print):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
