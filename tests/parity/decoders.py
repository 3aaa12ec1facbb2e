"""Configurations of small decoders with unusual sizes, by class of transformers."""

from typing import Any

from peer import V

SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 31,
    "max_position_embeddings": 80,
}
WIDE = SMALL | {"hidden_size": 21, "num_hidden_layers": 2, "num_attention_heads": 7}
NARROW = SMALL | {"hidden_size": 10, "num_attention_heads": 1, "num_hidden_layers": 5}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
LLAMA3 = {  # Of wavelengths 6 to 906 one is kept, one is between, three are scaled.
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 3.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
OPT = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "intermediate_size")}

CASES: dict[str, list[dict[str, Any]]] = {
    "MistralForCausalLM": [
        SMALL | {"sliding_window": 3, "head_dim": 10},
        WIDE | {"num_key_value_heads": 7, "head_dim": 4, "sliding_window": 2},
        NARROW
        | {"num_key_value_heads": 1, "sliding_window": None, "rope_parameters": LLAMA3}
        | {"tie_word_embeddings": True},
    ],
    "Starcoder2ForCausalLM": [
        SMALL | {"sliding_window": 3},
        SMALL | {"use_bias": False, "norm_epsilon": 0.1, "rope_parameters": LINEAR},
        NARROW | {"num_key_value_heads": 1, "hidden_act": "relu", "tie_word_embeddings": False},
    ],
    "GemmaForCausalLM": [
        SMALL | {"head_dim": 10},
        WIDE | {"num_key_value_heads": 1, "head_dim": 2, "attention_bias": True},
        NARROW
        | {"num_key_value_heads": 1, "head_dim": 6, "hidden_act": "gelu", "rms_norm_eps": 0.1},
    ],
    "Phi3ForCausalLM": [
        SMALL | {"sliding_window": 4},
        SMALL | {"num_key_value_heads": None, "hidden_act": "gelu", "tie_word_embeddings": True},
        NARROW | {"num_key_value_heads": 1, "rms_norm_eps": 0.1},
    ],
    "OPTForCausalLM": [
        OPT | {"ffn_dim": 13},
        OPT | {"num_attention_heads": 3, "enable_bias": False, "activation_function": "gelu"},
        OPT
        | {"hidden_size": 10, "num_attention_heads": 1, "ffn_dim": 31}
        | {"do_layer_norm_before": False, "tie_word_embeddings": False},
    ],
}
for values in (case for cases in CASES.values() for case in cases):
    values |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}

LAYERS = {"OPTForCausalLM": "model.decoder.layers"}
"""Path of the blocks, for classes in which it is not model.layers."""
