"""Types of arrays inside jax.shard_map: the mesh axes over which their values vary."""

from typing import Any

import jax


def vary(tree: Any, like: Any) -> Any:
    """Return arrays whose type also varies over the manual mesh axes of the arrays in `like`.

    A loop in shard_map needs this for a constant first state, as the states after it vary. Outside
    of shard_map nothing changes. In the derivative, a gradient of an array that did not vary
    becomes the sum over these axes.
    """
    axes = frozenset[str]().union(*map(_axes, jax.tree.leaves(like)))

    def one(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree) if axes else tree


def _axes(x: jax.Array) -> frozenset[str]:
    kind = jax.typeof(x)
    # Before jax 0.10.2, the type itself has the axes.
    found = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(kind, "vma", ()) if found is None else found.varying)
