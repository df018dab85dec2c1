"""What a training script that follows a published formula prints of the same steps, beside what was counted.

nanogpt      `estimate_mfu` of nanoGPT's model.py: 6 N + 12 L H Q T per token, N without position embeddings, over the
             312e12 that it holds every device to
palm         PaLM (Chowdhery 2022, appendix B): 6 N + 12 L H Q T per token, all parameters
megatron     Megatron-LM's throughput per GPU (`num_floating_point_operations`): 72 B L s h^2 (1 + s / (6 h) +
             v / (12 h L)) per iteration of a GPT; with grouped queries, gated feed-forwards and experts as it has them
torchtitan   6 (N - untied embedding) + 6 L H (d_qk + d_v) T per token, without idle experts
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flopprof.analytic import (
    TransformerShape,
    megatron_training,
    nanogpt_flops_per_token,
    palm_flops_per_token,
    torchtitan_flops_per_token,
)
from flopprof.errors import UsageError
from flopprof.meter.figures import Peak, StepRecord, flops_by_rate
from flopprof.meter.summary import Convention

_A100_BFLOAT16 = 312e12  # nanoGPT, model.py: "A100 GPU bfloat16 peak flops is 312 TFLOPS"
_POSITIONS = ("wpe", "position_embeddings", "embed_positions", "position_embedding", "pos_emb", "wpe.weight")

# FLOPs of so many sequences of this shape, with n parameters of which so many are of position embeddings.
_Formula = Callable[[TransformerShape, int, int, int], int]


def _nanogpt(shape: TransformerShape, sequences: int, n: int, positions: int) -> int:
    return nanogpt_flops_per_token(n - positions, shape) * shape.seq * sequences


def _palm(shape: TransformerShape, sequences: int, n: int, positions: int) -> int:
    return palm_flops_per_token(n, shape) * shape.seq * sequences


def _megatron(shape: TransformerShape, sequences: int, n: int, positions: int) -> int:
    return megatron_training(shape, sequences)


def _torchtitan(shape: TransformerShape, sequences: int, n: int, positions: int) -> int:
    return torchtitan_flops_per_token(n, shape) * shape.seq * sequences


_FORMULAS: dict[str, _Formula] = {
    "nanogpt": _nanogpt,
    "palm": _palm,
    "megatron": _megatron,
    "torchtitan": _torchtitan,
}


class Teller:
    """One convention."""

    def __init__(self, name: str, formula: _Formula) -> None:
        self._name, self._formula = name, formula

    def tell(self, models: Sequence[Any], records: Sequence[StepRecord], peak: Peak) -> Convention | None:
        """Its figures of these steps; with the reason where it has none for this model. None without steps."""
        if not records:
            return None
        try:
            flops = self._flops(models, records)
        except ValueError as error:
            return Convention(name=self._name, reason=str(error))
        rate = flops / sum(record.step_time_s for record in records)
        limit = self._limit(records, peak)
        return Convention(
            name=self._name,
            flops_per_s=rate,
            mfu=None if limit is None else rate / limit,
            peak_flops_per_s=limit,
        )

    def _limit(self, records: Sequence[StepRecord], peak: Peak) -> float | None:
        if self._name == "nanogpt":
            return _A100_BFLOAT16
        table = flops_by_rate(records)
        most = max(table, key=lambda rate: table[rate][0], default=None)
        return None if most is None else peak(most)

    def _flops(self, models: Sequence[Any], records: Sequence[StepRecord]) -> int:
        if not models:
            raise ValueError("no model was given to the meter.")
        model = models[0]
        named = {id(tensor): (name, tensor.numel()) for name, tensor in model.named_parameters()}
        n = sum(numel for _, numel in named.values())
        positions = sum(numel for name, numel in named.values() if any(part in _POSITIONS for part in name.split(".")))
        total = 0
        shapes: dict[int, TransformerShape] = {}
        for record in records:
            if not record.samples or not record.tokens or record.tokens % record.samples:
                raise ValueError("it is of sequences of tokens: give Meter tokens= and samples=.")
            seq = record.tokens // record.samples
            if seq not in shapes:
                shapes[seq] = _shape(model, seq, n)
            total += self._formula(shapes[seq], record.samples, n, positions)
        return total


def teller(name: str) -> Teller:
    """The convention of that name. Raises UsageError."""
    if not isinstance(name, str) or name not in _FORMULAS:
        raise UsageError(f"convention {name!r} is none of {', '.join(_FORMULAS)}.")
    return Teller(name, _FORMULAS[name])


def _shape(model: Any, seq: int, n: int) -> TransformerShape:
    config = getattr(model, "config", None)
    if config is None:
        config = getattr(getattr(model, "module", None), "config", None)  # inside DistributedDataParallel
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config to read the sizes of a transformer from.")
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    elif not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        config = vars(config)
    return TransformerShape.from_config(config, seq=seq, n_params=n)
