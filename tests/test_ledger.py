"""Why a count is not 6 N T: every term by hand on small models, and every ledger closes row by row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flopprof import FlopCounter, count
from flopprof.errors import UsageError
from flopprof.ledger import BACKWARD, FORWARD, HARDWARE, Ledger, reconcile
from flopprof.profile import Profile
from zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs


def closed(profile: Profile, tokens: int | None = None) -> Ledger:
    """The ledger, after every check that holds for any profile."""
    ledger = reconcile(profile, tokens)
    for part in (ledger, ledger.backward, ledger.hardware):
        if part is not None:
            assert part.residual == 0
            assert all(term.flops == sum(item.flops for item in term.items) for term in part.terms)
    for joint in ledger.joints:
        twice = tuple(2 * flops for flops in joint.forward)
        missing = [sum(amount[i] for amount in joint.missing.values()) for i in range(3)]
        assert [want + lack for want, lack in zip(joint.wanted, missing, strict=True)] == list(twice)
    return ledger


def joined(profile: Profile, tokens: int | None = None) -> Ledger:
    """The ledger of one backward over one forward: per row, what was computed is what was wanted."""
    ledger = closed(profile, tokens)
    assert ledger.backward is not None
    for joint in ledger.joints:
        assert joint.computed == joint.wanted, joint
    assert not {row.op for row in profile.operators if row.phase == "backward" and not row.joined_to}
    return ledger


def nonzero(ledger: Ledger | None) -> dict[str, int]:
    assert ledger is not None
    return {name: flops for name, flops in ledger.term_flops().items() if flops}


# --- the zoo, and models at their real sizes --------------------------------------------------------
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ZOO)
def test_every_backward_of_the_zoo_is_joined(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    joined(count(model.train(training), *inputs, backward=True), tokens=7)


def on_meta(model: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        return model().to(dtype).eval()


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("tokens", [1024, 8192, 131072])
def test_llama_3_1_8b_from_its_dimensions_alone(tokens: int) -> None:
    """Forward = 2 (parameters multiplied) T + 4 L d T^2, both in integers made of the config's numbers."""
    layers, d, kv, wide, vocab = 32, 4096, 8 * 128, 14336, 128256
    multiplied = layers * (2 * d * d + 2 * d * kv + 3 * d * wide) + d * vocab
    norms = (2 * layers + 1) * d
    model = on_meta(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_8B)), torch.bfloat16)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    ledger = joined(count(model, ids, backward=True, use_cache=False), tokens)
    assert ledger.n_params == multiplied + norms + vocab * d == 8_030_261_248
    assert ledger.measured_flops == 2 * multiplied * tokens + 4 * layers * d * tokens**2
    assert nonzero(ledger) == {
        "never_multiplied": -2 * (norms + vocab * d) * tokens,
        "activation_x_activation": 4 * layers * d * tokens**2,
    }
    assert nonzero(ledger.backward) == {}
    assert ledger.model_flops == 3 * ledger.measured_flops
    assert ledger.n_params_active == multiplied
    assert sum(use.n for use in ledger.parameters if use.embedding) == vocab * d


def test_gpt2_at_1024_tokens() -> None:
    """The tied head is multiplied although the embedding is looked up; positions, norms and biases are not."""
    model = on_meta(lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()))
    ids = torch.zeros(1, 1024, dtype=torch.int64, device="meta")
    ledger = joined(count(model, ids, backward=True, use_cache=False), 1024)
    matrices = 12 * 12 * 768 * 768 + 50257 * 768
    assert nonzero(ledger) == {
        "never_multiplied": -2 * (124_439_808 - matrices) * 1024,
        "activation_x_activation": 12 * 4 * 768 * 1024**2,
    }


def test_mixtral_8x7b_leaves_six_of_eight_experts_idle() -> None:
    config = transformers.MixtralConfig(num_hidden_layers=2, max_position_embeddings=4096)
    model = on_meta(lambda: transformers.MixtralForCausalLM(config))
    ids = torch.zeros(1, 512, dtype=torch.int64, device="meta")
    ledger = joined(count(model, ids, backward=True, use_cache=False), 512)
    assert nonzero(ledger)["under_use"] == -2 * 512 * 2 * 6 * 3 * 4096 * 14336
    experts = [use for name, use in ledger.by_parameter().items() if ".experts." in name]
    assert experts
    assert {use.reuse for use in experts} == {0.25}


