"""Tiny configurations of the causal families of the installed transformers, made from their defaults by the names of sizes."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 2
# value → attributes that get it, wherever a configuration has them
SIZES: dict[int, str] = {
    256: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size audio_vocab_size "
    "encoder_hash_byte_group_vocab ngram_vocab_size_base shape_vocab_size pronunciation_vocab_size",
    128: "intermediate_size max_position_embeddings ffn_dim decoder_ffn_dim encoder_ffn_dim n_positions ffn_hidden_size "
    "dim_ff dff n_inner d_inner feed_forward_size max_seq_len context_length shared_intermediate_size "
    "intermediate_size_mlp max_target_positions max_source_positions dense_intermediate_size n_ctx image_size "
    "model_max_length mlp_dim lsh_attn_chunk_length local_attn_chunk_length moe_intermediate_size "
    "moe_shared_expert_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size original_max_position_embeddings attention_hidden_size mamba_d_ssm",
    64: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size "
    "word_embed_proj_dim lru_width hidden_size_global out_hidden_size backbone_hidden_size pronunciation_embed_dim "
    "shape_embed_dim ple_embed_dim dim_model_base o_lora_rank",
    32: "sliding_window local_attention_window_len attention_window_size window_size local_attention keep_window_size "
    "index_topk sliding_window_size rel_extent attention_chunk_size q_lora_rank kv_lora_rank qk_head_dim hc_lowrank "
    "router_hidden_size laurel_rank mamba_headdim attention_head_dim block_multiple_of chunk_size mamba_chunk_size",
    16: "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim index_head_dim linear_key_head_dim linear_value_head_dim "
    "swa_head_dim linear_head_dim dim_head d_head kv_channels attention_head_size mamba_d_head mamba_head_dim "
    "rotary_dim mamba_d_state state_size ssm_state_size hidden_size_per_layer_input adapter_rank prompt_length d_rel "
    "mem_len block_size time_step_rank mamba_dt_rank gated_norm_rank",
    8: "mamba_n_heads num_experts moe_num_experts n_routed_experts num_local_experts mamba_num_heads",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "swa_num_attention_heads linear_num_heads linear_num_value_heads num_encoder_attention_heads "
    "num_decoder_attention_heads index_n_heads embed_dim zero_expert_num o_groups n_mamba_heads",
    2: "num_key_value_heads linear_num_key_heads swa_num_key_value_heads num_kv_heads num_query_groups "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k num_hidden_layers n_layer n_layers num_layers "
    "decoder_layers encoder_layers depth num_encoder_layers num_decoder_layers num_blocks max_window_layers "
    "num_layers_per_stack mamba_expand expand n_groups index_topk_blocks heads_per_ngram "
    "make_ngram_vocab_size_divisible_by split_ngram_parts num_random_blocks",
    1: "n_group topk_group num_expert_group first_k_dense_replace moe_layer_start_index num_dense_layers mamba_n_groups "
    "num_kv_shared_layers",
    0: "pad_token_id",
}
VALUES: dict[str, Any] = {name: value for value, names in SIZES.items() for name in names.split()}
VALUES |= dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id", "forced_eos_token_id", "cls_token_id"))
LISTS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "indexer_types",
    "block_types",
    "attn_layers",
)  # one entry a layer
# what the rules above do not get right, by family
# the last two of four layers use keys and values of the first two
SHARED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
# what the rules above do not get right, by family
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "cwm": {"bos_token_id": 0},
    "dots1": {"moe_intermediate_size": 64, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4, "layer_types": ["indexed_attention"] * 2},
    "emu3_text_model": {"bos_token_id": 0, "eos_token_id": 1},
    "mllama_text_model": {"bos_token_id": 0, "eos_token_id": 1},
    "gemma3n_text": SHARED | {"intermediate_size": 128, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    "gemma4_text": SHARED | {"global_head_dim": 16},
    "gemma4_unified_text": SHARED | {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "modernbert-decoder": dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"indexer_budget": 32, "indexer_compress_ratio": 4, "indexer_n_heads": 4, "indexer_kv_heads": 1}
    | {"indexer_head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """The families that AutoModelForCausalLM knows."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(family: str, **changes: Any) -> PreTrainedConfig:
    """A tiny configuration of a family, with some attributes changed."""
    config_class = CONFIG_MAPPING[family]
    return config_class(**_shrunk(config_class().to_dict()) | changes)


def _shrunk(defaults: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a configuration that are to be smaller than by default."""
    made: dict[str, Any] = {}
    layers = max((len(_kinds(defaults[name])) for name in LISTS if defaults.get(name)), default=LAYERS)
    layers = max(layers, LAYERS)
    for name, value in defaults.items():
        if name in LISTS and value:
            kinds = _kinds(value)
            made[name] = (kinds * layers)[:layers]
        elif name in VALUES and (value is None or isinstance(value, int | list) or VALUES[name] is None):
            small = VALUES[name]
            if value is not None or small in (0, None):
                made[name] = small
            if name in ("num_hidden_layers", "num_layers", "n_layer"):
                made[name] = layers
        elif isinstance(value, dict) and name.endswith(("_config", "encoder", "decoder")) and name != "per_layer_config":
            made[name] = {key: kept for key, kept in value.items() if key != "per_layer_config"} | _shrunk(value)
        elif name.endswith(("_token_id", "_token_index")) and value:
            made[name] = 255
    if defaults.get("kv_lora_rank"):  # latent attention, where each head has keys and values of its own
        made["num_key_value_heads"] = made["num_attention_heads"]
    return made | EXCEPTIONS.get(defaults.get("model_type", ""), {})


def _kinds(entries: list[Any]) -> list[Any]:
    """The different entries of a list, in order."""
    return list(dict.fromkeys(entries))
