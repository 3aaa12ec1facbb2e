"""Test that encoders equal those of transformers with the same random weights and unusual sizes."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peer import (
    LENGTHS,
    REAL,
    RNG,
    B,
    T,
    V,
    array,
    assert_close,
    back,
    export,
    ours,
    randomised,
    run,
    run_row,
    tensors,
    torch,
    transformers,
)

from heedful.model.transformer import build

CLASSES, PADDING = 7, 1
TOKENS = np.where(REAL, RNG.integers(2, V, (B, T)), PADDING)
TYPES = RNG.integers(0, 2, (B, T))
SIZES: list[dict[str, Any]] = [
    {"width": 20, "layers": 2, "heads": 5, "inner": 31, "length": 17},
    {"width": 18, "layers": 3, "heads": 3, "inner": 13, "length": 9, "act": "gelu_new"},
    {"width": 28, "layers": 1, "heads": 7, "inner": 47, "length": 11, "act": "relu"},
]
BERT_KEYS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "length": "max_position_embeddings",
    "act": "hidden_act",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Roberta": {"type_vocab_size": 1, "head_act": "gelu"},
    "XLMRoberta": {"type_vocab_size": 2, "layer_norm_eps": 1e-3, "head_act": "gelu"},
    "DistilBert": {
        "names": {
            "width": "dim",
            "layers": "n_layers",
            "heads": "n_heads",
            "inner": "hidden_dim",
            "length": "max_position_embeddings",
            "act": "activation",
        },
    },
    "MPNet": {"head_act": "gelu"},
    "Electra": {"embedding_size": 18, "type_vocab_size": 2, "head_act": "gelu"},
}
"""Values of config.json beside the sizes. head_act: the only activation of the masked language
model."""
HEADS = ("ForMaskedLM", "ForSequenceClassification", "Model")


def has_types(family: str) -> bool:
    return FAMILIES[family].get("type_vocab_size") == 2


def model(family: str, head: str, sizes: dict[str, Any]) -> Any:
    values = {"vocab_size": V, "pad_token_id": PADDING, "num_labels": CLASSES, **FAMILIES[family]}
    names, only = values.pop("names", BERT_KEYS), values.pop("head_act", None)
    if only and head == "ForMaskedLM":
        sizes = sizes | {"act": only}
    values |= {names[name]: value for name, value in sizes.items()}
    cls = getattr(transformers, family + head)
    return randomised(cls(cls.config_class(**values, attn_implementation="eager")))


CASES = [(family, head, i) for family in FAMILIES for head in HEADS for i in range(len(SIZES))]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def models(request, tmp_path_factory):
    """Return a family, a model of transformers, and our model from its file."""
    family, head, i = request.param
    theirs = model(family, head, SIZES[i])
    found = ours(theirs, tmp_path_factory.mktemp(family))
    assert found.architecture == family + head
    return family, theirs, found


def outputs(family: str, theirs: Any, **inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Run a model of transformers; return its outputs, and the hidden states [L, B, T, D]."""
    if not has_types(family):
        inputs.pop("token_type_ids", None)
    with torch.no_grad():
        out = theirs(**tensors(**inputs), output_hidden_states=True)
    result = out.logits if "logits" in out else out.last_hidden_state
    return array(result), np.stack([array(x) for x in out.hidden_states[1:]])


def test_padded(models):
    family, theirs, found = models
    inputs = {"input_ids": TOKENS, "attention_mask": REAL, "token_type_ids": TYPES}
    expected, blocks = outputs(family, theirs, **inputs)
    ours = {"segment_ids": REAL} | ({"type_ids": TYPES} if has_types(family) else {})
    if found.config.head.kind == "classifier" and found.config.head.outputs is None:
        encode = jax.jit(partial(build(found.config).apply, method="encode"))
        arrays = jax.tree.map(jnp.asarray, {"inputs": TOKENS, **ours})
        assert_close("last", np.asarray(encode({"params": found.params}, **arrays)), expected, REAL)
        return
    logits, states = run(found, TOKENS, **ours)
    assert_close("logits", logits, expected, REAL if logits.ndim == 3 else None)
    assert_close("hidden states", states["encoder"], blocks, REAL)


def test_the_way_back(models, tmp_path):
    family, theirs, found = models
    again = back(type(theirs), export(found, tmp_path / "export"))
    assert again.config.model_type == theirs.config.model_type
    inputs = {"input_ids": TOKENS, "attention_mask": REAL, "token_type_ids": TYPES}
    mine, expected = (outputs(family, one, **inputs) for one in (again, theirs))
    real = REAL.astype(bool)  # Positions of padding may change.
    np.testing.assert_array_equal(mine[1][:, real], expected[1][:, real])
    if mine[0].ndim == 2:
        np.testing.assert_array_equal(mine[0], expected[0])
    else:
        np.testing.assert_array_equal(mine[0][real], expected[0][real])


@pytest.mark.parametrize("family", list(FAMILIES))
def test_packed(family: str, tmp_path):
    theirs = model(family, "ForMaskedLM", SIZES[0])
    documents = [(TOKENS[i, :n], TYPES[i, :n]) for i, n in enumerate(LENGTHS)]
    tokens, types = (np.concatenate(parts)[None] for parts in zip(*documents, strict=True))
    more = {"type_ids": types} if has_types(family) else {}
    logits = run_row(ours(theirs, tmp_path), tokens, **more)
    alone = [
        outputs(family, theirs, input_ids=tokens[None], token_type_ids=types[None])[0]
        for tokens, types in documents
    ]
    assert_close("logits", logits, np.concatenate(alone, axis=1))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_pooler(family: str, tmp_path):
    theirs = model(family, "Model", SIZES[0])
    found = ours(theirs, tmp_path)
    with torch.no_grad():
        expected = theirs(**tensors(input_ids=TOKENS, attention_mask=REAL))
    assert found.config.head.pooler == ("pooler_output" in expected)
    if found.config.head.pooler:
        # If the kernel of the classes is the identity, the outputs are the pooled features.
        width = found.config.width
        classes = {"kernel": np.eye(width, dtype=np.float32), "bias": np.zeros(width, np.float32)}
        config = replace(found.config, head=replace(found.config.head, outputs=width))
        params = found.params | {"head": found.params["head"] | {"classes": classes}}
        pooled, _ = run(replace(found, config=config, params=params), TOKENS, segment_ids=REAL)
        assert_close("pooled", pooled, array(expected.pooler_output))
