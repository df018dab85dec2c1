"""Generation, run: a transformers model's prefill, and single tokens after a cache that a prefill has filled.

Nothing of a model's kind is known here. The prompt runs (on meta it costs nothing) and whatever cache the model makes
is handed back to it with one new token, whose operators are counted. No sequence is padded and no mask is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch

from flopprof.counting.preserve import preserved
from flopprof.counting.questions import failures
from flopprof.counting.runtime import FlopCounter
from flopprof.counting.values import carried, moved, needs_values
from flopprof.errors import FlopprofError, ModelFailed, UsageError
from flopprof.models.hf_cache import (
    Held,
    Kept,
    allocated,
    cache_in,
    changed,
    held,
    known,
    layers_of,
    lengthen,
    recurrent,
)
from flopprof.models.hf_config import load_transformers
from flopprof.models.hf_inputs import make_inputs
from flopprof.models.hf_maker import Maker, ids, reach
from flopprof.models.hf_reads import Read, Reads
from flopprof.models.inputs import first_line
from flopprof.models.request import Request
from flopprof.models.workload import Workload
from flopprof.profile import Attention, Profile

T = TypeVar("T")
Logits = Literal["last", "every"]

_SHORT = (24, 40)  # prompts of which one, lengthened, must be the other
_ONLY_LAST = ("logits_to_keep", "num_logits_to_keep")


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


@dataclass(frozen=True)
class _Full:
    """A cache that a prompt has filled, under which name it is handed back, and the output that it came with."""

    name: str
    cache: Any
    output: Any
    whole: bool = True  # every token of the prompt ran


@dataclass(frozen=True)
class Generator:
    """A transformers model that generates, on the device that it is on; inputs of any batch and length are made for it.

    request: sizes of pictures and sound; its batch and seq are replaced.
    """

    workload: Workload
    request: Request
    attention: Attention = "full"
    _whole: list[bool] = field(
        default_factory=list, init=False, repr=False
    )  # filled once prompts are known to run whole

    @property
    def model(self) -> Any:
        """The model; torch's own type lacks what transformers' has."""
        return self.workload.model

    @property
    def paired(self) -> bool:
        """Is there an encoder, whose output the decoder reads through a cross-attention?"""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def reads_text(self) -> bool:
        """Is its first input made of tokens?"""
        main = self.model.main_input_name
        return "input_ids" in (main if isinstance(main, list) else [main])

    @property
    def taken(self) -> Mapping[str, inspect.Parameter]:
        """What `forward` takes, by name."""
        return inspect.signature(self.model.forward).parameters

    @property
    def logits(self) -> Logits:
        """Which of a prompt's positions the prefill makes logits of: generation asks for the last, where it can."""
        return "last" if self.paired or any(name in self.taken for name in _ONLY_LAST) else "every"

    @property
    def reach(self) -> int | None:
        """The longest text that learned positions allow; None where positions are computed."""
        return reach(self.model)

    @property
    def dtype(self) -> str:
        """Of the parameters, most of them."""
        sizes: dict[torch.dtype, int] = {}
        for parameter in self.model.parameters():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        return str(max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)).removeprefix("torch.")

    @property
    def weight_bytes(self) -> int:
        """Of all parameters and persistent buffers, shared ones once."""
        storages = {id(t): t for t in self.model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
        return sum(tensor.numel() * tensor.element_size() for tensor in storages.values())

    # --- what is run --------------------------------------------------------------------------------
    def prompt(self, batch: int, length: int, source: int | None = None) -> Mapping[str, Any]:
        """Arguments of a prefill: `length` tokens of text; of an encoder-decoder the decoder's, and `source` tokens."""
        wanted = replace(self.request, batch=batch, seq=source if self.paired else length)
        kwargs = dict(make_inputs(self.workload.model, wanted, self.workload.device).kwargs)
        if self.paired:
            maker = Maker(self.workload.model, wanted, self.workload.device)
            kwargs["decoder_input_ids"] = ids(maker, batch, length)
        kwargs["use_cache"] = True
        kwargs.update({name: 1 for name in _ONLY_LAST if name in self.taken})
        return kwargs

    def prefill(self, batch: int, length: int, source: int | None = None, *, fold: bool | None = None) -> Profile:
        """FLOPs of the prompt's one forward, which fills the cache. Raises ModelFailed."""
        with _quiet():
            kwargs = self.prompt(batch, length, source)
            return replace(self.workload, args=(), kwargs=kwargs).count(attention=self.attention, fold=fold)

    def read(self, length: int, source: int | None = None) -> Mapping[str, Read]:
        """What the prefill of one sequence reads of the model's own tensors. Raises ModelFailed, UsageError."""

        def look(_values: bool) -> Mapping[str, Read]:
            with Reads(self.workload.model) as reads:
                self._at(1, length, source)
            return dict(reads.reads)

        return self._attempt(look)

    def steps(self, batch: int, contexts: Sequence[int], source: int | None = None) -> list[Step]:
        """A single token after each of these contexts, ascending. Raises ModelFailed, UsageError.

        The prompt of the first runs; what follows it does too, token by token, but where tokens are left out between
        two contexts, and all of the cache's layers are transformers' own, keys and values are made longer instead.
        """

        def run(values: bool) -> list[Step]:
            return list(self._follow(batch, contexts, source, values=values))

        return self._attempt(run)

    # --- how ------------------------------------------------------------------------------------------
    def _attempt(self, run: Callable[[bool], T]) -> T:
        """Without values first, which is faster; with them where a question about values has failed."""
        meta = self.workload.device == "meta"
        failed = failures()
        try:
            with self._undisturbed():
                found = run(False)
            if not meta or failures() == failed:
                return found
        except Exception as error:
            if not meta or not needs_values(error):
                raise self._failure(error) from error
        try:
            with self._undisturbed(), carried(lambda _: None):  # each step's counter is told what was guessed
                return run(True)
        except Exception as error:
            raise self._failure(error) from error

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            stack.enter_context(preserved([self.workload.model]))
            stack.enter_context(torch.no_grad())
            yield

    def _fill(self, batch: int, length: int, source: int | None) -> _Full:
        """After a prefill that is not counted. Raises UsageError where the model keeps nothing."""
        kwargs = dict(self.prompt(batch, length, source))
        output = self.model(**(moved(kwargs) if self.workload.device == "meta" else kwargs))
        found = cache_in(output)
        if found is None:
            raise UsageError(
                f"{self.workload.name} ({type(self.workload.model).__name__}) keeps no cache between tokens: each new "
                "token costs a forward of the whole text, which a count without --mode tells."
            )
        return _Full(*found, output)

    def _at(self, batch: int, context: int, source: int | None) -> _Full:
        """As _fill; of a recurrent model, which runs a prompt token by token, from a short prompt where that is proved.

        The proof: of two short prompts, one lengthened is the other, tensor by tensor.
        """
        least, more = _SHORT
        if context <= more or self.paired or not self._text_alone or self._whole:
            return self._fill(batch, context, source)
        short = self._fill(batch, least, source)
        if known(short.cache) and recurrent(short.cache):
            lengthen(short.cache, more - least)
            longer = self._fill(batch, more, source)
            if [_outline(item) for item in held(short.cache)] == [_outline(item) for item in held(longer.cache)]:
                lengthen(longer.cache, context - more)
                return replace(longer, whole=False)
        self._whole.append(True)
        return self._fill(batch, context, source)

    @property
    def _text_alone(self) -> bool:
        return not any(isinstance(v, torch.Tensor) for k, v in self.workload.kwargs.items() if k != "input_ids")

    def _follow(self, batch: int, contexts: Sequence[int], source: int | None, *, values: bool) -> Iterator[Step]:
        full = self._at(batch, contexts[0], source)
        now = contexts[0]
        for context in contexts:
            if context != now and known(full.cache):
                lengthen(full.cache, context - now)
                full = replace(full, whole=False)
            elif context != now:
                full = self._at(batch, context, source)
            step, cache = self._step(batch, context, full, values=values)
            full, now = replace(full, cache=cache), context + 1
            yield step

    def _step(self, batch: int, context: int, full: _Full, *, values: bool) -> tuple[Step, Any]:
        before, memory = list(held(full.cache)), allocated(full.cache) if full.whole else None
        counter, reads = FlopCounter(self.workload.model, attention=self.attention), Reads(self.workload.model)
        given = {**self._next(batch, full.output), full.name: full.cache}
        with carried(counter.assume) if values else nullcontext(), reads, counter:
            output = self.model(**given)
        found = cache_in(output)
        if found is None:
            raise UsageError(f"{self.workload.name} returns no cache after a token: how it goes on is not known.")
        cache = found[1]
        step = Step(
            context=context,
            batch=batch,
            profile=self._named(counter.profile, batch),
            cache=type(cache).__name__,
            layers=layers_of(cache),
            kept=changed(before, list(held(cache)), self.latent),
            allocated=memory,
            windows=tuple(sorted({item.window for item in before if item.window is not None})),
            reads=reads.reads,
            shapes=reads.shapes,
        )
        return step, cache

    def _next(self, batch: int, output: Any) -> dict[str, Any]:
        """Arguments for one new token of each sequence, besides the cache."""
        token = torch.zeros(batch, 1, dtype=torch.int64, device=self.workload.device)
        given: dict[str, Any] = {"decoder_input_ids" if self.paired else "input_ids": token, "use_cache": True}
        if self.paired:
            hidden = getattr(output, "encoder_last_hidden_state", None)
            if hidden is not None and "encoder_outputs" in self.taken:
                made = load_transformers().modeling_outputs.BaseModelOutput
                given["encoder_outputs"] = made(last_hidden_state=hidden)
        return given

    def _named(self, profile: Profile, batch: int) -> Profile:
        from msgspec.structs import replace as with_fields

        said = (*profile.assumptions, *self.workload.assumptions)
        return with_fields(profile, target=self.workload.name, tokens=batch, samples=batch, assumptions=said)

    @property
    def latent(self) -> frozenset[int]:
        """Widths of the compressed entries that multi-head latent attention keeps (DeepSeek-V2, arXiv 2405.04434).

        The largest is that of all that it keeps of a token in one layer.
        """
        text = Maker(self.workload.model, self.request, self.workload.device).text
        if not isinstance(getattr(text, "kv_lora_rank", None), int):
            return frozenset()
        ranks = (getattr(text, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim"))
        widths = [rank for rank in ranks if isinstance(rank, int)]
        return frozenset([*widths, sum(widths)])

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, FlopprofError):
            return error
        return ModelFailed(
            f"{self.workload.name} failed to go on from its own cache: {type(error).__name__}: {first_line(error)} "
            "See the whole error with --traceback."
        )


def _outline(item: Held) -> tuple[Any, ...]:
    return item.path, item.shape, item.dtype, item.window


def generator(workload: Workload, request: Request, attention: Attention = "full") -> Generator:
    """What runs the workload's model as generation does. Raises UsageError for a model that does not generate."""
    can = getattr(workload.model, "can_generate", None)
    if can is None or not hasattr(workload.model, "config"):
        raise UsageError(
            f"--mode is for Hugging Face models that generate text: {workload.name} is "
            f"a {type(workload.model).__name__}."
        )
    if not can():
        raise UsageError(
            f"{workload.name} is a {type(workload.model).__name__}, which generates no text: leave --mode out."
        )
    return Generator(workload, request, attention)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers tells of kernels that are not installed; a count needs none."""
    logging = load_transformers().logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
