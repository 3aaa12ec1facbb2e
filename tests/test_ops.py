"""Test formulas that have a variant for a platform: the variant equals the plain form."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heedful.model.ops import caches, loops, platform, products
from heedful.model.ops.platform import OPS, op
from heedful.model.ops.products import MAX_ROWS_TRANSPOSED

ROOT = Path(__file__).parent.parent
for file in (ROOT / "model" / "ops").glob("*.py"):  # The imports fill the table.
    import_module(f"heedful.model.ops.{file.stem}")
FEW, MANY = MAX_ROWS_TRANSPOSED, MAX_ROWS_TRANSPOSED + 1


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def compared(name: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Return the results of the plain form and of its CPU variant."""
    made = OPS[name]

    def both(*args: Any) -> tuple[Any, Any]:
        return made.plain(*args, **options), made.variants["cpu"](*args, **options)

    # Arrays are arguments of the program: XLA would spend a minute to compute it from constants.
    static = [i for i, x in enumerate(args) if isinstance(x, int | str) or callable(x)]
    return jax.jit(both, static_argnums=static)(*args)


def test_a_formula_takes_the_variant_of_the_platform_in_force(monkeypatch):
    monkeypatch.setattr(platform, "OPS", {})

    @op
    def double(x: int) -> int:
        """Twice x."""
        return 2 * x

    @double.on("gpu", "tpu")
    def shifted(x: int) -> int:
        return -2 * x

    assert (double.__doc__, double.__name__) == ("Twice x.", "double")
    found = {}
    for name in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(platform, "target_platform", lambda name=name: name)
        found[name] = double(3)
    assert found == {"cpu": 6, "gpu": -6, "tpu": -6}
    assert {"double": double} == platform.OPS


def test_every_formula_is_compared_below():
    source = Path(__file__).read_text("utf-8")
    compared = set(re.findall(r'compared\(\s*"(\w+)"', source))
    assert {*OPS} == compared | {"layers_per_iteration", "unstack_layers"}


@pytest.mark.parametrize(("i", "o"), [(7, 5), (5, 7)])
def test_summed_outer_products(i: int, o: int):
    x, y = random(2, 11, i), random(2, 11, o, seed=1)
    for found in compared("summed_outer_products", x, y):
        np.testing.assert_allclose(found, np.einsum("BTi,BTo->io", x, y), atol=1e-5)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("name", ["transposed_matmul", "tied_logits"])
def test_products_with_a_transposed_matrix(name: str, rows: int):
    x, matrix = random(1, rows, 7), random(13, 7, seed=1)
    pair = {
        "transposed_matmul": lambda: compared("transposed_matmul", x, matrix, "float32"),
        "tied_logits": lambda: compared("tied_logits", x, matrix),
    }[name]()
    for found in pair:
        np.testing.assert_allclose(found, x @ matrix.T, atol=1e-5)


def test_a_wide_bias_is_added():
    logits, bias = random(2, 3, 5), random(5, seed=1)
    np.testing.assert_array_equal(products.add_wide_bias(logits, bias), logits + bias)


def test_kernels_are_transposed_where_few_rows_are_faster_so():
    kernels = {("query",): random(2, 3, 5)}
    plain, transposed = compared("transpose_for_decoding", kernels)
    assert plain == {}
    np.testing.assert_array_equal(transposed[("query",)], np.swapaxes(kernels[("query",)], 1, 2))


@pytest.mark.parametrize("rows", [1, FEW])  # multiplied by 12 in the test
@pytest.mark.parametrize("size", [7, 1009, 32 * 31])
def test_the_highest_are_found_block_by_block(size: int, rows: int):
    rng = np.random.default_rng(0)
    ties = np.round(4 * rng.normal(size=(5, size)).astype(np.float32))
    lonely = np.full((1, size), -np.inf, np.float32)
    lonely[0, -6:] = range(6)
    equal = np.zeros((1, size), np.float32)
    logits = np.concatenate([rng.normal(size=(5, size)).astype(np.float32), ties, equal, lonely])
    logits = np.tile(logits, (rows, 1))
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :6]
    for values, index in compared("top_k", jnp.asarray(logits), 6):
        np.testing.assert_array_equal(index, expected)
        np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, axis=1))


