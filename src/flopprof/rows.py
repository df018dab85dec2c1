"""The rows of a Profile: one kind of call of one operator in one module and phase, and one module. No torch.

Rows can be in no cycle, and there are tens of thousands of them: gc=False spares the collector to visit each.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

Phase = Literal["forward", "backward", "recompute", "optimizer"]
Attention = Literal["full", "causal"]
Kind = Literal["parameter", "buffer", "activation"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "recompute", "optimizer")


class Operand(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One tensor that a counted operator read: what it is, and whether a gradient of it is wanted.

    factor: it is multiplied (a bias is only added).
    """

    shape: tuple[int, ...]
    dtype: str
    kind: Kind = "activation"
    name: str = ""
    requires_grad: bool = False
    factor: bool = False


class OperatorRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Calls of one counted operator with the same shapes in one module and phase.

    flops follows the profile's attention convention; flops_full and flops_causal hold both. mask_known tells
    whether the operator itself said which pairs it computes (otherwise causal equals full). bytes: each
    operand read once, each result written once. parameter: the one it multiplies, or whose gradient it makes.
    Operands are those of the first call; later ones may differ in what is only added. site names a forward row
    (rows inside one autograd node share it); joined_to is the site of the row that a backward row differentiates.
    """

    op: str
    fqn: str
    phase: Phase
    dtype: str
    operands: tuple[Operand, ...]
    outputs: tuple[tuple[int, ...], ...]
    calls: int
    flops: int
    flops_full: int
    flops_causal: int
    mask_known: bool = False
    bytes: int = 0
    parameter: str = ""
    line: str = ""
    site: str = ""
    joined_to: str = ""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Operand shapes, in argument order."""
        return tuple(operand.shape for operand in self.operands)

    @property
    def gradients_wanted(self) -> tuple[bool, ...]:
        """Per operand: does autograd want its gradient?"""
        return tuple(operand.requires_grad for operand in self.operands)


class ElementwiseRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Elementwise FLOPs of one operator in one module and phase."""

    op: str
    fqn: str
    phase: Phase
    calls: int
    flops: int


class UncountedRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Calls of an operator that does arithmetic and has no formula."""

    op: str
    fqn: str
    phase: Phase
    calls: int
    shapes: tuple[tuple[int, ...], ...] = ()
    reason: str = ""


class RoutingRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tokens that a router sent to each expert, over all its choices; fqn: the module that chose.

    each: of every choice, where there were a few.
    """

    fqn: str
    tokens: tuple[int, ...]
    calls: int
    each: tuple[tuple[int, ...], ...] = ()

    @property
    def load(self) -> float:
        """The fullest expert's tokens over an even share: 1.0 is even."""
        return max(self.tokens) * len(self.tokens) / max(1, sum(self.tokens))


class ExpertsRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Products with the weights of all experts in one phase, where each token chose `chosen` of them; fqn: who chose.

    flops: as they ran, every expert for every token; active_flops: of the chosen ones.
    """

    fqn: str
    experts: int
    chosen: int
    phase: Phase
    flops: int
    active_flops: int


class ModuleRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One module that ran: its class, calls, parameters (its own and its children's, tied ones once), output."""

    fqn: str
    cls: str
    calls: int = 0
    parameters: int = 0
    own_parameters: int = 0
    output_shape: tuple[int, ...] | None = None


class ParameterRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One parameter under its first name; tied ones once. embedding: an nn.Embedding has it (a head may too)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    trainable: bool = True
    embedding: bool = False

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)
