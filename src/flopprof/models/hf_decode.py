"""Generation, run: a transformers model's prefill, and single tokens after a cache that a prefill has filled.

Nothing of a model's kind is known here. The prompt runs (on meta it costs nothing) and whatever cache the model makes
is handed back to it with one new token, whose operators are counted. No sequence is padded and no mask is given.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch

from flopprof.counting.preserve import preserved
from flopprof.counting.questions import failures
from flopprof.counting.values import carried, needs_values
from flopprof.errors import FlopprofError, ModelFailed, UsageError
from flopprof.models.hf_config import load_transformers
from flopprof.models.hf_inputs import make_inputs
from flopprof.models.hf_maker import Maker, ids, reach
from flopprof.models.hf_reads import Read
from flopprof.models.hf_steps import Memo, Session, Step, codes_of
from flopprof.models.inputs import first_line
from flopprof.models.request import Request
from flopprof.models.workload import Workload
from flopprof.profile import Attention, Profile

T = TypeVar("T")
Logits = Literal["last", "every"]

_SHORT = (24, 40)  # prompts of which one, lengthened, must be the other
_ONLY_LAST = ("logits_to_keep", "num_logits_to_keep")


@dataclass(frozen=True)
class Generator:
    """A transformers model that generates, on the device that it is on; inputs of any batch and length are made for it.

    request: sizes of pictures and sound; its batch and seq are replaced.
    """

    workload: Workload
    request: Request
    attention: Attention = "full"
    memo: Memo = field(default_factory=Memo, init=False, repr=False)

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
            codes = codes_of(kwargs.get("decoder_input_ids"))
            kwargs["decoder_input_ids"] = ids(maker, batch, length * math.prod(codes)).view(batch, length, *codes)
        if self.paired and getattr(self.model.config, "use_cache", False) and not self.memo.told:
            kwargs.pop("use_cache", None)  # said by the config; an encoder of the same class may refuse to be told
        else:
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
        return self._attempt(lambda session: session.read(length, source))

    def steps(self, batch: int, contexts: Sequence[int], source: int | None = None) -> list[Step]:
        """A single token after each of these contexts, ascending. Raises ModelFailed, UsageError.

        The prompt of the first runs; what follows it does too, token by token, but where tokens are left out between
        two contexts, and all of the cache's layers are transformers' own, keys and values are made longer instead.
        """
        return self._attempt(lambda session: list(session.follow(batch, contexts, source)))

    # --- how ------------------------------------------------------------------------------------------
    def _attempt(self, run: Callable[[Session], T]) -> T:
        """By calls with the least, else as generate() makes them; what failed first is what is told."""
        first: Exception | None = None
        for prepared, part in dict.fromkeys([(self.memo.prepared, self.memo.part), *self._ways()]):
            self.memo.prepared, self.memo.part = prepared, part
            try:
                return self._valued(run)
            except UsageError:
                raise
            except Exception as error:  # whatever a model's own code raises
                first = first or error
        self.memo.prepared, self.memo.part = False, ""
        assert first is not None
        raise self._failure(first) from first

    def _ways(self) -> Iterator[tuple[bool, str]]:
        """(with arguments that the model prepares, part of the model that makes the tokens)."""
        if hasattr(self.model, "prepare_inputs_for_generation"):
            yield True, ""
        own = load_transformers().GenerationMixin.generate
        if getattr(type(self.model), "generate", own) is not own:  # it hands over to a part that generates
            makers = [name for name, child in self.model.named_children() if getattr(child, "can_generate", bool)()]
            if len(makers) == 1:
                yield False, makers[0]

    def _valued(self, run: Callable[[Session], T]) -> T:
        """Without values first, which is faster; with them where a question about values has failed."""
        meta = self.workload.device == "meta"
        failed = failures()
        try:
            with self._undisturbed():
                found = run(Session(self, values=False))
            if not meta or failures() == failed:
                return found
        except Exception as error:
            if not meta or not needs_values(error):
                raise
        with self._undisturbed(), carried(lambda _: None):  # each step's counter is told what was guessed
            return run(Session(self, values=True))

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            stack.enter_context(preserved([self.workload.model]))
            stack.enter_context(torch.no_grad())
            yield

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

    @property
    def text_alone(self) -> bool:
        """Is it given nothing but text?"""
        return not any(isinstance(v, torch.Tensor) for k, v in self.workload.kwargs.items() if k != "input_ids")

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, FlopprofError):
            return error
        return ModelFailed(
            f"{self.workload.name} failed to go on from its own cache: {type(error).__name__}: {first_line(error)} "
            "See the whole error with --traceback."
        )


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
