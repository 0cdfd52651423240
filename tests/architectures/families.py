"""A tiny random model of every causal family that transformers has: sizes by the names that their configs share.

    model = random_model("jamba")      `CHANGES` holds what a family needs besides `SIZES`

Hybrid families get one layer of each kind at least. `OUTSIDE` are those that are no models of text alone.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny import VOCABULARY
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WIDTH, INNER, LAYERS, HEADS, EXPERTS = 32, 48, 2, 4, 4
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "lru_width"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "dff", "dim_ff"), INNER),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), INNER),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k", "num_key_value_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 20),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "mamba_n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 12),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "mamba_d_conv", "linear_conv_kernel_dim"), 4),
    **dict.fromkeys(("head_dim", "v_head_dim", "mamba_d_state", "mamba_d_head", "mamba_n_heads", "mamba_chunk_size"), 8),
    **dict.fromkeys(("state_size", "chunk_size", "linear_key_head_dim", "linear_value_head_dim", "block_size"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 8),
    "vocab_size": VOCABULARY, "mamba_expand": 2, "mamba_dt_rank": 4, "mamba_d_ssm": 64, "time_step_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip

_LINEAR = ["linear_attention", "full_attention"]
_SLIDING = ["sliding_attention", "full_attention"]
_LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}
_INDEXED = {**_LATENT, "first_k_dense_replace": 1, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64}
_DECODER = {"is_decoder": True}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

CHANGES: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": _SLIDING},
    "axk1": {**_LATENT, "q_lora_rank": 12},
    "axk2": {**_LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64},
    "bailing_hybrid": {"num_hidden_layers": 2, "layer_types": _LINEAR, "num_key_value_heads": 4},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "bert": _DECODER, "bert-generation": _DECODER, "camembert": _DECODER, "data2vec-text": _DECODER, "electra": _DECODER,
    "ernie": _DECODER, "megatron-bert": _DECODER, "rembert": _DECODER, "roberta": _DECODER, "roformer": _DECODER,
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "roberta-prelayernorm": _DECODER, "xlm-roberta": _DECODER, "xlm-roberta-xl": _DECODER,
    "big_bird": {**_DECODER, "attention_type": "original_full"}, "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere2": {"layer_types": _SLIDING},
    "cohere_compass_text": {"layer_types": _SLIDING, "rope_parameters": dict.fromkeys(_SLIDING, _ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH}},
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2, "topk_method": "greedy", "first_k_dense_replace": 1},
    "deepseek_v3": {**_LATENT, "first_k_dense_replace": 1},
    "deepseek_v32": _INDEXED,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "exaone4": {"layer_types": _SLIDING},
    "gemma3_text": {"layer_types": _SLIDING},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": _SLIDING, "vocab_size_per_layer_input": VOCABULARY,
                     "hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": {"num_kv_shared_layers": 0, "layer_types": _SLIDING, "vocab_size_per_layer_input": VOCABULARY,
                    "hidden_size_per_layer_input": 8, "global_head_dim": 16},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _INDEXED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "granitemoehybrid": {"layer_types": _LINEAR, "shared_intermediate_size": 20, "position_embedding_type": "rope"},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": [2, 2], "num_experts": 4},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": _LINEAR, "linear_head_dim": 8, "linear_num_heads": 4, **_LATENT, "q_lora_rank": None,
                    "model_max_length": 64, "num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "sliding_attention"]},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8,
                    "interleave_moe_layer_step": 1},
    "longcat_flash": {**_LATENT, "ffn_hidden_size": INNER, "expert_ffn_hidden_size": 20, "num_layers": 1,
                      "num_hidden_layers": 2, "zero_expert_num": 2, "moe_topk": 2, "n_routed_experts": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "minimax": {"layer_types": _LINEAR, "num_hidden_layers": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 8,
                   "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, "moe_shared_expert_intermediate_size": 20},
    "olmo3": {"layer_types": _SLIDING},
    "olmo_hybrid": {"layer_types": _LINEAR},
    "qwen3_5_moe_text": {"layer_types": _LINEAR}, "qwen3_5_text": {"layer_types": _LINEAR},
    "qwen3_next": {"layer_types": _LINEAR},
    "qwen4_exp_text": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "indexed_attention"],
                       "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
                       "indexer_compress_ratio": 4},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {**_DECODER, "axial_pos_embds": False, "attn_layers": ["local", "local"], "feed_forward_size": INNER,
                 "attention_head_size": 8, "local_attn_chunk_length": 8},
    "roc_bert": {**_DECODER, "pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY,
                 "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "rwkv": {"attention_hidden_size": WIDTH, "rescale_every": 1},
    "xlm": {"causal": True},
    "xlstm": {"num_heads": 2},
    "xmod": {**_DECODER, "languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": {**_LATENT, "pad_token_id": None},  # transformers zeroes the padding row of every Youtu that it loads
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
              "attention_hidden_size": 64, "attention_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 4,
              "n_mamba_heads": 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 8,
               "mamba_ngroups": 1, "num_mem_blocks": 1, "adapter_rank": 4, "num_key_value_heads": 4,
               "attention_head_dim": 16, "use_mem_rope": True},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

OUTSIDE = frozenset({
    "blt", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified",
    "gemma4_unified_assistant", "git", "got_ocr2", "llama4", "mllama", "moss_transcribe_diarize", "musicgen",
    "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
})  # fmt: skip
"""Models of images or sound, drafts for another model, and bytes in patches (BLT)."""
FAMILIES = tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - OUTSIDE))


def config(family: str, **changes: Any) -> Any:
    """The tiny configuration of a family."""
    kind = CONFIG_MAPPING[family]
    usual, aliases = kind().to_dict(), getattr(kind, "attribute_map", {})
    given: dict[str, Any] = {
        name: size for name, size in SIZES.items()
        if name not in aliases and usual.get(name) is not None and not isinstance(usual[name], (list, tuple, dict))
    }  # fmt: skip
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return kind(**{**given, **special, **CHANGES.get(family, {}), **changes})


def random_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of random float32 weights; decays and convolutions stay near what their class makes, or states explode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "A_log" in name or (parameter.ndim == 2 and "conv" in name):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)
    return model.eval()
