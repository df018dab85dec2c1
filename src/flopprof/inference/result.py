"""The result: FLOPs, cache, bytes and bounds of a prefill, a decoded token or a generation, and its JSON. No torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from flopprof.errors import InvalidProfile
from flopprof.inference.traffic import Traffic
from flopprof.profile import Profile
from flopprof.rows import Attention

Mode = Literal["prefill", "decode", "generate"]
MODES: tuple[Mode, ...] = ("prefill", "decode", "generate")
SCHEMA = "flopprof.inference/1"


class CachePart(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors of one kind in one sequence's cache.

    kind: `attention` keys and values of every token, `latent` the compressed ones of multi-head latent attention,
    `sliding window` of the last tokens, `indexer`, `cross-attention` of the encoder's output, `convolution state`,
    `state` of a recurrence. bytes_per_token: what one more token adds, 0 where it takes an older one's place.
    """

    kind: str
    tensors: int
    dtype: str
    bytes: int
    bytes_per_token: int


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept for each sequence between tokens, at one length of text.

    tokens: in the text that it was made of. allocated_bytes: of the memory in which a prefill of it leaves its tensors,
    which may hold more than them. latent_bytes: what the compressed keys and values of multi-head latent attention
    would take, where the model is of that kind and its code keeps the expanded ones.
    """

    cls: str
    tokens: int
    parts: tuple[CachePart, ...]
    allocated_bytes: int | None = None
    latent_bytes: int | None = None

    @property
    def bytes(self) -> int:
        """Of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def bytes_per_token(self) -> int:
        """What one more token adds."""
        return sum(part.bytes_per_token for part in self.parts)


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """Decoding steps of a generation: the first after `first_context` tokens, of which the cache holds the text.

    flops and bytes_moved are of all of them, for the whole batch; counted: how many were run; the rest lie on straight
    lines through those, which were proved on others between them.
    """

    number: int
    first_context: int
    flops: int
    bytes_moved: int
    counted: int


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What a device's dense peaks allow at best: every FLOP and every byte at peak, the two at the same time.

    compute_s, memory_s: the time of all FLOPs, of all bytes; time_s: not less than this (for a generation the sum over
    its steps of the longer of the two). tokens_per_s: not more than this, for the whole batch.
    compute_bound_from: the least batch at which decoding is not bound by memory; None: none, or not asked.
    largest_batch: how many sequences' caches fit beside the weights; None where the memory is not known.
    """

    device: str
    dtype: str
    flops_per_s: float
    bytes_per_s: float
    memory_bytes: int | None
    compute_s: float
    memory_s: float
    time_s: float
    tokens_per_s: float
    compute_bound_from: int | None = None
    most_intensity: float | None = None
    largest_batch: int | None = None

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which the device is bound by its FLOPs."""
        return self.flops_per_s / self.bytes_per_s

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """What takes longer."""
        return "compute" if self.compute_s >= self.memory_s else "memory"


class Inference(msgspec.Struct, frozen=True, kw_only=True):
    """One prefill, one decoding step, or a whole generation of a batch.

    prompt          tokens that the prefill runs through; of an encoder-decoder the encoder's (None: no text)
    context         tokens in the cache before the (first) decoding step; of an encoder-decoder the decoder's
    tokens          that the counts are of, over the batch: of the prompt, new ones in a step, new ones generated
    flops           of the whole mode, over the batch
    bytes_moved     that it must move at least: weights, looked-up rows, the cache read and written; no activations
    logits          positions of the prompt that the prefill makes logits of: the `last` or `every`
    prefill, decode the counts of the prefill, and of the first decoding step
    traffic         of the (first) decoding step, as a function of the batch; None where FLOPs do not grow as it does
    """

    target: str
    mode: Mode
    batch: int
    tokens: int
    flops: int
    bytes_moved: int
    weight_bytes: int
    cache: Cache
    dtype: str
    device: str
    paired: bool = False
    prompt: int | None = None
    context: int | None = None
    new_tokens: int | None = None
    logits: Literal["last", "every"] = "last"
    attention: Attention = "full"
    prefill: Profile | None = None
    decode: Profile | None = None
    traffic: Traffic | None = None
    steps: Steps | None = None
    bounds: Bounds | None = None
    notes: tuple[str, ...] = ()
    schema: str = SCHEMA

    @property
    def flops_per_token(self) -> float:
        """FLOPs over tokens."""
        return self.flops / self.tokens

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved."""
        return self.flops / self.bytes_moved

    @property
    def cache_bytes(self) -> int:
        """What the whole batch keeps."""
        return self.batch * self.cache.bytes

    def to_json(self) -> str:
        """Everything as JSON, schema `flopprof.inference/1`."""
        return msgspec.json.encode(self, enc_hook=tuple).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Inference:
        """What to_json wrote. Raises InvalidProfile, naming the field."""
        try:
            found = msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidProfile(f"not a flopprof inference: {error}.") from error
        if found.schema != SCHEMA:
            raise InvalidProfile(f"inference schema is {found.schema!r}; this flopprof reads {SCHEMA!r}.")
        return found
