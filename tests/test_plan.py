"""Test plans: a program read by hand, the CPU's compiler, and the TPU's if libtpu is installed."""

import dataclasses
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny import tiny

from heedful.data.config import DataConfig
from heedful.train import cli
from heedful.train.config import MeshConfig, TrainConfig
from heedful.train.errors import TrainError
from heedful.train.plan.chips import Chip, chip_of
from heedful.train.plan.collectives import Collective, collectives, seconds
from heedful.train.plan.compiled import compile_step, largest_batch
from heedful.train.plan.hlo import Program
from heedful.train.plan.oom_advice import explained, memory_advice
from heedful.train.plan.report import make_plan
from heedful.train.plan.roofline import roofline
from heedful.train.plan.search import candidates
from heedful.train.plan.topology import devices_of
from heedful.train.plan.work import InstructionCost, instruction_costs

needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, comes with the extra plan"
)
CHIP = Chip(name="toy", kind="toy", flops=1e3, memory=10**6, bandwidth=1e2, link=10.0, wraps=4)

PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%nested (param_0.1: s32[], param_1.1: f32[5,7,11]) -> f32[7,11] {
  %param_1.1 = f32[5,7,11]{2,1,0:T(8,128)} parameter(1)
  %param_0.1 = s32[]{:T(128)} parameter(0)
  %slice = f32[1,7,11]{2,1,0} dynamic-slice(%param_1.1, %param_0.1), dynamic_slice_sizes={1,7,11}
  ROOT %flat = f32[7,11]{1,0} bitcast(%slice)
}