@pytest.mark.parametrize("rows", [3, MANY])
def test_logsumexp_given_max(rows: int):
    logits = 90 * random(rows, 41)
    expected = np.logaddexp.reduce(np.float64(logits), 1)
    for total in compared("logsumexp_given_max", logits, logits.max(1)):
        np.testing.assert_allclose(total, expected, rtol=1e-6)


@pytest.mark.parametrize("offset", [0, 15, 16, 63, 127])
def test_what_a_token_sees_of_a_cache_is_read(offset: int):
    kept = jnp.where(jnp.arange(128) <= offset, random(128), 0)
    plain, part = compared("read_filled", lambda n: jnp.sum(kept[:n]), 128, jnp.array(offset))
    np.testing.assert_allclose(part, plain, rtol=1e-5)
    read: list[int] = []

    def count(n: int) -> jax.Array:
        read.append(n)
        return jnp.float32(n)

    size = caches.read_filled.variants["cpu"](count, 128, jnp.array([0, offset]))
    assert offset < size <= max(16, 2 * offset + 2)
    assert read == [16, 32, 64, 128]


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("start", [0, 4, 6])
def test_a_slice_is_written(start: int, axis: int):
    array = random(2, 9, 9)
    x = random(2, *[3 if axis == each else 9 for each in (-2, -1)], seed=1)

    def written(array: jax.Array, x: jax.Array, start: int) -> np.ndarray:
        copy = np.array(array)
        copy[(..., slice(start, start + 3), *[slice(None)] * (-1 - axis))] = x
        return copy

    for found in compared("write_slice", array, x, jnp.array(start), axis):
        np.testing.assert_array_equal(found, written(array, x, start))
    by_row = caches.write_at(array, x, jnp.array([start, 2]), axis=axis)
    np.testing.assert_array_equal(by_row[0], written(array[0], x[0], start))
    np.testing.assert_array_equal(by_row[1], written(array[1], x[1], 2))


def test_layers_are_apart_and_together_again():
    stacked = {"kernel": random(3, 2, 2), "norm": {"scale": random(3, 2)}}
    unstack = loops.unstack_layers
    assert unstack.plain(stacked) is stacked
    apart = unstack.variants["cpu"](stacked)
    assert sorted(x.shape for x in jax.tree.leaves(apart)) == [(2,)] * 3 + [(2, 2)] * 3
    jax.tree.map(np.testing.assert_array_equal, loops.restack_layers({"a": apart}), {"a": stacked})
    assert loops.restack_layers(unstack.variants["cpu"]({})) == {}


@pytest.mark.parametrize(
    ("asked", "remat", "decodes", "expected"),
    [
        (None, False, False, (1, 12)),
        (None, True, False, (1, 1)),
        (None, True, True, (1, 12)),
        (3, False, False, (3, 3)),
        (3, False, True, (3, 12)),
        (20, True, True, (20, 20)),
    ],
)
def test_layers_per_iteration(asked, remat: bool, decodes: bool, expected: tuple[int, int]):
    made = loops.layers_per_iteration
    forms = made.plain, made.variants["cpu"]
    assert tuple(form(asked, remat=remat, decodes=decodes) for form in forms) == expected


PLACES = ["ops", "attention", "axes.py"]
"""Files and folders of model/ that may name platforms; cores list the platforms they run on."""


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted((ROOT / "model").rglob("*.py"))
        if not {*PLACES} & {*path.relative_to(ROOT / "model").parts}
    ],
    ids=lambda path: path.name,
)
def test_a_model_is_read_without_a_word_about_platforms(path: Path):
    source = path.read_text("utf-8")
    words = r"target_platform|default_backend|\b(?:MAX|MIN)_[A-Z_]+ =|\"(?:cpu|gpu|tpu)\"|\bCPU\b"
    assert not re.findall(words, source)
