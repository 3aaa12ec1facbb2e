"""Formulas, and their variants for single platforms.

The plain form of a formula is a function that reads as mathematics. If a platform computes another
form faster, this variant is written below the plain form:

    @op
    def double(x): return 2 * x

    @double.on("cpu")
    def _sum(x): return x + x

`double(x)` calls the variant for the platform that the program is traced for; without such a
variant, it calls the plain form.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Generic, ParamSpec, TypeVar

from heedful.model.axes import target_platform

P = ParamSpec("P")
R = TypeVar("R")


class Op(Generic[P, R]):
    """A formula in its plain form, and its variants by platform."""

    def __init__(self, plain: Callable[P, R]):
        self.plain = plain
        self.variants: dict[str, Callable[P, R]] = {}
        update_wrapper(self, plain)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.variants.get(target_platform(), self.plain)(*args, **kwargs)

    def on(self, *platforms: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorate a variant for these platforms: "cpu", "gpu" or "tpu"."""

        def register(variant: Callable[P, R]) -> Callable[P, R]:
            self.variants.update(dict.fromkeys(platforms, variant))
            return variant

        return register


OPS: dict[str, Op] = {}
"""All formulas that `op` decorates, by name."""


def op(plain: Callable[P, R]) -> Op[P, R]:
    """Turn a function into an `Op`, and add it to `OPS`."""
    OPS[plain.__name__] = made = Op(plain)
    return made
