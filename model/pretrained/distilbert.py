"""DistilBERT (arXiv:1910.01108): BERT without token types, and a classifier with ReLU."""

from heedful.model.pretrained.encoders import BODY, Encoder

DISTILBERT = Encoder(
    model_type="distilbert",
    name="DistilBert",
    body="distilbert",
    classes={
        "Model": "body",
        "ForMaskedLM": "language_model",
        "ForSequenceClassification": "classifier",
    },
    language_model={
        "head/transform": "vocab_transform",
        "head/norm": "vocab_layer_norm",
        "head/bias": "vocab_projector.bias",
    },
    classifier={"head/pooler": "pre_classifier", "head/classes": "classifier"},
    inputs={path: name for path, name in BODY.items() if path != "inputs/types"},
    layer="transformer.layer.{}",
    block={
        "self_attention/query": "attention.q_lin",
        "self_attention/key": "attention.k_lin",
        "self_attention/value": "attention.v_lin",
        "self_attention/out": "attention.out_lin",
        "self_attention_norm": "sa_layer_norm",
        "feed_forward/up": "ffn.lin1",
        "feed_forward/down": "ffn.lin2",
        "feed_forward_norm": "output_layer_norm",
    },
    keys={
        "model.width": ("dim", 768),
        "model.layers": ("n_layers", 6),
        "model.type_vocab_size": ("", 0),
        "model.dropout": ("dropout", 0.1),
        "attention.heads": ("n_heads", 12),
        "attention.dropout": ("attention_dropout", 0.1),
        "feed_forward.width": ("hidden_dim", 3072),
        "feed_forward.activation": ("activation", "gelu"),
        "norm.epsilon": ("", 1e-12),
    },
    classifier_dropout=("seq_classif_dropout", 0.2),
    pooler_activation="relu",
).family(
    aliases={
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    },
    tied={"distilbert.embeddings.word_embeddings.weight": ("vocab_projector.weight",)},
    # The table of positions is in the file, whatever its initial values were.
    ignored_keys=frozenset({"qa_dropout", "sinusoidal_pos_embds", "tie_weights_"}),
)
