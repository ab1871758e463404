"""Tiny configs of every causal LM of transformers: general rules, and a table of what they do not
cover.
"""

import re
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from support.tiny_parts import EOS, PAD

HIDDEN, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 300
COMPASS_ROPE = {
    kind: {"rope_type": "default", "rope_theta": 1e4}
    for kind in ("full_attention", "sliding_attention")
}

# Names of sizes, and what they become; the first pattern that matches decides.
RULES: list[tuple[str, Any]] = [
    (r"logits_scaling|final_logit_softcapping|logits_soft_cap|output_logit_soft_cap", 2.0),
    (r"lm_head_multiplier|logits_mup_width_multiplier", 0.5),
    (r"attention_hidden_size", HIDDEN),
    (r"(unpadded_)?vocab_size(_per_layer_input)?|decoder_vocab_size", VOCABULARY),
    (r"hidden_size_per_layer_input", 8),
    (
        r"hidden_size|d_model|n_embd|dim_model_base|word_embed_proj_dim|"
        r"embedding_size|backbone_hidden_size",
        HIDDEN,
    ),
    (r"cross_attention_hidden_size|vision_output_dim|projection_dim|output_proj_dims", HIDDEN),
    (r"num_layers_per_stack", 1),
    (
        r"(num_|n_)(hidden_|encoder_|decoder_|global_)?layers?|(encoder|decoder)_layers|depth",
        LAYERS,
    ),
    (r"\w*num_key_value_heads|num_kv_heads|multi_query_group_num", 2),
    (r"linear_num_key_heads|linear_num_value_heads|linear_num_heads", 2),
    (
        r"\w*num_attention_heads|n_heads?|num_heads|(encoder|"
        r"decoder)_attention_heads|index_n_heads",
        HEADS,
    ),
    (
        r"head_dim|swa_head_dim|global_head_dim|kv_channels|dim_head|"
        r"attention_head_dim|d_kv|swa_v_head_dim",
        8,
    ),
    (r"linear_(key|value)_head_dim|linear_head_dim", 8),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_nope_head_dim|v_head_dim|index_head_dim", 8),
    (r"qk_head_dim", 12),
    (r"(q|kv|o)_lora_rank|gated_norm_rank|laurel_rank|d_rel|hc_lowrank", 8),
    (r"index_topk", 64),
    (
        r"(moe|shared_expert|moe_shared_expert|expert|"
        r"shared_experts)_(intermediate|ffn_hidden)_size",
        16,
    ),
    (
        r"\w*intermediate_size(_mlp)?|\w*ffn_dim|n_inner|dim_ff|dff|d_ff|"
        r"ffn_hidden_size|feed_forward_proj_dim",
        48,
    ),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts|moe_top_k", 2),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"zero_expert_num", 2),
    (r"n_groups?|topk_group|num_expert_group|mamba_n_groups", 1),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers|n_hash_layers", 1),
    (r"max_window_layers", 1),
    (r"num_kv_shared_layers", 0),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|"
        r"model_max_length|max_source_positions",
        512,
    ),
    (r"max_target_positions|context_length|max_sequence_length", 512),
    (
        r"sliding_window(_size)?|attention_chunk_size|local_attention|"
        r"keep_window_size|attention_window_size",
        8,
    ),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size|mamba_state_dim", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"mamba_d_ssm", 64),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"(mamba_)?chunk_size|rel_extent|block_size", 8),
    (r"attn_layer_period", 2),
    (r"attn_layer_offset", 1),
    (r"image_size", 32),
    (r"patch_size", 16),
    (r"prompt_length|prompt_mid_dim", 8),
    (r"num_mel_bins", 16),
]
# What the rules do not build, or would build without what is particular to the type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"rope_parameters": COMPASS_ROPE, "pooling": None},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 12},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp_text": {
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 2,
        "ple_embed_dim": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False, "concat_input": False},
    "xlm": {"emb_dim": HIDDEN},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default config of a type with small sizes, token ids of the tests' tokenizer, and weights
    of some size.
    """
    return AutoConfig.for_model(model_type, **_shrunk(AutoConfig.for_model(model_type)))


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The values of a config that the rules change."""
    values = config.to_dict()
    layers = next(
        (
            values[n]
            for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
            if n in values
        ),
        0,
    )
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, list) and len(value) == layers > 0
    }
    # not layers' numbers
    lists = {name: value for name, value in lists.items() if len(set(map(str, value))) < layers}
    few = _layers_to_show(lists)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(sub := vars(config).get(name), PretrainedConfig):
            small[name] = {"model_type": sub.model_type, **_shrunk(sub)}
        elif name in lists:
            small[name] = [_element(name, value[index]) for index in few]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            small |= _by_rule(name, value, len(few) if lists else LAYERS)
    # multi-head latent attention has no groups
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = HEADS
        small["head_dim"] = small.get("qk_rope_head_dim", 4)
    return small | OVERRIDES.get(config.model_type, {})


def _element(name: str, value: Any) -> Any:
    return _by_rule(name, value, LAYERS).get(name, value) if type(value) is int else value


def _by_rule(name: str, value: float, layers: int) -> dict[str, Any]:
    if name.endswith("_token_id"):
        known = {"pad_token_id": PAD, "eos_token_id": EOS}
        return {name: known.get(name, min(int(value), VOCABULARY - 1))}
    if name in ("initializer_range", "init_std"):
        return {name: 0.1}
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            size = (
                layers
                if small == LAYERS and "layer" in name and name != "max_window_layers"
                else small
            )
            return {name: size}
    return {}


def _layers_to_show(lists: dict[str, list[Any]]) -> list[int]:
    """Indices of layers: the first of each kind, where lists say which layer is of which; two at
    least.
    """
    if not lists:
        return []
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    first = sorted({kind: kinds.index(kind) for kind in kinds}.values())
    return first if len(first) > 1 else [0, 1][: max(1, min(2, len(kinds)))]
