"""Models of the timm collection: `timm:NAME`."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from flopprof.errors import MissingPackage
from flopprof.models.inputs import InputSpec, make_input, samples_in
from flopprof.models.request import Request, construct
from flopprof.models.vision import explain_mismatch
from flopprof.models.workload import Workload


def names(*, tagged: bool = False) -> list[str]:
    """Every name that timm can build, or every one with a tag of weights; none where timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        return []
    return list(_timm().list_models(pretrained=tagged))


def knows(name: str) -> bool:
    """Whether timm has this architecture (`resnet50`, also with a weight tag: `resnet50.a1_in1k`)."""
    return bool(_timm().is_model(name))


def load(name: str, request: Request) -> Workload:
    """The timm model without weights, with the input size that its own configuration declares."""
    return _on(request.device or "meta", name, request)


def _on(device: str, name: str, request: Request) -> Workload:
    timm = _timm()
    model = construct(partial(_build, name, request), name=f"timm:{name}", device=device, request=request)
    if request.inputs:
        args = request.tensors(device)
    else:
        channels, *size = timm.data.resolve_model_data_config(model)["input_size"]
        if request.image_size is not None:
            size = [request.image_size, request.image_size]
        args = (make_input(InputSpec((request.batch, channels, *size)), device, request.dtype),)
    return Workload(
        model=model,
        args=args,
        kwargs={},
        name=f"timm:{name}",
        device=device,
        samples=samples_in(args[0]),
        on_cpu=partial(_on, "cpu", name, request) if request.device is None and device == "meta" else None,
    )


def _build(name: str, request: Request) -> nn.Module:
    create: Callable[..., nn.Module] = partial(_timm().create_model, name, pretrained=False, **request.model_args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.image_size is None or "img_size" in request.model_args:
            return create()
        try:  # transformers are built for one size; convolutional models have no such argument
            return create(img_size=request.image_size)
        except TypeError:
            return create()


def _timm() -> Any:  # timm ships no types
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingPackage("timm: models need the timm package: pip install timm") from error
    except RuntimeError as error:
        raise explain_mismatch(error) from error
    return timm
