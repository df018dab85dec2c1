"""What the literature says that a transformer costs: one function a formula, each with its source and its units.

All counts are FLOPs, a multiply-add being 2; all are exact integers. `n` is a number of parameters: each function says
which ones its authors mean. Attention is `full` (every query-key pair) except where a function says otherwise.

No formula is preferred here: they disagree, and `reconcile` shows by how much and why.
"""

from __future__ import annotations

from typing import Literal

from flopprof.analytic.shape import TransformerShape

Recompute = Literal["none", "selective", "full"]


# --- parameters times tokens ---------------------------------------------------------------------
def two_n(n: int, tokens: int) -> int:
    """Forward FLOPs: 2 N T, one multiply-add per parameter and token (Kaplan 2020, eq. 2.2 without attention).

    n: by the formula's own reading, parameters that are multiplied once per token: without embeddings, active experts.
    """
    return 2 * n * tokens


def six_n(n: int, tokens: int) -> int:
    """Training FLOPs: 6 N T, forward 2 and backward 4 (Kaplan 2020, section 2.1; Hoffmann 2022, appendix F).

    The backward multiplies twice: for the gradient of the input and for that of the weight.
    """
    return 6 * n * tokens


def brown_table_d1(n: int, tokens: int, *, forward: int = 2, backward: int = 3, active_percent: int = 100) -> int:
    """Training FLOPs of GPT-3's table of compute (Brown 2020, arXiv 2005.14165, table D.1).

    n x tokens x (forward FLOPs per active parameter) x (3, forward and backward) x (share of active parameters); an
    encoder-decoder has half of its parameters active for each token. Attention is ignored. The table's T5 rows print 1
    for 2 x 0.5 and 0.5 beside it, which would halve twice; their FLOPs follow from halving once.
    """
    return n * tokens * forward * backward * active_percent // 100


def huggingface_trainer(n_non_embedding: int, tokens: int) -> int:
    """Training FLOPs that transformers' Trainer logs as `total_flos`: 6 N T (`floating_point_ops`).

    n_non_embedding: all parameters but those of input embeddings; frozen ones too, and all experts.
    """
    return 6 * n_non_embedding * tokens


# --- Kaplan 2020 ---------------------------------------------------------------------------------
def kaplan_table1(shape: TransformerShape) -> dict[str, tuple[int, int]]:
    """Rows (parameters, forward FLOPs per token) of Kaplan 2020 (arXiv 2001.08361), table 1.

    "Attention: Mask" is 2 L n_ctx d_attn: half of QK^T and PV over every pair, so the causal average. Grouped queries,
    gated feed-forwards and experts are not in the table: raises ValueError for them.
    """
    _plain(shape, "Kaplan 2020, table 1")
    d, d_attn, d_ff, layers, context = shape.d_model, shape.d_attention, shape.d_ff, shape.layers, shape.seq
    n = 2 * d * layers * (2 * d_attn + d_ff)
    return {
        "Embed": ((shape.vocab + context) * d, 4 * d),
        "Attention: QKV": (layers * d * 3 * d_attn, 2 * layers * d * 3 * d_attn),
        "Attention: Mask": (0, 2 * layers * context * d_attn),
        "Attention: Project": (layers * d_attn * d, 2 * layers * d_attn * d),
        "Feedforward": (layers * 2 * d * d_ff, 2 * layers * 2 * d * d_ff),
        "De-embed": (0, 2 * d * shape.vocab),
        "Total (non-embedding)": (n, 2 * n + 2 * layers * context * d_attn),
    }


def kaplan_forward(shape: TransformerShape, tokens: int) -> int:
    """Forward FLOPs: C_forward = 2 N + 2 L n_ctx d_attn per token (Kaplan 2020, eq. 2.2); N without embeddings."""
    return kaplan_table1(shape)["Total (non-embedding)"][1] * tokens


# --- Hoffmann 2022 (Chinchilla) ------------------------------------------------------------------
def chinchilla_appendix_f(shape: TransformerShape) -> dict[str, int]:
    """Forward FLOPs of one sequence, part by part, over all layers (Hoffmann 2022, arXiv 2203.15556, appendix F).

    Counts the embedding as a product with one-hot rows, and 3 FLOPs per score for the softmax. The printed ratios to
    6 N D (table A4) do not follow from it: they come out with embeddings and final logits left out and N of
    `chinchilla_table_a4_n`. Raises ValueError for grouped queries, gated feed-forwards and experts, which it has not.
    """
    _plain(shape, "Hoffmann 2022, appendix F")
    s, d, wide, layers = shape.seq, shape.d_model, shape.d_attention, shape.layers
    return {
        "embeddings": 2 * s * shape.vocab * d,
        "attention: QKV": layers * 2 * 3 * s * d * wide,
        "attention: logits": layers * 2 * s * s * wide,
        "attention: softmax": layers * 3 * shape.heads * s * s,
        "attention: reduction": layers * 2 * s * s * wide,
        "attention: linear": layers * 2 * s * wide * d,
        "dense": layers * 2 * s * (d * shape.d_ff + d * shape.d_ff),
        "final logits": 2 * s * d * shape.vocab,
    }


