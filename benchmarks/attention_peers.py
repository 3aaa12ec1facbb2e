"""The worker for attention of peers: `PYTHON -m benchmarks.attention_peers CASE WHAT`.

Like the cores, peers are measured without projections from and to hidden states: `transformers` and
`linformer` get the projected values as inputs, in the layout that they use.
"""

import logging
import platform
from collections.abc import Callable
from importlib.metadata import version

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.worker import Case, Program, Run, Skipped, limit_memory, peak_resident, serve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Given(torch.nn.Module):
    """A replacement of a projection, with a given result."""

    def __init__(self, values: Callable[[], torch.Tensor]):
        super().__init__()
        self.values = values

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.values()


def sdpa(case: Case, leaf: Callable[..., torch.Tensor]):
    q, k, v = (leaf(1, case.heads, case.length, case.head_dim) for _ in range(3))
    run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)  # noqa: E731
    return run, [q, k, v]


def longformer(case: Case, leaf: Callable[..., torch.Tensor]):
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    if case.causal:
        raise Skipped("there is no causal one")
    width = case.heads * case.head_dim
    config = LongformerConfig(
        hidden_size=width,
        num_attention_heads=case.heads,
        attention_window=[2 * case.window],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, layer_id=0)
    q, k, v = (leaf(case.length, 1, width) for _ in range(3))
    layer.query, layer.key, layer.value = (
        Given(lambda: q.clone()),  # The layer divides it in place.
        Given(lambda: k),
        Given(lambda: v),
    )
    hidden = torch.empty(1, case.length, width, dtype=q.dtype, device=DEVICE)
    none = torch.zeros(1, case.length, dtype=q.dtype, device=DEVICE)
    run = lambda: layer(hidden, none, none.bool(), none.bool(), False)[0]  # noqa: E731
    return run, [q, k, v]


def performer(case: Case, leaf: Callable[..., torch.Tensor]):
    from performer_pytorch import FastAttention

    q, k, v = (leaf(1, case.heads, case.length, case.head_dim) for _ in range(3))
    layer = FastAttention(case.head_dim, nb_features=case.features, causal=case.causal)
    layer = layer.to(DEVICE, q.dtype)
    return lambda: layer(q, k, v), [q, k, v]


def linformer(case: Case, leaf: Callable[..., torch.Tensor]):
    from linformer import LinformerSelfAttention

    if case.causal:
        raise Skipped("there is no causal one")
    width = case.heads * case.head_dim
    layer = LinformerSelfAttention(width, case.length, k=case.rank, heads=case.heads)
    layer = layer.to(DEVICE)
    q, k, v = (leaf(1, case.length, width) for _ in range(3))
    layer.to_q, layer.to_k, layer.to_v = Given(lambda: q), Given(lambda: k), Given(lambda: v)
    layer.to_out = torch.nn.Identity()
    layer.proj_k, layer.proj_v = (torch.nn.Parameter(p.to(q.dtype)) for p in layer.parameters())
    return lambda: layer(q), [q, k, v, layer.proj_k, layer.proj_v]


PEERS = {
    "torch sdpa": sdpa,
    "transformers longformer": longformer,
    "performer-pytorch": performer,
    "pypi linformer": linformer,
}


def prepare(case: Case) -> Program:
    if DEVICE == "cpu":
        limit_memory(case.memory)
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=case.backward)

    attend, leaves = PEERS[case.name](case, leaf)
    with torch.no_grad():
        g = torch.randn_like(attend()) if case.backward else None

    def run() -> object:
        if case.backward:
            out = attend()
            result = out, torch.autograd.grad(out, leaves, g)
        else:
            with torch.no_grad():
                result = attend()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    return Program(run, lambda: (peak_resident if DEVICE == "cpu" else peak_on_device)(run))


def peak_on_device(run: Run) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    serve(
        prepare,
        {
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            **{name: version(name) for name in ("torch", "transformers")},
            **{name: version(name) for name in ("performer-pytorch", "linformer")},
        },
    )