def test_t5_decoder_tokens() -> None:
    """T is the decoder's length: the encoder sees another number of tokens, which is reuse or under-use."""
    model = on_meta(lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=2)))
    source, target = (torch.zeros(1, n, dtype=torch.int64, device="meta") for n in (48, 16))
    ledger = joined(count(model, source, decoder_input_ids=target, backward=True, use_cache=False), 16)
    attention, dense = 4 * 512 * 512, 2 * 512 * 2048
    reuse = 2 * (48 - 16) * (2 * (attention + dense) + 2 * 2 * 512 * 512)  # the encoder, and cross keys and values
    assert nonzero(ledger)["reuse"] == reuse


@pytest.mark.parametrize("name", ["vit_b_16", "resnet50"])
def test_vision_models_report_reuse_by_sample(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = on_meta(lambda: torchvision.models.get_model(name))
    profile = count(model, torch.zeros(2, 3, 224, 224, device="meta"), backward=True)
    ledger = joined(profile, tokens=2)
    assert nonzero(ledger)["reuse"] > 0
    stem = "conv_proj.weight" if name == "vit_b_16" else "conv1.weight"
    side = 14 if name == "vit_b_16" else 112
    assert ledger.by_parameter()[stem].reuse == side * side


# --- each term by hand ----------------------------------------------------------------------------
def linear(fan_in: int, fan_out: int, **options: Any) -> nn.Linear:
    return nn.Linear(fan_in, fan_out, bias=False, **options)


def test_two_layers_and_their_biases() -> None:
    """Three rows through 4 -> 5 -> 6: the first layer's input wants no gradient."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))
    ledger = joined(count(model, torch.randn(3, 4), backward=True), tokens=3)
    assert (ledger.estimate_flops, ledger.measured_flops) == (2 * 61 * 3, 2 * 50 * 3)
    assert nonzero(ledger) == {"never_multiplied": -2 * 11 * 3}
    assert nonzero(ledger.backward) == {"no_input_gradient": -2 * 20 * 3}
    assert ledger.factor == (2 * 50 * 3 * 3 - 2 * 20 * 3) / (61 * 3)


def test_frozen_first_layer() -> None:
    """Nothing before the trainable layer wants a gradient: not the frozen weight, not its input, not its output."""
    model = nn.Sequential(linear(4, 5), linear(5, 6))
    model[0].weight.requires_grad_(False)
    ledger = joined(count(model, torch.randn(3, 4), backward=True), tokens=3)
    assert nonzero(ledger.backward) == {
        "frozen_weights": -2 * 20 * 3,
        "no_input_gradient": -2 * 20 * 3 - 2 * 30 * 3,
    }


def test_frozen_last_layer() -> None:
    model = nn.Sequential(linear(4, 5), linear(5, 6))
    model[1].weight.requires_grad_(False)
    ledger = joined(count(model, torch.randn(3, 4), backward=True), tokens=3)
    assert nonzero(ledger.backward) == {"frozen_weights": -2 * 30 * 3, "no_input_gradient": -2 * 20 * 3}


def test_lora_costs_less_than_six_n() -> None:
    """A frozen 8 x 8 beside 8 -> 2 -> 8 that train; the input of the layer below wants a gradient here."""

    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down, self.up = linear(8, 8), linear(8, 2), linear(2, 8)
            self.base.weight.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x))

    model = nn.Sequential(Lora(), Lora())
    ledger = joined(count(model, torch.randn(10, 8), backward=True), tokens=10)
    # Of the first: no gradient of its input, through base (64) and through down (16). Of both: none of the base.
    assert nonzero(ledger.backward) == {"frozen_weights": -2 * 10 * 128, "no_input_gradient": -2 * 10 * 80}
    forward = 2 * 10 * 192
    assert ledger.factor == (3 * forward - 2 * 10 * 208) / (192 * 10)


def test_reuse_by_convolution_and_by_sharing() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.shared = nn.Conv2d(2, 3, 3, bias=False), linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shared(self.shared(self.conv(x).flatten(1)[:, :4]))

    ledger = joined(count(Twice(), torch.randn(5, 2, 6, 6), backward=True), tokens=5)
    assert nonzero(ledger) == {"reuse": 2 * 5 * 54 * (16 - 1) + 2 * 5 * 16}
    uses = ledger.by_parameter()
    assert (uses["conv.weight"].reuse, uses["shared.weight"].reuse) == (16, 2)


def test_heads_on_fewer_tokens() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = linear(4, 4), linear(4, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x)[:, 0])

    ledger = joined(count(Head(), torch.randn(2, 7, 4), backward=True), tokens=14)
    assert nonzero(ledger) == {"under_use": 2 * 40 * 2 - 2 * 40 * 14}
    assert ledger.n_params_active == 16 + 40 * 2 // 14


def test_a_buffer_is_multiplied_and_is_no_parameter() -> None:
    class Fixed(nn.Module):
        basis: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("basis", torch.randn(4, 6))
            self.out = linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x @ self.basis)

    x = torch.randn(3, 4, requires_grad=True)
    ledger = joined(count(Fixed(), x, backward=True), tokens=3)
    assert nonzero(ledger) == {"buffer_x_activation": 2 * 3 * 24}
    assert nonzero(ledger.backward) == {"frozen_weights": -2 * 3 * 24}


def test_a_frozen_activation() -> None:
    """Scores against keys that carry no gradient."""

    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = linear(4, 4)

        def forward(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            return self.query(x) @ keys.T

    ledger = joined(count(Score(), torch.randn(3, 4), torch.randn(5, 4), backward=True), tokens=3)
    assert nonzero(ledger)["activation_x_activation"] == 2 * 3 * 4 * 5
    assert nonzero(ledger.backward) == {"no_input_gradient": -2 * 3 * 16, "frozen_activations": -2 * 3 * 4 * 5}


def test_no_graph_and_unreached() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student, self.unused = linear(4, 4), linear(4, 4), linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            with torch.no_grad():
                target = self.teacher(x)
            return self.student(x) - target, self.unused(x)

    x = torch.randn(3, 4, requires_grad=True)
    ledger = closed(count(Branches(), x, loss=lambda out: out[0].sum()), tokens=3)
    each = 2 * 3 * 16
    assert nonzero(ledger.backward) == {"no_graph": -2 * each, "unreached": -2 * each}


def test_gradients_of_some_inputs_only() -> None:
    model, x = nn.Sequential(linear(4, 4), linear(4, 4)), torch.randn(3, 4, requires_grad=True)
    with FlopCounter(model) as counter:
        torch.autograd.grad(model(x).sum(), x)
    ledger = closed(counter.profile, tokens=3)
    assert nonzero(ledger.backward) == {"unreached": -2 * 2 * 3 * 16}


def test_two_backwards_over_one_forward() -> None:
    model, x = linear(4, 4), torch.randn(3, 4, requires_grad=True)
    with FlopCounter(model) as counter:
        y = model(x).sum()
        y.backward(retain_graph=True)
        y.backward()
    ledger = closed(counter.profile, tokens=3)
    assert nonzero(ledger.backward) == {"repeated": 2 * 2 * 3 * 16}


def test_gradients_of_gradients() -> None:
    model, x = nn.Sequential(linear(4, 4), nn.Tanh(), linear(4, 1)), torch.randn(3, 4, requires_grad=True)
    with FlopCounter(model) as counter:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
    ledger = closed(counter.profile, tokens=3)
    assert nonzero(ledger.backward)["higher_order"] > 0


def test_a_custom_function_is_named_not_folded_away() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            x, w = ctx.saved_tensors
            return grad @ w.T, x.T @ grad

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Product.apply(x, self.weight)

    x = torch.randn(3, 4, requires_grad=True)
    ledger = closed(count(Custom(), x, backward=True), tokens=3)
    each = 2 * 3 * 20
    assert nonzero(ledger.backward) == {"no_graph": -2 * each, "unjoined": 2 * each}


@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_checkpointing(reentrant: bool) -> None:
    class Replayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = linear(4, 4), nn.Sequential(linear(4, 8), nn.GELU(), linear(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, self.first(x), use_reentrant=reentrant)

    ledger = joined(count(Replayed(), torch.randn(3, 4), backward=True), tokens=3)
    assert nonzero(ledger.backward) == {"no_input_gradient": -2 * 3 * 16}
    # The kind that is not reentrant stops as soon as it has what the backward saved: before the last product.
    assert nonzero(ledger.hardware) == {"checkpoint_recompute": 2 * 3 * (64 if reentrant else 32)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fused_and_unfused_attention_close_alike(device: str) -> None:
    """Six queries of width 4 on eight keys and values: 4 b h s t d, causal half a square and the rest."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = linear(4, 4), linear(4, 4), linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (p(x)[:, None] for p in (self.q, self.k, self.v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    model = Attend()
    model.k.weight.requires_grad_(False)
    profile = count(model.to(device), torch.randn(1, 6, 4, device=device), backward=True)
    ledger = joined(profile, tokens=6)
    (term,) = (term for term in ledger.terms if term.name == "activation_x_activation")
    assert (term.flops_full, term.flops_causal) == (4 * 36 * 4, 4 * 21 * 4)
    # Of the keys nothing wants a gradient; queries, probabilities and values do.
    assert ledger.backward is not None
    assert nonzero(ledger.backward)["frozen_activations"] == -2 * 36 * 4


def test_optimizer_products_are_hardware_flops() -> None:
    model, x = linear(4, 4), torch.randn(3, 4)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.01)
    ledger = closed(count(model, x, optimizer=optimizer), tokens=3)
    assert nonzero(ledger.hardware)["optimizer"] > 0


