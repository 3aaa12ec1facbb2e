"""Translate English numbers to German: python examples/translate.py [RUN [TEXT ...]]

The model learns from pairs in memory, in about two minutes on a CPU; a run that exists is used as
it is. So `python examples/translate.py runs/translate_tiny "The device is offline"` works, too.
"""

import sys
from pathlib import Path

import heedful as hf

ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
EINER = ["ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
ZEHNER = ["zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]


def pairs() -> list[tuple[str, str]]:
    """Return (English, German) of numbers such as 321: three hundred twenty one."""
    found = []
    for hundred, hundert in zip(ONES, EINER, strict=True):
        for ten, zehn in zip(TENS, ZEHNER, strict=True):
            for one, ein in zip(ONES, EINER, strict=True):
                found.append((f"{hundred} hundred {ten} {one}", f"{hundert}hundert{ein}und{zehn}"))
    return found


def learn(directory: Path) -> hf.TrainedRun:
    texts = pairs()
    tokenizer = hf.Tokenizer.train(sum(texts, ()), hf.TokenizerConfig(kind="chars"))
    settings = {"max_length": 64, "batch_tokens": 2048, "holdout": 0.1}
    train, valid, test = (
        hf.Dataset.from_texts(texts, tokenizer, "translation", split=split, **settings)
        for split in ("train", "valid", "test")
    )
    model = hf.ModelConfig(
        width=64,
        layers=2,
        attention=hf.AttentionConfig(heads=4),
        feed_forward=hf.FeedForwardConfig(width=128),
        norm=hf.NormConfig(position="pre"),
        dropout=0.0,
    )
    optimizer = hf.OptimizerConfig(peak_lr=3e-3, warmup_steps=50, schedule="linear")
    experiment = hf.Experiment(
        model=model, train=hf.TrainConfig(steps=300, checkpoint_every=100, optimizer=optimizer)
    )
    return hf.fit(experiment, directory, train=train, valid=valid, test=test)


def main() -> None:
    directory, texts = Path((sys.argv[1:] or ["runs/numbers"])[0]), sys.argv[2:]
    run = hf.load(directory) if directory.exists() else learn(directory)
    texts = texts or ["three hundred twenty one", "nine hundred ninety nine"]
    for text, translation in zip(texts, run.translate(texts, beam=1), strict=True):
        print(f"{text} -> {translation}")


if __name__ == "__main__":
    main()
