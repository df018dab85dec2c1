"""Bytes of a training run on its fullest device: weights, gradients, optimizer, activations, logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flopprof.analytic import TransformerShape
from flopprof.errors import UsageError
from flopprof.plan.result import TrainingMemory
from flopprof.plan.sizes import Sizes

Checkpointing = Literal["none", "selective", "full"]
Precision = Literal["mixed", "fp32", "bf16"]
Optimizer = Literal["adamw", "momentum", "sgd"]

# bytes a parameter: the weights, their gradients, a copy in float32, and each state of the optimizer
_BYTES: dict[Precision, tuple[int, int, int, int]] = {"mixed": (2, 2, 4, 4), "fp32": (4, 4, 0, 4), "bf16": (2, 2, 0, 2)}
_STATES: dict[Optimizer, int] = {"adamw": 2, "momentum": 1, "sgd": 0}
_FLOAT32 = 4
_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is laid out over devices, and what its forward keeps.

    zero               0: every rank has all; 1: optimizer states are shared out over data parallel ranks, 2: gradients
                       too, 3: weights too (FSDP)
    micro_batch        sequences of one forward on one replica
    sequence_parallel  with tp: also norms and dropout are split (Korthikanti 2022)
    fused_attention    no scores are kept (SDPA, flash); dropout: its masks are, a byte an element
    """

    precision: Precision = "mixed"
    optimizer: Optimizer = "adamw"
    checkpointing: Checkpointing = "none"
    zero: int = 0
    tp: int = 1
    pp: int = 1
    micro_batch: int = 1
    sequence_parallel: bool = False
    fused_attention: bool = True
    dropout: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "micro_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        for name, choices in (("zero", _STAGES), ("precision", _BYTES), ("optimizer", _STATES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} is one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}.")
        if self.checkpointing not in ("none", "selective", "full"):
            raise UsageError(f"checkpointing is none, selective or full, got {self.checkpointing!r}.")

    def describe(self, data_parallel: int) -> str:
        """In a line: what was reckoned with."""
        parts = [
            f"{self.precision} precision",
            self.optimizer,
            f"ZeRO {self.zero} over {data_parallel}" if self.zero else f"DP {data_parallel}",
            f"TP {self.tp}" + (" with sequence parallelism" if self.sequence_parallel else "") if self.tp > 1 else "",
            f"PP {self.pp}" if self.pp > 1 else "",
            f"micro-batch {self.micro_batch}",
            f"checkpointing {self.checkpointing}",
            "" if self.fused_attention else "scores kept",
        ]
        return ", ".join(part for part in parts if part)


def training_memory(sizes: Sizes, layout: Layout, devices: int | None) -> TrainingMemory:
    """The bytes of the fullest pipeline stage. Raises UsageError where devices do not divide into replicas.

    States follow ZeRO (Rajbhandari 2020, arXiv 1910.02054): with mixed precision and Adam 2 + 2 + 12 bytes a parameter.
    Activations follow Korthikanti 2022 (arXiv 2205.05198), and are None where only the number of parameters is known.
    """
    replica = layout.tp * layout.pp
    ranks = 1 if devices is None else devices // replica
    if devices is not None and (ranks < 1 or devices % replica):
        raise UsageError(f"{devices} devices do not divide into replicas of tp {layout.tp} x pp {layout.pp}.")
    if sizes.shape is not None and layout.pp > sizes.shape.layers:
        raise UsageError(f"pp {layout.pp} is more than the model's {sizes.shape.layers} layers.")
    params = _ceil(_stage_params(sizes, layout.pp), layout.tp)
    weights, gradients, optimizer = state_bytes(params, layout, ranks)
    activations = logits = None
    if sizes.shape is not None:
        # the first stage has pp micro-batches under way (1F1B), of an even share of the layers each
        layers = _ceil(sizes.shape.layers, layout.pp) * layout.pp + sizes.shape.encoder_layers
        activations = activation_bytes(sizes.shape, layout, layout.micro_batch * sizes.shape.seq, layers)
        logits = logits_bytes(sizes.shape, layout, layout.micro_batch * sizes.shape.seq)
    return TrainingMemory(
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=activations,
        logits_bytes=logits,
        total_bytes=weights + gradients + optimizer + (activations or 0) + (logits or 0),
        devices_per_replica=replica,
        data_parallel=ranks,
        settings=layout.describe(ranks),
    )


def _stage_params(sizes: Sizes, pp: int) -> int:
    """Parameters of the fullest stage: an even share of the layers, and an embedding or a head at either end."""
    shape = sizes.shape
    if shape is None or pp == 1:
        return _ceil(sizes.params, pp)
    embedding = (shape.vocab + shape.positions) * shape.d_embedding
    head = 0 if shape.tied else shape.vocab * shape.d_embedding
    layers = _ceil(max(sizes.params - embedding - head, 0), shape.layers) * _ceil(shape.layers, pp)
    return layers + max(embedding, head)


def state_bytes(params: int, layout: Layout, ranks: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer of so many parameters on one of `ranks` data parallel ranks."""
    weight, gradient, copy, state = _BYTES[layout.precision]
    shared = [ranks if layout.zero >= stage else 1 for stage in (3, 2, 1)]
    each = (weight, gradient, copy + state * _STATES[layout.optimizer])
    weights, gradients, optimizer = (_ceil(params * size, over) for size, over in zip(each, shared, strict=True))
    return weights, gradients, optimizer


def logits_bytes(shape: TransformerShape, layout: Layout, tokens: int) -> int:
    """The logits of so many tokens, split over tp ranks: the loss is taken in float32."""
    return _ceil(tokens * shape.vocab * _FLOAT32, layout.tp)


def activation_bytes(shape: TransformerShape, layout: Layout, tokens: int, layers: int) -> int:
    """What forwards of so many tokens through so many layers keep for the backward."""
    element = _BYTES[layout.precision][0]
    whole = layer_bytes_per_token(shape, layout, element)
    if layout.checkpointing != "full":
        return tokens * layers * whole
    kept = element * shape.d_model
    kept = _ceil(kept, layout.tp) if layout.sequence_parallel else kept
    return tokens * (layers * kept + whole)  # the input of every layer, and one layer that is run again


def layer_bytes_per_token(shape: TransformerShape, layout: Layout, element: int = 2) -> int:
    """Bytes that one layer keeps of each token, on each of tp devices.

    For a plain layer in 16 bits with dropout and scores kept: h (10 + 24 / t + 5 a s / (h t)), Korthikanti's eq. 2; and
    all of it over t with sequence parallelism (eq. 4). Grouped queries, gates and experts keep what they have.
    """
    h = shape.d_model
    # the norms' inputs and outputs, and dropout's masks after either block
    outside = 4 * element * h + (2 * h if layout.dropout else 0)
    queries, values = shape.d_attention, shape.heads * shape.d_head_value
    inside = element * (queries + shape.kv_heads * (shape.d_head + shape.d_head_value) + values)
    if not layout.fused_attention and layout.checkpointing != "selective":
        scores = shape.heads * shape.seq
        inside += 2 * element * scores + scores if layout.dropout else element * scores
    width = shape.d_ff
    if shape.experts:
        width = (shape.experts_per_token + shape.shared_experts) * shape.d_ff_expert
    # gated: the gate, its activation, the other branch and their product; else the activation's input and output
    inside += (4 if shape.gated else 2) * element * width
    if layout.sequence_parallel:
        return _ceil(outside + inside, layout.tp)
    return outside + _ceil(inside, layout.tp)


def _ceil(value: int, parts: int) -> int:
    return -(-value // parts)
