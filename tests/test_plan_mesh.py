"""Simulated meshes: the ranks' work sums to the whole, and is what DTensor runs and sends on a fake process group."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import flopprof
from flopprof.errors import UsageError
from flopprof.models import Workload
from flopprof.plan.memory import Layout
from flopprof.plan.mesh import parse_mesh, simulate

transformers = pytest.importorskip("transformers")

BATCH, SEQ, D, FF, VOCAB, LAYERS = 2, 16, 64, 96, 128, 4
SIZES = {
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": FF,
    "vocab_size": VOCAB,
}


def model(family: str, **changed: Any) -> Any:  # a transformers model
    config = transformers.CONFIG_MAPPING[family](**{**SIZES, **changed})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def workload(family: str = "llama", batch: int = BATCH, **changed: Any) -> Workload:
    with torch.device("meta"):
        built = model(family, **changed)
        ids = torch.zeros(batch, SEQ, dtype=torch.long)
    return Workload(
        model=built,
        args=(ids,),
        kwargs={"use_cache": False},
        name=family,
        device="meta",
        tokens=batch * SEQ,
        samples=batch,
    )


# --- the ranks' sum is the whole -----------------------------------------------------------------------
MESHES = [(1, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 3), (2, 3, 2), (4, 2, 8)]
FAMILIES = ["llama", "qwen3", "gemma2", "gpt_neox", "mistral"]
USUAL = [("llama", 2, 1, 1), ("llama", 1, 3, 2), ("llama", 4, 2, 8), ("gpt_neox", 2, 2, 1)]
NIGHTLY = [(family, *mesh) for family in FAMILIES for mesh in MESHES if (family, *mesh) not in USUAL]


@pytest.mark.parametrize(
    ("family", "tp", "pp", "dp"), [*USUAL, *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY)]
)
def test_the_sum_over_ranks_is_the_unsharded_count(family: str, tp: int, pp: int, dp: int) -> None:
    changed = {"head_dim": D // 4} if family in ("qwen3", "gemma2") else {}
    whole = workload(family, **changed).count(backward=True)
    found = simulate(workload(family, **changed), tp=tp, pp=pp, dp=dp, micro_batches=3)
    assert found.ranks_flops == found.whole_flops == 3 * dp * whole.hardware_flops
    assert tp * dp * sum(stage.forward_flops for stage in found.stages) == 3 * dp * whole.forward_flops
    assert found.replicated == ()
    assert found.ranks == tp * pp * dp
    assert [stage.first for stage in found.stages][1:] == [stage.last + 1 for stage in found.stages[:-1]]
    assert (found.stages[0].first, found.stages[-1].last) == (0, LAYERS - 1)


def test_every_parameter_lies_somewhere() -> None:
    untied = workload(tie_word_embeddings=False)
    whole = sum(parameter.numel() for parameter in untied.model.parameters())
    for pp in (1, 3, 4):
        assert sum(stage.params for stage in simulate(untied, pp=pp).stages) == whole
    norms = (2 * LAYERS + 1) * D  # every tensor parallel rank has all of them
    (stage,) = simulate(untied, tp=4).stages  # which cuts it
    assert stage.params == (whole - norms) // 4 + norms


def test_a_tied_head_is_a_copy_on_a_stage_of_its_own() -> None:
    untied = simulate(workload(tie_word_embeddings=False), pp=2)
    tied = simulate(workload(tie_word_embeddings=True), pp=2)
    assert [stage.params for stage in tied.stages] == [stage.params for stage in untied.stages]
    one, none = (simulate(workload(tie_word_embeddings=tie), tp=2).stages[0].params for tie in (True, False))
    assert none - one == VOCAB * D // 2


def test_what_every_rank_does_alike_is_named() -> None:
    """A product that the plan does not split is done by all."""
    sharded = workload()
    sharded.model._tp_plan = {k: v for k, v in sharded.model.tp_plan.items() if "mlp" not in k}
    found = simulate(sharded, tp=2)
    names = ("gate_proj", "up_proj", "down_proj")
    assert found.replicated == tuple(f"model.layers.*.mlp.{name}" for name in names)
    alike = 3 * 3 * 2 * BATCH * SEQ * D * FF * LAYERS  # three products, forward and twice backward
    assert found.ranks_flops - found.whole_flops == alike


def test_routers_are_on_every_rank_and_experts_are_split() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    found = simulate(workload("mixtral", **experts), tp=2)
    assert found.replicated == ("model.layers.*.mlp.gate",)
    assert found.ranks_flops - found.whole_flops == 3 * 2 * BATCH * SEQ * D * 4 * LAYERS
    # attention's output and the experts' are summed; q, k, v, the experts' input and the head's back; logits gathered
    activations, logits = BATCH * SEQ * D * 4, BATCH * SEQ * VOCAB * 4
    embedding = "embed_tokens" in str(workload("mixtral", **experts).model.tp_plan)
    assert found.stages[0].traffic.tensor == LAYERS * (1 + 1 + 3 + 1) * activations + (
        activations + logits // 2 + embedding * activations
    )


def test_a_gathered_product_leaves_attention_to_every_rank() -> None:
    """Phi-3's queries, keys and values are one matrix, whose outputs are gathered: each rank has all heads."""
    found = simulate(workload("phi3", pad_token_id=0), tp=2)
    assert found.replicated == ("model.layers.*.self_attn",)
    assert found.ranks_flops - found.whole_flops == 3 * 4 * BATCH * SEQ**2 * D * LAYERS


