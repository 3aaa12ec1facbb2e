"""The worker for the cores of this project: `python -m benchmarks.attention_cores CASE WHAT`."""

import platform
from typing import Any

import flax.linen as nn
import jax

from benchmarks.worker import Case, Program, Run, Skipped, limit_memory, peak_resident, serve
from heedful.model import masks
from heedful.model.attention import CORES, AttentionCall, choose
from heedful.model.config import (
    AttentionConfig,
    LinformerConfig,
    ModelConfig,
    ModelError,
    PerformerConfig,
)
from heedful.model.masks import AttentionMask


class Attention(nn.Module):
    """A core alone; some cores have parameters."""

    config: ModelConfig

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
        core = CORES[self.config.attention.core].make(self.config, {})
        return core(AttentionCall(q, k, v, mask))


def prepare(case: Case) -> Program:
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        limit_memory(case.memory)
    elif case.dtype == "float32":  # The default is TF32, which is not the default of torch.
        jax.config.update("jax_default_matmul_precision", "highest")
    mask = masks.causal() if case.causal else masks.full()
    if case.name == "longformer":
        mask &= masks.sliding(case.window, case.window)
    shape = (1, case.length, case.heads, case.head_dim)
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, g = (jax.random.normal(key, shape, case.dtype) for key in keys[:4])

    def forward(params: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return module.apply(params, q, k, v, mask)

    def both(params: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, pullback = jax.vjp(forward, params, q, k, v)
        return out, pullback(g)

    try:
        module = Attention(model_config(case))
        choose(case.name, jax.default_backend(), case.length)
        params = jax.jit(lambda q, k, v: module.init(keys[4], q, k, v, mask))(q, k, v)
        function = jax.jit(both if case.backward else forward)
        compiled = function.lower(params, q, k, v).compile()
    except ModelError as error:
        raise Skipped(str(error)) from error
    # The compiler plans the memory of results and intermediate values.
    sizes: Any = compiled.memory_analysis()
    planned = sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    if on_cpu and planned > case.memory:
        raise Skipped(f"needs {planned / 2**30:.1f} GiB")
    run = lambda: jax.block_until_ready(compiled(params, q, k, v))  # noqa: E731
    return Program(run, lambda: peak_resident(run) if on_cpu else peak_on_device(run, planned))


def model_config(case: Case) -> ModelConfig:
    size = {"heads": case.heads, "head_dim": case.head_dim}
    own: dict[str, Any] = {}
    if case.name == "longformer":
        own["window"] = case.window
    if case.name == "performer":
        own["performer"] = PerformerConfig(features=case.features)
    if case.name == "linformer":
        own["linformer"] = LinformerConfig(rank=case.rank, max_length=case.length)
    attention = AttentionConfig(core=case.name, **size, **own)
    return ModelConfig(width=case.heads * case.head_dim, attention=attention)


def peak_on_device(run: Run, planned: int) -> int:
    """Return the bytes that a run takes on an accelerator at its peak."""
    device = jax.devices()[0]
    before = device.memory_stats()
    run()
    after = device.memory_stats()
    if after["peak_bytes_in_use"] > before["peak_bytes_in_use"]:
        return after["peak_bytes_in_use"] - before["bytes_in_use"]
    return planned  # An earlier run, or autotuning before it, had the same or a higher peak.


if __name__ == "__main__":
    serve(
        prepare,
        {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        },
    )
