"""The zoo of transformers: a sample of its default configurations here, all of them at night."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import zoo_huggingface as zoo
from flopprof.errors import ModelFailed
from hf_reduced import consistent, narrowed, narrowings, reduced

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

LIMITS = (Path(__file__).parents[1] / "docs" / "limits.md").read_text()
WRITTEN_FOR = "5.23"
AS_WRITTEN = pytest.mark.skipif(
    not transformers.__version__.startswith(WRITTEN_FOR), reason=f"the list is of transformers {WRITTEN_FOR}"
)

# Forty families: decoders, encoders, both, experts, states, pictures, sound, and several at once.
SAMPLE = [
    "CausalLM/llama", "CausalLM/gpt2", "CausalLM/mistral", "CausalLM/mixtral", "CausalLM/qwen3", "CausalLM/gemma2",
    "CausalLM/mamba2", "CausalLM/phi3", "CausalLM/falcon", "CausalLM/bloom", "CausalLM/opt", "CausalLM/gpt_neox",
    "CausalLM/olmo2", "CausalLM/cohere", "CausalLM/granite", "CausalLM/deepseek_v3", "CausalLM/xmod",
    "CausalLM/glm4", "MaskedLM/bert", "MaskedLM/roberta", "MaskedLM/albert", "MaskedLM/distilbert",
    "MaskedLM/electra", "MaskedLM/fnet", "Seq2SeqLM/t5", "Seq2SeqLM/bart", "Seq2SeqLM/marian",
    "Seq2SeqLM/pegasus", "ImageClassification/vit", "ImageClassification/deit", "ImageClassification/dinov2",
    "ImageClassification/resnet", "ImageClassification/convnext", "ImageClassification/mobilenet_v1",
    "ImageClassification/poolformer", "Model/clip", "Model/siglip", "Model/whisper", "Model/wav2vec2",
    "Model/fnet",
]  # fmt: skip

# Where meta and the CPU differ, and why: what meta cannot know is taken for more or other work than was done.
DIFFERENT: dict[str, str] = {
    "CausalLM/longcat_flash": "some of its experts compute nothing, and routing that nobody knows is taken to be even",
    "Model/longcat_flash": "some of its experts compute nothing, and routing that nobody knows is taken to be even",
}


def what(name: str) -> zoo.Registered:
    auto, kind = name.split("/")
    return next(item for item in zoo.registered(auto) if item.kind == kind)


def listed() -> set[str]:
    """The configurations that docs/limits.md names as not counted, as Auto/kind."""
    section = LIMITS.partition("### Configurations that are not counted")[2].partition("\n## ")[0]
    return set(re.findall(r"`([A-Za-z0-9]+/[\w.-]+)`", section))


@pytest.mark.parametrize("name", SAMPLE)
def test_a_default_configuration_counts_on_meta(name: str) -> None:
    tried = zoo.attempt(what(name))
    assert (tried.verdict, tried.reason) == ("clean", "")
    assert tried.flops > 0


def test_the_sample_is_of_forty_families() -> None:
    assert len({name.partition("/")[2] for name in SAMPLE}) >= 39
    assert len(SAMPLE) == 40
    assert {name.partition("/")[0] for name in SAMPLE} == set(zoo.AUTO)


# --- the tools of the sweep: each can say no -------------------------------------------------------------------------
def test_what_does_not_build_in_transformers_is_told_apart() -> None:
    assert zoo.attempt(what("CausalLM/reformer")).verdict == "unbuilt"
    assert zoo.fault(what("CausalLM/llama")) is None


def test_a_slow_model_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr(zoo, "load_config", spin)
    monkeypatch.setattr(zoo, "LIMIT_S", 1)
    tried = zoo.attempt(what("CausalLM/llama"))
    assert (tried.verdict, tried.reason) == ("failed", "more than 1 s")


def test_uncounted_operators_are_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = SimpleNamespace(uncounted={"own::scan": 2}, model_flops=5)
    workload = SimpleNamespace(count=lambda **_: profile)
    monkeypatch.setattr(zoo, "load_config", lambda *_: workload)
    tried = zoo.attempt(what("CausalLM/llama"))
    assert (tried.verdict, tried.reason, tried.flops) == ("uncounted", "own::scan", 5)


@pytest.mark.parametrize(
    ("answer", "told"),
    [(None, ("equal", "")), ("7 on meta, 8 on the CPU", ("different", "7 on meta, 8 on the CPU"))],
)
def test_a_comparison_tells_what_came_of_it(monkeypatch: pytest.MonkeyPatch, answer: object, told: object) -> None:
    monkeypatch.setattr(zoo, "disagreement", lambda _: answer)
    one = zoo.compare(what("CausalLM/llama"))
    assert (one.verdict, one.reason) == told


def test_what_cannot_be_compared_is_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise ModelFailed("stays too large.")

    monkeypatch.setattr(zoo, "disagreement", fail)
    one = zoo.compare(what("CausalLM/llama"))
    assert (one.verdict, one.reason) == ("apart", "stays too large.")
    assert zoo.compare(what("CausalLM/reformer")).verdict == "unbuilt"


def test_a_difference_between_the_devices_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    load = zoo.load_config

    def longer(kind: str, facts: Any, request: Any) -> Any:
        return load(kind, facts, request if request.device == "meta" else replace(request, seq=request.seq + 1))

    monkeypatch.setattr(zoo, "load_config", longer)
    one = zoo.compare(what("CausalLM/llama"))
    assert one.verdict == "different"


def test_the_summary_counts_shares_of_what_builds() -> None:
    def tried(auto: str, verdict: zoo.Verdict) -> zoo.Tried:
        return zoo.Tried(zoo.Registered(auto, "k", "K"), verdict, "", 1, 0.0)

    lines = zoo.summary([tried("A", "clean"), tried("A", "unbuilt"), tried("B", "failed"), tried("B", "uncounted")])
    assert [line.split() for line in lines[1:]] == [
        ["A", "2", "1", "1", "1", "100.0", "%"],
        ["B", "2", "2", "1", "0", "0.0", "%"],
        ["all", "4", "3", "2", "1", "33.3", "%"],
    ]


def test_depth_is_reduced_and_kinds_are_kept() -> None:
    few = next(reduced(zoo.default("gemma3_text")))
    whole = zoo.default("gemma3_text")
    assert few["num_hidden_layers"] < whole.num_hidden_layers
    assert set(few["layer_types"]) == set(whole.layer_types)
    assert len(few["layer_types"]) == few["num_hidden_layers"]
    assert {name: few[name] for name in ("hidden_size", "vocab_size", "head_dim")} == {
        name: getattr(whole, name) for name in ("hidden_size", "vocab_size", "head_dim")
    }


def test_only_what_contradicts_is_changed() -> None:
    facts = zoo.default("qwen2_vl").to_dict()
    made = consistent(facts)
    assert made["vision_config"]["hidden_size"] == facts["text_config"]["hidden_size"]
    assert facts["vision_config"]["hidden_size"] != facts["text_config"]["hidden_size"]
    made["vision_config"]["hidden_size"] = facts["vision_config"]["hidden_size"]
    for name in ("depth", "embed_dim", "patch_size"):
        assert made["vision_config"][name] == facts["vision_config"][name]


def changed(kind: str) -> dict[str, tuple[object, object]]:
    """Which fields of a default are changed to agree, by their path: (before, after)."""
    before = dict(fields(zoo.default(kind).to_dict()))
    after = dict(fields(consistent(zoo.default(kind).to_dict())))
    paths = sorted(before.keys() | after.keys())
    return {path: (before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)}


def fields(facts: dict[str, Any], path: str = "") -> Iterator[tuple[str, object]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def test_a_misspelt_name_is_read_as_the_one_that_was_meant() -> None:
    assert changed("edgetam_vision_model") == {
        "backbone_config.archirecture": ("repvit_m1", None),
        "backbone_config.architecture": ("resnet50", "repvit_m1"),
    }


def test_pictures_are_joined_to_no_more_tokens_than_they_have_patches_also_inside_an_encoder() -> None:
    made = changed("t5gemma2")
    assert made["encoder.mm_tokens_per_image"] == (256, ((224 // 16) // 2) ** 2)
    assert changed("modernvbert")["pixel_shuffle_factor"] == (4, 2)  # of 14 patches a side


def test_an_encoder_of_pictures_ends_as_wide_as_its_adapter() -> None:
    made = changed("llama4")
    assert made["vision_config.hidden_size"] == (768, 5632 // 2**2)
    assert made["vision_config.vision_output_dim"] == (7680, 4096)
    assert not any(path.endswith(("size", "heads", "layers")) for path in made if path.startswith("text_config"))


def test_what_must_be_given_is() -> None:
    assert changed("lw_detr")["projector_scale_factors"] == ([], [1.0])
    assert changed("step3p7")["text_config.sliding_window"] == (None, 128000)
    assert changed("uvdoc")["backbone_config.out_indices"] == ([6], [1, 2, 3, 4, 5, 6])


def test_a_default_without_contradictions_stays_as_it_is() -> None:
    for kind in ("bert", "clip", "t5", "convnext", "mixtral"):
        assert not {path for path in changed(kind) if "sliding_window" not in path}, kind


def test_layers_of_their_own_sizes_are_cut_with_the_others() -> None:
    few = next(reduced(zoo.default("gemma4_text")))
    assert few["num_hidden_layers"] == len(few["layer_types"]) == 6
    assert {int(layer): given for layer, given in few["per_layer_config"].items()} == {5: {"head_dim": 512}}


def test_experts_are_fewer_and_a_token_still_leaves_half() -> None:
    facts = next(narrowings({"num_local_experts": 128, "num_experts_per_tok": 8, "hidden_size": 64}))
    assert facts == {"num_local_experts": 16, "num_experts_per_tok": 8, "hidden_size": 8}


def test_heads_are_narrower_or_fewer() -> None:
    facts = {"hidden_size": 512, "head_dim": 64, "num_attention_heads": 12, "num_key_value_heads": 4, "adapter_in": 512}
    assert narrowed(facts, 8) == {
        "hidden_size": 64, "head_dim": 8, "num_attention_heads": 12, "num_key_value_heads": 4, "adapter_in": 64,
    }  # fmt: skip
    assert narrowed(facts, 8, heads=True) == {
        "hidden_size": 64, "head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 1, "adapter_in": 64,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["CausalLM/granitemoehybrid", "CausalLM/gemma4", "Model/llama4", "Model/neomme"])
def test_a_default_that_some_device_runs_counts(name: str) -> None:
    tried = zoo.attempt(what(name))
    assert (tried.verdict, tried.reason) == ("clean", "")


def test_widths_are_narrowed_and_pictures_are_not() -> None:
    facts = {"hidden_size": 64, "image_size": 64, "sizes": {"d_model": 48}, "embed_dims": [16, 20], "vocab_size": 800}
    assert narrowed(facts, 8) == {
        "hidden_size": 8, "image_size": 64, "sizes": {"d_model": 6}, "embed_dims": [2, 20], "vocab_size": 800,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["CausalLM/llama", "MaskedLM/bert", "ImageClassification/vit", "CausalLM/xmod"])
def test_a_narrow_model_counts_on_meta_as_on_the_cpu(name: str) -> None:
    assert zoo.disagreement(what(name)) is None


# --- all of them -----------------------------------------------------------------------------------------------------
@pytest.mark.nightly
@AS_WRITTEN
def test_nearly_every_default_configuration_counts() -> None:
    tried = list(zoo.sweep([*zoo.AUTO]))
    built = [result for result in tried if result.verdict != "unbuilt"]
    missed = {f"{one.what.auto}/{one.what.kind}": one.reason for one in built if one.verdict != "clean"}
    assert set(missed) == listed(), missed
    assert len(built) - len(missed) >= 0.95 * len(built)


@pytest.mark.nightly
@AS_WRITTEN
@pytest.mark.parametrize("auto", zoo.AUTO)
def test_every_narrow_model_counts_on_meta_as_on_the_cpu(auto: str) -> None:
    compared = [one for one in zoo.comparisons([auto]) if f"{auto}/{one.what.kind}" not in listed()]
    different = {f"{auto}/{one.what.kind}": one.reason for one in compared if one.verdict == "different"}
    assert set(different) == {name for name in DIFFERENT if name.startswith(f"{auto}/")}, different
    built = [one for one in compared if one.verdict != "unbuilt"]
    apart = {str(one.what): one.reason for one in built if one.verdict == "apart"}
    assert len(apart) <= 0.06 * len(built), apart  # two of the 37 encoder-decoders
