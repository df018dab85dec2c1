"""Simulated meshes: the ranks' work sums to the whole, and is what DTensor runs and sends on a fake process group."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import flopprof
from flopprof.cli.main import app
from flopprof.errors import UsageError
from flopprof.models import Workload
from flopprof.plan.memory import Layout
from flopprof.plan.mesh import simulate as simulate_on
from flopprof.plan.mesh_axes import Axes, parse_mesh
from flopprof.plan.mesh_result import Mesh

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


def simulate(work: Workload, **options: Any) -> Mesh:
    """simulate(), the axes among its options."""
    axes = {name: options.pop(name) for name in ("tp", "pp", "dp", "cp", "ep", "etp", "sp") if name in options}
    return simulate_on(work, Axes(**axes), **options)


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
    each = 3 * 2 * BATCH * SEQ * D * FF * LAYERS  # forward and twice backward
    assert {row.module: row.flops for row in found.replicated} == {f"model.layers.*.mlp.{name}": each for name in names}
    assert found.ranks_flops - found.whole_flops == 3 * each == found.replicated_flops


def test_routers_are_on_every_rank_and_experts_are_split() -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    found = simulate(workload("mixtral", **experts), tp=2)
    assert [row.module for row in found.replicated] == ["model.layers.*.mlp.gate"]
    assert found.ranks_flops - found.whole_flops == 3 * 2 * BATCH * SEQ * D * 4 * LAYERS
    # attention's output and the experts' are summed; the input of q, k, v, the experts' and the head's back, and two
    # routing weights a token; logits gathered
    activations, logits, weights = BATCH * SEQ * D * 4, BATCH * SEQ * VOCAB * 4, BATCH * SEQ * 2 * 4
    embedding = "embed_tokens" in str(workload("mixtral", **experts).model.tp_plan)
    rest = activations + logits // 2 + embedding * activations
    assert found.stages[0].traffic.tensor == LAYERS * (4 * activations + weights) + rest
    assert found.stages[0].traffic.tensor_each == LAYERS * (6 * activations + weights) + rest


def test_a_gathered_product_leaves_attention_to_every_rank() -> None:
    """Phi-3's queries, keys and values are one matrix, whose outputs are gathered: each rank has all heads."""
    found = simulate(workload("phi3", pad_token_id=0), tp=2)
    assert [row.module for row in found.replicated] == ["model.layers.*.self_attn"]
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
        if func.namespace in ("_c10d_functional", "c10d") and ("reduce" in str(func) or "gather" in str(func)):
            kind = str(func).split(".")[1].strip("_").replace("allreduce", "all_reduce")
            self.seen[kind] += 1
            # of c10d's own the tensors come first, beside what is waited for
            self.elements[kind] += sum(each.numel() for each in (out[0] if func.namespace == "c10d" else [out]))
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
    assert stage.traffic.tensor_each == 4 * sent.elements["all_reduce"] + 2 * sent.elements["all_gather_into_tensor"]
    assert sent.seen["all_gather_into_tensor"] == 1  # the logits


def test_what_is_sent_in_numbers() -> None:
    """Llama: two sums a layer in forward and two in backward (Megatron, 1909.08053, figure 4), of batch x seq x width.

    torch's own has one in backward for each of q, k, v, gate and up.
    """
    both = BATCH * SEQ * D * 4  # a layer's activations, float32
    found = simulate(workload(), tp=4, pp=2, dp=8, micro_batches=5)
    first, last = found.stages
    layers = LAYERS // 2
    logits = BATCH * SEQ * VOCAB * 4
    for reduces, field in ((4, "tensor"), (2 + 5, "tensor_each")):
        # and the embedding; and the head's input and output
        assert getattr(first.traffic, field) == 5 * (layers * reduces + 1) * 2 * both * 3 // 4
        assert getattr(last.traffic, field) == 5 * ((layers * reduces + 1) * 2 * both + logits) * 3 // 4
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
        ("llama", {"tp": 3}, "LlamaForCausalLM has 4 heads .num_attention_heads., which tp=3 does not divide"),
        ("llama", {"tp": 8}, "which tp=8 does not divide"),
        ("llama", {"pp": 9}, "no list of 9 blocks or more to cut into stages"),
        ("llama", {"dp": 0}, "1 or more ranks an axis: got dp=0"),
        ("llama", {"ep": 2, "dp": 2}, "no experts with an expert parallel plan"),
        ("llama", {"ep": 3, "dp": 2}, "ep=3 does not divide: the experts lie on ep of the tp x cp x dp = 2 ranks"),
        ("llama", {"sp": True}, "sp splits over tensor parallel ranks: give tp=2"),
        ("llama", {"tp": 4, "etp": 2}, "etp is 1 or as large as tp: got etp=2 at tp=4"),
        ("llama", {"cp": 2}, "no decoder or encoder of a known shape"),
    ],
)
def test_what_cannot_be_cut(family: str, axes: dict[str, int], said: str) -> None:
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 16} if family == "gpt2" else {}
    with pytest.raises(UsageError, match=said):
        simulate(workload(family, **sizes), **axes)


