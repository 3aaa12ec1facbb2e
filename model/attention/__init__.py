"""Attention cores by name, and the choice among them.

To add a core, write a file that ends with its SPEC, and add one line to the table here. A core of
your own needs no line: model.attention.core also takes its import path, my_package.my_core:SPEC.
"""

from heedful import own_code
from heedful.model.attention import (
    cudnn,
    dense,
    flash,
    linformer,
    longformer,
    performer,
    ring,
    splash,
)
from heedful.model.attention.core import FEATURES, AttentionCall, Cache, Core, CoreSpec
from heedful.model.axes import shards, target_platform
from heedful.model.config import AttentionSite, ModelConfig, ModelError
from heedful.names import did_you_mean

__all__ = [
    "CORES", "FEATURES", "AttentionCall", "Cache", "Core", "CoreSpec", "choose", "redraw_steps",
    "saves_memory", "spec_here", "spec_of", "specs",
]  # fmt: skip

CORES: dict[str, CoreSpec] = {
    spec.name: spec
    for spec in (
        dense.SPEC,
        flash.SPEC,
        longformer.SPEC,
        linformer.SPEC,
        performer.SPEC,
        cudnn.SPEC,
        splash.SPEC,
        ring.SPEC,
    )
}


def spec_of(core: str) -> CoreSpec:
    """Return the spec of a core by its name or import path; for auto that of dense.

    auto chooses exact cores. Raises ModelError for an unknown name and an import path without a
    CoreSpec.
    """
    if core == "auto":
        return CORES["dense"]
    if core in CORES:
        return CORES[core]
    if own_code.is_import_path(core):
        return own_code.resolve(core, "model.attention.core", CoreSpec, ModelError)
    known = did_you_mean(core, ["auto", *CORES])
    raise ModelError(
        f"unknown model.attention.core '{core}': {known}choose auto, one of "
        f"{sorted(CORES)}, or an import path, my_package.my_core:SPEC"
    )


def specs(config: ModelConfig) -> dict[AttentionSite, CoreSpec]:
    """Return the specs of the cores at all sites of the model."""
    return {site: spec_of(config.attention.core_of(site)) for site in config.sites}


def redraw_steps(config: ModelConfig) -> int | None:
    """Return the training steps between two draws of random features; None: no new draws."""
    asked = (spec.redraw_steps(config) for spec in specs(config).values())
    return min((steps for steps in asked if steps is not None), default=None)


def spec_here(core: str, length: int, queries: int) -> CoreSpec:
    """Return the spec of the core that `choose` names for the platform and the mesh in force."""
    name, _ = choose(core, target_platform(), length, queries, shards("act_length"))
    return spec_of(name)


def saves_memory(platform: str, shards: int) -> str:
    """Return the core to choose if a core with quadratic memory runs out of memory."""
    return next(
        name
        for name, spec in CORES.items()
        if (spec.length == "split" if shards > 1 else platform in spec.saves_memory_on)
    )


def choose(
    core: str, platform: str, length: int, queries: int | None = None, shards: int = 1
) -> tuple[str, str]:
    """Return the name of the core to run on `platform` ("cpu", "gpu", "tpu"), and the reason.

    `length` is the number of keys, `queries` the number of queries (None: `length`), which is small
    in decoding. The mesh splits the sequence over `shards` devices. Raises ModelError for an
    unknown name.
    """
    if core != "auto":
        spec_of(core)
        return core, "chosen by model.attention.core"
    pairs = length * (length if queries is None else queries)
    for name, spec in CORES.items():
        least = spec.faster_from.get(platform)
        if least is not None and spec.fits(platform, shards) and pairs >= least**2:
            return name, f"exact, and faster than dense on {platform} from {least} keys on"
    if shards > 1:
        return "dense", f"exact, and takes what the mesh splits over {shards} devices"
    return "dense", f"exact, and runs every mask on {platform}"
