"""The axes of a mesh of devices, and how they divide it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields

from flopprof.errors import UsageError

_EXAMPLE = "tp=8,pp=4,dp=16"
_BARE = "sp"


@dataclass(frozen=True, kw_only=True)
class Axes:
    """tp x cp x dp x pp ranks.

    tp   tensor parallel: a rank has slices of the weights
    cp   context parallel: a rank has a slice of every text, and gathers keys and values
    dp   data parallel: a rank has texts of its own; weights may be shared out (ZeRO)
    pp   pipeline stages
    ep   expert parallel, inside the ranks above: each has some of the experts, and is sent their tokens
    etp  tensor parallel ranks of an expert: tp, or 1 (experts lie whole, and tp ranks share out the tokens)
    sp   sequence parallel (Korthikanti 2022): norms, dropout and what they keep are split over tp ranks by tokens
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    sp: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for sizes that do not go together."""
        sizes = {name: getattr(self, name) for name in ("tp", "pp", "dp", "cp", "ep", "etp")}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise UsageError(f"a mesh has 1 or more ranks an axis: got {name}={size}.")
        if self.sp and self.tp == 1:
            raise UsageError("sp splits over tensor parallel ranks: give tp=2 or more beside it.")
        if self.etp not in (None, 1, self.tp):
            raise UsageError(f"etp is 1 or as large as tp: got etp={self.etp} at tp={self.tp}.")
        ranks = self.tp * self.cp * self.dp
        if ranks % (self.ep * self.expert_tp):
            each = f"{self.expert_tp} x " if self.expert_tp > 1 else ""
            raise UsageError(
                f"ep={self.ep} does not divide: the experts lie on {each}ep of the tp x cp x dp = {ranks} ranks of a "
                "stage."
            )

    @property
    def expert_tp(self) -> int:
        """Tensor parallel ranks of an expert."""
        if self.etp is None:  # as Megatron has it, unless the experts' ranks are the tensor parallel ones
            return 1 if (self.cp * self.dp) % self.ep else self.tp
        return self.etp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights outside experts: their gradients are reduced."""
        return self.dp * self.cp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.tp * self.cp * self.dp // (self.ep * self.expert_tp)

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.tp * self.cp * self.dp * self.pp


def parse_mesh(text: str) -> Axes:
    """`tp=8,sp,pp=16,dp=128` as axes. Raises UsageError."""
    names = [field.name for field in fields(Axes)]
    found: dict[str, int | bool] = {}
    for part in text.split(","):
        axis, equals, value = part.strip().partition("=")
        if axis in found:
            raise UsageError(f"the mesh has {axis} twice: give each axis once.")
        if axis == _BARE and not equals:
            found[axis] = True
        elif axis in names and axis != _BARE and value.isdecimal() and int(value) >= 1:
            found[axis] = int(value)
        else:
            raise UsageError(
                f"cannot read {part!r} of the mesh: write it as {_EXAMPLE} (axes: {', '.join(names)}; sp has no size)."
            )
    return Axes(**found)  # type: ignore[arg-type]  # sp is the only one that is no int
