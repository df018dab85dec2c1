"""What closed forms cost: to make them for Llama-3.1-8B, to evaluate totals, to make rows; and a count for comparison.

    python benchmarks/closed.py [--rounds 200]

Medians of one process. Goal: `at()` with all its totals under 1 ms.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flopprof import Profile, count, trace

CONFIG = LlamaConfig(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131072,
)


def totals(profile: Profile) -> tuple[int, ...]:
    """Everything that at() promises at once."""
    return (
        profile.forward_flops,
        profile.backward_flops,
        profile.model_flops,
        profile.hardware_flops,
        profile.elementwise_flops,
        profile.bytes_moved,
        profile.causal_flops,
        *profile.by_phase().values(),
    )


def median_ms(work: Callable[[int], object], rounds: int) -> float:
    """Median time of work(0), work(1) ... in milliseconds."""
    times = []
    for round_ in range(rounds):
        start = time.perf_counter()
        work(round_)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(model: torch.nn.Module, ids: torch.Tensor, backward: bool, rounds: int) -> None:
    """Print what one profile with closed forms costs."""
    start = time.perf_counter()
    profile = trace(model, ids, dynamic={"batch": (0, 0), "seq": (0, 1)}, backward=backward)
    made = time.perf_counter() - start
    at = median_ms(lambda n: totals(profile.at(batch=8, seq=4096 + n)), rounds)
    rows = median_ms(lambda n: profile.at(batch=8, seq=4096 + n).by_module(), min(rounds, 20))
    whole = median_ms(lambda n: count(model, ids, backward=backward), 3)
    print(f"{'forward + backward' if backward else 'forward'}: {profile.formula()}")
    print(f"  trace(dynamic=...)      {made:10.2f} s")
    print(f"  at(), all totals        {at:10.3f} ms")
    print(f"  at(), rows by module    {rows:10.3f} ms")
    print(f"  count()                 {whole:10.3f} ms")


def main() -> None:
    """Print one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="evaluations timed (default 200)")
    options = parser.parse_args()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG).eval()
        ids = torch.zeros(1, 64, dtype=torch.long)
    for backward in (False, True):
        measure(model, ids, backward, options.rounds)


if __name__ == "__main__":
    main()
