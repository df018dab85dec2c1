"""Training memory and decoding: the figures of ZeRO and of Megatron's papers, and laws."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopprof.analytic import TransformerShape
from flopprof.errors import UsageError
from flopprof.plan.make import plan
from flopprof.plan.memory import Layout, layer_bytes_per_token, training_memory
from flopprof.plan.serving import Service, cache_bytes_per_token
from flopprof.plan.sizes import of_name, of_numbers, of_shape

B, T = 10**9, 10**12


# --- ZeRO, Rajbhandari 2020, figure 1: 7.5 billion parameters on 64 devices ---------------------------
@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero(zero: int, gigabytes: float) -> None:
    found = training_memory(of_numbers(75 * 10**8, None, None), Layout(zero=zero), 64)
    assert found.total_bytes / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert found.activations_bytes is None


@pytest.mark.parametrize(
    ("precision", "optimizer", "each"),
    [
        ("mixed", "adamw", 16),
        ("mixed", "momentum", 12),
        ("mixed", "sgd", 8),
        ("fp32", "adamw", 16),
        ("fp32", "sgd", 8),
        ("bf16", "adamw", 8),
    ],
)
def test_bytes_a_parameter(precision: str, optimizer: str, each: int) -> None:
    layout = Layout(precision=precision, optimizer=optimizer)  # type: ignore[arg-type]
    assert training_memory(of_numbers(1000, None, None), layout, None).total_bytes == 1000 * each


# --- activations, Korthikanti 2022, table 2: bytes a layer, s b h times -------------------------------
GPT = [(22, 48, 6144, 64), (175, 96, 12288, 96), (530, 105, 20480, 128), (1000, 128, 25600, 160)]


def gpt(layers: int, h: int, heads: int) -> TransformerShape:
    return TransformerShape(layers=layers, d_model=h, heads=heads, vocab=51200, seq=2048, positions=2048)


@pytest.mark.parametrize(("billions", "layers", "h", "heads"), GPT)
@pytest.mark.parametrize("t", [1, 8])
def test_activations_of_a_layer(billions: int, layers: int, h: int, heads: int, t: int) -> None:
    shape, scores = gpt(layers, h, heads), 5 * heads * 2048
    plain = Layout(tp=t, dropout=True, fused_attention=False)
    assert layer_bytes_per_token(shape, plain) == 10 * h + (24 * h + scores) // t
    parallel = Layout(tp=t, dropout=True, fused_attention=False, sequence_parallel=True)
    assert layer_bytes_per_token(shape, parallel) == (34 * h + scores) // t
    selective = Layout(tp=t, dropout=True, fused_attention=False, sequence_parallel=True, checkpointing="selective")
    assert layer_bytes_per_token(shape, selective) == 34 * h // t
    fused = Layout(tp=t, dropout=True, sequence_parallel=True)
    assert layer_bytes_per_token(shape, fused) == 34 * h // t


@pytest.mark.parametrize("pp", [1, 2, 4, 8])
def test_a_pipelines_first_stage_keeps_as_much_as_all_layers(pp: int) -> None:
    """pp micro-batches under way, of 1 / pp of the layers each."""
    sizes = of_shape(gpt(48, 6144, 64), None, None)
    found = training_memory(sizes, Layout(pp=pp, micro_batch=4, dropout=True), None)
    assert found.activations_bytes == 34 * 2048 * 4 * 6144 * 48
    full = training_memory(sizes, Layout(pp=pp, micro_batch=4, dropout=True, checkpointing="full"), None)
    assert full.activations_bytes == 2 * 2048 * 4 * 6144 * 48 + 34 * 2048 * 4 * 6144  # and the layer that runs again


def test_grouped_queries_and_gates_keep_what_they_have() -> None:
    shape = of_name("llama-3.1-8b", 8192).shape
    assert shape is not None
    # 2 bytes of: both norms' inputs and outputs; queries, keys, values, the heads' output; gate, its SiLU, up, product
    assert layer_bytes_per_token(shape, Layout()) == 2 * (4 * 4096 + 4096 + 2 * 1024 + 4096 + 4 * 14336)
    scores = 2 * 32 * 8192
    assert (
        layer_bytes_per_token(shape, Layout(fused_attention=False)) == layer_bytes_per_token(shape, Layout()) + scores
    )


def test_what_an_activation_really_keeps() -> None:
    """A layer run by torch saves for its backward what the formula says, on the byte, weights and rounding aside."""
    torch = pytest.importorskip("torch")
    d, heads, ff, seq = 64, 4, 256, 32

    class Layer(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(d) for _ in range(2))
            self.q, self.k, self.v, self.o = (torch.nn.Linear(d, d, bias=False) for _ in range(4))
            self.up, self.down = torch.nn.Linear(d, ff, bias=False), torch.nn.Linear(ff, d, bias=False)

        def forward(self, x: object) -> object:
            y = self.norms[0](x)
            q, k, v = (f(y).view(1, seq, heads, d // heads).transpose(1, 2) for f in (self.q, self.k, self.v))
            a = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, seq, d)
            x = x + self.o(a)
            return x + self.down(torch.nn.functional.gelu(self.up(self.norms[1](x))))

    layer = Layer()
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: object) -> object:
        storage = tensor.untyped_storage()  # type: ignore[attr-defined]
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(1, seq, d, requires_grad=True))
    shape = TransformerShape(layers=1, d_model=d, heads=heads, vocab=10, seq=seq, d_ff=ff)
    expected = seq * layer_bytes_per_token(shape, Layout(precision="fp32"), 4)
    small = 4 * seq * 2 * 2 + 4 * seq * heads  # the norms' means and deviations, attention's log-sum-exp
    assert expected <= sum(kept.values()) <= expected + small + 64


# --- stages and ranks --------------------------------------------------------------------------------
def test_tensor_and_pipeline_parallel_ranks_share_the_weights() -> None:
    whole = training_memory(of_numbers(64 * B, None, None), Layout(), 64)
    split = training_memory(of_numbers(64 * B, None, None), Layout(tp=8, pp=4), 64)
    assert split.total_bytes * 32 == whole.total_bytes
    assert (split.devices_per_replica, split.data_parallel, whole.data_parallel) == (32, 2, 64)


def test_the_fullest_stage_has_an_end_too() -> None:
    sizes = of_name("llama-3.1-8b", 8192)
    table = 128256 * 4096
    found = training_memory(sizes, Layout(pp=4), 4)
    layer = -(-(sizes.params - 2 * table) // 32)
    assert found.weights_bytes == 2 * (8 * layer + table)


@given(
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["none", "selective", "full"]),
    st.booleans(),
)
def test_sharing_and_checkpointing_never_cost_memory(
    zero: int, tp: int, pp: int, checkpointing: str, fused: bool
) -> None:
    sizes = of_name("llama-3.1-8b", 2048)
    options = {"zero": zero, "tp": tp, "pp": pp, "checkpointing": checkpointing, "fused_attention": fused}
    found = training_memory(sizes, Layout(**options), 64)  # type: ignore[arg-type]
    for name, less in (
        ("zero", min(zero + 1, 3)),
        ("tp", 2 * tp),
        ("checkpointing", "full"),
        ("fused_attention", True),
    ):
        assert training_memory(sizes, Layout(**{**options, name: less}), 64).total_bytes <= found.total_bytes  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tp": 0}, "tp must be 1 or more, got 0"),
        ({"zero": 4}, "zero is one of 0, 1, 2, 3, got 4"),
        ({"precision": "fp8"}, "precision is one of mixed, fp32, bf16, got 'fp8'"),
        ({"optimizer": "lion"}, "optimizer is one of adamw, momentum, sgd"),
        ({"checkpointing": "some"}, "checkpointing is none, selective or full, got 'some'"),
    ],
)
def test_wrong_layouts(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Layout(**options)  # type: ignore[arg-type]


def test_layouts_that_do_not_fit_the_run() -> None:
    with pytest.raises(UsageError, match="12 devices do not divide into replicas of tp 8 x pp 1"):
        plan(params=B, tokens=T, devices=12, layout=Layout(tp=8))
    with pytest.raises(UsageError, match="pp 64 is more than the model's 32 layers"):
        plan("llama-3.1-8b", layout=Layout(pp=64))


def test_whether_it_fits() -> None:
    small = plan("llama-3.2-1b", hardware="H100").memory
    large = plan("llama-3.1-70b", hardware="H100").memory
    assert small is not None
    assert large is not None
    assert small.fits(80 * B) is True
    assert large.fits(80 * B) is False
    assert large.fits(None) is None


# --- decoding ----------------------------------------------------------------------------------------
def test_a_decoded_token_of_llama() -> None:
    """2 x (parameters in products) + 4 L d (context + 1); weights once, and each sequence's keys and values."""
    found = plan("llama-3.1-8b", peak=1e15, bandwidth=3e12, service=Service(batch=4, context=8191)).serving
    assert found is not None
    assert found.flops_per_token == 15_009_316_864 + 4 * 32 * 4096 * 8192
    assert found.cache_bytes_per_token == 2 * 2 * 32 * 8 * 128
    assert found.weight_bytes == 2 * (8_030_261_248 - 128256 * 4096)  # one row of the embedding is read
    assert found.bytes_per_step == found.weight_bytes + 4 * 8191 * 131072
    assert found.memory_s == pytest.approx(found.bytes_per_step / 3e12)
    assert found.tokens_per_s == pytest.approx(4 / (found.memory_s or 1))