# --- what is asked of it --------------------------------------------------------------------------
def test_json_holds_every_term() -> None:
    ledger = closed(count(linear(4, 5), torch.randn(3, 4), backward=True), tokens=3)
    assert '"never_multiplied"' in ledger.to_json()
    assert [term.name for term in ledger.terms] == list(FORWARD)
    assert ledger.backward is not None
    assert [term.name for term in ledger.backward.terms] == list(BACKWARD)
    assert ledger.hardware is not None
    assert [term.name for term in ledger.hardware.terms] == list(HARDWARE)


def test_without_a_backward_there_is_no_backward_ledger() -> None:
    ledger = closed(count(linear(4, 5), torch.randn(3, 4)), tokens=3)
    assert ledger.backward is None
    assert ledger.factor == 2


@pytest.mark.parametrize("tokens", [0, -3, 2.5, True])
def test_impossible_tokens(tokens: Any) -> None:
    with pytest.raises(UsageError, match="positive whole number"):
        reconcile(count(linear(4, 5), torch.randn(3, 4)), tokens)


def test_tokens_must_come_from_somewhere() -> None:
    with pytest.raises(UsageError, match="tokens="):
        reconcile(count(linear(4, 5), torch.randn(3, 4)))


# --- any stack closes ------------------------------------------------------------------------------
class Mixer(nn.Module):
    """Attention of one head over (batch, length, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = linear(4, 4), linear(4, 4), linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Stack(nn.Module):
    def __init__(self, layers: list[tuple[str, bool, str]]) -> None:
        super().__init__()
        self.embed, self.layers, self.replays = nn.Embedding(9, 4), nn.ModuleList(), []
        shared = linear(4, 4)
        for kind, frozen, replay in layers:
            layer = {
                "linear": lambda: linear(4, 4), "conv": Convolved, "attention": Mixer, "shared": lambda: shared,
                "mlp": lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)),
                "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
            }[kind]()  # fmt: skip
            layer.requires_grad_(not frozen)
            self.layers.append(layer)
            self.replays.append(replay)
        self.head = linear(4, 9)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer, replay in zip(self.layers, self.replays, strict=True):
            whole = layer if not isinstance(layer, nn.LSTM) else lambda x, layer=layer: layer(x)[0]
            x = whole(x) if not replay else checkpoint(whole, x, use_reentrant=replay == "reentrant")
        return self.head(x)


LAYER = st.tuples(
    st.sampled_from(["linear", "conv", "attention", "shared", "mlp", "lstm"]),
    st.booleans(),
    st.sampled_from(["", "", "reentrant", "not reentrant"]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(LAYER, max_size=5), st.booleans(), st.sampled_from(["cpu", "meta"]))
def test_any_stack_closes(layers: list[tuple[str, bool, str]], frozen_embedding: bool, device: str) -> None:
    model = Stack(layers)
    model.embed.weight.requires_grad_(not frozen_embedding)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    profile = count(copy.deepcopy(model).to(device), ids.to(device), backward=True)
    if profile.backward_flops:
        joined(profile, tokens=6)
    else:
        closed(profile, tokens=6)


def test_a_profile_reconciles_itself() -> None:
    profile = count(linear(4, 5), torch.randn(3, 4), backward=True)
    assert profile.reconcile(tokens=3) == reconcile(profile, 3)
    assert Profile.from_json(profile.to_json()).reconcile(tokens=3) == reconcile(profile, 3)
