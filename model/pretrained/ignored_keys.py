"""Keys of a config.json that do not change the function that a model computes."""

from typing import Any

IGNORED = frozenset(
    {
        # Origin of the file, and its description.
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
        # Type of the parameters, which are float32 here, and the implementation of attention.
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
        # Outputs beside the logits.
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "tie_last_hidden_states",
        # Initialisation, and classes, which Keys.outputs reads for classifiers.
        "_num_labels",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "init_std",
        "label2id",
        "num_labels",
        "problem_type",
        # Settings of transformers' pipelines.
        "prefix",
        "task_specific_params",
    }
)

FIXED: dict[str, Any] = {
    "add_cross_attention": False,
    "is_causal": True,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}
"""Keys that change the model, and the only supported value of each key."""