def chinchilla_training(shape: TransformerShape, sequences: int = 1) -> int:
    """Training FLOPs: three times the forward of `chinchilla_appendix_f`, the backward having twice its FLOPs."""
    return 3 * sequences * sum(chinchilla_appendix_f(shape).values())


def chinchilla_table_a4_ratio(shape: TransformerShape) -> float:
    """FLOPs over 6 N D as table A4 prints them: without embeddings and final logits, N of `chinchilla_table_a4_n`."""
    parts = chinchilla_appendix_f(shape)
    counted = sum(parts.values()) - parts["embeddings"] - parts["final logits"]
    return 3 * counted / six_n(chinchilla_table_a4_n(shape), shape.seq)


def chinchilla_table_a4_n(shape: TransformerShape) -> int:
    """Parameters that table A4's sizes and ratios imply: 13 L d^2 + V d, relative positions' d^2 a layer included."""
    return 13 * shape.layers * shape.d_model**2 + shape.vocab * shape.d_model


# --- Chowdhery 2022 (PaLM), and those who use its formula ----------------------------------------
def palm_flops_per_token(n: int, shape: TransformerShape) -> int:
    """Training FLOPs per token: 6 N + 12 L H Q T (Chowdhery 2022, arXiv 2204.02311, appendix B). Full attention.

    n: all parameters, the shared embedding once; Q: size of a head; T: sequence length.
    """
    return 6 * n + 12 * shape.layers * shape.d_attention * shape.seq


def palm_mfu(tokens_per_s: float, n: int, shape: TransformerShape, peak_flops_per_s: float) -> float:
    """Model FLOPs utilisation, a fraction: tokens/s over R = P / (6 N + 12 L H Q T) (Chowdhery 2022, appendix B).

    peak_flops_per_s: of all devices together, dense.
    """
    return tokens_per_s * palm_flops_per_token(n, shape) / peak_flops_per_s


def palm_rematerialized_per_token(n: int, shape: TransformerShape, *, forward_percent: int = 0) -> int:
    """Executed FLOPs per token with attention's forward run twice, and a share of the other forward (table 22).

    forward_percent: 75 for PaLM 540B, 0 for 8B and 62B.
    """
    attention = 4 * shape.layers * shape.d_attention * shape.seq
    return palm_flops_per_token(n, shape) + 2 * n * forward_percent // 100 + attention


def nanogpt_flops_per_token(n_without_positions: int, shape: TransformerShape) -> int:
    """Training FLOPs per token of nanoGPT's `estimate_mfu`: PaLM's formula.

    n_without_positions: all parameters but the position embedding; the tied token embedding is in, being the head too.
    """
    return palm_flops_per_token(n_without_positions, shape)


def torchtitan_flops_per_token(n: int, shape: TransformerShape) -> int:
    """Training FLOPs per token of torchtitan: 6 (N - embedding) + 6 L H (d_qk + d_v) T. Full attention.

    n: all parameters, of which inactive experts do not count; the embedding stays in where the head is tied to it. (Its
    table of April 2024 still counted an untied embedding.)
    """
    idle = shape.n_params - shape.n_params_active
    embedding = 0 if shape.tied else shape.vocab * shape.d_model
    per_head = shape.d_head + shape.d_head_value
    return 6 * (n - idle - embedding) + 6 * shape.layers * shape.heads * per_head * shape.seq


def llm_foundry_training(n: int, shape: TransformerShape, sequences: int = 1, *, recompute: bool = False) -> int:
    """Training FLOPs of MosaicML's llm-foundry: 3 (2 N T + 4 L d T^2) per sequence; 4 instead of 3 with checkpointing.

    n: all parameters. The first is its MFU's numerator, the second its HFU's.
    """
    forward = 2 * n * shape.seq + 4 * shape.layers * shape.d_model * shape.seq**2
    return (4 if recompute else 3) * forward * sequences


# --- Narayanan 2021, Korthikanti 2022 (Megatron-LM) ----------------------------------------------
def narayanan_parameters(shape: TransformerShape) -> int:
    """P = 12 l h^2 (1 + 13 / (12 h) + (V + s) / (12 l h)) (Narayanan 2021, arXiv 2104.04473, eq. 2)."""
    _megatron(shape, "Narayanan 2021, eq. 2")
    h = shape.d_model
    return 12 * shape.layers * h * h + 13 * shape.layers * h + (shape.vocab + shape.seq) * h


