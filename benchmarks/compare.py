"""What comparing models costs beside counting them one after the other, forward and backward on meta.

    python benchmarks/compare.py [--rounds 3] [--workers N] [--models resnet18,resnet50,...]

Both run in this process with torch and torchvision imported, interleaved, and the least time of each is printed: what
else runs on the machine only adds. Counting is
`load(name).count(backward=True)`; comparing does that, and also measures training memory and sizes, in workers. Goal:
within 1.3x of the time of counting divided by the cores used.
"""

from __future__ import annotations

import argparse
import gc
import time

from flopprof.compare.run import compare
from flopprof.compare.workers import cores
from flopprof.models import load

MODELS = [
    "resnet18",
    "resnet50",
    "vit_b_16",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "convnext_tiny",
    "swin_t",
    "swin_v2_t",
    "regnet_y_400mf",
    "densenet121",
    "vgg16",
    "alexnet",
    "squeezenet1_0",
    "googlenet",
    "inception_v3",
    "shufflenet_v2_x1_0",
    "mnasnet1_0",
    "maxvit_t",
    "wide_resnet50_2",
]
GOAL = 1.3


def one_after_the_other(names: list[str]) -> list[int]:
    return [load(name).count(backward=True).model_flops for name in names]


def side_by_side(names: list[str], workers: int) -> list[int | None]:
    return [row.training_flops for row in compare(names, workers=workers)]


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that warms up (default 3)")
    parser.add_argument("--workers", type=int, default=cores(), help="worker processes (default: the cores)")
    parser.add_argument("--models", default=",".join(MODELS), help="torchvision names, separated by commas")
    options = parser.parse_args()
    names = options.models.split(",")
    alone: list[float] = []
    together: list[float] = []
    for number in range(options.rounds + 1):
        gc.collect()
        start = time.perf_counter()
        expected = one_after_the_other(names)
        middle = time.perf_counter()
        found = side_by_side(names, options.workers)
        end = time.perf_counter()
        assert found == expected
        if number:
            alone.append(middle - start)
            together.append(end - middle)
    share = min(alone) / options.workers
    print(f"{len(names)} models, {options.workers} workers, least of {options.rounds} rounds")
    print(f"  counted one after the other   {min(alone):7.2f} s")
    print(f"  that divided by the workers   {share:7.2f} s")
    print(f"  compared                      {min(together):7.2f} s", end="")
    print(f"  {min(together) / share:.2f}x, goal {GOAL}x")


if __name__ == "__main__":
    main()
