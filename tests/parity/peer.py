"""Functions that the comparisons with transformers share."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

from heedful.model.config import ModelConfig  # noqa: E402
from heedful.model.pretrained import Pretrained, read, write  # noqa: E402
from heedful.model.transformer import build, empty_cache  # noqa: E402

B, S, T, V = 3, 7, 5, 23
SOURCE_LENGTHS, LENGTHS = [7, 4, 1], [3, 5, 2]
RNG = np.random.default_rng(0)
TOKENS, SOURCE, TYPES = (RNG.integers(1, n, (B, k)) for n, k in ((V, T), (V, S), (3, T)))
REAL, SOURCE_REAL = (
    (np.arange(n) < np.array(lengths)[:, None]).astype(int)
    for n, lengths in ((T, LENGTHS), (S, SOURCE_LENGTHS))
)


def randomised(model: Any) -> Any:
    """Set all weights of a torch model to random values: no bias is 0, no scale is 1."""
    generator = torch.Generator().manual_seed(0)
    fixed = {n for n, x in model.named_modules() if "Sinusoidal" in type(x).__name__}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.rpartition(".")[0] not in fixed:
                weight.normal_(0.0, 0.2, generator=generator)
                if "norm" in name.lower() and name.endswith("weight"):
                    weight += 1.0
    return model.eval()


def ours(model: Any, directory: Path) -> Pretrained:
    """Save a model of transformers and read its files with this library."""
    model.save_pretrained(directory)
    found = read(directory)
    assert found.unused == []
    return found


def back(cls: Any, directory: Path) -> Any:
    """Load our export with transformers; no tensor may be missing or unused."""
    model, info = cls.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def export(found: Pretrained, directory: Path) -> Path:
    more = {"special": found.special, "labels": found.labels, "model_type": found.model_type}
    write(directory, found.config, found.params, **more)
    return directory


def run(found: Pretrained, *args: Any, **kwargs: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run our model; return its outputs, and the hidden states [L, B, T, D] by stack."""
    apply = jax.jit(partial(build(found.config).apply, mutable=["intermediates"]))
    args, kwargs = jax.tree.map(jnp.asarray, (args, kwargs))
    scores, state = apply({"params": found.params}, *args, **kwargs)
    stacks: Any = state["intermediates"]
    return np.asarray(scores), {k: np.asarray(s["blocks"]["hidden"][0]) for k, s in stacks.items()}


DOCUMENTS = [TOKENS[i, :n] for i, n in enumerate(LENGTHS)]


def run_row(found: Pretrained, tokens: np.ndarray, **more: np.ndarray) -> np.ndarray:
    """Run our model on documents of LENGTHS packed into one row, and return the logits."""
    return run(
        found,
        tokens,
        segment_ids=np.repeat([1, 2, 3], LENGTHS)[None],
        positions=np.concatenate([np.arange(n) for n in LENGTHS])[None],
        **more,
    )[0]


def run_with_cache(found: Pretrained, tokens: np.ndarray, *encoded: Any) -> np.ndarray:
    """Run our model with a cache, one token after the other, and return the logits.

    `encoded` are the hidden states of the source and its segments.
    """
    apply = jax.jit(partial(build(found.config).apply, method="decode"))
    cache, scores = empty_cache(found.config, len(tokens), tokens.shape[1] + 2), []
    for t in range(tokens.shape[1]):
        step = jnp.asarray(tokens[:, t : t + 1])
        logits, cache = apply(
            {"params": found.params}, step, *encoded, cache=cache, offset=jnp.int32(t)
        )
        encoded = (None, *encoded[1:]) if encoded else ()
        scores.append(np.asarray(logits))
    return np.concatenate(scores, axis=1)


def hidden(blocks: Sequence[Any], forward: Callable[[], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Run a torch model; return its outputs, and those of each block [L, B, T, D].

    Outputs of blocks do not include a last norm.
    """
    outputs = []

    def record(module: Any, args: Any, output: Any) -> None:
        outputs.append(array(output[0] if isinstance(output, tuple) else output))

    handles = [block.register_forward_hook(record) for block in blocks]
    with torch.no_grad():
        scores = array(forward().logits)
    for handle in handles:
        handle.remove()
    return scores, np.stack(outputs)


def with_cache(
    model: Any, tokens: np.ndarray, name: str = "input_ids", **kwargs: Any
) -> np.ndarray:
    """Run a model of transformers with a cache, one token after the other; return the logits."""
    scores, cache = [], None
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            step = {name: torch.tensor(tokens[:, t : t + 1])}
            out = model(**step, **kwargs, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            scores.append(array(out.logits))
    return np.concatenate(scores, axis=1)


PAIRS = [(SOURCE[i, :s], TOKENS[i, :t]) for i, (s, t) in enumerate([(4, 2), (2, 5), (7, 3)])]


def run_packed(found: Pretrained) -> np.ndarray:
    """Run our encoder-decoder on PAIRS packed into one row, and return the logits."""
    packed = {}
    for name, parts in zip(("encoder_", ""), zip(*PAIRS, strict=True), strict=True):
        lengths = [len(part) for part in parts]
        packed[f"{name}inputs"] = np.concatenate(parts)[None]
        packed[f"{name}segment_ids"] = np.repeat([1, 2, 3], lengths)[None]
        packed[f"{name}positions"] = np.concatenate([np.arange(n) for n in lengths])[None]
    return run(found, packed.pop("inputs"), packed.pop("encoder_inputs"), **packed)[0]


def one_by_one(model: Any) -> np.ndarray:
    """Run a model of transformers on each of PAIRS alone; return the logits, concatenated."""
    with torch.no_grad():
        scores = [
            array(model(**tensors(input_ids=s[None], decoder_input_ids=t[None])).logits)
            for s, t in PAIRS
        ]
    return np.concatenate(scores, axis=1)


def encode(found: Pretrained, source: np.ndarray, segments: np.ndarray) -> Any:
    """Encode a source with our model into hidden states for the decoder."""
    apply = build(found.config).apply
    arrays = jnp.asarray(source), jnp.asarray(segments)
    return apply({"params": found.params}, *arrays, method="encode")


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()


def tensors(**arrays: np.ndarray) -> dict[str, Any]:
    return {name: torch.tensor(x) for name, x in arrays.items()}


def assert_close(
    what: str, found: np.ndarray, expected: np.ndarray, real: Any = None, most: float = 1e-5
) -> None:
    """Print the largest absolute difference where `real` [B, T] is True; it is at most `most`."""
    assert found.shape == expected.shape
    difference = np.abs(found - expected)
    if real is not None:
        difference = difference[..., np.asarray(real, bool), :]
    print(f"{what}: {difference.max():.2g} of {np.abs(expected).max():.2g}")
    assert difference.max() <= most


def compact(config: ModelConfig, params: Any) -> Pretrained:
    """Return a model of this library in the form that the comparisons take."""
    return Pretrained(config=config, params=jax.tree.map(np.asarray, params), architecture="")
