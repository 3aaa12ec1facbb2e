"""Train on all hosts of a pod: run the same command on each host.

python examples/pod.py --run-dir /mnt/shared/run                 # a TPU slice, or a Slurm step
python examples/pod.py --run-dir runs/pod --processes 1          # one process, to try it
python examples/pod.py --run-dir runs/pod --coordinator localhost:1234 --processes 2 --process 0

On a TPU slice and in a Slurm step the processes find each other. It has been tried with processes
on one machine with CPUs only, not on a pod.
"""

import argparse

from rich.console import Console

import heedful as hf
from heedful.train import hosts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", required=True, help="a folder that all hosts share")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that split the parameters")
    parser.add_argument("--steps", type=int, default=100)
    for flag in hosts.FLAGS:
        parser.add_argument(flag)
    flags = vars(parser.parse_args())
    given = {flag: flags[flag.removeprefix("--")] for flag in hosts.FLAGS}
    hosts.join({flag: value for flag, value in given.items() if value})  # Before anything else.

    experiment = hf.Experiment(
        model=hf.ModelConfig(
            architecture="decoder_only",
            width=128,
            layers=2,
            attention=hf.AttentionConfig(heads=4),
            feed_forward=hf.FeedForwardConfig(width=512),
            norm=hf.NormConfig(position="pre"),
        ),
        data=hf.DataConfig(
            source="shakespeare",
            objective="causal_lm",
            tokenizer=hf.TokenizerConfig(kind="chars"),
            max_length=64,
            batch_tokens=2048,
        ),
        train=hf.TrainConfig(
            steps=flags["steps"],
            checkpoint_every=50,
            mesh=hf.MeshConfig(fsdp=flags["fsdp"]),  # `data` gets all other devices.
            optimizer=hf.OptimizerConfig(peak_lr=3e-3, warmup_steps=20),
        ),
    )
    run = hf.fit(experiment, flags["run_dir"], console=Console() if hosts.is_first() else None)
    if hosts.is_first():
        print(run)


if __name__ == "__main__":
    main()