def narayanan_training(shape: TransformerShape, batch: int, *, recompute: bool = True) -> int:
    """FLOPs of one iteration: 96 B s l h^2 (1 + s / (6 h) + V / (16 l h)) (Narayanan 2021, eq. 3).

    The 96 is 72 for forward and backward and 24 for the forward that full checkpointing runs again, the logits
    excepted. recompute=False gives model FLOPs: 72 B s l h^2 (1 + s / (6 h) + V / (12 l h)).
    """
    return _iteration(shape, batch, "full" if recompute else "none", "Narayanan 2021, eq. 3")


def korthikanti_training(shape: TransformerShape, batch: int, *, recompute: Recompute = "none") -> int:
    """FLOPs of one iteration (Korthikanti 2022, arXiv 2205.05198, appendix A).

    none: model FLOPs, 72 B L s h^2 (1 + s / (6 h) + v / (12 h L)); selective, as printed: 72 B L s h^2 (1 + s / (3 h)
    + v / (12 h L)), which adds 12 B L s^2 h although attention's forward, that it repeats, is 4 B L s^2 h, and which
    the paper's HFU follows; full: every layer's forward once more, but not that of the logits.
    """
    return _iteration(shape, batch, recompute, "Korthikanti 2022, appendix A")


def megatron_training(shape: TransformerShape, batch: int) -> int:
    """Model FLOPs of one iteration that Megatron-LM reports (training.py, `num_floating_point_operations`, 2024).

    12 B s L h^2 ((1 + g / a + s / h) q / h + k m f / h + m e / h + V / (2 L h)): a heads of q / a each, g of keys and
    values; feed-forwards of width f, k of them for each token, and shared experts of width e in all; m is 3/2 where
    they are gated. For a GPT this is `korthikanti_training`. V is not padded here. Later versions halve attention for
    its causal mask. Raises ValueError for an encoder, latent attention, and experts in some of the layers only.
    """
    missing = [
        name
        for name, present in (
            ("an encoder beside the decoder", shape.encoder_layers > 0),
            ("attention in a latent space", shape.attention_parameters is not None),
            ("experts in some of the layers only", shape.experts > 0 and shape.dense_layers > 0),
        )
        if present
    ]
    if missing:
        raise ValueError(f"Megatron-LM's formula does not cover {', '.join(missing)}.")
    s, layers, h, q = shape.seq, shape.layers, shape.d_model, shape.d_attention
    visited = (shape.experts_per_token + shape.shared_experts) * shape.d_ff_expert if shape.experts else shape.d_ff
    attention = 12 * h * (q + shape.kv_heads * shape.d_head) + 12 * s * q
    feed_forward = (18 if shape.gated else 12) * h * visited
    return batch * s * (layers * (attention + feed_forward) + 6 * h * shape.vocab)


def _iteration(shape: TransformerShape, batch: int, recompute: Recompute, source: str) -> int:
    _megatron(shape, source)
    s, layers, h = shape.seq, shape.layers, shape.d_model
    # Forward: 24 B s h^2 a layer for its products, 4 B s^2 h for attention, 2 B s h V for the logits.
    products, attention, logits = 24 * layers * s * h * h, 4 * layers * s * s * h, 2 * s * h * shape.vocab
    again = {"none": 0, "selective": 3 * attention, "full": products + attention}
    if recompute not in again:
        raise ValueError(f"recompute {recompute!r} is none of none, selective, full.")
    return batch * (3 * (products + attention + logits) + again[recompute])


# --- what a formula does not cover ---------------------------------------------------------------
def _plain(shape: TransformerShape, source: str) -> None:
    """Raises ValueError where the formula's authors had no such architecture."""
    missing = [
        name
        for name, present in (
            ("grouped-query attention", shape.kv_heads != shape.heads),
            ("gated feed-forwards", shape.gated),
            ("experts", shape.experts > 0),
            ("an encoder beside the decoder", shape.encoder_layers > 0),
            ("attention in a latent space", shape.attention_parameters is not None),
        )
        if present
    ]
    if missing:
        raise ValueError(f"{source} does not cover {', '.join(missing)}.")


def _megatron(shape: TransformerShape, source: str) -> None:
    _plain(shape, source)
    if shape.d_attention != shape.d_model or shape.d_ff != 4 * shape.d_model:
        raise ValueError(f"{source} is written for heads x head size = hidden size and a feed-forward of 4 x hidden.")
