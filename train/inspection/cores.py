"""Table of the masks that each attention core supports, from the cores' own checks."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from heedful.model import masks
from heedful.model.attention import CORES
from heedful.model.attention_masks import cross_mask, decoder_mask, encoder_mask
from heedful.model.axes import shards, target_platform
from heedful.model.cache import new_cache
from heedful.model.config import AttentionConfig, AttentionSite, ModelConfig, ModelError
from heedful.model.masks import AttentionMask, MaskNotSupported
from heedful.model.multi_head_attention import MultiHeadAttention, StackContext
from heedful.model.positions import PositionBias

T = 4
IDS = jnp.ones((1, T), jnp.int32)
LENGTHS = jnp.ones(1, jnp.int32)
WINDOW = {"window": 1}
DILATED = {**WINDOW, "dilation": (1, 2)}
GLOBAL = {**WINDOW, "global_tokens": 1}


@dataclass(frozen=True)
class Row:
    """Row of the table of cores: an attention that a core may support."""

    where: str
    what: str
    mask: Callable[[ModelConfig], AttentionMask]
    attention: dict[str, Any] = field(default_factory=dict)
    bias: PositionBias | None = None
    has_cache: bool = False

    @property
    def site(self) -> AttentionSite:
        return "cross" if self.where == "cross" else "self"


def _encoder(config: ModelConfig) -> AttentionMask:
    return encoder_mask(config, IDS)


def _decoder(config: ModelConfig) -> AttentionMask:
    return decoder_mask(config, IDS)


def _cached(config: ModelConfig) -> AttentionMask:
    return decoder_mask(config, None, offset=1)


ROWS = (
    Row("encoder", "everything", lambda config: encoder_mask(config, None)),
    Row("encoder", "all but padding", _encoder),
    Row("encoder", "its own of several documents in a row", _encoder),
    Row("encoder", "a window", _encoder, WINDOW),
    Row("encoder", "a window with a dilation by head", _encoder, DILATED),
    Row("encoder", "a window, and global tokens", _encoder, GLOBAL),
    Row("decoder", "the past", lambda config: decoder_mask(config, None)),
    Row("decoder", "the past, but padding", _decoder),
    Row("decoder", "the past of its own document", _decoder),
    Row("decoder", "the past and a prefix", lambda c: decoder_mask(c, None, LENGTHS)),
    Row("decoder", "the past in a window", _decoder, WINDOW),
    Row("decoder", "the past in a window with a dilation", _decoder, DILATED),
    Row("decoder", "the past in a window, and global tokens", _decoder, GLOBAL),
    Row("decoder", "the past, from a cache", _cached, has_cache=True),
    Row("decoder", "the past in a window, from a cache", _cached, WINDOW, has_cache=True),
    Row("cross", "the source", lambda config: cross_mask(IDS, None, None)),
    Row("cross", "the source, but padding", lambda config: cross_mask(IDS, IDS, IDS)),
    Row("encoder", "everything, with ALiBi's or T5's bias",
        lambda config: encoder_mask(config, None), bias=PositionBias(jnp.ones(2))),
    Row("encoder", "everything, with dropout of weights",
        lambda config: encoder_mask(config, None), {"dropout": 0.1}),
)  # fmt: skip

DOCUMENTS = ("its own of several documents in a row", "the past of its own document")
NAN = "a row holds one document: others, which are not known while tracing, come out as NaN"


def refusal(core: str, row: Row) -> str | None:
    """Return the reason why a core does not support a row; None: the core supports it.

    Only shapes are computed. Cores check the mask before the device and the device mesh.
    """
    attention = AttentionConfig(heads=2, core=core, **row.attention)
    config = ModelConfig(
        architecture="decoder_only", vocab_size=2, width=16, attention=attention, dtype="bfloat16"
    )
    layer = MultiHeadAttention(config, row.site)
    new = 1 if row.has_cache else T
    x = jnp.zeros((1, new, 16), jnp.bfloat16)
    source = jnp.zeros((1, T, 16), jnp.bfloat16) if row.site == "cross" else None
    mask, shared = row.mask(config), StackContext(bias=row.bias)
    cache = new_cache(config, 1, T) if row.has_cache else None

    def run(params: Any) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        options = {"cache": cache, "deterministic": False, "rngs": rngs}
        return layer.apply(params, x, source, mask, shared, **options)

    try:
        jax.eval_shape(run, _params(core))
    except MaskNotSupported as error:
        return error.reason
    except ModelError:
        if CORES[core].fits(target_platform(), shards("act_length")):
            raise
    return NAN if row.what in DOCUMENTS and row.site in CORES[core].one_document_at else None


@cache
def _params(core: str) -> Any:
    """Return the shapes of the parameters of an attention layer, the same for all rows."""
    attention = AttentionConfig(heads=2, core=core)
    layer = MultiHeadAttention(ModelConfig(width=16, attention=attention))
    x = jnp.zeros((1, T, 16))
    return jax.eval_shape(lambda: layer.init(jax.random.key(0), x, None, masks.full()))


def table() -> str:
    """Return the table in Markdown, with numbered reasons below."""
    reasons: dict[str, dict[str, None]] = {}  # Reason -> cores, in order.

    def cell(core: str, row: Row) -> str:
        reason = refusal(core, row)
        if reason is None:
            return "yes"
        if not row.attention.get("window") and row.site == "self":
            inside = replace(row, attention={**row.attention, **WINDOW})
            if refusal(core, inside) is None:
                return "in a window"
        reasons.setdefault(reason, {})[core] = None
        return f"no [{list(reasons).index(reason) + 1}]"

    lines = [
        f"| attention | a query attends to | {' | '.join(CORES)} |",
        "|---|---|" + "---|" * len(CORES),
    ]
    for row in ROWS:
        cells = " | ".join(cell(core, row) for core in CORES)
        lines.append(f"| {row.where} | {row.what} | {cells} |")
    notes = [
        f"{i}. {', '.join(names)}: {reason}" for i, (reason, names) in enumerate(reasons.items(), 1)
    ]
    return "\n".join([*lines, "", *notes])
