"""Closed forms equal counts at sizes that they were not made from, and where none is right there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flopprof import count
from flopprof.counting.closed import closed
from flopprof.counting.closed_places import Inputs
from flopprof.errors import NoForm, UsageError
from flopprof.profile import Profile

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

BATCH_SEQ = {"batch": (0, 0), "seq": (0, 1)}
IMAGE = {"batch": (0, 0), "h": (0, 2), "w": (0, 3)}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build().eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long, device="meta")


def forms(model: nn.Module, args: Any = (), dynamic: Any = None, kwargs: Any = None, **how: Any) -> Profile:
    return closed(lambda a, k: count(model, *a, **how, **k), args, kwargs or {}, dynamic)


def counted(
    model: nn.Module, sizes: dict[str, int], args: Any, dynamic: Any, kwargs: Any = None, **how: Any
) -> Profile:
    given, also = Inputs(args, kwargs or {}, dynamic).at(tuple(sizes.values()))
    return count(model, *given, **how, **also)


def assert_equal_at(
    profile: Profile, model: nn.Module, sizes: dict[str, int], args: Any, dynamic: Any, kwargs: Any = None, **how: Any
) -> None:
    """The whole profile, row by row: the count knows nothing of the forms."""
    expected = counted(model, sizes, args, dynamic, kwargs, **how)
    made = profile.at(**sizes)
    assert made.by_phase() == expected.by_phase()
    assert made.elementwise_flops == expected.elementwise_flops
    assert made.bytes_moved == expected.bytes_moved
    assert made == msgspec.structs.replace(expected, assumptions=made.assumptions)


def hugging_face(head: str, kind: str, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return on_meta(lambda: getattr(transformers, head).from_config(transformers.AutoConfig.for_model(kind, **config)))


def torchvision(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return on_meta(lambda: models.get_model(name, weights=None))


# --- known values ----------------------------------------------------------------------------------------------------
def test_llama_3_1_8b() -> None:
    # d = 4096, 32 layers, 32 heads and 8 key-value heads of 128, 14336 hidden, 128256 words.
    # Per token and layer 2 (2 d d + 2 d 1024 + 3 d 14336), and the head 2 d 128256; pairs: 2 * 2 d a layer.
    d = 4096
    per_token = 32 * 2 * (2 * d * d + 2 * d * 1024 + 3 * d * 14336) + 2 * d * 128256
    assert per_token == 15009316864
    assert 32 * 4 * d == 524288
    model = hugging_face(
        "AutoModelForCausalLM", "llama", hidden_size=d, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=14336, vocab_size=128256, max_position_embeddings=131072,
    )  # fmt: skip
    profile = forms(model, (ids(1, 64),), BATCH_SEQ)
    assert profile.formula() == "FLOPs = 15009316864*batch*seq + 524288*batch*seq**2"
    assert profile.at(batch=8, seq=4096).model_flops == per_token * 8 * 4096 + 524288 * 8 * 4096**2
    assert profile.formula(module="lm_head") == f"FLOPs = {2 * d * 128256}*batch*seq"
    assert_equal_at(profile, model, {"batch": 2, "seq": 333}, (ids(1, 64),), BATCH_SEQ)


def test_gpt2() -> None:
    # d = 768, 12 layers, 50257 words: 2 * 12 d d a layer and token, 2 d 50257; pairs 4 d a layer
    assert 12 * 2 * 12 * 768**2 + 2 * 768 * 50257 == 247064064
    assert 12 * 4 * 768 == 36864
    model = hugging_face("AutoModelForCausalLM", "gpt2")
    profile = forms(model, (ids(2, 32),), BATCH_SEQ)
    assert profile.formula() == "FLOPs = 247064064*batch*seq + 36864*batch*seq**2"
    for sizes in ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 1000}):
        assert_equal_at(profile, model, sizes, (ids(2, 32),), BATCH_SEQ)


@pytest.mark.nightly
def test_t5_base_has_two_lengths() -> None:
    # d = 768, inner 768, 3072 hidden, 12 layers a side, 32128 words. Per token and layer 2 (4 d d + 2 d 3072) on either
    # side. Of the second attention, q and out are per decoder token, k and v per encoder token: 2 * 2 d d each.
    d = 768
    layer = 2 * (4 * d * d + 2 * d * 3072)
    assert 12 * (layer + 4 * d * d) == 198180864
    assert 12 * (layer + 4 * d * d) + 2 * d * 32128 == 247529472
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=d, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    model = on_meta(lambda: transformers.T5ForConditionalGeneration(config))
    kwargs = {"input_ids": ids(1, 16), "decoder_input_ids": ids(1, 8)}
    dynamic = {
        "b": [("input_ids", 0), ("decoder_input_ids", 0)], "s": ("input_ids", 1), "t": ("decoder_input_ids", 1)
    }  # fmt: skip
    profile = forms(model, (), dynamic, kwargs)
    # scores and values: 4 d a pair in each of self (s s, t t) and cross attention (s t)
    assert profile.formula() == ("FLOPs = 198180864*b*s + 247529472*b*t + 36864*b*s**2 + 36864*b*s*t + 36864*b*t**2")
    assert_equal_at(profile, model, {"b": 3, "s": 77, "t": 41}, (), dynamic, kwargs)


# --- small models, forward and backward ------------------------------------------------------------------------------
class Causal(nn.Module):
    """Embedding, one causal attention, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(30, 8), nn.Linear(8, 24), nn.Linear(8, 30)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.embed(tokens)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])


