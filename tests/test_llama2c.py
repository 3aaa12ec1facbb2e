"""Test checkpoints of llama2.c against a plain forward pass that uses the names of llama2.c."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import V
from tiny_pretrained import assert_equal, refused

from heedful.model import pretrained
from heedful.model.pretrained import Pretrained, read, write
from heedful.model.transformer import build

SIZES = {"D": 24, "F": 13, "L": 2, "N": 6, "K": 3, "V": V, "T": 19}


def llama2c(path: Path, is_tied: bool = True) -> dict[str, np.ndarray]:
    """Write a file in the format of llama2.c; return its tensors under their names there."""
    D, F, L, N, K, _, length = SIZES.values()
    H, rng = D // N, np.random.default_rng(0)
    shapes = {
        "token_embedding": (V, D),
        "rms_att": (L, D),
        "wq": (L, N * H, D),
        "wk": (L, K * H, D),
        "wv": (L, K * H, D),
        "wo": (L, D, N * H),
        "rms_ffn": (L, D),
        "w1": (L, F, D),
        "w2": (L, D, F),
        "w3": (L, F, D),
        "rms_final": (D,),
        "freq_cos": (length, H // 2),
        "freq_sin": (length, H // 2),
        **({} if is_tied else {"wcls": (V, D)}),
    }
    weights = {n: 0.5 * rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    angles = np.arange(length)[:, None] / 10_000 ** (np.arange(0, H, 2) / H)
    weights |= {"freq_cos": np.float32(np.cos(angles)), "freq_sin": np.float32(np.sin(angles))}
    header = [*list(SIZES.values())[:5], V if is_tied else -V, length]
    path.write_bytes(
        np.array(header, "<i4").tobytes() + b"".join(w.tobytes() for w in weights.values())
    )
    return weights


def plain_llama2c(w: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Compute logits as llama2.c does, in float64; rotary positions turn features (2i, 2i + 1)."""
    D, _, L, N, K, _, _ = SIZES.values()
    H, length = D // N, len(tokens)
    w = {name: array.astype(np.float64) for name, array in w.items()}
    angles = np.arange(length)[:, None] / 10_000 ** (np.arange(0, H, 2) / H)

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    def turn(x):
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    x = w["token_embedding"][tokens]
    for i in range(L):
        y = norm(x, w["rms_att"][i])
        q, k, v = (
            (y @ w[n][i].T).reshape(length, heads, H)
            for n, heads in (("wq", N), ("wk", K), ("wv", K))
        )
        k, v = (np.repeat(z, N // K, axis=1) for z in (turn(k), v))
        scores = np.einsum("tnh,snh->nts", turn(q), k) / np.sqrt(H)
        weights = np.exp(scores) * np.tri(length)
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("nts,snh->tnh", weights, v).reshape(length, D) @ w["wo"][i].T
        y = norm(x, w["rms_ffn"][i])
        gate = y @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"][i].T)) @ w["w2"][i].T
    return norm(x, w["rms_final"]) @ w.get("wcls", w["token_embedding"]).T


@pytest.mark.parametrize("is_tied", [True, False])
def test_llama2c_logits(is_tied: bool, tmp_path: Path):
    weights = llama2c(tmp_path / "model.bin", is_tied)
    found = pretrained.read_llama2c(tmp_path / "model.bin")
    assert found.config.tie_embeddings == is_tied
    tokens = np.random.default_rng(1).integers(0, V, 7)
    apply = jax.jit(build(found.config).apply)
    logits = apply({"params": found.params}, jnp.asarray(tokens[None]))
    np.testing.assert_allclose(np.asarray(logits)[0], plain_llama2c(weights, tokens), atol=1e-4)
    write(tmp_path / "export", found.config, found.params, special=found.special)
    assert_equal(read(tmp_path / "export").params, found.params)


def test_llama2c_files_that_are_refused(tmp_path: Path):
    path = tmp_path / "model.bin"
    llama2c(path)
    content = path.read_bytes()
    size = f"{len(content):,}"
    for spoiled, parts in (
        (content[:-4], (f"{len(content) - 4:,} bytes", f"implies {size}")),
        (content + b"0000", (f"{len(content) + 4:,} bytes", f"implies {size}")),
        (content[:20], ("not a llama2.c checkpoint", "[24, 13, 2, 6, 3]")),
        (b"\0" * 200, ("not a llama2.c checkpoint",)),
        (np.array([7, *[2] * 6], "<i4").tobytes(), ("not a llama2.c checkpoint",)),
    ):
        path.write_bytes(spoiled)
        refused(lambda: pretrained.read_llama2c(path), str(path), *parts)
    spoiled = np.frombuffer(content, "<f4").copy()
    for at, value, part in (
        (7 + 30, np.nan, "embedding/table has NaN or infinite values"),
        (len(spoiled) - 3, 0.5, "its sines are not those"),
        (len(spoiled) - 3 - 19 * 2, np.float32(0.5), "its cosines are not those"),
    ):
        other = spoiled.copy()
        other[at] = value
        path.write_bytes(other.tobytes())
        refused(lambda: pretrained.read_llama2c(path), str(path), part)
    path.write_bytes(content + b"tokenizer")
    found: Pretrained = pretrained.read_llama2c(path, following=9)
    assert found.config.vocab_size == V
    refused(lambda: pretrained.read_llama2c(tmp_path / "none"), "does not exist")
