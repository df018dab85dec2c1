"""inference(): a prefill, a decoding step or a generation, by running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from msgspec.structs import replace as with_fields

from flopprof.errors import ModelFailed, UsageError, ValuesUnknown
from flopprof.inference.bounds import Rates, bounded
from flopprof.inference.generation import Walk, amounts
from flopprof.inference.result import Cache, CachePart, Inference, Mode, Steps
from flopprof.inference.sizes import Sizes, check_sizes
from flopprof.inference.traffic import Routed, Traffic
from flopprof.models import hf_reads, load
from flopprof.models.hf_cache import KINDS, Kept
from flopprof.models.hf_decode import Generator, generator
from flopprof.models.hf_reads import Weights, plain, weights
from flopprof.models.hf_steps import Step
from flopprof.models.request import Request
from flopprof.models.workload import Workload
from flopprof.profile import Attention

_CONTEXT = 4096  # where none is given, or as far as the model's positions reach
_PROMPT = 512
_SEVERAL = 5  # tokens at once, by which experts are told from what every token takes


def inference(
    target: str | Workload,
    *,
    mode: Mode = "decode",
    context: int | None = None,
    prompt: int | None = None,
    new: int | None = None,
    batch: int = 1,
    hardware: str | None = None,
    flops_per_s: float | None = None,
    bytes_per_s: float | None = None,
    memory_bytes: int | None = None,
    attention: Attention = "full",
    fold: bool | None = None,
    seq: int | None = None,
    image_size: int | None = None,
    audio_seconds: float | None = None,
    images: int = 1,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    model_args: Mapping[str, object] | None = None,
    trust_remote_code: bool = False,
) -> Inference:
    """What generating text takes: FLOPs, the cache, bytes moved, and what a device allows at best.

    mode     `prefill`: the prompt's one forward, which fills the cache and makes the first new token;
             `decode`: one more token for each sequence, after `context` tokens in the cache;
             `generate`: a prefill of `prompt` tokens and the new - 1 steps after it
    context  tokens in the cache; of an encoder-decoder the decoder's. Default 4096, or as far as positions reach
    prompt   tokens of the prompt; of an encoder-decoder the encoder's, whose decoder then starts from one token
    seq      the same as prompt; with `decode` the encoder's tokens
    hardware a device of `flopprof peaks` (`H100`), for bounds; or flops_per_s and bytes_per_s, and memory_bytes

    The model runs, mostly on the meta device: the cache is the one that its own code makes of a prompt, and each step
    is handed back to it. No sequence is padded. Attention is counted over every pair, or as `causal`. The rest of the
    arguments are those of `flopprof.load`; of a workload its model is taken, and inputs are made anew.

    Raises UsageError for a model that does not generate and for sizes that contradict each other, ModelFailed.

    >>> from flopprof.inference import inference
    >>> step = inference("llama-3.1-8b", mode="decode", context=8192)
    >>> step.flops, step.cache.bytes_per_token
    (19304808448, 131072)
    """
    sizes = check_sizes(mode, context=context, prompt=prompt, new=new, batch=batch, seq=seq)
    rates = Rates.read(hardware, flops_per_s, bytes_per_s, memory_bytes)
    if isinstance(target, Workload):
        workload = target
    else:
        workload = load(
            target,
            image_size=image_size,
            audio_seconds=audio_seconds,
            images=images,
            device=device,
            dtype=dtype,
            model_args=model_args,
            trust_remote_code=trust_remote_code,
        )
    request = Request(
        batch=batch,
        image_size=image_size,
        inputs=(),
        device=device,
        dtype=None,
        train=False,
        model_args={},
        audio_seconds=audio_seconds,
        images=images,
    )

    def run(workload: Workload) -> Inference:
        return _Run(generator(workload, request, attention), sizes, rates, fold).result()

    try:
        return run(workload)
    except UsageError as error:  # of inputs that hold too few tokens, by the name that they have elsewhere
        if seq is not None or "--seq" not in str(error):
            raise
        raise UsageError(str(error).replace("--seq", "--context" if mode == "decode" else "--prompt")) from error
    except (ModelFailed, ValuesUnknown) as error:  # for want of values, or of a kernel for meta
        if workload.on_cpu is None:
            raise
        try:
            return run(workload.on_cpu())
        except (ModelFailed, ValuesUnknown):
            raise error from error.__cause__


class _Run:
    """One call of inference() on one device."""

    def __init__(self, made: Generator, sizes: Sizes, rates: Rates | None, fold: bool | None) -> None:
        self.made, self.sizes, self.rates, self.fold = made, sizes, rates, fold
        self.batch = sizes.batch
        self._check()

    def _check(self) -> None:
        """Raises UsageError for lengths that the model's positions do not reach, and sizes that it has no use for."""
        made, sizes = self.made, self.sizes
        if sizes.mode == "decode" and sizes.prompt is not None and not made.paired:
            raise UsageError("--mode decode takes --context, the tokens in the cache: leave --seq and --prompt out.")
        if sizes.prompt is not None and made.paired and not made.reads_text:
            raise UsageError(f"the encoder of {made.workload.name} reads no text: leave --seq and --prompt out.")
        reach = made.reach
        longest = {
            "--context": self.context + 1 if sizes.mode == "decode" else 0,
            "--prompt": self.prompt if sizes.mode != "decode" or made.paired else 0,
            "--prompt and --new": self.start + (sizes.new or 0) - 1 if sizes.mode == "generate" else 0,
        }
        for option, length in longest.items():
            if reach is not None and length is not None and length > reach:
                raise UsageError(
                    f"{option}: {length} tokens are more than the model's {reach} learned positions "
                    "(a step after N tokens is at position N + 1)."
                )

    # --- sizes ----------------------------------------------------------------------------------------
    @property
    def context(self) -> int:
        """Tokens in the cache before a decoding step."""
        if self.sizes.context is not None:
            return self.sizes.context
        reach = self.made.reach
        return _CONTEXT if reach is None else max(1, min(_CONTEXT, reach - 1))

    @property
    def prompt(self) -> int | None:
        """Tokens of the prompt; of an encoder's text, None where it reads none."""
        if self.made.paired and not self.made.reads_text:
            return None
        if self.sizes.prompt is not None:
            return self.sizes.prompt
        reach, room = self.made.reach, 0 if self.made.paired else (self.sizes.new or 1) - 1
        return _PROMPT if reach is None else max(1, min(_PROMPT, reach - room))

    @property
    def source(self) -> int | None:
        """Tokens of an encoder's text."""
        return self.prompt if self.made.paired else None

    @property
    def start(self) -> int:
        """Tokens in the (decoder's) cache after the prefill."""
        return 1 if self.made.paired else self.prompt or 1

    # --- what is run --------------------------------------------------------------------------------
    def result(self) -> Inference:
        """By the mode. Raises ModelFailed, UsageError."""
        mode = self.sizes.mode
        return self.decode() if mode == "decode" else self.prefill() if mode == "prefill" else self.generate()

    @cached_property
    def _beyond(self) -> bool:
        """Is there no position for a step after the prefill?"""
        reach = self.made.reach
        return reach is not None and self.start + 1 > reach

    @cached_property
    def at(self) -> int:
        """The context of the steps that are looked at."""
        return self.context if self.sizes.mode == "decode" else max(1, self.start - self._beyond)

    @cached_property
    def one(self) -> Step:
        """A step of one sequence."""
        return self.made.steps(1, [self.at], self.source)[0]

    @cached_property
    def several(self) -> Step:
        """The same of several."""
        return self.made.steps(_SEVERAL, [self.at], self.source)[0]

    @cached_property
    def step(self) -> Step:
        """The same of the batch that was asked for."""
        known = {1: self.one, _SEVERAL: self.several}
        return known.get(self.batch) or self.made.steps(self.batch, [self.at], self.source)[0]

    @cached_property
    def read(self) -> Weights:
        """What a step reads of the model's own tensors."""
        return weights(self.one.reads, self.several.reads, self.one.shapes)

    @property
    def linear(self) -> bool:
        """Are the FLOPs, and the cache, of a batch those of one sequence, times the batch?"""
        return all(
            step.profile.forward_flops == step.batch * self.one.profile.forward_flops
            and sum(item.n_bytes for item in step.kept) == step.batch * sum(item.n_bytes for item in self.one.kept)
            for step in (self.several, self.step)
        )

    @cached_property
    def traffic(self) -> Traffic:
        """Of a step, as a function of the batch."""
        found = amounts(self.one, self.read)
        return Traffic(
            flops=found.flops,
            weight_bytes=found.weights,
            row_bytes=found.rows,
            cache_read_bytes=found.read,
            cache_written_bytes=found.written,
            routed=tuple(self._routed(share) for share in self.read.routed),
        )

    def _routed(self, share: hf_reads.Routed) -> Routed:
        rows = self.one.profile.operators
        flops = sum(row.flops for row in rows if not share.names.isdisjoint(row.parameter.split(" + ")))
        return Routed(experts=share.experts, chosen=share.chosen, bytes_each=share.n_bytes, flops=flops)

    def decode(self) -> Inference:
        """One step."""
        flops, moved = self.step.profile.forward_flops, self.traffic.bytes_at(self.batch)
        found = self._made(tokens=self.batch, flops=flops, moved=moved, context=self.context)
        return bounded(with_fields(found, decode=self.step.profile), self.rates, [(flops, moved)], self.traffic)

    def prefill(self) -> Inference:
        """The prompt."""
        profile, moved = self._prefilled()
        found = self._made(tokens=self.batch * (self.prompt or 1), flops=profile.forward_flops, moved=moved)
        found = with_fields(found, prefill=profile, notes=_together(found.notes, profile.assumptions))
        return bounded(found, self.rates, [(profile.forward_flops, moved)], self.traffic)

    def generate(self) -> Inference:
        """A prefill, and the steps after it."""
        new = self.sizes.new or 1
        profile, moved = self._prefilled()
        each: list[tuple[int, Fraction]] = [(profile.forward_flops, moved)]
        steps, first = None, None
        if new > 1:
            if not self.linear:
                raise UsageError(
                    f"{self.made.workload.name} does not do for a batch what it does for each of its sequences: "
                    "a generation of it cannot be summed up; --mode decode counts its steps one by one."
                )
            last = self.start + new - 2
            walk = Walk(self.made, self.start, last, source=self.source, known=self.read)
            for found in walk.all:
                rest = with_fields(
                    self.traffic,
                    weight_bytes=found.weights,
                    row_bytes=found.rows,
                    cache_read_bytes=found.read,
                    cache_written_bytes=found.written,
                )
                each.append((self.batch * found.flops, rest.bytes_at(self.batch)))
            steps = Steps(
                number=new - 1,
                first_context=self.start,
                flops=sum(flops for flops, _ in each[1:]),
                bytes_moved=round(sum(some for _, some in each[1:])),
                counted=walk.counted,
            )
            first = self.step.profile
        result = self._made(
            tokens=self.batch * new, flops=sum(flops for flops, _ in each), moved=sum((m for _, m in each), Fraction(0))
        )
        kept = self._cache(self.start + new - 1)
        result = with_fields(
            result,
            prefill=profile,
            decode=first,
            steps=steps,
            new_tokens=new,
            cache=kept,
            context=self.start,
            notes=_together(result.notes, profile.assumptions),
        )
        return bounded(result, self.rates, each, self.traffic)

    def _prefilled(self) -> tuple[Any, Fraction]:
        """(the counts of the prefill, the bytes that it must move)."""
        profile = self.made.prefill(self.batch, self.start, self.source, fold=self.fold)
        reads = self.made.read(self.start, self.source)
        shares = sum((share.expected(self.batch * self.start) for share in self.traffic.routed), Fraction(0))
        whole, rows = plain(reads, self.read.stacks, ())
        # Experts of an encoder, which no decoding step meets: a text of usual length leaves none of them out.
        whole += sum(
            read.each * read.shape[0] for name, read in reads.items() if read.grouped and name not in self.read.stacks
        )
        return profile, whole + shares + self.batch * (rows + self._cache(self.start).bytes)

    # --- what is told -------------------------------------------------------------------------------
    def _made(self, *, tokens: int, flops: int, moved: Fraction, context: int | None = None) -> Inference:
        made = self.made
        return Inference(
            target=made.workload.name,
            mode=self.sizes.mode,
            batch=self.batch,
            tokens=tokens,
            flops=flops,
            bytes_moved=round(moved),
            weight_bytes=made.weight_bytes,
            cache=self._cache(self.context if self.sizes.mode == "decode" else self.start),
            dtype=made.dtype,
            device=made.workload.device,
            paired=made.paired,
            prompt=self.prompt if self.sizes.mode != "decode" or made.paired else None,
            context=context,
            logits=made.logits,
            attention=made.attention,
            traffic=self.traffic if self.linear else None,
            notes=tuple(self._notes()),
        )

    def _cache(self, tokens: int) -> Cache:
        """What one sequence keeps of so many tokens; run again where those are not the ones of `one`."""
        step, more = self.one, tokens - self.at
        if more and not (self._beyond and more == 1):
            beyond = self.made.reach is not None and tokens + 1 > self.made.reach
            step, more = self.made.steps(1, [tokens - beyond], self.source)[0], int(beyond)
        return Cache(
            cls=step.cache,
            tokens=tokens,
            parts=tuple(_parts(step.kept, more)),
            allocated_bytes=None if more else step.allocated,
            latent_bytes=self._latent(step.kept, tokens),
        )

    def _latent(self, kept: Sequence[Kept], tokens: int) -> int | None:
        """Bytes of the compressed entries, where the model has such attention and its code keeps the expanded ones."""
        full = [item for item in kept if item.kind == "attention"]
        if not self.made.latent or not full or any(item.kind == "latent" for item in kept):
            return None
        size = torch.empty((), dtype=getattr(torch, full[0].dtype)).element_size()
        return len(full) // 2 * max(self.made.latent) * size * tokens

    def _notes(self) -> list[str]:
        steps = (self.one, self.several, self.step)
        notes = dict.fromkeys(sentence for step in steps for sentence in step.profile.assumptions)
        if self.traffic.routed:
            notes["experts are taken to be chosen evenly, independently for each token: weights read are expected"] = (
                None
            )
        own = [name.rpartition(".")[2] for name in self.one.layers if not name.startswith("transformers.cache_utils.")]
        if own:
            kinds = ", ".join(own) if any(own) else self.one.cache
            notes[
                f"the cache is of the model's own kind ({kinds}): what a token adds is what the next one adds here"
            ] = None
        if not self.linear:
            notes["FLOPs are not proportional to the batch: no batch is told from which on they take longer"] = None
        return list(notes)


def _together(*notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(sentence for part in notes for sentence in part))


def _parts(kept: Sequence[Kept], more: int) -> list[CachePart]:
    """Tensors of a kind and type together, `more` tokens later."""
    groups: dict[tuple[int, str], list[Kept]] = {}
    for item in kept:
        groups.setdefault((KINDS.index(item.kind), item.dtype), []).append(item)
    return [
        CachePart(
            kind=KINDS[kind],
            tensors=len(items),
            dtype=dtype,
            bytes=sum(item.n_bytes + more * item.per_token for item in items),
            bytes_per_token=sum(item.per_token for item in items),
        )
        for (kind, dtype), items in sorted(groups.items())
    ]