def test_fewer_bits_are_read_faster() -> None:
    times = [
        plan(params=70 * B, peak=1e15, bandwidth=3e12, service=Service(weight_bits=bits)).serving for bits in (16, 8, 4)
    ]
    assert [found.time_s for found in times if found] == pytest.approx([0.14 / 3, 0.07 / 3, 0.035 / 3])


def test_from_some_batch_on_products_take_longer() -> None:
    at = plan(params=70 * B, hardware="H100").serving
    assert at is not None
    assert at.compute_bound_from == math.ceil(989.4e12 / 3352e9)  # 2 bytes and 2 FLOPs a parameter: the ridge
    bounds = [
        plan(params=70 * B, hardware="H100", service=Service(batch=batch)).serving
        for batch in (at.compute_bound_from - 1, at.compute_bound_from)
    ]
    assert [found.bound for found in bounds if found] == ["memory", "compute"]


def test_price_and_energy_of_tokens() -> None:
    found = plan(params=70 * B, peak=1000e12, bandwidth=3e12, price=2.0, power_w=700, pue=1.2).serving
    assert found is not None
    assert found.usd_per_million_tokens == pytest.approx(1e6 * 0.14 / 3 * 2 / 3600)
    assert found.joules_per_token == pytest.approx(700 * 1.2 * 0.14 / 3)
    eight = plan(params=70 * B, peak=1000e12, bandwidth=3e12, price=2.0, service=Service(devices=8)).serving
    assert eight is not None
    assert eight.time_s == pytest.approx((found.time_s or 0) / 8)
    assert eight.usd_per_million_tokens == pytest.approx(found.usd_per_million_tokens)