def test_features_that_do_not_divide() -> None:
    with pytest.raises(UsageError, match=r"mlp\.gate_proj has 98 features, which tp=4 does not divide"):
        simulate(workload(intermediate_size=98), tp=4)


def test_a_mesh_is_read() -> None:
    assert parse_mesh("tp=8, pp=4,dp=16") == Axes(tp=8, pp=4, dp=16)
    assert parse_mesh("dp=2") == Axes(dp=2)
    assert parse_mesh("tp=2,sp,cp=2,ep=4") == Axes(tp=2, sp=True, cp=2, ep=4)
    for text in ("tp", "tp=0", "tp=x", "fsdp=2", "sp=2", ""):
        with pytest.raises(UsageError, match="write it as tp=8,pp=4,dp=16"):
            parse_mesh(text)
    with pytest.raises(UsageError, match="has tp twice"):
        parse_mesh("tp=2,tp=4")


# --- latent attention, experts, sequences and contexts --------------------------------------------------
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 8,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "sizes"),
    [("deepseek_v2", LATENT), pytest.param("mixtral", EXPERTS, marks=pytest.mark.nightly)],
)
def test_a_rank_does_and_sends_what_transformers_own_ranks_do(
    family: str, sizes: dict[str, int], two_ranks: Any
) -> None:
    """Latent attention and experts, cut by transformers itself."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    whole = model(family, **sizes)
    apply_tensor_parallelism(whole, two_ranks, whole._expand_parallel_plan(dict(whole.tp_plan)))
    with Collectives() as sent, flopprof.FlopCounter(whole) as counter:
        whole(torch.zeros(BATCH, SEQ, dtype=torch.long), use_cache=False).logits.sum().backward()
    real = counter.profile

    found = simulate(workload(family, **sizes), tp=2)
    (stage,) = found.stages

    assert (stage.forward_flops, stage.backward_flops) == (real.forward_flops, real.backward_flops)
    reduced = sum(count for kind, count in sent.elements.items() if "reduce" in kind)
    gathered = sum(count for kind, count in sent.elements.items() if "gather" in kind)
    assert stage.traffic.tensor_each == 4 * reduced + 2 * gathered


def test_sequence_parallelism_sends_as_much_and_keeps_less() -> None:
    """Reduce-scatters and all-gathers instead of all-reduces, and an eighth of all activations (2205.05198, eq. 4)."""
    from flopprof.analytic import TransformerShape
    from flopprof.plan.memory import layer_bytes_per_token

    shape = TransformerShape(layers=LAYERS, d_model=D, heads=4, vocab=VOCAB, seq=SEQ, d_ff=FF, gated=True)
    plain, split = (simulate(workload(), tp=4, sp=sp, shape=shape).stages[0] for sp in (False, True))
    assert (split.flops, split.params, split.traffic.tensor) == (plain.flops, plain.params, plain.traffic.tensor)
    assert plain.traffic.gathered_again == 0
    # the inputs of attention, of the feed-forward and of the head
    assert split.traffic.gathered_again == (2 * LAYERS + 1) * BATCH * SEQ * D * 4 * 3 // 4
    logits = BATCH * SEQ * VOCAB * 4 // 4
    whole = layer_bytes_per_token(shape, Layout(), 2)
    assert split.activations_bytes == LAYERS * BATCH * SEQ * whole // 4 + logits
    assert plain.activations_bytes is not None
    assert plain.activations_bytes > split.activations_bytes
    (first, _) = simulate(workload(), tp=4, sp=True, pp=2, micro_batches=3).stages
    assert first.traffic.pipeline == 3 * BATCH * SEQ * D * 4 // 4


@pytest.mark.parametrize(("tp", "dp", "ep", "etp"), [(1, 4, 4, None), (2, 4, 2, None), (2, 2, 4, 1), (2, 1, 2, None)])
def test_experts_lie_on_their_own_ranks(tp: int, dp: int, ep: int, etp: int | None) -> None:
    whole = workload("mixtral", tie_word_embeddings=False, **EXPERTS)
    parameters = sum(parameter.numel() for parameter in whole.model.parameters())
    of_experts = LAYERS * 4 * 3 * D * FF
    norms_and_routers = (2 * LAYERS + 1) * D + LAYERS * 4 * D
    found = simulate(whole, tp=tp, dp=dp, ep=ep, etp=etp)
    (stage,) = found.stages
    sliced = etp or (tp if dp % ep == 0 else 1)
    assert found.etp == sliced
    assert stage.expert_params == of_experts // (ep * sliced)
    rest = parameters - of_experts - norms_and_routers
    assert stage.params - stage.expert_params == rest // tp + norms_and_routers
    # the routers alone are on every tensor parallel rank
    assert found.ranks_flops - found.whole_flops == (tp - 1) * dp * 3 * 2 * BATCH * SEQ * D * 4 * LAYERS
    # two experts a token, there and back, forward and backward; whole experts get a rank's own share of the tokens
    tokens = BATCH * SEQ // (tp if sliced == 1 else 1)
    assert stage.traffic.expert == LAYERS * 4 * 2 * tokens * D * 4 * (ep - 1) // ep
    replicas = tp * dp // (ep * sliced)
    dense, expert = 4 * (stage.params - stage.expert_params), 4 * stage.expert_params
    assert stage.traffic.data == 2 * dense * (dp - 1) // dp + 2 * expert * (replicas - 1) // replicas
    assert "each rank's experts are sent as many tokens as any other's" in found.assumptions


def test_whole_experts_gather_their_tokens_over_tensor_parallel_ranks() -> None:
    """Instead of a sum in forward and one in backward, each twice the bytes; by sequence parallelism nothing."""
    sizes = dict(tie_word_embeddings=False, **EXPERTS)
    axes: list[dict[str, Any]] = [{"etp": 2}, {"etp": 1}, {"etp": 1, "sp": True}]
    sliced, whole, split = (
        simulate(workload("mixtral", **sizes), tp=2, dp=2, ep=2, **more).stages[0].traffic.tensor for more in axes
    )
    exchanged = (2 * D + 2) * BATCH * SEQ * 4  # tokens there and back, and two routing weights each
    assert (sliced - whole, whole - split) == (LAYERS * exchanged // 2, LAYERS * exchanged // 2)


@pytest.mark.parametrize(("tp", "cp", "pp"), [(1, 4, 1), (2, 2, 2)])
def test_parts_of_texts_sum_to_the_whole(tp: int, cp: int, pp: int) -> None:
    """A rank has a part of the queries and all keys: 2 x parameters x its tokens, and 4 x its tokens x all x width."""
    from flopprof.analytic import TransformerShape

    shape = TransformerShape(layers=LAYERS, d_model=D, heads=4, vocab=VOCAB, seq=SEQ, d_ff=FF, gated=True)
    found = simulate(workload(), tp=tp, cp=cp, pp=pp, dp=3, micro_batches=2, shape=shape)
    matrices = LAYERS * (4 * D * D + 3 * D * FF) + D * VOCAB
    forward = 2 * BATCH * SEQ // cp * matrices + LAYERS * 4 * BATCH * (SEQ // cp) * SEQ * D
    assert sum(stage.forward_flops for stage in found.stages) == 2 * forward // tp
    assert found.ranks_flops == found.whole_flops
    assert found.ranks == tp * cp * pp * 3
    alone = simulate(workload(), tp=tp, pp=pp, dp=3 * cp, micro_batches=2, shape=shape)
    for split, plain in zip(found.stages, alone.stages, strict=True):
        keys_and_values = BATCH * SEQ * 2 * D * 4 // tp * LAYERS // pp
        assert split.traffic.context == 2 * 3 * keys_and_values * (cp - 1) // cp
        assert split.traffic.data == plain.traffic.data  # weights lie on all of them
        assert split.traffic.tensor == plain.traffic.tensor // cp
        assert split.activations_bytes is not None
        assert plain.activations_bytes == split.activations_bytes * cp


def test_work_that_does_not_divide_over_parts_is_refused() -> None:
    """A state-space model's chunks are of a length of their own, and its convolution reaches past a part's edge."""
    from flopprof.analytic import TransformerShape

    shape = TransformerShape(layers=2, d_model=D, heads=4, vocab=VOCAB, seq=SEQ, d_ff=FF)
    mamba = {"state_size": 8, "num_hidden_layers": 2, "head_dim": 16, "num_heads": 8, "n_groups": 1, "chunk_size": 16}
    with pytest.raises(UsageError, match=r"does not divide over parts of a text .*: give cp=1"):
        simulate(workload("mamba2", **mamba), cp=2, shape=shape)
    with pytest.raises(UsageError, match="cp=3 does not divide 16 tokens: give another --seq"):
        simulate(workload(), cp=3, shape=shape)


def test_latent_attention_is_split_by_heads() -> None:
    """What leads down to the latents is on every rank, as transformers' plan has it, and so is the router."""
    found = simulate(workload("deepseek_v2", **LATENT), tp=2)
    tokens = 3 * 2 * BATCH * SEQ * 3  # forward and twice backward, in three layers
    assert {row.module: row.flops for row in found.replicated} == {
        "model.layers.*.self_attn.q_a_proj": tokens * D * 24,
        "model.layers.*.self_attn.kv_a_proj_with_mqa": tokens * D * (32 + 8),
        "model.layers.*.mlp.gate": tokens * 2 // 3 * D * 4,
    }
    assert found.ranks_flops == found.whole_flops + found.replicated_flops


