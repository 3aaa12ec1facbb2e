"""Keys of a config.json that change nothing of what a model computes, whatever their value."""

from typing import Any

IDLE = frozenset(
    {
        # where the file comes from, and what else is said of it
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "finetuning_task",
        "language",
        "model_type",
        "name_or_path",
        "tokenizer_class",
        "transformers.js_config",
        "transformers_version",
        # how it is computed: parameters are float32 here, and each core gives the same
        "_attn_implementation",
        "_experts_implementation",
        "attn_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "experts_implementation",
        "gradient_checkpointing",
        "output_past",
        "torch_dtype",
        "torchscript",
        "use_bfloat16",
        "xla_device",
        # what is returned beside the scores
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "tie_last_hidden_states",
        # beginning of training, and names of classes, which classifiers read
        "_num_labels",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "init_std",
        "label2id",
        "num_labels",
        "problem_type",
        # of pipelines, by task
        "prefix",
        "task_specific_params",
    }
)
GENERATION = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "bad_words_ids",
        "begin_suppress_tokens",
        "cache_implementation",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "force_bos_token_to_be_generated",
        "guidance_scale",
        "length_penalty",
        "low_memory",
        "max_length",
        "max_new_tokens",
        "max_time",
        "min_length",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_logits",
        "output_scores",
        "penalty_alpha",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "return_dict_in_generate",
        "sequence_bias",
        "stop_strings",
        "suppress_tokens",
        "target_lookbehind",
        "temperature",
        "token_healing",
        "top_h",
        "top_k",
        "top_p",
        "typical_p",
        "use_cache",
    }
)
"""How transformers generates with the model; what is followed of it is read elsewhere."""

FIXED: dict[str, Any] = {
    "add_cross_attention": False,
    "is_causal": True,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}
"""Keys that change the model, but for these values."""
