"""Families of Hugging Face models whose config tells every matrix that they have.

Each was compared with the model that transformers 5.23 builds from its default config: `n_params` is that of all
parameters of two dimensions and more, to 0.1 %. Hybrids of attention and recurrences, layers that are shared, and
layers of different sizes are no TransformerShape, and in none of the lists.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


KNOWN = _names(
    """
    aimv2_text_model arcee bert-generation biogpt bitnet bloom chinese_clip_text_model clip_text_model
    clipseg_text_model codegen cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 diffllama ernie4_5 eurobert
    exaone4 exaone_moe falcon flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe glm4v_text glm_image_text
    glm_moe_dsa glm_ocr_text gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite
    granite_docling_text granite_swa granitemoe granitemoe_swa granitemoeshared helium hyperclovax internlm3
    iquestcoder jais2 kolibri1 llama llama4_text longt5 mellum metaclip_2_text_model minicpm3 minimax_m2
    ministral3 mistral mistral4 mistral_large4_text mixtral mllama_text_model mpt mt5 olmo olmo2 olmo3 olmoe
    openai-gpt opt owlv2_text_model owlvit_text_model paddleocr_vl_text persimmon phi phi3 phimoe qwen2
    qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_moe qwen3_omni_moe_text qwen3_vl_moe_text qwen3_vl_text
    seed_oss smollm3 solar_open stablelm starcoder2 t5 tipsv2_text_model umt5 vaultgemma videoprism_text_model
    xclip_text_model youtu
    """
)

# Of these, the ones that look up an embedding of each position; the others compute it (rotary, ALiBi, relative), also
# where a config is too old or too short to say so.
LEARNED_POSITIONS = _names(
    """
    aimv2_text_model bert-generation biogpt chinese_clip_text_model clip_text_model clipseg_text_model gpt2 gpt_bigcode
    gpt_neo metaclip_2_text_model openai-gpt opt owlv2_text_model owlvit_text_model tipsv2_text_model
    videoprism_text_model xclip_text_model
    """
)

# Encoder-decoders with learned positions: a table for each stack, with so many rows that are not positions.
TWO_TABLES = {
    "bart": 2, "mbart": 2, "plbart": 2, "pegasus": 0, "marian": 0, "blenderbot": 0, "blenderbot-small": 0,
}  # fmt: skip

# The head of these language models has a square matrix before the embedding, which is tied; tokens have types.
WITH_HEAD_TRANSFORM = _names(
    """
    bert camembert data2vec-text deberta distilbert ernie ibert megatron-bert modernbert nomic_bert roberta
    roberta-prelayernorm xlm-roberta
    """
)