MLP = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
CNN = nn.Sequential(
    nn.Conv2d(3, 4, 3, 2, 1),
    nn.BatchNorm2d(4),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(4, 6, 5, 3),
    nn.AdaptiveAvgPool2d(2),
)
SMALL: dict[str, tuple[Callable[[], nn.Module], Any, Any, list[dict[str, int]]]] = {
    "mlp": (lambda: MLP, (torch.empty(3, 8),), {"n": (0, 0)}, [{"n": 1}, {"n": 57}]),
    "causal attention": (
        Causal, (torch.zeros(2, 6, dtype=torch.long),), BATCH_SEQ, [{"batch": 1, "seq": 1}, {"batch": 4, "seq": 63}]
    ),
    "cnn": (
        lambda: CNN, (torch.empty(2, 3, 40, 40),), IMAGE,
        [{"batch": 1, "h": 64, "w": 31}, {"batch": 5, "h": 33, "w": 98}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("backward", [False, True])
def test_small_models_on_meta(name: str, backward: bool) -> None:
    build, args, dynamic, checks = SMALL[name]
    model = build().to("meta")
    args = tuple(tensor.to("meta") for tensor in args)
    profile = forms(model, args, dynamic, backward=backward)
    for sizes in checks:
        assert_equal_at(profile, model, sizes, args, dynamic, backward=backward)
    assert Profile.from_json(profile.to_json()) == profile
    if backward and name == "causal attention":
        causal = profile.with_attention("causal").at(batch=2, seq=5)
        assert causal.model_flops == counted(model, {"batch": 2, "seq": 5}, args, dynamic, backward=True).causal_flops


def test_a_model_with_real_weights_is_fitted_on_small_sizes() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    seen = []

    def count_at(args: Any, kwargs: Any) -> Profile:
        seen.append(args[0].shape[0])
        return count(model, *args, **kwargs)

    profile = closed(count_at, (torch.randn(3, 8),), {}, {"batch": (0, 0)})
    assert profile.formula() == f"FLOPs = {2 * 8 * 16 + 2 * 16 * 4}*batch"
    assert max(seen) < 200
    assert profile.at(batch=64) == count(model, torch.randn(64, 8))


def test_one_name_for_several_dimensions() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 5)

        def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * mask[..., None]

    model = on_meta(Masked)
    args, kwargs = (torch.empty(2, 6, 4, device="meta"),), {"mask": torch.empty(2, 6, device="meta")}
    dynamic = {"b": [(0, 0), ("mask", 0)], "seq": [(0, 1), ("mask", -1)]}
    profile = forms(model, args, dynamic, kwargs)
    assert profile.formula() == "FLOPs = 40*b*seq"
    assert_equal_at(profile, model, {"b": 3, "seq": 9}, args, dynamic, kwargs)


def test_a_loop_over_a_size_makes_calls_that_grow_with_it() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = x[:, 0]
            for step in range(x.shape[1]):
                state = self.cell(state) + x[:, step]
            return state

    model = on_meta(Loop)
    args = (torch.empty(2, 6, 4, device="meta"),)
    profile = forms(model, args, BATCH_SEQ)
    assert profile.formula() == "FLOPs = 32*batch*seq"
    rows = profile.at(batch=3, seq=40).operators  # the first state alone wants no gradient
    assert sum(row.calls for row in rows) == 40
    assert {row.shapes[1] for row in rows} == {(3, 4)}


# --- strides and padding ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_resnet18_at_odd_sizes(backward: bool) -> None:
    model = torchvision("resnet18")
    args = (torch.empty(1, 3, 224, 224, device="meta"),)
    profile = forms(model, args, IMAGE, backward=backward)
    for h, w in ((224, 224), (97, 131), (333, 64), (1, 1)):
        assert_equal_at(profile, model, {"batch": 2, "h": h, "w": w}, args, IMAGE, backward=backward)
    # the first convolution: 64 channels of 7 x 7 x 3 taps on half the size, rounded up
    expected = "FLOPs = 18816*batch*((h + 1)//2)*((w + 1)//2)"
    assert profile.formula("forward", module="conv1") == expected


def test_adaptive_windows_and_a_least_size() -> None:
    # AlexNet pools any map to 6 x 6; below 63 pixels its last pooling has no window.
    model = torchvision("alexnet")
    args = (torch.empty(1, 3, 224, 224, device="meta"),)
    profile = forms(model, args, IMAGE)
    for h, w in ((63, 64), (225, 300)):
        assert_equal_at(profile, model, {"batch": 1, "h": h, "w": w}, args, IMAGE)
    with pytest.raises(UsageError, match="h >= 63"):
        profile.at(batch=1, h=62, w=224)


# --- where a polynomial would be wrong -------------------------------------------------------------------------------
class Chunked(nn.Module):
    """Attention inside chunks of 16, the last one padded, as in Mamba-2 and windowed attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 0, 0, -x.shape[1] % 16)).unflatten(1, (-1, 16))
        return x @ x.mT


def test_padding_to_a_chunk_is_a_floor_or_no_form() -> None:
    model = on_meta(Chunked)
    args = (torch.empty(2, 40, 4, device="meta"),)
    profile = forms(model, args, BATCH_SEQ)
    assert profile.forms is not None
    if not profile.forms.reason:
        for seq in (15, 16, 17, 100, 333):
            assert_equal_at(profile, model, {"batch": 3, "seq": seq}, args, BATCH_SEQ)


class Windowed(nn.Module):
    """Full attention up to 100 tokens, to the last 100 beyond."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = x[:, -100:] if x.shape[1] > 100 else x
        return x @ keys.mT


@pytest.mark.parametrize(("example", "inside", "outside"), [(12, 100, 101), (300, 101, 100)])
def test_a_threshold_bounds_the_form(example: int, inside: int, outside: int) -> None:
    model = on_meta(Windowed)
    args = (torch.empty(2, example, 4, device="meta"),)
    profile = forms(model, args, BATCH_SEQ)
    assert_equal_at(profile, model, {"batch": 3, "seq": inside}, args, BATCH_SEQ)
    expected = {12: "8*batch*seq**2  where seq <= 100", 300: "800*batch*seq  where seq >= 100"}[example]
    if example == 300:  # at exactly 100 tokens both are 100 * 100 pairs
        assert profile.formula() == f"FLOPs = {expected}"
        outside = 99
    else:
        assert profile.formula() == f"FLOPs = {expected}"
    with pytest.raises(UsageError, match="the closed form holds only where seq"):
        profile.at(batch=3, seq=outside)


def test_a_largest_size_is_found_and_said() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.table = nn.Linear(4, 4), nn.Parameter(torch.zeros(150, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x + self.table[: x.shape[1]])

    model = on_meta(Positions)
    profile = forms(model, (torch.empty(2, 12, 4, device="meta"),), BATCH_SEQ)
    assert profile.formula() == "FLOPs = 32*batch*seq  where seq <= 150"
    with pytest.raises(UsageError, match="seq <= 150"):
        profile.at(batch=1, seq=151)


def test_only_multiples_are_accepted() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.unflatten(1, (-1, 4)).flatten(2))

    model = on_meta(Patches)
    args = (torch.empty(2, 40, 3, device="meta"),)
    profile = forms(model, args, BATCH_SEQ)
    # seq / 4 patches of 12 values to 4: 2 * 12 * 4 / 4 = 24 a position
    assert profile.formula() == "FLOPs = 24*batch*seq  where seq - 4*(seq//4) == 0"
    assert_equal_at(profile, model, {"batch": 3, "seq": 64}, args, BATCH_SEQ)
    with pytest.raises(UsageError, match="holds only where"):
        profile.at(batch=3, seq=65)


def test_parity_shows() -> None:
    class Even(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.mT if x.shape[1] % 2 else (x @ x.mT) @ x

    profile = forms(on_meta(Even), (torch.empty(2, 7, 4, device="meta"),), BATCH_SEQ)
    with pytest.raises(NoForm, match="other operators run at"):
        profile.formula()


@pytest.mark.parametrize(
    ("name", "dynamic", "reason"),
    [
        ("vit_b_16", IMAGE, "Wrong image height! Expected 224 but got 225"),
        ("vit_b_16", {"batch": (0, 0), "size": [(0, 2), (0, 3)]}, "the model runs at no other size"),
        pytest.param("swin_t", {"batch": (0, 0), "size": [(0, 2), (0, 3)]}, "no polynomial", marks=pytest.mark.nightly),
    ],
)
def test_models_of_one_size_or_of_windows_have_no_form(name: str, dynamic: Any, reason: str) -> None:
    model = torchvision(name)
    profile = forms(model, (torch.empty(1, 3, 224, 224, device="meta"),), dynamic)
    assert profile.exact
    with pytest.raises(NoForm, match=f"no closed form in batch, .* is proved: .*{reason}"):
        profile.formula()
    assert Profile.from_json(profile.to_json()) == profile


def test_tied_sizes_have_no_form() -> None:
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x

    profile = forms(on_meta(Square), (torch.empty(6, 6, device="meta"),), {"h": (0, 0), "w": (0, 1)})
    with pytest.raises(NoForm, match="h"):
        profile.at(h=5, w=5)


# --- wrong requests --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({}, "dynamic names no size"),
        ({"n": (1, 0)}, r"dynamic\['n'\] names argument 1: there are 0, 'mask'"),
        ({"n": ("ids", 0)}, r"dynamic\['n'\] names argument 'ids': there are 0, 'mask'"),
        ({"n": (0, 5)}, "names dimension 5 of argument 0, which has 2"),
        ({"n": 3}, r"is \(argument, dimension\), or a list of them, got 3"),
        ({"n o": (0, 0)}, "a name is a word"),
        ({"for": (0, 0)}, "a name is a word"),
        ({"n": (0, 0), "m": (0, 0)}, "names dimension 0 of argument 0 twice: 'n' and 'm'"),
        ({"n": [(0, 0), (0, 1)]}, "names dimensions of different sizes: 3 at dimension 0 of argument 0, 8 at"),
    ],
)
def test_places_that_are_wrong_are_named(dynamic: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        forms(MLP, (torch.empty(3, 8, device="meta"),), dynamic, {"mask": torch.empty(3, device="meta")})


def test_arguments_that_are_no_tensors_are_named() -> None:
    with pytest.raises(UsageError, match="argument 0, which is no dense tensor"):
        forms(MLP, ([1, 2],), {"n": (0, 0)})


def test_what_the_model_raises_on_the_arguments_themselves_is_raised() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        forms(nn.Linear(4, 5), (torch.empty(3, 7),), {"n": (0, 0)})


def test_symbolic_sizes_leave_torch_as_it_was() -> None:
    before = torch.SymInt.__hash__
    forms(CNN.to("meta"), (torch.empty(2, 3, 40, 40, device="meta"),), IMAGE)
    assert torch.SymInt.__hash__ is before
