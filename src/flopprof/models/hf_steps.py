"""Single tokens of a transformers model, each counted, after the cache that the model itself has filled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from msgspec.structs import replace as with_fields

from flopprof.counting.refused import accepted
from flopprof.counting.runtime import FlopCounter
from flopprof.counting.values import carried, moved
from flopprof.errors import UsageError
from flopprof.models.hf_cache import (
    Held,
    Kept,
    allocated,
    cache_in,
    changed,
    held,
    held_by_modules,
    known,
    layers_of,
    lengthen,
    recurrent,
)
from flopprof.models.hf_config import load_transformers
from flopprof.models.hf_reads import Read, Reads, lengthened
from flopprof.profile import Profile

if TYPE_CHECKING:
    from flopprof.models.hf_decode import Generator

_SHORT = (24, 40)  # prompts of which one, lengthened, must be the other


@dataclass(frozen=True)
class Step:
    """One new token for each sequence of a batch, after `context` in the cache: its counts, and what it read.

    cache, layers: classes of the cache and of its layers. kept: what it found there. reads: of the model's own
    tensors, by name. allocated: bytes of the memory in which the cache's tensors lay; None where its prompt was not
    run as a whole. windows: of its layers that slide.
    """

    context: int
    batch: int
    profile: Profile
    cache: str
    layers: tuple[str, ...]
    kept: tuple[Kept, ...]
    allocated: int | None
    windows: tuple[int, ...]
    reads: Mapping[str, Read] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)


@dataclass
class Memo:
    """What was found out about a model, so that it need not be again.

    whole: prompts run whole. given: it must be given an empty cache. prepared: calls as generate() prepares them.
    told: it keeps a cache only where a call says so too, and not the config alone.
    part: the part of it that makes the tokens after a prompt, where its generate() hands over to one. codes: sizes of
    what stands at each place of a text: none for a word, as many as there are codebooks for sound.
    """

    whole: bool = False
    given: bool = False
    prepared: bool = False
    told: bool = False
    part: str = ""
    codes: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Full:
    """A cache that a prompt has filled, under which name it is handed back, and what an encoder gave.

    whole: every token of the prompt ran.
    """

    name: str
    cache: Any
    encoded: Any = None
    whole: bool = True


class Session:
    """Prompts and steps while the model is left to change; values: those of small tensors are carried on meta."""

    def __init__(self, made: Generator, *, values: bool) -> None:
        self._made, self._values, self._memo = made, values, made.memo
        self._model: Any = made.workload.model
        self._before = {item.path: item.identity[0] for item in held_by_modules(self._model, {})}

    # --- prompts --------------------------------------------------------------------------------------
    def at(self, batch: int, context: int, source: int | None) -> _Full:
        """After a prefill; of a recurrent model, which runs a prompt token by token, after a short one, lengthened.

        The proof that it is the same: of two short prompts, one lengthened is the other, tensor by tensor.
        """
        least, more = _SHORT
        if self._runs_whole(context):
            return self._fill(batch, context, source)
        short = self._fill(batch, least, source)
        if known(short.cache) and recurrent(short.cache):
            lengthen(short.cache, more - least)
            found = [_outline(item) for item in self._held(short)]
            longer = self._fill(batch, more, source)
            if found == [_outline(item) for item in self._held(longer)]:
                lengthen(longer.cache, context - more)
                return replace(longer, whole=False)
        self._memo.whole = True
        return self._fill(batch, context, source)

    def _runs_whole(self, context: int) -> bool:
        made = self._made
        return context <= _SHORT[1] or made.paired or self._memo.whole or not made.text_alone or not self._recurs()

    def read(self, length: int, source: int | None) -> Mapping[str, Read]:
        """What the prefill of one sequence reads of the model's own tensors."""
        if not self._runs_whole(length) and not self.at(1, length, source).whole:
            least, more = (self._read(short, source) for short in _SHORT)
            return lengthened(least, more, Fraction(length - _SHORT[1], _SHORT[1] - _SHORT[0]))
        return self._read(length, source)

    def _read(self, length: int, source: int | None) -> Mapping[str, Read]:
        before, reads = replace(self._memo), Reads(self._model)
        self._fill(1, length, source, reads)
        # what was found out only now took a second forward
        return reads.reads if replace(self._memo, codes=before.codes) == before else self._read(length, source)

    def _fill(
        self, batch: int, length: int, source: int | None, watch: AbstractContextManager[Any] | None = None
    ) -> _Full:
        """After a prefill that is not counted, `watch` open around it. Raises UsageError where nothing is kept."""
        kwargs = dict(self._made.prompt(batch, length, source))
        self._memo.codes = codes_of(kwargs.get(self._ids))
        kwargs = moved(kwargs) if self._made.workload.device == "meta" else kwargs
        encoded: list[Any] = []
        encoder = self._model.get_encoder() if self._made.paired else None
        hook = None if encoder is None else encoder.register_forward_hook(lambda *call: encoded.append(call[-1]))
        try:
            with watch or accepted():
                found = None if self._memo.given else cache_in(self._model(**kwargs))
                if found is None and "past_key_values" in self._made.taken and not self._made.paired:
                    found = self._given(kwargs)
            if found is None and self._made.paired and not self._memo.told and "use_cache" in self._made.taken:
                self._memo.told = True
                return self._fill(batch, length, source)
        finally:
            if hook is not None:
                hook.remove()
        if found is None:
            raise UsageError(
                f"{self._made.workload.name} ({type(self._model).__name__}) keeps no cache between tokens: each new "
                "token costs a forward of the whole text, which a count without --mode tells."
            )
        return _Full(*found, encoded[-1] if encoded else None)

    def _given(self, kwargs: Mapping[str, Any]) -> tuple[str, Any] | None:
        """The cache that generate() hands to a model that makes none itself, once filled; None where it stays empty."""
        cache = self._empty()
        self._model(**{**kwargs, "past_key_values": cache})
        self._memo.given = any(True for _ in held(cache))
        return ("past_key_values", cache) if self._memo.given else None

    def _empty(self) -> Any:
        return load_transformers().DynamicCache(config=self._model.config.get_text_config(decoder=True))

    def _recurs(self) -> bool:
        """Does the config speak of layers that keep a state? True where it cannot be asked."""
        try:
            return recurrent(self._empty())
        except Exception:  # a config of a kind of its own
            return True

    def _elsewhere(self) -> list[Held]:
        """What the model's modules keep themselves, since the session began."""
        return list(held_by_modules(self._model, self._before))

    def _held(self, full: _Full) -> list[Held]:
        return [*held(full.cache), *self._elsewhere()]

    # --- steps ------------------------------------------------------------------------------------------
    def follow(self, batch: int, contexts: Sequence[int], source: int | None) -> Iterator[Step]:
        """A step after each of these contexts, ascending."""
        full, now = self.at(batch, contexts[0], source), contexts[0]
        for context in contexts:
            if context != now and known(full.cache):
                lengthen(full.cache, context - now)
                full = replace(full, whole=False)
            elif context != now:
                full = self.at(batch, context, source)
            step, cache = self._step(batch, context, full)
            full, now = replace(full, cache=cache), context + 1
            yield step

    def _step(self, batch: int, context: int, full: _Full) -> tuple[Step, Any]:
        before = self._held(full)
        memory = allocated(full.cache) if full.whole and not self._elsewhere() else None
        counter, reads = FlopCounter(self._model, attention=self._made.attention), Reads(self._model)
        given = (self._prepared if self._memo.prepared else self._next)(batch, context, full)
        with carried(counter.assume) if self._values else nullcontext(), reads, counter:
            output = self._model.get_submodule(self._memo.part)(**given)
        _name, cache = cache_in(output) or (full.name, full.cache)
        later = self._held(replace(full, cache=cache))
        if [item.identity for item in before] == [item.identity for item in later]:
            raise UsageError(f"{self._made.workload.name} leaves its cache as it was after a token: it cannot go on.")
        step = Step(
            context=context,
            batch=batch,
            profile=self._named(counter.profile, batch),
            cache=type(cache).__name__,
            layers=layers_of(cache),
            kept=changed(before, later, self._made.latent),
            allocated=memory,
            windows=tuple(sorted({item.window for item in before if item.window is not None})),
            reads=reads.reads,
            shapes=reads.shapes,
        )
        return step, cache

    def _next(self, batch: int, context: int, full: _Full) -> dict[str, Any]:
        """Arguments for one new token of each sequence: positions are left to the model, which asks its cache."""
        token = self._tokens(batch, 1)
        given = {self._ids: token, "use_cache": True}
        given[full.name] = full.cache
        if full.encoded is not None and "encoder_outputs" in self._made.taken:
            given["encoder_outputs"] = full.encoded
        if "cache_position" in self._made.taken:  # which earlier releases do not ask the cache for
            given["cache_position"] = torch.arange(context, context + 1, device=token.device)
        return given

    def _prepared(self, batch: int, context: int, full: _Full) -> dict[str, Any]:
        """The same as generate() prepares them, from the whole text: with positions and a mask that masks nothing."""
        text = self._tokens(batch, context + 1)
        given = self._next(batch, context, full)
        given["attention_mask"] = torch.ones(batch, context + 1, dtype=torch.int64, device=text.device)
        given = {name: value for name, value in given.items() if not name.endswith("input_ids")}
        prepare = self._model.prepare_inputs_for_generation
        if "next_sequence_length" in prepare.__code__.co_varnames[: prepare.__code__.co_argcount + 1]:
            given["next_sequence_length"] = 1
        prepared: dict[str, Any] = prepare(text, **given)
        return prepared

    @property
    def _ids(self) -> str:
        return "decoder_input_ids" if self._made.paired else "input_ids"

    def _tokens(self, batch: int, length: int) -> torch.Tensor:
        device = self._made.workload.device
        ones = torch.ones(batch, length, *self._memo.codes, dtype=torch.int64)
        return ones.to(device)

    def _named(self, profile: Profile, batch: int) -> Profile:
        workload = self._made.workload
        said = (*profile.assumptions, *workload.assumptions)
        return with_fields(profile, target=workload.name, tokens=batch, samples=batch, assumptions=said)


def codes_of(tokens: Any) -> tuple[int, ...]:
    """Sizes behind (batch, length) of a text, where a place holds several codes."""
    return tuple(tokens.shape[2:]) if isinstance(tokens, torch.Tensor) else ()


def _outline(item: Held) -> tuple[Any, ...]:
    return item.path, item.shape, item.dtype, item.window