def test_a_checkpoint_directory_lies_on_a_mesh(tmp_path: Path) -> None:
    """Any text model that transformers builds, its activations from its own config."""
    transformers.LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    page = tmp_path / "mesh.html"
    options = ["--mesh", "tp=2,sp,pp=2", "--seq", str(SEQ), "--json", "-", "--html", str(page)]
    ran = CliRunner().invoke(app, ["plan", str(tmp_path), *options])
    assert ran.exit_code == 0, ran.output
    found = msgspec.json.decode(ran.stdout, type=Mesh)
    assert (found.tp, found.sp, found.ranks_flops, found.replicated) == (2, True, found.whole_flops, ())
    assert all(stage.activations_bytes for stage in found.stages)
    assert f"{found.stages[0].flops:,}" in page.read_text()


def test_experts_that_the_plan_does_not_split_share_out_tokens() -> None:
    """Then tensor parallel ranks do not do them alike: each sends its own part of the tokens."""

    def unsplit() -> Workload:
        found = workload("mixtral", tie_word_embeddings=False, **EXPERTS)
        found.model._tp_plan = {k: v for k, v in found.model.tp_plan.items() if "experts" not in k}
        return found

    whole = simulate(workload("mixtral", tie_word_embeddings=False, **EXPERTS), tp=2, dp=2, ep=2, etp=1)
    assert simulate(unsplit(), tp=2, dp=2, ep=2).stages == whole.stages
    with pytest.raises(UsageError, match="does not split experts in its tp_plan, but etp=2 would"):
        simulate(unsplit(), tp=2, dp=2, ep=2, etp=2)
    assert [row.module for row in simulate(unsplit(), tp=2).replicated] == [
        "model.layers.*.mlp.gate",
        "model.layers.*.mlp.experts",
    ]
