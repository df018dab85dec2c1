"""Whole collections count the same folded and not; nightly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from folds import same

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs


TIMM = [
    "beit_base_patch16_224", "cait_xxs24_224", "coat_lite_tiny", "coatnet_nano_rw_224", "convit_tiny",
    "convmixer_768_32", "convnext_tiny", "convnextv2_atto", "crossvit_9_240", "cspresnet50", "davit_tiny",
    "deit3_small_patch16_224", "densenet121", "dla34", "dm_nfnet_f0", "dpn68", "edgenext_xx_small",
    "efficientformer_l1", "efficientnet_b0", "efficientvit_b0", "eva02_tiny_patch14_224", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_100", "hardcorenas_a", "hgnet_tiny", "hrnet_w18_small",
    "inception_v4", "levit_128s", "maxvit_tiny_tf_224", "mixer_b16_224", "mobilenetv4_conv_small", "mobileone_s0",
    "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnety_002",
    "repvgg_a0", "resmlp_12_224", "resnest14d", "resnet50", "rexnet_100", "skresnet18", "res2net50_14w_8s",
    "samvit_base_patch16", "seresnet50", "sequencer2d_s", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "tiny_vit_5m_224", "tnt_s_patch16_224", "twins_pcpvt_small", "vgg11", "visformer_tiny", "vit_small_patch16_224",
    "volo_d1_224", "vovnet39a", "xception41", "xcit_tiny_12_p8_224",
]  # fmt: skip

GROUPED = ("mistral", "qwen2", "qwen3", "gemma", "mixtral", "stablelm")
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(
        ("llama", "gemma2", "phi", "gpt_neox", "gpt2", "opt", "bloom",
         "falcon", "mamba", "olmo2", "cohere", "starcoder2", "smollm3", "granite"),
        ("AutoModelForCausalLM", {}),
    ),
    **{kind: ("AutoModelForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}) for kind in GROUPED},
    "gptj": ("AutoModelForCausalLM", {"rotary_dim": 4}),
    **dict.fromkeys(
        ("bert", "roberta", "electra", "distilbert", "albert", "modernbert", "deberta-v2", "mpnet"),
        ("AutoModel", {}),
    ),
    "t5": ("AutoModelForTextEncoding", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 6, "num_heads": 4}),
}  # fmt: skip


def every_vision_model() -> list[str]:
    from flopprof.models import vision

    models = pytest.importorskip("torchvision.models")
    names = models.list_models(module=models)
    return [name for name in vision.names() if name in names and not name.startswith("quantized_")]


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*every_vision_model(), *(f"timm:{name}" for name in TIMM)])
def test_every_vision_model_counts_the_same_folded(name: str) -> None:
    from flopprof.models import load

    workload = load(name, batch=2)
    same(workload.model, *workload.args, backward=True)
    same(workload.model.train(), *workload.args)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", HEADS)
def test_every_language_model_counts_the_same_folded(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    head, sizes = HEADS[kind]
    common: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 48,
        "vocab_size": 60, "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**common, **sizes})
    with torch.device("meta"):
        model = getattr(transformers, head).from_config(config).eval()
    ids = torch.zeros(2, 12, dtype=torch.long, device="meta")
    for backward in (False, True):
        same(model, ids, backward=backward)
    same(model.train(), ids, backward=True)
