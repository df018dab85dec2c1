"""Every torchvision model against the multiply-adds that its own weights publish, to the printed digits."""

from __future__ import annotations

import pytest

from flopprof import load

models = pytest.importorskip("torchvision.models")


ONE_OF_EACH_FAMILY = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_32",
    "wide_resnet50_2", "fcn_resnet50", "lraspp_mobilenet_v3_large", "r3d_18", "mvit_v2_s", "s3d", "swin3d_t",
    "raft_small", "quantized_shufflenet_v2_x0_5", "quantized_resnet18", "ssdlite320_mobilenet_v3_large",
]  # fmt: skip


def published(name: str) -> float:
    """Billions of multiply-adds, three decimals."""
    return float(models.get_model_weights(name).DEFAULT.meta["_ops"])


def check(name: str) -> None:
    profile = load(name).count()
    assert profile.exact
    assert round(profile.macs / 1e9, 3) == pytest.approx(published(name), abs=1e-9)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_a_family_matches_its_publication(name: str) -> None:
    check(name)


def test_a_wrong_count_would_be_seen() -> None:
    profile = load("resnet18").count()
    assert round(2 * profile.macs / 1e9, 3) != pytest.approx(published("resnet18"), abs=1e-9)


RCNN = ("fasterrcnn", "maskrcnn", "keypointrcnn")


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in models.list_models() if not name.startswith(RCNN)])
def test_every_model_matches_its_publication(name: str) -> None:
    check(name)