def test_a_batch_visits_more_experts() -> None:
    """Mixtral: 2 of 8 experts a token; a batch leaves each unread with probability 0.75 to its power."""
    sizes = of_name("mixtral-8x7b", None)
    idle = sizes.params - sizes.active
    read = [
        (found := plan("mixtral-8x7b", service=Service(batch=batch, context=0)).serving) and found.weight_bytes / 2
        for batch in (1, 2, 1000)
    ]
    embedding = 32000 * 4096
    assert read[0] == sizes.active - embedding
    assert read[1] == pytest.approx(sizes.active - embedding + idle * (1 - 0.75**2 - 0.25) / 0.75, rel=1e-9)
    assert read[2] == pytest.approx(sizes.params - embedding, rel=1e-9)
    bare = plan(params=40 * B, active_params=10 * B, service=Service(batch=3)).serving
    assert bare is not None
    assert bare.weight_bytes == 2 * 30 * B


def test_a_latent_cache_is_not_guessed() -> None:
    shape = of_name("deepseek-v3", None).shape
    assert shape is not None
    assert cache_bytes_per_token(shape) is None


def test_wrong_services() -> None:
    with pytest.raises(UsageError, match="batch must be 1 or more, got 0"):
        Service(batch=0)
    with pytest.raises(UsageError, match="context must be 0 or more, got -1"):
        Service(context=-1)
