"""Keys of transformers' generation_config.json: irrelevant, not supported, or followed by a run.

Older models have these keys in their config.json, where the keys do not change the model.
"""

from typing import Any

# Keys that do not change the generated text, and ids that data/special.py reads.
IRRELEVANT = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
    "transformers_version", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "low_memory", "compile_config", "disable_compile", "prefill_chunk_size",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
)  # fmt: skip
# Keys that are not supported, and the value of each key that leaves generation unchanged.
UNSUPPORTED = {
    "max_length": 20, "min_length": 0, "min_new_tokens": 0, "max_time": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None, "diversity_penalty": 0.0,
    "num_beam_groups": 1, "num_return_sequences": 1, "guidance_scale": 1.0, "penalty_alpha": None,
    "renormalize_logits": False, "remove_invalid_values": False, "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None, "sequence_bias": None, "token_healing": False,
    "task_specific_params": None, "force_bos_token_to_be_generated": False,
}  # fmt: skip
# Keys that a run follows, with the defaults of transformers.
BEAM = {"length_penalty": 1.0, "early_stopping": False}
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
FOLLOWED: dict[str, Any] = {
    "num_beams": 1, "do_sample": False, **BEAM, **SAMPLING, "repetition_penalty": 1.0,
    "max_new_tokens": 200, "stop_strings": [], "bad_words_ids": [], "suppress_tokens": [],
}  # fmt: skip

GENERATION_KEYS = frozenset((*IRRELEVANT, *UNSUPPORTED, *FOLLOWED))
