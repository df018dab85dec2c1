"""What counting costs: a training step bare, under an empty dispatch mode, under FlopCounter, under FlopCounterMode.

    python benchmarks/overhead.py [--rounds 40] [--seed 0]

The four run interleaved in one process, in random order each round; ratios of medians are printed, because
absolute times depend on the machine. Goal: FlopCounter at most 1.2x of the empty mode.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flopprof import FlopCounter


class EmptyMode(TorchDispatchMode):
    """The least that any dispatch mode costs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Block(torch.nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(torch.nn.Module):
    """Four blocks of d_model 64 over a vocabulary of 256."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, 64)
        self.blocks = torch.nn.ModuleList(Block(64, 4) for _ in range(4))
        self.head = torch.nn.Linear(64, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def cnn() -> torch.nn.Module:
    """Four convolutions with batch norm, and a head."""
    layers: list[torch.nn.Module] = []
    for cin, cout in ((3, 16), (16, 32), (32, 32), (32, 64)):
        layers += [torch.nn.Conv2d(cin, cout, 3, stride=2, padding=1), torch.nn.BatchNorm2d(cout), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10))


def training_step(model: torch.nn.Module, batch: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and an SGD step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        model(batch).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(step: Callable[[], None], model: torch.nn.Module, rounds: int) -> dict[str, float]:
    """Median seconds per step of each variant; the modes stay open over their steps, as in a training loop."""
    variants: dict[str, Callable[[], Any]] = {
        "bare": contextlib.nullcontext,
        "empty mode": EmptyMode,
        "FlopCounter": lambda: FlopCounter(model),
        "FlopCounterMode": lambda: FlopCounterMode(display=False),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name in random.sample(list(variants), len(variants)):
            with variants[name]():
                for _ in range(2):
                    step()  # the first steps under a new mode are not timed
                for _ in range(10):
                    start = time.perf_counter()
                    step()
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the ratios for a small transformer and a small CNN."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="rounds of 10 timed steps per variant (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="order of the variants (default 0)")
    options = parser.parse_args()
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    for name, model, batch in (
        ("transformer d_model 64", Transformer(), torch.randint(0, 256, (4, 32))),
        ("CNN", cnn(), torch.randn(4, 3, 32, 32)),
    ):
        medians = measure(training_step(model, batch), model, options.rounds)
        print(f"{name}: training step, medians of {10 * options.rounds}")
        for variant, seconds in medians.items():
            print(
                f"  {variant:<16}{1e3 * seconds:8.3f} ms {seconds / medians['bare']:7.2f}x bare"
                f" {seconds / medians['empty mode']:7.2f}x empty mode"
            )


if __name__ == "__main__":
    main()
