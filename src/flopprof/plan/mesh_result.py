"""A model on a simulated mesh of devices: what each pipeline stage's ranks do, hold and send. No torch."""

from __future__ import annotations

import msgspec

SCHEMA = "flopprof.mesh/2"


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that one rank sends in a step: around rings of ranks of each kind, and to the next stages.

    An all-reduce of b bytes over n ranks sends 2 b (n - 1) / n, an all-gather or a reduce-scatter half of that, as does
    an all-to-all.

    tensor           of split products that multiply one input, its gradient is reduced once (Megatron); with sequence
                     parallelism the same bytes are reduce-scattered and gathered
    tensor_each      the same with one reduction for each such product, as torch's own tensor parallelism does
    gathered_again   with sequence parallelism: inputs of which a rank keeps only its slice, gathered a second time for
                     the weights' gradients (Korthikanti 2022, section 4.2.2); not in `tensor`
    expert           tokens sent to their experts' ranks and back, in forward and in backward
    context          keys and values gathered in forward, again in backward, and their gradients scattered
    """

    tensor: int = 0
    tensor_each: int = 0
    gathered_again: int = 0
    expert: int = 0
    context: int = 0
    pipeline: int = 0
    data: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        tensor = self.tensor + self.gathered_again
        return tensor + self.expert + self.context + self.pipeline + self.data


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of one pipeline stage: all ranks of a stage are alike.

    flops: of a step, all micro-batches, forward and backward and what is executed again. first, last: its blocks.
    expert_params: of `params`, those of experts
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
    expert_params: int = 0

    @property
    def flops(self) -> int:
        """Everything that the rank executes in a step."""
        return self.forward_flops + self.backward_flops + self.recompute_flops

    @property
    def memory_bytes(self) -> int:
        """Weights, gradients, optimizer, and activations where they are known."""
        return self.states_bytes + (self.activations_bytes or 0)


class Alike(msgspec.Struct, frozen=True, kw_only=True):
    """Modules whose products every tensor parallel rank does alike, and the FLOPs of a step that are done over again.

    module: `*` stands for the number of a block
    """

    module: str
    flops: int


class Mesh(msgspec.Struct, frozen=True, kw_only=True):
    """A step of training on tp x cp x dp x pp ranks: micro_batches of micro_batch sequences on each replica.

    whole_flops: the same step unsharded, counted on the model as it is. ranks_flops: the sum over all ranks; it is
    whole_flops + replicated_flops, always. assumptions: of the count, and of the mesh
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
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sp: bool = False
    replicated: tuple[Alike, ...] = ()
    assumptions: tuple[str, ...] = ()
    schema: str = SCHEMA

    @property
    def ranks(self) -> int:
        """tp x cp x dp x pp."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def ranks_flops(self) -> int:
        """FLOPs of a step, summed over all ranks."""
        return self.tp * self.cp * self.dp * sum(stage.flops for stage in self.stages)

    @property
    def replicated_flops(self) -> int:
        """What the ranks do over again, in a step."""
        return sum(row.flops for row in self.replicated)

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
        """The mesh as JSON, schema `flopprof.mesh/2`."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()
