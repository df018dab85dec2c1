"""Pictures and what goes with them: read off what a model documents, and made to agree with the text around them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from flopprof import load
from flopprof.models.hf_agreed import agreed, scattered
from flopprof.models.hf_documented import documented, made
from flopprof.models.hf_maker import Inputs, Maker
from flopprof.models.hf_pictures import come_in_patches, patches
from flopprof.models.request import Request
from flopprof.models.workload import Workload

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs

BATCH = 2


class Config(SimpleNamespace):
    """As many facts as a case needs, and where a config of transformers keeps more of them."""

    model_type = "own"

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def maker(forward: Any, parts: dict[str, nn.Module] | None = None, **facts: Any) -> Maker:
    """For a model on meta with this forward."""

    class Model(nn.Module):
        main_input_name = "pixel_values"
        config = Config(**facts)

    Model.forward = forward  # type: ignore[method-assign]
    model = Model()
    for name, part in (parts or {}).items():
        model.add_module(name, part)
    request = Request(batch=BATCH, image_size=None, inputs=(), device="meta", dtype=None, train=False, model_args={})
    return Maker(model.to("meta").eval(), request, "meta")


# --- what is documented ----------------------------------------------------------------------------------------------
def document(self: Any, pixel_values: Any, target_sizes: Any, **_: Any) -> Any:
    """
    pixel_values (`torch.FloatTensor` of shape `(batch_size, num_tiles, num_channels, height, width)`):
        Tiles.
    tile_mask (`torch.BoolTensor` of shape `(batch_size, num_tiles)`, *optional*):
        Real tiles.
    context (`torch.Tensor` of shape `[batch_size, 3, dim * len(config.target_layer_ids)]`):
        States.
    classes_input_ids (`torch.LongTensor` of shape `(total_classes (>= batch_size), 7)`):
        Ids.
    classes_attention_mask (`torch.BoolTensor` of shape `(total_classes (>= batch_size), num_classes, 7)`):
        Mask.
    classes_structure (torch.LongTensor of shape `(batch_size)`):
        This tensor indicates the number of classes for each task.
    target_sizes (`torch.IntTensor` of shape `(num_images, 2)`):
        Height and width (in patches) of each image.
    prompt_masks (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
        A picture, whatever it is called.

    Returns:
        The patch grid of nothing.
    """


def test_sizes_are_those_of_what_is_given_and_of_lists_of_the_config() -> None:
    own, notes = maker(document, hidden_size=8, target_layer_ids=[1, 3, 5], vocab_size=50, image_size=4), []
    tiles = own.floats(BATCH, 5, 3, 4, 4)
    mask = made(own, "tile_mask", document, notes, {"pixel_values": tiles})
    assert (tuple(mask.shape), mask.dtype, notes) == ((BATCH, 5), torch.bool, [])
    assert made(own, "context", document, notes).shape == (BATCH, 3, 8 * 3)
    assert notes == []
    assert made(own, "tile_mask", document, notes).shape == (BATCH, 16)  # nothing tells how many tiles: owned up to
    assert notes == ["num_tiles of tile_mask is taken to be 16, which the config does not say"]


def test_as_many_classes_as_must_be_one_a_sample() -> None:
    own = maker(document, vocab_size=50)
    words = made(own, "classes_input_ids", document, [])
    mask = made(own, "classes_attention_mask", document, [], {"classes_input_ids": words})
    assert words.shape == mask.shape == (BATCH, 7)
    assert made(own, "classes_structure", document, []).tolist() == [1] * BATCH


def test_a_picture_is_no_mask_and_a_grid_is_known_by_what_is_said_of_it() -> None:
    own = maker(document, image_size=6, vocab_size=50)
    picture = made(own, "prompt_masks", document, [])
    assert (tuple(picture.shape), picture.dtype) == ((BATCH, 3, 6, 6), torch.float32)
    pages = documented(document)
    assert [name for name, said in pages.items() if said.counts_patches] == ["target_sizes"]


def test_patches_lie_side_by_side_under_a_grid_of_another_name() -> None:
    own = maker(document, image_size=32, patch_size=8, vocab_size=50)
    assert come_in_patches(own)
    first = next(patches(own, BATCH, "pixel_values"))
    assert first["target_sizes"].tolist() == [[4, 4]] * BATCH
    assert first["pixel_values"].shape == (1, 3, 8, BATCH * 16 * 8)


def placed(self: Any, pixel_values: Any, image_position_ids: Any) -> Any:
    """
    image_position_ids (`torch.LongTensor` of shape `(batch_size, max_patches, 2)`):
        The patch positions as (x, y) coordinates in the image.
    """


def test_patches_that_say_where_they_lie() -> None:
    own = maker(placed, image_size=(16, 24), patch_size=8)
    (only,) = patches(own, BATCH, "pixel_values")
    assert only["image_position_ids"].tolist() == [[[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]] * BATCH
    assert only["pixel_values"].shape == (BATCH, 6, 3 * 8 * 8)


# --- places for features ---------------------------------------------------------------------------------------------
def by_mask(self: Any, input_ids: Any, places_mask: Any) -> Any:
    words = self.embed(input_ids)
    words[places_mask.bool()] = self.features.view(1, 3, 4).expand(BATCH, 3, 4).reshape(-1, 4)
    return words


def by_placeholder(self: Any, input_ids: Any, places_mask: Any) -> Any:
    mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
    return self.embed(input_ids).masked_scatter(mask, self.features.expand(BATCH, 12))


class Features(nn.Embedding):
    """Words, of width 4."""


def reader(forward: Any) -> Maker:
    own = maker(forward, {"embed": nn.Embedding(50, 4)}, image_token_id=49, vocab_size=50)
    own.model.register_buffer("features", torch.empty(12, device="meta"))
    return own


@pytest.mark.parametrize(("forward", "places"), [(by_mask, BATCH * 9), (by_placeholder, 0)])
def test_as_many_places_are_marked_as_there_are_features(forward: Any, places: int) -> None:
    own = reader(forward)
    given = {"input_ids": torch.full((BATCH, 9), 5), "places_mask": torch.ones(BATCH, 9, dtype=torch.int64)}
    assert scattered(own, given) == [(places, BATCH * 3)]
    found = agreed(own, Inputs(given, None, BATCH))
    assert scattered(own, found.kwargs) == [(BATCH * 3, BATCH * 3)]
    marks = found.kwargs["places_mask"] if forward is by_mask else found.kwargs["input_ids"] == 49
    assert marks.tolist() == [[0, 1, 1, 1, 0, 0, 0, 0, 0]] * BATCH


def test_what_agrees_is_left_alone() -> None:
    own = reader(by_mask)
    mask = torch.zeros(BATCH, 9, dtype=torch.int64)
    mask[:, 4:7] = 1
    found = Inputs({"input_ids": torch.full((BATCH, 9), 5), "places_mask": mask}, None, BATCH)
    assert agreed(own, found) is found


# --- whole models ----------------------------------------------------------------------------------------------------
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "minicpm_ocr_vision": (
        "MiniCPMOcrVisionModel", {**SMALL, "image_size": 64, "patch_size": 8, "insert_layer_id": 0},
    ),
    "gemma4_vision": (
        "Gemma4VisionModel",
        {**SMALL, "head_dim": 12, "num_key_value_heads": 2, "patch_size": 16, "position_embedding_size": 64},
    ),
    "inkling2_vision": (
        "Inkling2VisionModel", {**SMALL, "patch_size": 16, "projection_hidden_dim": 32, "text_hidden_size": 16},
    ),
    "seggpt": ("SegGptModel", {**SMALL, "image_size": [64, 32], "patch_size": 8, "pretrain_image_size": 32,
                               "intermediate_hidden_state_indices": [0, 1], "merge_index": 0}),
    "idefics": ("IdeficsModel", {**SMALL, "vocab_size": 60, "vision_config": {
        "embed_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
        "patch_size": 8}}),
    "tipsv2_text_model": ("Tipsv2TextModel", {**SMALL, "vocab_size": 60, "max_position_embeddings": 16}),
}  # fmt: skip


SLOW = ("gemma4_vision", "idefics", "inkling2_vision")


def loaded(kind: str, folder: Path, **sizes: Any) -> Workload:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    cls, facts = CONFIGS[kind]
    config = transformers.AutoConfig.for_model(kind, **facts)
    config.architectures = [cls]
    config.save_pretrained(folder)
    return load(str(folder), **sizes)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.nightly) if kind in SLOW else kind for kind in CONFIGS]
)
def test_a_model_counts_on_meta_as_on_the_cpu(kind: str, tmp_path: Path) -> None:
    sizes = {"seq": 12} if kind == "idefics" else {}
    on_meta = loaded(kind, tmp_path, **sizes).count(backward=True)
    real = loaded(kind, tmp_path, device="cpu", **sizes).count(backward=True)
    assert on_meta.model_flops == real.model_flops > 0
    for phase in ("forward", "backward"):
        assert on_meta.by_module(phase) == real.by_module(phase)
    assert on_meta.assumptions == ()


def test_pictures_and_their_prompts_are_of_one_size(tmp_path: Path) -> None:
    kwargs = loaded("seggpt", tmp_path).kwargs
    assert len({tuple(tensor.shape) for tensor in kwargs.values()}) == 1


def test_the_whole_picture_runs_through_the_encoder(tmp_path: Path) -> None:
    workload = loaded("minicpm_ocr_vision", tmp_path)
    ((rows, columns),) = workload.kwargs["target_sizes"].tolist()
    patch_embedding = workload.count().by_module()["embeddings.patch_embedding"]
    assert patch_embedding == 2 * rows * columns * (3 * 8 * 8) * 24
