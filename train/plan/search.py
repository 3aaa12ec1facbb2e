"""Search layouts (mesh and model.remat): rank all by an estimate, then compile the best."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from heedful.data.config import DataConfig
from heedful.model.config import ModelConfig
from heedful.train.config import MeshConfig, TrainConfig
from heedful.train.errors import TrainError
from heedful.train.inspection.costs import BACKWARD, device_bytes, logits_at_once, parts, recomputed
from heedful.train.inspection.inspect import layout, number
from heedful.train.plan.chips import Chip, chip_of
from heedful.train.plan.compiled import largest_batch
from heedful.train.plan.report import Plan, make_plan, print_model
from heedful.train.plan.roofline import milliseconds
from heedful.train.plan.topology import devices_of
from heedful.train.sharding import MESH_AXES, require_divisible
from heedful.train.state import Setup, set_up

REMAT = ("none", "dots", "attention", "full")
TENSOR = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout (mesh and model.remat), and its estimated memory and time."""

    model: ModelConfig
    train: TrainConfig
    memory: float
    """Estimated bytes per chip."""
    seconds: float
    """Estimated time of a step, to choose which layouts to compile."""


def candidates(
    model: ModelConfig, data: DataConfig, train: TrainConfig, chips: int, chip: Chip
) -> list[Candidate]:
    """Return all layouts that divide the arrays; train.mesh.seq is not changed.

    Layouts that should fit in memory come first, sorted by estimated time.
    """
    result = []
    for mesh in _meshes(chips, train.mesh.seq):
        trained = replace(train, mesh=mesh)
        try:
            require_divisible(largest_batch(data), train.accumulate, layout(mesh))
            setup = set_up(model, trained, layout(mesh))
        except TrainError:  # A size is not divisible.
            continue
        for remat in REMAT:
            result.append(_estimate(replace(model, remat=remat), data, trained, setup, chip))
    return sorted(result, key=lambda one: (one.memory > chip.memory, one.seconds))


