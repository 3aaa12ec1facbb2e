"""The worker for Flax's examples: `python -m benchmarks.training_flax SETTING LIBRARY`.

The models come from examples/lm1b and examples/wmt in the clone that FLAX names. Their train.py
imports TensorFlow and clu, so that loss and update are written here in the same way: the
cross-entropy with a one-hot matrix of targets, and optax's AdamW in one jit that donates its state.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta

from benchmarks.training_ours import about_jax, peak
from benchmarks.worker import Ready, answer_with, samples
from heedful.configs import base

BEGAN = time.perf_counter()


def prepare(given: dict[str, Any], library: str) -> Ready:
    sys.path.insert(0, str(Path(os.environ["FLAX"]) / "examples" / library.split()[1]))
    import models  # type: ignore[import-not-found]

    ours = base.load(given["config"])[0].model
    vocab_size, dropout = given["vocab_size"], given["dropout"]
    is_pair = ours.architecture == "encoder_decoder"
    config = models.TransformerConfig(
        vocab_size=vocab_size,
        output_vocab_size=vocab_size,
        share_embeddings=is_pair,
        logits_via_embedding=True,
        dtype=given["dtype"],
        emb_dim=ours.width,
        num_heads=ours.attention.heads,
        num_layers=ours.layers,
        qkv_dim=ours.width,
        mlp_dim=ours.feed_forward.width,
        dropout_rate=dropout,
        attention_dropout_rate=dropout,
    )
    model = (models.Transformer if is_pair else models.TransformerLM)(config)
    random = np.random.default_rng(0)
    shape = given["rows"], given["length"]
    tokens = [random.integers(1, vocab_size, shape, np.int32) for _ in range(1 + is_pair)]
    keys = dict(zip(("params", "dropout"), jax.random.split(jax.random.key(0)), strict=True))
    params = meta.unbox(model.init(keys, *tokens)["params"])
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-4, b2=0.98, eps=1e-9, weight_decay=0.1)
    )

    def loss(params: Any, key: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, *tokens, rngs={"dropout": key})
        targets = jax.nn.one_hot(tokens[-1], vocab_size)
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))

    def step(params: Any, state: Any, number: jax.Array):
        key = jax.random.fold_in(keys["dropout"], number)
        value, gradient = jax.value_and_grad(loss)(params, key)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, value

    compiled = jax.jit(step, donate_argnums=(0, 1))
    held = [params, optimizer.init(params)]

    def run(steps: int = given["steps"]) -> None:
        for number in range(steps):
            held[0], held[1], _ = compiled(*held, number)
        jax.block_until_ready(held)

    run(3)
    start = time.perf_counter() - BEGAN
    return samples(run, peak), {"start": start} | about_jax(given["dtype"], given["product"])


if __name__ == "__main__":
    answer_with(lambda: prepare(json.loads(sys.argv[1]), sys.argv[2]))
