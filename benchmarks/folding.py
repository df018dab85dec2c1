"""What counting a model on meta costs, folded, beside torch's FlopCounterMode: forward and backward, in one run.

    python benchmarks/folding.py [--rounds 5] [--models llama-405b,vit_l_16,resnet50,llama-3.1-405b,deepseek-v3]

The three variants run interleaved in one process; ratios of medians are printed, because absolute times depend on the
machine. Goals, folded beside FlopCounterMode: Llama-3.1-405B 0.1x, ViT-L 0.15x, ResNet-50 0.5x; from the catalogue,
as `flopprof count llama-3.1-405b` builds them, Llama-3.1-405B and DeepSeek-V3 0.2x. The last line is what the process
took at most, weights of every model having lain on meta.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from flopprof import count, load
from flopprof.models.catalogue import knows

GOALS = {"llama-405b": 0.1, "vit_l_16": 0.15, "resnet50": 0.5, "llama-3.1-405b": 0.2, "deepseek-v3": 0.2}
SEQ = 512


def build(name: str) -> tuple[torch.nn.Module, tuple[Any, ...], Mapping[str, Any]]:
    """(model, args, kwargs), the model on meta."""
    if knows(name):
        workload = load(name, seq=SEQ)
        # Without a cache the model looks into its positions, which FlopCounterMode cannot on meta.
        kwargs = {key: value for key, value in workload.kwargs.items() if key != "use_cache"}
        return workload.model, workload.args, kwargs
    with torch.device("meta"):
        if name == "llama-405b":
            from transformers import LlamaConfig, LlamaForCausalLM

            config = LlamaConfig(
                hidden_size=16384,
                num_hidden_layers=126,
                num_attention_heads=128,
                num_key_value_heads=8,
                intermediate_size=53248,
                vocab_size=128256,
            )
            return LlamaForCausalLM(config).eval(), (torch.zeros(1, SEQ, dtype=torch.long),), {}
        from torchvision.models import get_model

        return get_model(name).eval(), (torch.randn(1, 3, 224, 224),), {}


def by_torch(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Count with FlopCounterMode."""
    with FlopCounterMode(display=False):
        output = model(*args, **kwargs)
        (output if isinstance(output, torch.Tensor) else output.logits).sum().backward()
    model.zero_grad()


def measure(name: str, rounds: int) -> dict[str, float]:
    """Median seconds of each variant."""
    model, args, kwargs = build(name)
    variants: dict[str, Callable[[], object]] = {
        "FlopCounterMode": lambda: by_torch(model, args, kwargs),
        "count, folded": lambda: count(model, *args, backward=True, **kwargs),
        "count, fold=False": lambda: count(model, *args, backward=True, fold=False, **kwargs),
    }
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for number in range(rounds + 1):
        for variant, run in variants.items():
            gc.collect()  # each pays for its own garbage alone
            start = time.perf_counter()
            run()
            if number:  # the first round warms up
                times[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(values) for variant, values in times.items()}


def main() -> None:
    """Print the ratios for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--models", default=",".join(GOALS), help="names, separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models.split(","):
        medians = measure(name, options.rounds)
        goal = f", goal {GOALS[name]}x" if name in GOALS else ""
        print(f"{name}: forward + backward on meta, medians of {options.rounds}{goal}")
        for variant, seconds in medians.items():
            print(
                f"  {variant:<18}{1e3 * seconds:9.1f} ms {seconds / medians['FlopCounterMode']:7.3f}x FlopCounterMode"
            )
    print(f"resident at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
