"""A model on a simulated mesh of devices: what each pipeline stage's ranks do, hold and send. No torch."""

from __future__ import annotations

import msgspec

SCHEMA = "flopprof.mesh/1"


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that one rank sends in a step: around rings of tensor and data parallel ranks, and to the next stages.

    An all-reduce of b bytes over n ranks sends 2 b (n - 1) / n, an all-gather or a reduce-scatter half of that.
    """

    tensor: int = 0
    pipeline: int = 0
    data: int = 0

    @property
    def total(self) -> int:
        """All three."""
        return self.tensor + self.pipeline + self.data


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of one pipeline stage: all its tensor and data parallel sisters are alike.

    flops: of a step, all micro-batches, forward and backward and what is executed again. first, last: its blocks
    """

    first: int
    last: int
    forward_flops: int
    backward_flops: int
    recompute_flops: int
    params: int
    states_bytes: int
    activations_bytes: int | None
    traffic: Traffic

    @property
    def flops(self) -> int:
        """Everything that the rank executes in a step."""
        return self.forward_flops + self.backward_flops + self.recompute_flops

    @property
    def memory_bytes(self) -> int:
        """Weights, gradients, optimizer, and activations where they are known."""
        return self.states_bytes + (self.activations_bytes or 0)


class Mesh(msgspec.Struct, frozen=True, kw_only=True):
    """A step of training on tp x pp x dp ranks: micro_batches of micro_batch sequences on each replica.

    whole_flops: the same step unsharded, counted on the model as it is. ranks_flops: the sum over all ranks; it is more
    where work is done on several ranks alike.
    """

    model: str
    tp: int
    pp: int
    dp: int
    zero: int
    seq: int | None
    micro_batch: int
    micro_batches: int
    stages: tuple[Stage, ...]
    whole_flops: int
    replicated: tuple[str, ...] = ()
    schema: str = SCHEMA

    @property
    def ranks(self) -> int:
        """tp x pp x dp."""
        return self.tp * self.pp * self.dp

    @property
    def ranks_flops(self) -> int:
        """FLOPs of a step, summed over all ranks."""
        return self.tp * self.dp * sum(stage.flops for stage in self.stages)

    @property
    def bubble(self) -> float:
        """Share of a step that a stage waits, stages being equally long: (p - 1) / (m + p - 1) (arXiv 2104.04473)."""
        return (self.pp - 1) / (self.micro_batches + self.pp - 1)

    @property
    def balance(self) -> float:
        """FLOPs of the mean stage over those of the longest: what is lost where stages differ."""
        flops = [stage.flops for stage in self.stages]
        return sum(flops) / len(flops) / max(flops) if max(flops) else 1.0

    def to_json(self) -> str:
        """The mesh as JSON, schema `flopprof.mesh/1`."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()
