"""Train a small GPT in a loop of your own, with optax: python examples/own_loop.py [FILE]

FILE is any text; without it, the text of this folder is learned. It takes a minute on a CPU.
"""

import sys
from pathlib import Path

import jax
import optax

import heedful as hf

STEPS = 200
HERE = Path(__file__).parent


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.py"))
    texts = [file.read_text("utf-8") for file in files]
    tokenizer = hf.Tokenizer.train(texts, hf.TokenizerConfig(kind="chars"))
    data = hf.Dataset.from_texts(texts, tokenizer, "causal_lm", max_length=64, batch_tokens=1024)

    config = hf.ModelConfig(
        architecture="decoder_only",
        vocab_size=tokenizer.vocab_size,
        width=96,
        layers=3,
        attention=hf.AttentionConfig(heads=4),
        feed_forward=hf.FeedForwardConfig(width=384),
        norm=hf.NormConfig(position="pre"),
        positions=hf.PositionConfig(kind="rotary"),
        dropout=0.0,
    )
    model = hf.build(config)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    state = hf.TrainState.create(hf.init(model, jax.random.key(0)), optimizer)
    step = hf.make_train_step(model, optimizer, "causal_lm")

    for number, batch in zip(range(1, STEPS + 1), data.train_iterator(), strict=False):
        state, metrics = step(state, batch)
        if number % 50 == 0:
            print(f"step {number}: loss {metrics['loss']:.3f} nats per character")

    (prompt,) = tokenizer.encode_batch(["import "])
    apply, tokens = jax.jit(model.apply), list(prompt)
    for _ in range(20):  # Greedy, without a cache. Rows of one length are compiled once.
        row = jax.numpy.array([tokens + [0] * (32 - len(tokens))])
        logits = apply({"params": state.params}, row)
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    print(repr(tokenizer.decode(tokens)))


if __name__ == "__main__":
    main()
