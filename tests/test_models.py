"""Targets become the models and inputs that their published weights declare; what cannot be loaded says why."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from flopprof.errors import FlopprofError, MissingPackage, ModelFailed, UnknownTarget, UsageError
from flopprof.models import load, targets, timm, vision
from flopprof.models.inputs import InputSpec, describe_inputs, make_input, parse_input

SAMPLES = Path(__file__).parent / "sample_models"
NETS = SAMPLES / "nets.py"

# name, shape of each input: what torchvision's documentation of the weights gives
FAMILIES = [
    ("alexnet", [(1, 3, 224, 224)]),
    ("inception_v3", [(1, 3, 299, 299)]),
    ("googlenet", [(1, 3, 224, 224)]),
    ("efficientnet_b1", [(1, 3, 240, 240)]),
    ("regnet_y_400mf", [(1, 3, 224, 224)]),
    ("vit_b_16", [(1, 3, 224, 224)]),
    ("swin_t", [(1, 3, 224, 224)]),
    ("maxvit_t", [(1, 3, 224, 224)]),
    ("lraspp_mobilenet_v3_large", [(1, 3, 520, 520)]),
    ("deeplabv3_mobilenet_v3_large", [(1, 3, 520, 520)]),
    ("fasterrcnn_resnet50_fpn_v2", [(3, 800, 800)]),
    ("ssdlite320_mobilenet_v3_large", [(3, 320, 320)]),
    ("r3d_18", [(1, 3, 16, 112, 112)]),
    ("swin3d_t", [(1, 3, 16, 224, 224)]),
    ("raft_small", [(1, 3, 512, 512), (1, 3, 512, 512)]),
]


def shapes(args: tuple[object, ...]) -> list[tuple[int, ...]]:
    flat = args[0] if isinstance(args[0], list) else args
    return [tuple(tensor.shape) for tensor in flat]  # type: ignore[union-attr]


def n_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "expected"), FAMILIES)
def test_a_family_is_built_as_its_published_weights_have_it(name: str, expected: list[tuple[int, ...]]) -> None:
    workload = load(name)
    assert shapes(workload.args) == expected
    assert n_params(workload.model) == vision._default_weights(name).meta["num_params"]
    assert workload.device == "meta"
    assert all(parameter.is_meta for parameter in workload.model.parameters())
    assert not workload.model.training
    assert workload.samples == 1


# Without weights torchvision gives these a BatchNorm2d that trains, where the published ones have a frozen one
# whose scale and shift are buffers: a ResNet-50 has 26560 channels of it, a MobileNetV3-Large 12200.
FROZEN_NORM = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": 2 * 12200,
    "fasterrcnn_mobilenet_v3_large_fpn": 2 * 12200,
    "fasterrcnn_resnet50_fpn": 2 * 26560,
    "fcos_resnet50_fpn": 2 * 26560,
    "keypointrcnn_resnet50_fpn": 2 * 26560,
    "maskrcnn_resnet50_fpn": 2 * 26560,
    "retinanet_resnet50_fpn": 2 * 26560,
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", vision.names())
def test_every_torchvision_model_loads_with_its_published_parameters(name: str) -> None:
    workload = load(name)
    if name.startswith("quantized_"):  # int8 weights are packed, and no parameters
        assert workload.device == "cpu"
        return
    published = vision._default_weights(name).meta["num_params"]
    assert n_params(workload.model) == published + FROZEN_NORM.get(name, 0)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in vision.names() if "128gf" not in name])
def test_every_torchvision_model_counts(name: str) -> None:
    profile = load(name).count()
    assert profile.forward_flops > 0
    assert not profile.uncounted


# Multiply-adds of one detection's mask: four 3x3 convolutions of 256 channels on 14x14, a 2x2 transposed one to
# 28x28, a 1x1 one to 91 classes. Of one detection's keypoints: eight 3x3 convolutions, a 4x4 transposed one to 17.
MASK = 4 * 14 * 14 * 9 * 256 * 256 + 14 * 14 * 4 * 256 * 256 + 28 * 28 * 256 * 91
# Of one proposal's box: two linear layers on 256 channels of 7x7, and the scores and boxes of 91 classes.
BOX = 256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * 91 * 5
KEYPOINTS = 14 * 14 * 9 * (256 * 512 + 7 * 512 * 512) + 14 * 14 * 16 * 512 * 17


@pytest.mark.parametrize(
    ("name", "unpublished"),
    [
        ("fasterrcnn_resnet50_fpn", 0),
        pytest.param("fasterrcnn_resnet50_fpn_v2", 0, marks=pytest.mark.nightly),
        pytest.param("maskrcnn_resnet50_fpn_v2", 0, marks=pytest.mark.nightly),
        # published from noise, in which trained weights proposed nothing
        pytest.param("fasterrcnn_mobilenet_v3_large_320_fpn", 150 * BOX, marks=pytest.mark.nightly),
        pytest.param("fasterrcnn_mobilenet_v3_large_fpn", 1000 * BOX, marks=pytest.mark.nightly),
        # ... and in which they found nothing, and one person
        pytest.param("maskrcnn_resnet50_fpn", 100 * MASK, marks=pytest.mark.nightly),
        pytest.param("keypointrcnn_resnet50_fpn", 99 * KEYPOINTS, marks=pytest.mark.nightly),
    ],
)
def test_an_rcnn_fills_every_proposal_and_detection(name: str, unpublished: int) -> None:
    profile = load(name).count()
    assert round((profile.macs - unpublished) / 1e9, 3) == pytest.approx(vision._default_weights(name).meta["_ops"])
    assert len(profile.assumptions) == 1


def test_an_rcnn_with_its_own_thresholds_assumes_nothing() -> None:
    assert load("fasterrcnn_resnet50_fpn", model_args={"rpn_nms_thresh": 0.5}).assumptions == ()


def test_a_product_of_two_dtypes_is_refused_on_meta_as_it_is_elsewhere() -> None:
    with pytest.raises(ModelFailed, match=r"in up \(Linear\) on input 2x8 int64: aten::addmm would multiply"):
        load(f"{NETS}:Mlp", inputs=["2x8:int64"]).count()
    with pytest.raises(ModelFailed, match=r"in up \(Linear\) on input 2x8 int64: RuntimeError"):
        load(f"{NETS}:Mlp", inputs=["2x8:int64"], device="cpu").count()


def test_batch_and_image_size() -> None:
    assert shapes(load("resnet18", batch=3, image_size=64).args) == [(3, 3, 64, 64)]
    assert shapes(load("vit_b_32", image_size=64).args) == [(1, 3, 64, 64)]
    assert load("resnet18", batch=3).samples == 3
    assert shapes(load("ssd300_vgg16", batch=2).args) == [(3, 300, 300)] * 2


def test_a_name_in_capitals_is_the_same_name() -> None:
    assert load("ResNet18").name == "resnet18"


def test_inputs_replace_the_declared_ones() -> None:
    assert shapes(load("resnet18", inputs=["2x3x32x32"]).args) == [(2, 3, 32, 32)]
    assert shapes(load("ssd300_vgg16", inputs=["2x3x64x64", "3x64x80"]).args) == [(3, 64, 64), (3, 64, 64), (3, 64, 80)]


def test_model_arguments_reach_the_builder() -> None:
    assert load("resnet18", model_args={"num_classes": 10}).model.fc.out_features == 10


def test_dtype_and_mode() -> None:
    workload = load("resnet18", dtype="bfloat16", train=True)
    assert workload.model.training
    assert workload.args[0].dtype == torch.bfloat16
    assert {parameter.dtype for parameter in workload.model.parameters()} == {torch.bfloat16}


def test_detection_in_training_gets_targets() -> None:
    images, truth = load("maskrcnn_resnet50_fpn", train=True).args
    assert len(images) == len(truth) == 1
    assert set(truth[0]) == {"boxes", "labels", "masks", "keypoints"}


def test_quantised_models_run_int8_on_the_cpu() -> None:
    engine = torch.backends.quantized.engine
    workload = load("quantized_mobilenet_v2")
    assert workload.device == "cpu"
    assert "quantized" in type(workload.model.features[0][0]).__module__
    assert torch.backends.quantized.engine == engine
    for wish in ({"device": "meta"}, {"dtype": "float16"}, {"train": True}):
        with pytest.raises(UsageError, match="quantized_mobilenet_v2"):
            load("quantized_mobilenet_v2", **wish)  # type: ignore[arg-type]


def test_timm_declares_its_own_input() -> None:
    workload = load("timm:vit_tiny_patch16_224")
    assert shapes(workload.args) == [(1, 3, 224, 224)]
    assert workload.name == "timm:vit_tiny_patch16_224"
    assert workload.device == "meta"
    assert shapes(load("timm:vit_tiny_patch16_224", image_size=64, batch=2).args) == [(2, 3, 64, 64)]
    assert shapes(load("timm:resnet18", image_size=64).args) == [(1, 3, 64, 64)]
    assert shapes(load("timm:resnet18", inputs=["1x3x32x32"]).args) == [(1, 3, 32, 32)]


def test_building_moves_no_random_state() -> None:
    import numpy

    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    load("regnet_y_400mf")
    load(f"{NETS}:with_tensor", device="cpu")
    after = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert before == after


def test_two_loads_on_the_cpu_are_the_same_model() -> None:
    first, second = (load(f"{NETS}:Mlp", device="cpu", inputs=["2x8"]) for _ in range(2))
    assert torch.equal(first.model.up.weight, second.model.up.weight)
    assert torch.equal(first.args[0], second.args[0])


# --- files ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("attribute", ["with_tensor", "with_tuple"])
def test_a_function_that_returns_inputs(attribute: str) -> None:
    workload = load(f"{NETS}:{attribute}")
    assert shapes(workload.args) == [(2, 8)]
    assert workload.args[0].is_meta
    # 2 x (8 -> 16), 2 x (16 -> 4), a multiply-add is 2
    assert workload.count().forward_flops == 2 * 2 * (8 * 16 + 16 * 4)


def test_inputs_by_name() -> None:
    workload = load(f"{NETS}:with_dict")
    assert workload.args == ()
    assert workload.count().forward_flops == 2 * 2 * (8 * 16 + 16 * 4)


def test_a_class_with_arguments_and_a_ready_module() -> None:
    assert load(f"{NETS}:Mlp", inputs=["1x8"], model_args={"hidden": 5}).model.up.out_features == 5
    profile = load(f"{NETS}:ready", inputs=["3x8"]).count()
    assert profile.forward_flops == 2 * 3 * (8 * 16 + 16 * 4)
    assert profile.target == f"{NETS}:ready"
    assert profile.samples == 3  # rows of the first input, as everywhere in torch


def test_batch_reaches_a_function_that_takes_it() -> None:
    workload = load(f"{NETS}:with_batch", batch=5)
    assert shapes(workload.args) == [(5, 8)]
    with pytest.raises(UsageError, match="no parameter batch"):
        load(f"{NETS}:with_tensor", batch=5)


def test_a_model_that_needs_values_is_counted_on_the_cpu() -> None:
    profile = load(f"{NETS}:DataDependent", inputs=["4x8"]).count()
    assert profile.device == "cpu"
    assert profile.forward_flops == 2 * 4 * 8 * 8
    with pytest.raises(ModelFailed, match="DataDependent failed"):
        load(f"{NETS}:DataDependent", inputs=["4x8"], device="meta").count()


def test_a_count_leaves_the_path_and_the_modules_alone(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("import torch\n\ndef make():\n    return torch.nn.Linear(3, 5)\n")
    (tmp_path / "net.py").write_text("from beside import make\n")
    (tmp_path / "late.py").write_text("def make():\n    import beside\n    return beside.make()\n")
    (tmp_path / "bad.py").write_text("import beside\nraise RuntimeError('no')\n")
    path = list(sys.path)
    try:
        with pytest.raises(ModelFailed, match=r"bad\.py could not be imported: RuntimeError: no\."):
            load(f"{tmp_path / 'bad.py'}:make")
        assert "beside" not in sys.modules
        assert "flopprof_target_bad" not in sys.modules
        for file in ("net", "late"):
            assert load(f"{tmp_path / file}.py:make", inputs=["2x3"]).count().forward_flops == 2 * 2 * 3 * 5
        assert sys.path == path
    finally:
        sys.modules.pop("beside", None)


def test_a_file_is_never_run_as_main(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text("import torch\nNet = torch.nn.Identity\nif __name__ == '__main__':\n    raise SystemExit(9)\n")
    assert isinstance(load(f"{file}:Net", inputs=["1"]).model, nn.Identity)


# --- what cannot be loaded ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        ("resnet51", UnknownTarget, r"'resnet51': did you mean resnet50"),
        ("timm:vit_tiny_patch16_225", UnknownTarget, r"did you mean timm:vit_tiny_patch16_224"),
        ("mixer_b16_224", UnknownTarget, r"did you mean timm:mixer_b16_224"),
        ("zzzzzz", UnknownTarget, r"timm:NAME, hf:ORG/NAME, a directory or path/to/file\.py:function"),
        ("", UnknownTarget, r"no model is called ''"),
        ("hf:a/b/c", UsageError, r"names no repository"),
        ("nowhere.py:f", UsageError, r"no file 'nowhere\.py'"),
        (f"{NETS}", UsageError, r"does not say which function or class: it defines Mlp, "),
        (f"{NETS}:Mlpp", UsageError, r"has no 'Mlpp': it defines Mlp, "),
        (f"{NETS}:number", UsageError, r"number is a int: name a function, a class or a module"),
        (f"{NETS}:not_a_module", UsageError, r"returned a int: return a torch\.nn\.Module"),
        (f"{NETS}:NeedsArgument", UsageError, r"missing a required argument: 'width'.*--model-arg"),
        (f"{NETS}:Mlp", UsageError, r"returns a module and no inputs: .* forward\(x: "),
        (f"{NETS}:raises", ModelFailed, r"could not be built: RuntimeError: no such checkpoint\."),
        (f"{SAMPLES / 'broken.py'}:f", ModelFailed, r"could not be imported: ModuleNotFoundError: No module named"),
    ],
)
def test_a_target_that_cannot_be_loaded_says_why(target: str, error: type[FlopprofError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        load(target)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"image_size": 0}, "image size is 0"),
        ({"device": "tpu"}, "none of meta, cpu, cuda"),
        ({"dtype": "int8"}, "not one that a model can be cast to"),
        ({"inputs": ["1x3x8x8"], "batch": 2}, "both --batch and --input"),
        ({"inputs": ["1x3x8x8"], "image_size": 8}, "both --image-size and --input"),
        ({"inputs": ["1xthree"]}, "cannot read input '1xthree'"),
        ({"inputs": ["-1x3"]}, "cannot read input '-1x3'"),
        ({"inputs": ["1x3:float128"]}, "unknown dtype 'float128'"),
    ],
)
def test_a_wish_that_cannot_be_met_says_why(wish: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load("resnet18", **wish)  # type: ignore[arg-type]


def test_a_builder_that_raises_is_the_models_failure() -> None:
    with pytest.raises(ModelFailed, match=r"resnet18 could not be built: TypeError: .*--model-arg"):
        load("resnet18", model_args={"no_such_argument": 1})


def test_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="torch sees no CUDA device"):
        load("resnet18", device="cuda")


def test_a_failure_names_the_module_and_the_input() -> None:
    with pytest.raises(ModelFailed, match=r"resnet18 failed in conv1 \(Conv2d\) on input 1x4x64x64 float32: Run"):
        load("resnet18", inputs=["1x4x64x64"]).count()
    with pytest.raises(ModelFailed, match=r"in inner \(Explodes\) on .*: ValueError: the fuse is lit\. Check"):
        load(f"{NETS}:Fails", inputs=["1x8"]).count()


def test_a_torchvision_for_another_torch_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(vision.importlib, "import_module", broken)
    with pytest.raises(MissingPackage) as caught:
        load("resnet18")
    assert f"torch {torch.__version__.partition('+')[0]}" in str(caught.value)
    assert "operator torchvision::nms does not exist." in str(caught.value)
    assert "pip install --force-reinstall torch torchvision" in str(caught.value)
    assert vision.names() == []


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setattr(vision.importlib, "import_module", missing)
    with pytest.raises(MissingPackage, match=r"pip install 'flopprof\[zoo\]'"):
        load("resnet18")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackage, match="pip install timm"):
        load("timm:resnet18")


def test_suggestions_do_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm.importlib.util, "find_spec", lambda name: None)
    assert targets.suggestions("resnet51")[0] in ("resnet50", "resnet101")


# --- inputs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("2x8", InputSpec((2, 8))),
        ("7", InputSpec((7,))),
        ("0x3", InputSpec((0, 3))),
        ("1x128:int64", InputSpec((1, 128), torch.int64)),
        ("1X3x224x224:BFloat16", InputSpec((1, 3, 224, 224), torch.bfloat16)),
        ("scalar", InputSpec(())),
        ("scalar:bool", InputSpec((), torch.bool)),
    ],
)
def test_input_text(text: str, spec: InputSpec) -> None:
    assert parse_input(text) == spec


def test_inputs_are_zeros_where_integer_and_normal_where_floating() -> None:
    assert make_input(InputSpec((2, 3), torch.int64), "cpu", None).tolist() == [[0, 0, 0], [0, 0, 0]]
    floating = make_input(InputSpec((100,)), "cpu", torch.float64)
    assert floating.dtype == torch.float64
    assert floating.std() > 0.5
    assert make_input(InputSpec((2,), torch.float32), "cpu", torch.float16).dtype == torch.float32


def test_inputs_are_described_with_their_names() -> None:
    text = describe_inputs((torch.zeros(2, 8), 3, [torch.tensor(1)]), {"mask": torch.zeros(1, dtype=torch.bool)})
    assert text == "2x8 float32, scalar int64, mask=1 bool"