def _meshes(chips: int, seq: int) -> Iterator[MeshConfig]:
    for tensor in TENSOR:
        rest = chips // (seq * tensor)
        if rest * seq * tensor != chips:
            continue
        for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
            yield MeshConfig(data=rest // fsdp, fsdp=fsdp, seq=seq, tensor=tensor)


def _estimate(
    model: ModelConfig, data: DataConfig, train: TrainConfig, setup: Setup, chip: Chip
) -> Candidate:
    """Estimate memory and time: the state exactly, activations and collectives roughly.

    https://jax-ml.github.io/scaling-book/training: FSDP all-gathers the parameters twice and
    reduce-scatters the gradients once, data parallelism all-reduces the gradients, and tensor
    parallelism exchanges the hidden states four times per layer in each direction.
    """
    shape, mesh, state = largest_batch(data), setup.mesh, setup.abstract
    sizes = mesh.shape
    params, moments = device_bytes(state.params), device_bytes(state.opt_state)
    tokens = shape.rows * max(shape.lengths) / (mesh.size // sizes["tensor"])
    tokens_at_once = tokens / train.accumulate
    layers = model.layers
    if model.architecture == "encoder_decoder":
        layers += model.encoder_layers or model.layers
    heads = model.head_dim * (2 * model.attention.heads + 2 * model.kv_heads) / sizes["tensor"]
    inner = model.feed_forward.width * (2 if model.feed_forward.gated else 1) / sizes["tensor"]
    saved = {"full": model.width, "attention": 2 * model.width + heads}  # Per token and layer.
    saved["dots"] = saved["attention"] + inner + model.width
    saved["none"] = 2.5 * saved["dots"]
    size = 2 if model.dtype == "bfloat16" else 4
    activations = tokens_at_once * saved[model.remat] * size * layers
    logits = (
        logits_at_once(tokens_at_once, data, train) * (model.vocab_size or 1) * 8 / sizes["tensor"]
    )

    forward = parts(model, state.params, data.max_length)
    per_token = sum(part.flops for part in forward) * (1 + BACKWARD) + recomputed(model, forward)
    compute = per_token * shape.rows * max(shape.lengths) / (mesh.size * chip.flops)
    gathered = 3 * params * (sizes["fsdp"] - 1) * train.accumulate
    reduced = 2 * params * (sizes["data"] > 1)
    exchanged = 8 * layers * tokens * model.width * size * (sizes["tensor"] > 1)
    return Candidate(
        model=model,
        train=train,
        memory=2 * params + moments + activations + logits,
        seconds=max(compute, (gathered + reduced) / (2 * chip.link)) + exchanged / (2 * chip.link),
    )


def search(
    title: str,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    console: Console,
    *,
    topology: str | None,
    compiles: int,
) -> bool:
    """Compile the `compiles` most promising layouts and print them; return True if any fits."""
    devices = devices_of(topology)
    chip = chip_of(devices[0])
    if chip is None:
        raise TrainError(
            f"--search: train/plan/chips.py does not list {devices[0].device_kind}; give --topology"
        )
    model = print_model(title, model, data, console)
    layouts = candidates(model, data, train, len(devices), chip)
    console.print(
        f"{len(devices):,} x {devices[0].device_kind}: {len(layouts)} layouts are possible, the "
        f"{min(compiles, len(layouts))} most promising are compiled"
    )
    plans = []
    for one in layouts[:compiles]:
        with console.status(f"compiling {_flags(one)}"):
            try:
                plan = make_plan(one.model, data, one.train, devices)
            except TrainError as error:
                console.print(f"{_flags(one)}: {error}")
                continue
        plans.append((one, plan))
        console.print(f"{_flags(one)}: {_outcome(plan)}")
    if not plans:
        raise TrainError(
            f"--search: no layout fits {len(devices)} chips; change data.batch_multiple or "
            "--topology"
        )
    plans.sort(key=lambda pair: _rank(pair[1]))
    console.print(_table(plans, chip))
    best, plan = plans[0]
    if plan.compiled.memory.fits:
        console.print(f"best: {_flags(best)}")
    return plan.compiled.memory.fits


def _rank(plan: Plan) -> tuple:
    memory = plan.compiled.memory
    time = plan.roofline.step if plan.roofline else 0.0
    return (not memory.fits, time if memory.fits else memory.total)


def _flags(one: Candidate) -> str:
    mesh = " ".join(f"--train.mesh.{axis} {getattr(one.train.mesh, axis)}" for axis in MESH_AXES)
    return f"{mesh} --model.remat {one.model.remat}"


def _outcome(plan: Plan) -> str:
    if not plan.compiled.memory.fits:
        return "does not fit"
    time = f", {milliseconds(plan.roofline.step)} per step" if plan.roofline else ""
    return f"fits{time} (compiled in {plan.compiled.seconds:.0f} s)"


def _table(plans: Sequence[tuple[Candidate, Plan]], chip: Chip) -> Table:
    table = Table(title="layouts, the fastest that fits first")
    table.title_justify = "left"
    for name in (*MESH_AXES, "remat", "memory", "left", "step", "utilisation", "bottleneck"):
        table.add_column(name, justify="left" if name in ("remat", "bottleneck") else "right")
    for one, plan in plans:
        memory, time = plan.compiled.memory, plan.roofline
        left: Any = (memory.capacity or 0.0) - memory.total
        row = [str(getattr(one.train.mesh, axis)) for axis in MESH_AXES]
        row += [one.model.remat, number(memory.total, 1024) + "B"]
        row.append(number(left, 1024) + "B" if left >= 0 else "does not fit")
        if time is None:
            row += ["", "", ""]
        else:
            row += [milliseconds(time.step), f"{plan.utilisation(chip):.1%}", time.bottleneck]
        table.add_row(*row)
    return table
