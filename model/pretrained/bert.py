"""BERT (arXiv:1810.04805): masked language model, classifier, or the bare encoder."""

from heedful.model.pretrained.encoders import Encoder

BERT = Encoder(
    model_type="bert",
    name="Bert",
    body="bert",
    classes={
        "Model": "body",
        "ForMaskedLM": "language_model",
        "ForPreTraining": "language_model",
        "ForSequenceClassification": "classifier",
    },
    language_model={
        "head/transform": "cls.predictions.transform.dense",
        "head/norm": "cls.predictions.transform.LayerNorm",
        "head/bias": "cls.predictions.bias",
    },
    classifier={"head/pooler": "bert.pooler.dense", "head/classes": "classifier"},
    pooler="bert.pooler.dense",
).family(
    # Keys of TensorFlow's files and of sentence-transformers.
    ignored_keys=frozenset(
        {
            "directionality",
            "is_causal",
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
            "sbert_ce_default_activation_function",
            "sentence_transformers",
        }
    ),
    tied={
        "bert.embeddings.word_embeddings.weight": ("cls.predictions.decoder.weight",),
        "cls.predictions.bias": ("cls.predictions.decoder.bias",),
    },
)
