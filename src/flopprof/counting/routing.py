"""Which expert gets how many tokens: what routers were seen to choose, and what they are told to choose on meta.

A router takes the largest of a few scores, one for each expert, beside modules or weights that are as many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from flopprof.counting.idle import MERGED, Choices
from flopprof.counting.values_store import aside
from flopprof.errors import UsageError
from flopprof.rows import RoutingRow

if TYPE_CHECKING:
    from flopprof.counting.attribution import Frame
    from flopprof.counting.tally import Row

MOST_EXPERTS = 1024  # routers choose among few: a choice among more (a vocabulary, anchors) is none of theirs
TOLD = "the choice of the largest scores is taken to send each expert the tokens that the given routing says"
Routing = Mapping[str, tuple[tuple[int, ...], ...]]  # by pattern, the tokens for each expert of each choice in turn
_DEPTH = 2  # of experts below the module that holds the router
_NAMED = 3
_MOST_APART = 8  # choices of one router that are told apart: some choose twice in a forward


# --- what was seen --------------------------------------------------------------------------------
class Seen:
    """Tokens for each expert, by the module that chose, added up over calls."""

    def __init__(self, counted: Mapping[Any, Row]) -> None:
        self._counted = counted  # what was multiplied so far
        self._routers: dict[tuple[str, int], _Router | None] = {}
        self._maxima: dict[str, _Maximum] = {}  # of each module the last, of which it is not known yet what it is for

    @property
    def choices(self) -> list[Choices]:
        """How widely each router chose, also on meta."""
        return [router.choices for router in self._routers.values() if router is not None and router.choices.calls]

    def note(self, frames: Mapping[str, Frame], frame: Frame, base: str, args: Any, out: Any) -> None:
        """An operator chose the largest of some scores, in a forward; or looked up what was chosen.

        A maximum is a choice only where its place is looked up: it may be there for its value alone.
        """
        if base in ("aten::gather", "aten::scatter"):
            self._looked_up(frame, args)
            return
        scores, chosen = args[0], out if base == "aten::argmax" else out[1]
        if type(chosen) is not torch.Tensor or not scores.is_floating_point() or scores.dim() < 2:
            return
        at = 2 if base == "aten::topk" else 1
        dim = args[at] if len(args) > at else None if base == "aten::argmax" else -1
        if dim is None:  # one for all of them
            return
        experts = scores.shape[dim]
        if not 1 < experts <= MOST_EXPERTS or (base == "aten::topk" and args[1] >= experts):
            return
        key = frame.fqn, experts
        if key not in self._routers:
            held = _weights(frames, frame.fqn, experts)
            self._routers[key] = _Router(Choices(frame.fqn, experts, self._chosen_among(held))) if held else None
        router = self._routers[key]
        if router is None:
            return
        if base == "aten::max":
            self._maxima[frame.fqn] = _Maximum(router, chosen, scores.numel() // experts)
        else:
            router.note(chosen, scores.numel() // experts)

    def _chosen_among(self, held: list[_Held]) -> tuple[Mapping[str, int], ...]:
        """Those that a choice may be about: others are as many by chance, as the layers below a classifier are.

        They are multiplied after it, and where there are several kinds, they are named experts.
        """
        before = {name for row in self._counted.values() for name in row.parameter.split(MERGED)}
        held = [each for each in held if before.isdisjoint(each.slot)]
        if len({each.owner for each in held}) > 1:
            held = [each for each in held if "expert" in each.owner.lower()]
        return tuple(each.slot for each in held)

    def _looked_up(self, frame: Frame, args: Any) -> None:
        last = self._maxima.get(frame.fqn)
        if last is None or len(args) < 3 or type(args[2]) is not torch.Tensor:
            return
        if args[2].untyped_storage()._cdata == last.chosen.untyped_storage()._cdata:
            last.router.note(last.chosen, last.rows)
            del self._maxima[frame.fqn]

    def rows(self) -> tuple[RoutingRow, ...]:
        """One row a router, in the order in which they ran."""
        with aside():
            return tuple(router.row() for router in self._routers.values() if router is not None and router.calls)


class _Held(NamedTuple):
    """Weights of as many parts as there are experts. owner: of their list or the stack's module, from the router's."""

    owner: str
    slot: Mapping[str, int]


class _Maximum(NamedTuple):
    router: _Router
    chosen: torch.Tensor
    rows: int


class _Router:
    """Tokens of all its choices on real numbers, and of the first few each."""

    def __init__(self, choices: Choices) -> None:
        self.choices, self.calls, self.each = choices, 0, list[torch.Tensor]()
        self._total: torch.Tensor | None = None

    def note(self, chosen: torch.Tensor, rows: int) -> None:
        """One more choice."""
        self.choices.add(rows, chosen.numel())
        if chosen.is_meta:
            return
        with aside():
            index = chosen.reshape(-1)
            tokens = torch.zeros(self.choices.experts, dtype=torch.int64, device=chosen.device)
            tokens.scatter_add_(0, index, torch.ones_like(index))
            self._total = tokens if self._total is None else self._total + tokens
        self.calls += 1
        if self.calls <= _MOST_APART:
            self.each.append(tokens)

    def row(self) -> RoutingRow:
        """What was seen."""
        assert self._total is not None
        apart = 1 < self.calls <= _MOST_APART
        return RoutingRow(
            fqn=self.choices.fqn,
            tokens=tuple(self._total.tolist()),
            calls=self.calls,
            each=tuple(tuple(tokens.tolist()) for tokens in self.each) if apart else (),
        )


def _weights(frames: Mapping[str, Frame], fqn: str, experts: int) -> list[_Held]:
    """Names and elements of the weights of so many experts that the module, or the one around it, holds.

    They are modules of a list, or slices of a parameter; a mapping for each part of an expert.
    """
    for name in (fqn, fqn.rpartition(".")[0]):
        module = _module(frames, name)
        parts = () if module is None else _within(module, name, _DEPTH)
        found = [
            _Held(owner[len(name) :], slot) for fqn_of, part in parts for owner, slot in _held(part, fqn_of, experts)
        ]
        if found:
            return found
    return []


def _module(frames: Mapping[str, Frame], fqn: str) -> nn.Module | None:
    """By its name: where only a method of it was called, it has no frame."""
    for name in (fqn, ""):
        frame = frames.get(name)
        found = frame.module() if frame is not None and frame.module is not None else None
        if found is not None:
            try:
                return found if name == fqn else found.get_submodule(fqn)
            except AttributeError:  # the root is not the model
                return None
    return None


def _within(module: nn.Module, fqn: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    yield fqn, module
    if depth:
        for name, child in module.named_children():
            yield from _within(child, f"{fqn}.{name}" if fqn else name, depth - 1)


def _held(module: nn.Module, fqn: str, experts: int) -> Iterator[tuple[str, dict[str, int]]]:
    prefix = f"{fqn}." if fqn else ""
    for key, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            kinds = Counter(map(type, child.children()))
            alike = [pair for pair in child.named_children() if kinds[type(pair[1])] == experts]
            parts: dict[str, dict[str, int]] = {}
            for number, expert in alike:
                for name, parameter in expert.named_parameters():
                    parts.setdefault(name, {})[f"{prefix}{key}.{number}.{name}"] = parameter.numel()
            for slot in parts.values() if parts or not alike else [{}]:
                yield prefix + key, slot
    for key, stack in module._parameters.items():
        if stack is not None and stack.dim() >= 3 and stack.shape[0] == experts:
            yield fqn, {f"{prefix}{key}": stack.numel()}


# --- what is told ---------------------------------------------------------------------------------
class Told:
    """Tokens for each expert, by patterns of the choosing module or of one around it; the first that fits holds.

    Where a list holds lists, they are those of the module's choices in turn, over and over.
    """

    def __init__(self, given: Routing) -> None:
        self._given = given
        self._turns: dict[str, int] = {}  # choices made so far, by module
        self._met: dict[str, str] = {}  # pattern -> why it could not be followed; "" where it was
        self._choosing: dict[str, int] = {}  # experts, by the modules that chose among some

    def tokens(self, fqn: str, rows: int, width: int, experts: int) -> tuple[int, ...] | None:
        """What the module is told of `rows` tokens that each go to `width` of so many experts; None: nothing."""
        self._choosing[fqn] = max(experts, self._choosing.get(fqn, 0))
        pattern = next((pattern for pattern in self._given if _fits(pattern, fqn)), None)
        if pattern is None:
            return None
        shares = self._given[pattern]
        turn = self._turns[fqn] = self._turns.get(fqn, -1) + 1
        tokens = shares[turn % len(shares)]
        problem = ""
        if len(tokens) != experts:
            problem = f"it lists {len(tokens)} experts, and {fqn or 'the model'} chooses among {experts}"
        elif sum(tokens) != rows * width:
            problem = (
                f"its numbers add up to {sum(tokens):,}, and {fqn or 'the model'} sends {rows:,} tokens to {width} "
                f"experts each: {rows * width:,}"
            )
        elif max(tokens) > rows:
            problem = f"it gives one expert {max(tokens):,} of {rows:,} tokens, and each token meets an expert once"
        if problem:
            self._met.setdefault(pattern, problem)
            return None
        self._met[pattern] = ""
        return tokens

    def require_followed(self) -> None:
        """Raises UsageError for a pattern that no router followed: it says why."""
        for pattern in self._given:
            problem = self._met.get(pattern)
            if problem == "":
                continue
            if problem is None:
                routers = [fqn for fqn in self._choosing if fqn]
                more = f" and {len(routers) - _NAMED} more" if len(routers) > _NAMED else ""
                problem = (
                    f"it fits no router of this run: there are {', '.join(routers[:_NAMED])}{more}"
                    if routers
                    else "nothing in this run chooses among experts"
                )
            raise UsageError(f"the routing of {pattern!r} cannot be followed: {problem}.")


def checked(given: Any, where: str) -> Routing:
    """The routing, its numbers counts. Raises UsageError, naming the key."""
    if not isinstance(given, Mapping) or not given:
        raise UsageError(f'{where} holds no routing: write {{"model.layers.*.mlp": [8, 8, 8, 8]}}.')
    found = {}
    for key, tokens in given.items():
        if not isinstance(key, str):
            raise UsageError(f"{where}: {key!r} is no pattern of modules.")
        shares = tokens if _is_list(tokens) and tokens and _is_list(tokens[0]) else [tokens]
        for share in shares:
            if not _is_list(share) or len(share) < 2:
                raise UsageError(f"{where}: {key!r} takes a list of the tokens that each expert gets.")
            for expert, number in enumerate(share):
                if type(number) is not int or not 0 <= number < 2**62:
                    raise UsageError(f"{where}: {key!r} gives expert {expert} {str(number)[:40]} tokens.")
        found[key] = tuple(tuple(share) for share in shares)
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _fits(pattern: str, fqn: str) -> bool:
    while True:
        if fnmatchcase(fqn, pattern):
            return True
        if not fqn:
            return False
        fqn = fqn.rpartition(".")[0]


def laid_out(tokens: tuple[int, ...], rows: int, width: int) -> torch.Tensor:
    """(rows, width) of expert numbers: each as often as told, and no row holds one twice.

    The list 0 0 0 1 1 ... is dealt to the rows in turn: one expert's tokens lie less than `rows` apart.
    """
    dealt = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(tokens))
    return dealt.view(width, rows).t().contiguous()
