"""Error of Performer's attention against exact attention, by the number of random features.

python -m benchmarks.performer_error    # a minute on two CPU cores

The setting is that of arXiv:2009.14794 Figure 4 (left): 4,096 tokens, heads of 16, and the mean
squared error of the output, with its mean and deviation over 15 samples. Queries, keys and values
are normal. The paper does not say how it normalises them, but the result depends on it: a weight's
relative variance is (exp(|q + k|^2) - 1) / features for q and k scaled by 16^-1/4. Therefore a flag
sets the deviation of the entries. The paper also plots trigonometric features, which this library
does not have.

From 16 to 1,024 features the squared error falls from 5.6e-6 to 9.9e-8 with independent features
and from 4.5e-6 to 6.7e-8 with orthogonal features, which are better at each number; the root of the
error falls with exponent -0.49. With the deviation 0.5 a weight's relative variance is ten times as
high: the squared error falls from 6.2e-5 to 2.3e-6, the exponents are -0.40 and -0.38, and there is
no difference at 1,024 features. With the deviation 1.0 the error does not fall at all yet.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import parser
from heedful.model import masks
from heedful.model.attention import AttentionCall
from heedful.model.attention.flash import flash
from heedful.model.attention.performer import Performer
from heedful.model.config import PerformerConfig


@partial(jax.jit, static_argnums=(0, 1, 2))
def squared_error(config: PerformerConfig, length: int, head_dim: int, deviation, seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k, v = (jax.random.normal(key, (1, length, 1, head_dim)) for key in keys[:3])
    q, k = q * deviation, k * deviation
    call = AttentionCall(q, k, v, masks.full())
    exact = flash(call)
    out = Performer(config).apply({}, call, rngs={"features": keys[3]})
    return jnp.mean((jnp.asarray(out) - exact) ** 2)


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    command = parser("performer_error", __doc__)
    add = command.add_argument
    add("--features", type=int, nargs="+", default=[2**i for i in range(4, 11)])
    add("--length", type=int, default=4096)
    add("--head-dim", type=int, default=16)
    add("--deviation", type=float, default=0.25, help="of the entries of queries and keys")
    add("--samples", type=int, default=15)
    add("--out", default="runs/performer_error", help="OUT.png is written")
    arguments = command.parse_args(argv)
    errors: dict[str, np.ndarray] = {}
    for name, orthogonal in (("independent", False), ("orthogonal", True)):
        errors[name] = np.array(
            [
                [
                    squared_error(
                        PerformerConfig(features=features, orthogonal=orthogonal),
                        arguments.length,
                        arguments.head_dim,
                        arguments.deviation,
                        seed,
                    )
                    for seed in range(arguments.samples)
                ]
                for features in arguments.features
            ]
        )
    report(arguments.features, errors)
    path = Path(arguments.out).with_suffix(".png")
    plot(path, arguments.features, errors)
    print(f"{path} has the plot")
    return errors


def report(features: Sequence[int], errors: dict[str, np.ndarray]) -> None:
    """Print a line per kind of features: mean squared errors and the exponent of their root."""
    print(f"{'features':12}" + "".join(f"{n:>10,}" for n in features) + "  exponent of the root")
    for name, of in errors.items():
        root = np.sqrt(of.mean(axis=1))
        exponent = np.polyfit(np.log(features), np.log(root), 1)[0]
        print(f"{name:12}" + "".join(f"{x:10.2e}" for x in of.mean(axis=1)) + f"{exponent:10.2f}")


def plot(path: Path, features: Sequence[int], errors: dict[str, np.ndarray]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
    for name, of in errors.items():
        axis.errorbar(features, of.mean(axis=1), of.std(axis=1), label=name, marker="o", capsize=3)
    first = errors["independent"].mean(axis=1)[0]
    axis.plot(features, first * features[0] / np.array(features), "k:", label="1 / features")
    axis.set(xscale="log", yscale="log", xlabel="random features", ylabel="mean squared error")
    axis.set_title("Performer's output, positive features")
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
