"""What tracing costs: trace() by torch.fx and by torch.export, against counting forward + backward on meta.

    python benchmarks/tracing.py [--rounds 5] [--models resnet50 vit_b_16 ...] [--big]

Each round counts and traces every model once, in one process; medians and their ratios are printed. Goals: fx at most
3x, export at most 12x the time of counting forward + backward on the same meta model. `--big` exports Llama-3.1-405B
and prints its time and the most memory that the process held (goal: 1.5 GiB).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from flopprof import count, trace

VISION = ("resnet50", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16", "densenet121")
TEXT: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "bert": {},
    "llama": {"num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16},
}
LLAMA_405B: dict[str, Any] = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def vision(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A torchvision classifier and one image, on meta."""
    from torchvision import models

    return models.get_model(name, weights=None).eval().to("meta"), torch.empty(1, 3, 224, 224, device="meta")


def text(kind: str, config: dict[str, Any]) -> tuple[torch.nn.Module, torch.Tensor]:
    """A language model of transformers and 128 tokens, on meta."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    auto = AutoModel if kind == "bert" else AutoModelForCausalLM
    with torch.device("meta"):
        made = AutoConfig.for_model(kind, use_cache=False, **config)
        return auto.from_config(made).eval(), torch.ones(1, 128, dtype=torch.int64)


def seconds(run: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(name: str, model: torch.nn.Module, batch: torch.Tensor, rounds: int) -> tuple[float | None, float]:
    """Ratios of fx (None where it cannot trace) and of export to counting forward + backward, of medians."""
    ways: dict[str, Callable[[], Any]] = {
        "count": lambda: count(model, batch, backward=True, fold=False),
        "fx": lambda: trace(model, batch, backward=True, engine="fx"),
        "export": lambda: trace(model, batch, backward=True, engine="export"),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, run in ways.items():
            try:
                taken = seconds(run)
            except Exception:  # what fx cannot trace
                continue
            if turn:  # the first one imports
                times[way].append(taken)
    medians = {way: statistics.median(taken) if taken else None for way, taken in times.items()}
    base, by_fx, by_export = medians["count"], medians["fx"], medians["export"]
    assert base is not None
    assert by_export is not None
    ratio = None if by_fx is None else by_fx / base
    shown = "cannot" if ratio is None else f"{ratio:5.2f}x"
    print(f"{name:<22} count {base:7.3f} s   fx {shown:>7}   export {by_export / base:5.2f}x")
    return ratio, by_export / base


def big() -> None:
    """Llama-3.1-405B: 128 tokens, forward + backward, by export."""
    model, ids = text("llama", LLAMA_405B)
    taken = seconds(lambda: print(f"{trace(model, ids, backward=True, engine='export').model_flops:,} FLOPs"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"llama 3.1 405B by export: {taken:.1f} s, at most {peak:.2f} GiB held by the process")


def main() -> None:
    """Print the ratio of each model, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds a model (default 5)")
    parser.add_argument("--models", nargs="*", default=[*VISION, *TEXT], help="which models (default: all)")
    parser.add_argument("--big", action="store_true", help="only Llama-3.1-405B, and its memory")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.big:
        big()
        return
    ratios = []
    for name in options.models:
        model, batch = vision(name) if name not in TEXT else text(name, TEXT[name])
        ratios.append(compare(name, model, batch, options.rounds))
    by_fx = [ratio for ratio, _export in ratios if ratio is not None]
    print(f"medians: fx {statistics.median(by_fx):.2f}x" if by_fx else "fx traced none", end="")
    print(f", export {statistics.median(ratio for _fx, ratio in ratios):.2f}x of counting forward + backward")


if __name__ == "__main__":
    main()
