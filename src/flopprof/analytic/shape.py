"""TransformerShape: the sizes that decide what a transformer costs."""

from __future__ import annotations

from typing import Any

import msgspec

from flopprof.analytic.config import sizes_of


class TransformerShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of a transformer. Raises ValueError where one is impossible.

    layers            decoder layers (all layers, where there is one stack)
    heads, kv_heads   query heads, and key-value heads (kv_heads=0: as many)
    d_head            size of a query and key head (0: d_model // heads); d_head_value: of a value head (0: the same)
    d_ff              width of the feed-forward (0: 4 d_model); gated ones have three matrices, others two
    seq               sequence length in tokens
    positions         learned position embeddings; 0 where they are computed
    d_embedding       width of the embeddings (0: d_model); another one is projected to d_model
    experts           routed experts a layer; experts_per_token of them run; shared_experts always run; of width
                      d_ff_expert (0: d_ff). dense_layers of the layers have a plain feed-forward instead
    encoder_layers    of an encoder beside the decoder, whose layers then attend to it too
    attention_parameters   of one layer, where they do not follow from the sizes above (latent attention)
    other_parameters       of matrices beside the layers: a transform before the head, embeddings of token types;
                           negative where layers share theirs
    """

    layers: int
    d_model: int
    heads: int
    vocab: int
    seq: int
    kv_heads: int = 0
    d_head: int = 0
    d_head_value: int = 0
    d_ff: int = 0
    gated: bool = False
    tied: bool = True
    positions: int = 0
    d_embedding: int = 0
    experts: int = 0
    experts_per_token: int = 0
    shared_experts: int = 0
    d_ff_expert: int = 0
    dense_layers: int = 0
    encoder_layers: int = 0
    attention_parameters: int | None = None
    other_parameters: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "d_model", "heads", "vocab", "seq"):
            _require(_whole(getattr(self, name)) and getattr(self, name) > 0, name, self, "a positive whole number")
        for name in (
            *("kv_heads", "d_head", "d_head_value", "d_ff", "positions", "d_embedding", "experts"),
            *("experts_per_token", "shared_experts", "d_ff_expert", "dense_layers", "encoder_layers"),
        ):
            _require(_whole(getattr(self, name)) and getattr(self, name) >= 0, name, self, "a whole number")
        _require(_whole(self.other_parameters), "other_parameters", self, "a whole number")
        _require(self.experts_per_token <= self.experts, "experts_per_token", self, "at most the number of experts")
        _require(self.dense_layers <= self.layers, "dense_layers", self, "at most the number of layers")
        self._default("kv_heads", self.heads)
        self._default("d_head", self.d_model // self.heads)
        self._default("d_head_value", self.d_head)
        self._default("d_embedding", self.d_model)
        self._default("d_ff", 4 * self.d_model)
        self._default("d_ff_expert", self.d_ff)

    def _default(self, name: str, value: int) -> None:
        if not getattr(self, name):
            msgspec.structs.force_setattr(self, name, value)

    # --- parameters: of matrices and embeddings; biases and norms, under 0.1 %, are in none -----------
    @property
    def d_attention(self) -> int:
        """Query heads times their size."""
        return self.heads * self.d_head

    @property
    def n_params(self) -> int:
        """Parameters of all matrices and embeddings, a tied embedding once; biases and norms are left out."""
        return self._parameters(self.experts)

    @property
    def n_params_active(self) -> int:
        """n_params without the experts that a token does not visit."""
        return self._parameters(self.experts_per_token)

    @property
    def n_params_non_embedding(self) -> int:
        """n_params without token and position embeddings; an untied head stays in."""
        return self.n_params - (self.vocab + self.positions) * self.d_embedding

    def _parameters(self, experts: int) -> int:
        d, value_width = self.d_model, self.heads * self.d_head_value
        attention = self.attention_parameters
        if attention is None:
            attention = d * (self.d_attention + self.kv_heads * (self.d_head + self.d_head_value) + value_width)
        matrices = 3 if self.gated else 2
        dense = matrices * d * self.d_ff
        routed = (experts + self.shared_experts) * matrices * d * self.d_ff_expert + d * self.experts
        plain_layers = self.dense_layers if self.experts else self.layers
        stack = self.layers * attention + plain_layers * dense + (self.layers - plain_layers) * routed
        if self.encoder_layers:  # its own layers, and the decoder's attention to them
            stack += self.encoder_layers * (attention + dense) + self.layers * attention
        embeddings = (self.vocab * (1 if self.tied else 2) + self.positions) * self.d_embedding
        projection = d * self.d_embedding if self.d_embedding != d else 0
        return stack + embeddings + projection + self.other_parameters

    @classmethod
    def from_config(cls, config: Any, *, seq: int, n_params: int | None = None) -> TransformerShape:
        """The shape that a Hugging Face config (object or mapping) describes, at a sequence length in tokens.

        Of a config with a `text_config`, that one's: no vision, no audio. Raises ValueError, naming what is missing,
        where it is none of a transformer, and for families whose parameters do not follow from their config
        (families.py), unless n_params gives them. A mapping without a `model_type` is taken at its word.
        """
        shape = cls(seq=seq, **sizes_of(config, counted=n_params is not None))
        if n_params is None:
            return shape
        rest = shape.other_parameters + n_params - shape.n_params
        return msgspec.structs.replace(shape, other_parameters=rest)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(holds: bool, name: str, shape: TransformerShape, wanted: str) -> None:
    if not holds:
        raise ValueError(f"a transformer's {name} is {wanted}, got {getattr(shape, name)!r}.")
