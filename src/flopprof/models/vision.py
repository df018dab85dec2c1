"""Every model of torchvision, without weights, shaped as its own published weights declare."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import warnings
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from flopprof.errors import FlopprofError, MissingPackage, UsageError
from flopprof.models.inputs import InputSpec, first_line, make_input, samples_in
from flopprof.models.request import Request, construct
from flopprof.models.workload import Workload

# torchvision computes its published `_ops` from 512 x 512 images that pass through the weights' own transforms,
# and from clips of 16 frames; transforms that do not resize (optical flow) leave the 512.
_PUBLISHED_SIZE = 512
_FRAMES = 16

# Detection transforms do not resize either: these are the sizes of the published `_ops`, which the models'
# own resizing (shorter side 800, 320 or 300) leaves as they are.
_DETECTION_SIZE = 800
_DETECTION_SIZES = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": 320,
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
}

# How much of an R-CNN's second stage runs depends on its weights, which are random here. With predictors that
# leave every anchor as it is, and nothing suppressed, as much runs as its settings allow: 1000 proposals (trained
# weights give as many), 100 detections.
_FILLED = {"rpn_nms_thresh": 1.0, "box_nms_thresh": 1.0, "box_score_thresh": -1.0}
_FILLED_ASSUMPTION = (
    "every image gives as many proposals and detections as the model's settings allow (by default 1000 and 100)"
)


def names() -> list[str]:
    """Every name that torchvision can build; none where torchvision is not installed."""
    try:
        return list(_torchvision().list_models())
    except FlopprofError:
        return []


def knows(name: str) -> bool:
    """Whether torchvision has this model. Raises MissingPackage where torchvision is missing or broken."""
    return name.lower() in _torchvision().list_models()


def load(name: str, request: Request) -> Workload:
    """The torchvision model and the input that its default weights declare."""
    if name.startswith("quantized_"):
        return _load_quantized(name, request)
    return _on(request.device or "meta", name, request)


def _load_quantized(name: str, request: Request) -> Workload:
    """int8 kernels exist on the CPU only, for inference only, and choose their own dtype."""
    if request.device not in (None, "cpu"):
        raise UsageError(f"{name} runs int8 kernels, which exist on the CPU only: use --device cpu, or leave it out.")
    if request.dtype is not None:
        raise UsageError(f"{name} computes in int8: leave --dtype out, or count {name.removeprefix('quantized_')}.")
    if request.train:
        raise UsageError(f"{name} cannot train: leave --train out, or count {name.removeprefix('quantized_')}.")
    return _on("cpu", name, request)


def _on(device: str, name: str, request: Request) -> Workload:
    model = construct(partial(_build, name, request), name=name, device=device, request=request)
    args = _inputs(name, device, request)
    return Workload(
        model=model,
        args=args,
        kwargs={},
        name=name,
        device=device,
        samples=samples_in(args[0]),
        assumptions=(_FILLED_ASSUMPTION,) if _is_filled(name, request) else (),
        on_cpu=partial(_on, "cpu", name, request) if request.device is None and device == "meta" else None,
    )


def _build(name: str, request: Request) -> nn.Module:
    models = _torchvision()
    builder = models.get_model_builder(name)
    arguments = {**_arguments(name, builder, _default_weights(name), request.image_size), **request.model_args}
    if _is_filled(name, request):
        arguments |= _FILLED
    engine = torch.backends.quantized.engine
    try:
        with warnings.catch_warnings():  # about initial weights, which no count looks at
            warnings.simplefilter("ignore")
            model = builder(**arguments)
    finally:
        if torch.backends.quantized.engine != engine:  # torchvision's quantising builders leave theirs behind
            torch.backends.quantized.engine = engine
    if _is_filled(name, request):
        with torch.no_grad():
            for parameter in (*model.rpn.head.parameters(), *model.roi_heads.box_predictor.parameters()):
                parameter.zero_()
    return cast(nn.Module, model)


def _arguments(name: str, builder: Any, weights: Any, image_size: int | None) -> dict[str, object]:
    """What gives the architecture that the default weights fit, without loading them."""
    parameters = inspect.signature(builder).parameters
    arguments: dict[str, object] = {"weights": None}
    if "weights_backbone" in parameters:
        arguments["weights_backbone"] = None
    if "aux_loss" in parameters:  # published segmentation weights have the auxiliary head
        arguments["aux_loss"] = True
    if "quantize" in parameters:
        arguments["quantize"] = True
    if name.endswith("googlenet"):  # published weights have no auxiliary heads
        arguments["aux_logits"] = False
    if name.startswith("vit_"):
        arguments["image_size"] = image_size or weights.meta["min_size"][0]
    return arguments


def _is_filled(name: str, request: Request) -> bool:
    return "rcnn" in name and not request.train and not _FILLED.keys() & request.model_args.keys()


def default_weights(name: str) -> Any:
    """The weights that torchvision takes by default, as it describes them: metrics, transforms. Nothing is loaded."""
    return _default_weights(name)


def _default_weights(name: str) -> Any:
    return _torchvision().get_model_weights(name).DEFAULT


def _inputs(name: str, device: str, request: Request) -> tuple[Any, ...]:
    module = _torchvision().get_model_builder(name).__module__
    if ".detection." in module:
        images = _images(_side(name, module, request), device, request)
        return (images, _detection_targets(images)) if request.train else (images,)
    if request.inputs:
        return request.tensors(device)
    side = _side(name, module, request)
    shape = (request.batch, 3, _FRAMES, side, side) if ".video." in module else (request.batch, 3, side, side)
    pictures = 2 if ".optical_flow." in module else 1
    return tuple(make_input(InputSpec(shape), device, request.dtype) for _ in range(pictures))


def _images(side: int, device: str, request: Request) -> list[torch.Tensor]:
    """Detection models take a list of images: each `--input` is one, or with four sizes a batch of them."""
    if request.inputs:
        given = request.tensors(device)
        return [image for tensor in given for image in (tensor.unbind() if tensor.dim() == 4 else (tensor,))]
    return [make_input(InputSpec((3, side, side)), device, request.dtype) for _ in range(request.batch)]


def _side(name: str, module: str, request: Request) -> int:
    if request.image_size is not None:
        return request.image_size
    if ".detection." in module:
        return _DETECTION_SIZES.get(name, _DETECTION_SIZE)
    transforms = _default_weights(name).transforms()
    size = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None) or [_PUBLISHED_SIZE]
    return int(size[0])


def _detection_targets(images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """One box over the middle of each image, of class 1, with a mask and keypoints for the heads that want them."""
    targets = []
    for image in images:
        side, device = image.shape[-1], image.device
        low, high = side / 4, 3 * side / 4
        mask = torch.zeros(1, side, side, dtype=torch.uint8, device=device)
        mask[:, side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
        targets.append(
            {
                "boxes": torch.tensor([[low, low, high, high]], dtype=image.dtype, device=device),
                "labels": torch.ones(1, dtype=torch.int64, device=device),
                "masks": mask,
                "keypoints": torch.tensor([[[side / 2, side / 2, 1.0]] * 17], dtype=image.dtype, device=device),
            }
        )
    return targets


def _torchvision() -> Any:  # torchvision ships no types
    try:
        return importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchvision":
            raise
        raise MissingPackage("this name needs torchvision: pip install 'flopprof[zoo]'") from error
    except (RuntimeError, ImportError, OSError) as error:
        raise explain_mismatch(error) from error


def explain_mismatch(error: Exception) -> MissingPackage:
    """What to say of a torchvision that cannot be imported: which versions are installed, and what mends it."""
    installed = ", ".join(f"{package} {_version(package)}" for package in ("torch", "torchvision"))
    return MissingPackage(
        f"the installed torchvision does not fit the installed torch ({installed}): {first_line(error)} "
        "Reinstall both together: pip install --force-reinstall torch torchvision"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