%fused (param_0: f32[5,7,11], param_1: s32[], param_2: f32[7,11]) -> f32[5,7,11] {
  %param_0 = f32[5,7,11]{2,1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %param_2 = f32[7,11]{1,0:T(8,128)S(1)} parameter(2)
  %bitcast = f32[7,11]{1,0} fusion(%param_1, %param_0), kind=kLoop, calls=%nested
  %sum = f32[7,11]{1,0} add(%bitcast, %param_2)
  %back = f32[1,7,11]{2,1,0} bitcast(%sum)
  ROOT %update = f32[5,7,11]{2,1,0:T(8,128)} dynamic-update-slice(%param_0, %back, %param_1)
}

%all-reduce-scatter.1 (input: bf16[8,128]) -> bf16[1,128] {
  %input = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.2 = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %part = bf16[1,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.2, %input), dynamic_slice_sizes={1,128}
}

%cond (state.1: (s32[], f32[5,7,11], bf16[3,13])) -> pred[] {
  %state.1 = (s32[], f32[5,7,11]{2,1,0}, bf16[3,13]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(9)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%body (state: (s32[], f32[5,7,11], bf16[3,13])) -> (s32[], f32[5,7,11], bf16[3,13]) {
  %state = (s32[]{:T(128)}, f32[5,7,11]{2,1,0:T(8,128)}, /*index=2*/bf16[3,13]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[5,7,11]{2,1,0:T(8,128)} get-tuple-element(%state), index=1
  %w = bf16[3,13]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %two = s32[]{:T(128)} constant(2)
  %copy = s32[]{:T(128)} copy(%i)
  %next = s32[]{:T(128)} add(%copy, %two)
  %near = f32[7,11]{1,0:T(8,128)S(1)} constant({...})
  %fusion.1 = f32[5,7,11]{2,1,0:T(8,128)} fusion(%x, %i, %near), kind=kLoop, calls=%fused
  %start = (bf16[3,13]{1,0}, bf16[12,13]{1,0}) all-gather-start(%w), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, use_global_device_ids=true
  %done = bf16[12,13]{1,0} all-gather-done(%start)
  %dot.1 = f32[3,3]{1,0} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %tuple = (s32[]{:T(128)}, f32[5,7,11]{2,1,0:T(8,128)}, bf16[3,13]{1,0:T(8,128)(2,1)}) tuple(%next, %fusion.1, %w)
}

ENTRY %main (p: bf16[8,128], q: bf16[8,128]) -> bf16[1,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = (s32[]{:T(128)}, f32[5,7,11]{2,1,0:T(8,128)}, bf16[3,13]{1,0:T(8,128)(2,1)}) parameter(1)
  %while.1 = (s32[]{:T(128)}, f32[5,7,11]{2,1,0:T(8,128)}, bf16[3,13]{1,0:T(8,128)(2,1)}) while(%q), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %conv = f32[8,8]{1,0} convolution(%p, %p), dim_labels=bf_oi->bf
  %permute = bf16[8,128]{1,0} collective-permute(%p), channel_id=3, source_target_pairs={{0,1},{1,2}}
  ROOT %scatter = bf16[1,128]{1,0:T(8,128)(2,1)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_collectives_are_found_in_loops_and_fusions():
    found = collectives(Program(PROGRAM), 8)
    gather, permute, scatter = found
    assert (gather.kind, gather.times, gather.is_async) == ("all-gather", 5, True)
    assert gather.group == (0, 2, 4, 6) and gather.sent == 3 * 3 * 13 * 2
    assert (permute.kind, permute.group, permute.sent) == ("collective-permute", (0, 1), 2048)
    assert (scatter.kind, scatter.times, scatter.is_async) == ("reduce-scatter", 1, False)
    assert scatter.sent == 2048 * 7 / 8


def test_work_is_counted_as_often_as_it_runs_and_slices_by_what_they_take():
    found = {one.name: one for one in instruction_costs(Program(PROGRAM))}
    assert found["dot.1"].flops == 2 * 3 * 3 * 13 and found["dot.1"].times == 5
    assert found["conv"].flops == 2 * 8 * 8 * 128 and found["conv"].times == 1
    # The fusion reads and writes one slice; values inside a fusion need no memory access.
    assert found["fusion.1"].bytes == 2 * 7 * 11 * 4
    assert not {"start", "done", "scatter.flops"} & found.keys()


def test_the_length_of_a_loop_is_stated_or_found_or_told_to_be_unknown():
    def times(text: str) -> tuple[int, int]:
        program = Program(text)
        (found,) = (one.times for one in instruction_costs(program) if one.name == "dot.1")
        return found, program.loops_of_unknown_length

    stated = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert times(PROGRAM.replace('"n":"5"', '"n":"7"')) == (7, 0)
    assert times(PROGRAM.replace(stated, "")) == (5, 0)
    assert times(PROGRAM.replace(stated, "").replace("direction=LT", "direction=NE")) == (1, 1)


def test_groups_of_devices_as_compilers_write_them():
    def group(text: str) -> tuple[int, ...]:
        found = collectives(Program(PROGRAM.replace("[2,4]<=[4,2]T(1,0)", text)), 8)
        return found[0].group

    assert group("[2,4]<=[8]") == (0, 1, 2, 3)
    assert group("{{1,5},{0,4}}") == (1, 5)
    assert group("mesh['a'=2,'b'=2,'c'=2] {'a','c'}") == (0, 1, 4, 5)
    assert group("mesh['a'=8] {'a':(2)2}") == (0, 2)


def test_one_exchange_that_goes_on_in_several_fusions_counts_once():
    chained = PROGRAM.replace("to_apply=%add", 'frontend_attributes={chain_id="1"}').replace(
        "  ROOT %scatter =",
        "  %before = bf16[1,128]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1\n"
        "  ROOT %scatter =",
    )
    kinds = [(one.kind, one.is_async) for one in collectives(Program(chained), 8)]
    assert kinds == [
        ("all-gather", True), ("collective-permute", False), ("reduce-scatter", True)
    ]  # fmt: skip


def test_windows_of_a_matrix_product_count_without_their_padding():
    # 32 heads are a window that slides over the kernel: 1 of 32 places has an element each time.
    text = PROGRAM.replace(
        "%conv = f32[8,8]{1,0} convolution(%p, %p), dim_labels=bf_oi->bf",
        "%left = bf16[8,16,64,1]{2,1,3,0} constant({...})\n"
        "  %kernel = bf16[32,128,64,1]{1,2,0,3} constant({...})\n"
        "  %conv = bf16[8,16,32,128]{1,3,2,0} convolution(%left, %kernel), window={size=1x32 "
        "pad=0_0x31_31 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
    )
    (conv,) = (one for one in instruction_costs(Program(text)) if one.name == "conv")
    assert conv.flops == 2 * 8 * 16 * 64 * 32 * 128


# Links and time ---------------------------------------------------------------------------------

TORUS = [(x, y, 0) for x in range(4) for y in range(8)]  # device 8x + y


@pytest.mark.parametrize(
    ("kind", "group", "wanted"),
    [
        # 100 bytes use links of 10 bytes per second, two links if the axis is a ring.
        ("all-gather", (0, 8, 16, 24), 100 / 20),
        ("all-gather", (0, 8), 100 / 10),
        ("all-gather", tuple(range(32)), 100 / 40),
        # Every second device is in the group; another group shares the links.
        ("all-gather", (0, 2, 4, 6), 100 / 5),
        ("all-to-all", tuple(range(8)), 2 * 100 / 20),
        ("collective-permute", (0, 1), 100 / 10),
    ],
)
def test_an_exchange_uses_the_links_of_its_axes(kind, group, wanted):
    one = Collective(kind=kind, group=group, sent=100.0, times=1, is_async=False)
    np.testing.assert_allclose(seconds(one, CHIP, TORUS), wanted)


def test_the_roofline_takes_the_longer_of_each_and_hides_what_is_asynchronous():
    works = [InstructionCost("a", 2e3, 100.0, 3), InstructionCost("b", 1.0, 500.0, 1)]
    row = (0, 8, 16, 24)
    gather = Collective(kind="all-gather", group=row, sent=300.0, times=1, is_async=True)
    scatter = Collective(kind="reduce-scatter", group=row, sent=20.0, times=2, is_async=False)
    found = roofline(works, [gather, scatter], CHIP, TORUS)
    assert (found.compute, found.memory, found.hidden, found.exposed) == (6.0, 5.0, 15.0, 2.0)
    assert found.step == 17.0 and found.waiting == 6.0
    assert found.bottleneck == "interconnect" or found.compute == found.waiting
    assert roofline(works, [], CHIP, TORUS).bottleneck == "compute"


# The compiler of this machine -------------------------------------------------------------------


def experiment(
    architecture: Any = "decoder_only", width: int = 16, **changes: Any
) -> tuple[Any, ...]:
    objective = {
        "decoder_only": "causal_lm", "encoder_only": "masked_lm", "encoder_decoder": "translation"
    }[architecture]  # fmt: skip
    model = tiny(architecture, width=width, attention_heads=4, attention_kv_heads=2, **changes)
    data = DataConfig(objective=objective, batch_tokens=8 * 16, batch_multiple=8, max_length=16)
    return model, data, TrainConfig(mesh=MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.slow
def test_a_plan_for_this_machine():
    found = make_plan(
        *experiment("encoder_decoder", vocab_size=12, feed_forward_width=14), jax.devices()
    )
    memory = found.compiled.memory
    known = memory.parameters + memory.moments + memory.batch
    assert memory.fits and memory.temporaries > 0
    # The 4 bytes are the step counter.
    np.testing.assert_allclose(memory.arguments, known + 4, atol=64)
    assert {one.kind for one in found.exchanges} >= {"all-gather", "all-reduce"}
    # The program has each product of the model, and also scores that the causal mask discards.
    assert 1 <= found.flops / found.model_flops < 1.6
    assert found.roofline is None  # There are no figures for CPUs.


@pytest.mark.slow
def test_what_is_computed_again_is_arithmetic_in_place_of_memory():
    def planned(**changes: Any):
        model, data, train = experiment(width=64, feed_forward_width=256, layers=4, **changes)
        train = TrainConfig(mesh=MeshConfig())
        found = make_plan(model, data, train, jax.devices()[:1])
        return found.flops, found.compiled.memory.temporaries

    size = 4 * 8 * 16 * 256
    flops, memory = planned()
    more_flops, less_memory = planned(remat="full")
    # Each layer saves at least the inner activations of its feed-forward layer.
    assert more_flops > 1.2 * flops and less_memory < memory - 4 * size
    assert planned(remat="full", unroll=4)[0] > 1.2 * flops


def test_shapes_of_batches():
    of = lambda **values: largest_batch(DataConfig(**values))  # noqa: E731
    assert of(objective="translation", batch_tokens=2048, max_length=64) == (32, (64, 64))
    assert of(objective="causal_lm", batch_tokens=2048, max_length=64) == (32, (64,))
    spans = of(objective="span_corruption", batch_tokens=8192, max_length=512, batch_multiple=4)
    assert spans.rows == 16 and spans.lengths[0] <= 512 and spans.lengths[1] < 200


def test_a_mesh_that_does_not_fit_the_chips_or_the_batch():
    model, data, _ = experiment()
    with pytest.raises(TrainError, match=r"fsdp 3 .* but there are 8"):
        compile_step(model, data, TrainConfig(mesh=MeshConfig(fsdp=3)), jax.devices())
    data = DataConfig(objective="causal_lm", batch_tokens=4 * 16, batch_multiple=4, max_length=16)
    with pytest.raises(TrainError, match=r"set data\.batch_multiple to 8"):
        compile_step(model, data, TrainConfig(), jax.devices())


@pytest.mark.parametrize("topology", ["v5e", "v5e:4x4x4", "v9:2x2", "16x16", "v5p:4x"])
def test_unknown_topologies_are_refused_with_those_that_exist(topology):
    with pytest.raises(TrainError, match=r"unknown topology; .* v5e:2x2"):
        devices_of(topology)


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("heedful.train.plan.topology.find_spec", lambda name: None)
    with pytest.raises(TrainError, match=r"libtpu.*\[plan\]"):
        devices_of("v5e:4x4")


@pytest.mark.slow
def test_the_command_line_plans_for_this_machine(capsys):
    arguments = ["--data.batch-tokens", "512", "--model.layers", "1"]
    assert cli.run(["plan", "translate_tiny", *arguments]) == 0
    out = capsys.readouterr().out
    for words in ("parameters", "optimizer state", "capacity", "exchanges", "FLOPs", "fits"):
        assert words in out


# Too much ---------------------------------------------------------------------------------------


def test_an_out_of_memory_prints_the_table_and_three_ways_out(capsys):
    model, data, train = experiment(vocab_size=12, feed_forward_width=14)
    run = SimpleNamespace(model=model, data=data, train=train)
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.\nx")
    with (
        pytest.raises(TrainError, match=r"out of memory \(.*allocating 3 bytes\.\): give"),
        explained(run, jax.devices(), Console(markup=False)),
    ):
        raise error
    out = capsys.readouterr().out
    assert "optimizer state" in out and "2 x 16" not in out
    assert out.split("cheapest first:")[1].count("--") == 3
    with (
        pytest.raises(jax.errors.JaxRuntimeError),
        explained(run, jax.devices(), Console(markup=False)),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.slow
def test_ways_out_are_what_is_left_to_do():
    def flags(**changes):
        sizes = {"vocab_size": 12, "feed_forward_width": 14} | changes
        model, data, train = experiment(**sizes)
        compiled = compile_step(model, data, train, jax.devices())
        return " ".join(way.flags for way in memory_advice(model, data, train, compiled))

    assert "--train.accumulate 2" in flags()
    assert "--train.mesh.fsdp 4" in flags(feed_forward_width=14 * 64)
    assert "--model.remat" not in flags(remat="full", attention_core="flash")

    model, data, train = experiment(vocab_size=12, feed_forward_width=14)
    train = dataclasses.replace(train, mesh=MeshConfig(seq=2))  # flash does not support seq > 1.
    ways = memory_advice(model, data, train, compile_step(model, data, train, jax.devices()))
    assert ways[0].flags == "--model.attention.core ring"


def test_layouts_are_guessed_in_order_and_all_divide(unchecked):
    model, data, train = experiment(vocab_size=12, feed_forward_width=14)
    found = candidates(model, data, train, 8, CHIP)
    meshes = {tuple(vars(one.train.mesh).values()) for one in found}
    assert (2, 2, 1, 2) in meshes and all(np.prod(mesh) == 8 for mesh in meshes)
    assert all(mesh[3] <= 2 for mesh in meshes)  # There are two heads of keys and values.
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    tight = Chip(**{**vars(CHIP), "memory": sorted(one.memory for one in found)[3]})
    assert [one.memory <= tight.memory for one in candidates(model, data, train, 8, tight)][:5] == [
        True, True, True, True, False
    ]  # fmt: skip


# The TPU's compiler, without a TPU --------------------------------------------------------------


@needs_libtpu
@pytest.mark.parametrize(
    ("core", "mesh"), [("splash", {"fsdp": 2, "tensor": 2}), ("ring", {"seq": 4})]
)
def test_a_plan_for_tpus_that_are_not_there(core, mesh):
    sizes = {"width": 256, "vocab_size": 640, "feed_forward_width": 384}
    model, data, _ = experiment(**sizes, dtype="bfloat16", attention_core=core)
    data = DataConfig(objective="causal_lm", batch_tokens=8 * 512, batch_multiple=8, max_length=512)
    devices = devices_of("v5e:2x2")
    chip = chip_of(devices[0])
    assert chip is not None and chip.name == "v5e"
    found = make_plan(model, data, TrainConfig(mesh=MeshConfig(**mesh)), devices)
    memory = found.compiled.memory
    assert memory.fits and found.roofline is not None and found.exchanges
    known = memory.parameters + memory.moments + memory.batch
    np.testing.assert_allclose(known, memory.arguments, rtol=0.02)
    assert 0 < found.utilisation(chip) < 1
    assert found.unknown_loops == 0
    assert ("tpu_custom_call" in str(found.compiled.text)) == (core == "splash")


@needs_libtpu
def test_what_a_tpu_cannot_hold_is_told(capsys, unchecked):
    arguments = ["--topology", "v5e:2x2", "--data.batch-tokens", str(2**21)]
    assert cli.run(["plan", "gpt2_small", *arguments]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "missing" in out and "--model.remat full" in out