# --- DTensor on a fake process group: as it runs, and what it sends ------------------------------------
class Collectives(TorchDispatchMode):
    """Calls and elements of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and ("reduce" in str(func) or "gather" in str(func)):
            kind = str(func).split(".")[1]
            self.seen[kind] += 1
            self.elements[kind] += out.numel()
        return out


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch puts one of its own there, for good
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt_neox", marks=pytest.mark.nightly)])
def test_a_rank_does_and_sends_what_dtensor_does_and_sends(family: str, two_ranks: Any) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    whole = model(family)
    styles = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
        "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(whole, two_ranks, {name: styles[style]() for name, style in whole.tp_plan.items()})
    with Collectives() as sent, flopprof.FlopCounter(whole) as counter:
        whole(torch.zeros(BATCH, SEQ, dtype=torch.long), use_cache=False).logits.sum().backward()
    real = counter.profile

    (stage,) = simulate(workload(family), tp=2).stages
    assert (stage.forward_flops, stage.backward_flops) == (real.forward_flops, real.backward_flops)
    # float32; around a ring of two an all-reduce sends each element once, an all-gather half of its result
    assert stage.traffic.tensor == 4 * sent.elements["all_reduce"] + 2 * sent.elements["all_gather_into_tensor"]
    assert sent.seen["all_gather_into_tensor"] == 1  # the logits


def test_what_is_sent_in_numbers() -> None:
    """Llama: forward one sum after each attention and each feed-forward; backward one per column-wise product."""
    both = BATCH * SEQ * D * 4  # a layer's activations, float32
    found = simulate(workload(), tp=4, pp=2, dp=8, micro_batches=5)
    first, last = found.stages
    layers = LAYERS // 2
    reduces = layers * (2 + 5)  # q, k, v, gate and up
    assert first.traffic.tensor == 5 * (reduces + 1) * 2 * both * 3 // 4  # and the embedding
    logits = BATCH * SEQ * VOCAB * 4
    assert last.traffic.tensor == 5 * ((reduces + 1) * 2 * both + logits) * 3 // 4  # and the head's input and output
    assert first.traffic.pipeline == last.traffic.pipeline == 5 * both
    assert first.traffic.data == 2 * 4 * first.params * 7 // 8
    middle = simulate(workload(), pp=4, micro_batches=1).stages[1]
    assert middle.traffic.pipeline == 2 * both  # activations on, gradients back
    gathered = simulate(workload(), dp=8, layout=Layout(zero=3)).stages[0]
    assert gathered.traffic.data == 3 * 4 * gathered.params * 7 // 8


# --- the shape of a step -------------------------------------------------------------------------------
def test_bubble_and_balance() -> None:
    found = simulate(workload(), pp=4, micro_batches=12)
    assert found.bubble == 3 / 15
    heads = 3 * 2 * BATCH * SEQ * D * VOCAB * 12
    block = (found.stages[-1].flops - heads) if found.stages else 0
    assert [stage.flops for stage in found.stages] == [block, block, block, block + heads]
    assert found.balance == pytest.approx((4 * block + heads) / 4 / (block + heads))
    assert simulate(workload()).bubble == 0


def test_activations_of_stages_under_way() -> None:
    from flopprof.analytic import TransformerShape
    from flopprof.plan.memory import layer_bytes_per_token

    shape = TransformerShape(layers=LAYERS, d_model=D, heads=4, vocab=VOCAB, seq=SEQ, d_ff=FF, gated=True)
    found = simulate(workload(), pp=4, micro_batches=2, shape=shape)
    each, logits = BATCH * SEQ * layer_bytes_per_token(shape, Layout(), 2), BATCH * SEQ * VOCAB * 4
    assert [stage.activations_bytes for stage in found.stages] == [2 * each, 2 * each, 2 * each, each + logits]
    assert found.stages[0].memory_bytes == found.stages[0].states_bytes + 2 * each
    assert found.stages[0].states_bytes == 16 * found.stages[0].params


def test_a_network_of_stages_that_differ() -> None:
    torchvision = pytest.importorskip("torchvision")
    assert torchvision
    found = simulate(flopprof.load("resnet18", image_size=64), pp=2)
    assert found.ranks_flops == found.whole_flops
    assert found.seq is None


@pytest.mark.parametrize(
    ("family", "axes", "said"),
    [
        ("gpt2", {"tp": 2}, "GPT2LMHeadModel has no tensor parallel plan"),
        ("deepseek_v2", {"tp": 2}, "mla_kv_a_proj.* which is not simulated: give tp=1"),
        ("llama", {"tp": 3}, "LlamaForCausalLM has 4 heads .num_attention_heads., which tp=3 does not divide"),
        ("llama", {"tp": 8}, "which tp=8 does not divide"),
        ("llama", {"pp": 9}, "no list of 9 blocks or more to cut into stages"),
        ("llama", {"dp": 0}, "1 or more ranks an axis"),
    ],
)
def test_what_cannot_be_cut(family: str, axes: dict[str, int], said: str) -> None:
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 16} if family == "gpt2" else {}
    if family == "deepseek_v2":
        sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "q_lora_rank": None}
    with pytest.raises(UsageError, match=said):
        simulate(workload(family, **sizes), **axes)


def test_features_that_do_not_divide() -> None:
    with pytest.raises(UsageError, match=r"mlp\.gate_proj has 98 features, which tp=4 does not divide"):
        simulate(workload(intermediate_size=98), tp=4)


def test_a_mesh_is_read() -> None:
    assert parse_mesh("tp=8, pp=4,dp=16") == {"tp": 8, "pp": 4, "dp": 16}
    assert parse_mesh("dp=2") == {"tp": 1, "pp": 1, "dp": 2}
    for text in ("tp", "tp=0", "tp=x", "cp=2", ""):
        with pytest.raises(UsageError, match="write it as tp=8,pp=4,dp=16"):
            parse_mesh(text)
