"""Runtime and graph agree, per module, forward and backward: one model of each family here, whole zoos nightly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from conservation import conserved
from flopprof import count, load, trace
from flopprof.errors import Untraceable
from flopprof.profile import Profile
from zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs


def by_module(profile: Profile) -> dict[str, dict[str, int]]:
    return {phase: profile.by_module(phase, own=True) for phase in ("forward", "backward")}


def without_zeros(table: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    return {phase: {fqn: flops for fqn, flops in modules.items() if flops} for phase, modules in table.items()}


def agree(counted: Profile, traced: Profile) -> None:
    assert without_zeros(by_module(traced)) == without_zeros(by_module(counted))


# --- the laws' own zoo -----------------------------------------------------------------------------------------------
# What fx cannot trace, by what stops it.
NOT_FX = {
    "llama": "control flow",
    "mixtral": "control flow",
    "bert": "cannot be iterated",
    "t5": "control flow",
    "mamba": "cannot be iterated",
}


@pytest.mark.parametrize("engine", ["fx", "export"])
@pytest.mark.parametrize("name", ZOO)
def test_engines_agree_on_the_zoo(name: str, engine: Any) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.eval().to("meta")
    given = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), inputs)
    if engine == "fx" and name in NOT_FX:
        with pytest.raises(Untraceable, match=NOT_FX[name]):
            trace(model, *given, engine="fx")
        return
    traced = conserved(trace(model, *given, backward=True, engine=engine))
    counted = count(model, *given, backward=True, fold=False)
    agree(counted, traced)
    assert traced.n_params == counted.n_params
    assert traced.uncounted == {}
    if "checkpointed" not in name and name not in NOT_FX:  # masks of transformers: see docs/limits.md
        assert traced.elementwise_flops == counted.elementwise_flops or name == "recurrent"
        assert traced.by_parameter() == counted.by_parameter()
        assert traced.causal_flops == counted.causal_flops


@pytest.mark.parametrize("name", ["mlp", "gpt", "unet", "resnet18", "recurrent", "encoder-decoder"])
def test_a_model_in_training_on_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.train()
    there = copy.deepcopy(model).to("meta")
    given = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), inputs)
    counted = count(there, *given, backward=True, fold=False)
    for engine in ("fx", "export"):
        agree(counted, trace(model, *inputs, backward=True, engine=engine))  # type: ignore[arg-type]


# --- whole zoos ------------------------------------------------------------------------------------------------------
def compare(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """Each engine that traces the model agrees with the runtime; export traces all."""
    counted = count(model, *args, backward=True, fold=False, **kwargs)
    agree(counted, trace(model, *args, backward=True, engine="export", **kwargs))
    try:
        by_fx = trace(model, *args, backward=True, engine="fx", **kwargs)
    except Untraceable as error:
        print(error)  # pytest -s tells which
    else:
        agree(counted, by_fx)


def torchvision_names() -> list[str]:
    models = pytest.importorskip("torchvision.models")
    kinds = (models, models.segmentation, models.video)
    return [name for kind in kinds for name in models.list_models(module=kind) if not name.startswith("quantized")]


@pytest.mark.nightly
@pytest.mark.parametrize("name", torchvision_names())
def test_torchvision(name: str) -> None:
    workload = load(name, device="meta")
    compare(workload.model, *workload.args, **workload.kwargs)


# Of 42 families, those whose weights' names say that they differ in kind, at their own image sizes.
_NAMES = """beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_tiny coatnet_0_rw_224 convit_tiny convmixer_768_32
    convnext_tiny convnextv2_tiny crossvit_9_240 cspdarknet53 cspresnet50 darknet53 davit_tiny deit_tiny_patch16_224
    deit3_small_patch16_224 densenet121 dla34 dpn68 edgenext_small efficientformer_l1 efficientformerv2_s0
    efficientnet_b0 efficientnetv2_s efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny gernet_s ghostnet_100 ghostnetv2_100 hardcorenas_a haloregnetz_b hgnet_tiny
    hgnetv2_b0 hrnet_w18_small inception_next_tiny inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t
    lcnet_050 levit_128s maxvit_tiny_rw_224 mixer_s16_224 mixnet_s mnasnet_050 mobilenetv2_050 mobilenetv3_small_050
    mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nasnetalarge nextvit_small
    nf_resnet50 nfnet_f0 pit_ti_224 pnasnet5large poolformer_s12 pvt_v2_b0 regnetx_002 regnety_002 repghostnet_050
    repvgg_a0 repvit_m1 res2net50_26w_4s resmlp_12_224 resnest14d resnet18 resnetv2_50 rexnet_100 sebotnet33ts_256
    selecsls42 sequencer2d_s shvit_s1 skresnet18 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
    tf_efficientnet_b0 tiny_vit_5m_224 tinynet_e tnt_s_legacy_patch16_224 twins_pcpvt_small vgg11 visformer_tiny
    vit_tiny_patch16_224 vit_relpos_small_patch16_224 volo_d1_224 vovnet39a xception41 xcit_nano_12_p16_224"""
TIMM = _NAMES.split()


@pytest.mark.nightly
@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    workload = load(f"timm:{name}", device="meta")
    compare(workload.model, *workload.args, **workload.kwargs)


def ids(batch: int = 1, length: int = 128) -> torch.Tensor:
    return torch.ones(batch, length, dtype=torch.int64)


LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
IMAGE = {"pixel_values": lambda: torch.empty(1, 3, 224, 224, device="meta")}
TEXT = {"input_ids": ids}
# kind -> (head, sizes of the published model, inputs)
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], dict[str, Callable[[], torch.Tensor]]]] = {
    "llama": ("AutoModelForCausalLM", {**LLAMA, "num_key_value_heads": 8, "vocab_size": 128256}, TEXT),
    "qwen3": ("AutoModelForCausalLM", {**LLAMA, "num_key_value_heads": 8, "intermediate_size": 12288}, TEXT),
    "mistral": ("AutoModelForCausalLM", {**LLAMA, "num_key_value_heads": 8}, TEXT),
    "gemma": (
        "AutoModelForCausalLM",
        {
            "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
            "num_key_value_heads": 1, "head_dim": 256,
        },
        TEXT,
    ),
    "gpt2": ("AutoModelForCausalLM", {}, TEXT),
    "gpt_neox": ("AutoModelForCausalLM", {"num_hidden_layers": 16}, TEXT),
    "opt": ("AutoModelForCausalLM", {}, TEXT),
    "phi": ("AutoModelForCausalLM", {}, TEXT),
    "bert": ("AutoModelForMaskedLM", {}, TEXT),
    "roberta": ("AutoModelForMaskedLM", {}, TEXT),
    "electra": ("AutoModelForMaskedLM", {}, TEXT),
    "t5": (
        "AutoModelForSeq2SeqLM",
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        {"input_ids": ids, "decoder_input_ids": lambda: ids(length=64)},
    ),
    "modernbert": ("AutoModelForMaskedLM", {}, TEXT),
    "vit": ("AutoModelForImageClassification", {}, IMAGE),
    "clip": ("AutoModel", {}, {**IMAGE, "input_ids": lambda: ids(2, 77)}),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        {},
        {
            "input_features": lambda: torch.empty(1, 80, 3000, device="meta"),
            "decoder_input_ids": lambda: ids(length=64),
        },
    ),
    "mixtral": ("AutoModelForCausalLM", {"num_hidden_layers": 8}, TEXT),
    "mamba2": ("AutoModelForCausalLM", {"num_hidden_layers": 4, "hidden_size": 2048, "num_heads": 64}, TEXT),
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    head, sizes, inputs = TRANSFORMERS[kind]
    with torch.device("meta"):
        model = getattr(transformers, head).from_config(transformers.AutoConfig.for_model(kind, **sizes)).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    compare(model, **{name: make().to("meta") for name, make in inputs.items()})
