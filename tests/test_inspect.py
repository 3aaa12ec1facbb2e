"""Test inspection: its numbers against real arrays, the compiler or arithmetic by hand."""

import dataclasses
import functools
import io
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiny import HEAD_DIM, HEADS, INNER, KV_HEADS, LAYERS, WIDTH, V, random_params, tiny

from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.errors import DataError
from heedful.model.config import LinformerConfig, ModelConfig, PerformerConfig
from heedful.model.transformer import build
from heedful.train.cli.arguments import InspectArguments
from heedful.train.cli.flags import parse
from heedful.train.config import MeshConfig, OptimizerConfig, TrainConfig
from heedful.train.errors import TrainError
from heedful.train.inspection.attention_weights import attention_masks, attention_weights
from heedful.train.inspection.costs import Memory, memory, parts
from heedful.train.inspection.inspect import (
    ROW,
    complete,
    example,
    inspect,
    layout,
    number,
)
from heedful.train.sharding import make_mesh
from heedful.train.state import parameter_count, set_up
from heedful.train.trainable import split

pytestmark = pytest.mark.usefixtures("unchecked")  # An AbstractMesh replaces a Mesh.

TRAIN = TrainConfig()
LM = DataConfig(source="shakespeare", objective="causal_lm", max_length=13, batch_tokens=26)
TRANSLATION = DataConfig(max_length=13, batch_tokens=26, batch_multiple=1)
MODELS = {
    "encoder_decoder": tiny("encoder_decoder", encoder_layers=3),
    "decoder_only": tiny("decoder_only"),
    "encoder_only": tiny(
        "encoder_only", type_vocab_size=2, norm_embeddings=True, positions_kind="learned"
    ),
    "untied": tiny("decoder_only", tie_embeddings=False, norm_position="pre"),
    "gated": tiny("decoder_only", feed_forward_gated=True, feed_forward_activation="silu"),
    "lora": tiny("decoder_only", lora_rank=3, lora_targets=("query", "up", "down")),
    "relative": tiny("encoder_decoder", positions_kind="relative", norm_kind="rmsnorm"),
    "bert head": tiny("encoder_only", head_transform=True, head_bias=True),
    "classifier": tiny("encoder_only", head_kind="classifier", head_outputs=5),
}


def tokens(config: ModelConfig, length: int = 1, rows: int = 1) -> list[jax.Array]:
    array = jnp.zeros((rows, length), jnp.int32)
    return [array] * (2 if config.architecture == "encoder_decoder" else 1)


@functools.cache
def abstract(config: ModelConfig):
    return set_up(config, TRAIN).abstract.params


def of(config: ModelConfig, length: int = 13) -> dict[tuple[str, str], tuple[int, float]]:
    """Return (parameters, FLOPs) by (stack, part)."""
    found = parts(config, abstract(config), length)
    assert len({(part.stack, part.name) for part in found}) == len(found)
    return {(part.stack, part.name): (part.parameters, part.flops) for part in found}


# Parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_add_up_to_the_real_parameters(name: str):
    config = MODELS[name]
    params = random_params(build(config), *tokens(config))
    found = parts(config, params, 13)
    assert sum(part.parameters for part in found) == parameter_count(params)
    assert "other" not in {part.name for part in found}


@pytest.mark.parametrize("gated", [False, True])
def test_each_part_has_the_parameters_of_its_layers(gated: bool):
    config = tiny("decoder_only", tie_embeddings=False, feed_forward_gated=gated, norm_bias=False)
    found = {key: count for key, (count, _) in of(config).items()}
    heads = HEADS + 2 * KV_HEADS
    matrices = 3 if gated else 2
    assert found == {
        ("input", "embeddings"): V * WIDTH,
        ("decoder", "self-attention"): LAYERS
        * (WIDTH * heads * HEAD_DIM + heads * HEAD_DIM + HEADS * HEAD_DIM * WIDTH + WIDTH),
        ("decoder", "self-attention scores"): 0,
        ("decoder", "feed-forward"): LAYERS
        * (matrices * WIDTH * INNER + (matrices - 1) * INNER + WIDTH),
        ("decoder", "norms"): LAYERS * 2 * WIDTH,
        ("output", "head"): V * WIDTH,
    }


def test_parts_that_only_some_models_have_stand_in_their_place():
    assert of(MODELS["relative"])["encoder", "positions"][0] == 32 * HEADS
    assert of(MODELS["encoder_only"])["input", "positions"][0] == 512 * WIDTH
    assert of(MODELS["encoder_only"])["input", "norms"][0] == 2 * WIDTH
    assert of(MODELS["encoder_only"])["input", "embeddings"][0] == (V + 2) * WIDTH
    inner = HEADS * HEAD_DIM
    assert of(MODELS["lora"])["decoder", "low-rank updates"][0] == LAYERS * 3 * (
        WIDTH + inner + 2 * (WIDTH + INNER)
    )
    transform = WIDTH * WIDTH + WIDTH + 2 * WIDTH
    assert of(MODELS["bert head"])["output", "head"][0] == transform + V
    assert of(MODELS["classifier"])["output", "head"][0] == (WIDTH + 1) * WIDTH + (WIDTH + 1) * 5


# FLOPs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "decoder_only", "feed_forward_gated": True, "lora_rank": 16},
        {"architecture": "encoder_decoder", "tie_embeddings": False, "encoder_layers": 1},
        {"architecture": "encoder_only", "head_kind": "classifier", "head_outputs": 2},
    ],
    ids=lambda changes: changes["architecture"] + changes.get("head_kind", ""),
)
def test_the_compiler_counts_as_many_flops(changes: dict):
    # The width makes matrix products nearly all of the FLOPs. The compiler counts a loop once, so
    # that the loop over layers is unrolled.
    sizes = {"width": 192, "attention_heads": 3, "attention_kv_heads": 1, "layers": 2, "unroll": 2}
    config = tiny(**sizes, **changes, feed_forward_width=640, vocab_size=499)
    length, rows = 64, 2
    inputs = tokens(config, length, rows)
    shapes = jax.eval_shape(build(config).init, jax.random.key(0), *inputs)
    compiled = jax.jit(build(config).apply).lower(shapes, *inputs).compile()
    counted = compiled.cost_analysis()["flops"]
    ours = sum(flops for _, flops in of(config, length).values()) * rows * length
    assert ours == pytest.approx(counted, rel=0.03)


def test_flops_of_each_part_are_twice_its_multiply_adds():
    found = {key: flops for key, (_, flops) in of(MODELS["encoder_decoder"], length=7).items()}
    projections = 2 * WIDTH * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
    assert found["input", "embeddings"] == 0
    assert found["encoder", "self-attention"] == 3 * projections
    assert found["decoder", "cross-attention"] == LAYERS * projections
    assert found["encoder", "self-attention scores"] == 3 * 2 * (2 * 7 * HEADS * HEAD_DIM)
    assert found["decoder", "cross-attention scores"] == LAYERS * 2 * (2 * 7 * HEADS * HEAD_DIM)
    assert found["decoder", "feed-forward"] == LAYERS * 2 * 2 * WIDTH * INNER
    assert found["decoder", "norms"] == 0
    assert found["output", "head"] == 2 * WIDTH * V  # A tied head has no parameters, but a product.


# Memory -----------------------------------------------------------------------------------------


def on_a_device(tree) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def measured(config: ModelConfig, train: TrainConfig, data: DataConfig = LM) -> Memory:
    return memory(config, data, train, set_up(config, train, layout(train.mesh)))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_memory_is_that_of_the_real_arrays_on_a_real_mesh(lora_rank: int):
    mesh = MeshConfig(data=1, fsdp=2, tensor=3)
    config = tiny("decoder_only", vocab_size=12, feed_forward_width=15, lora_rank=lora_rank)
    train = TrainConfig(mesh=mesh)
    setup = set_up(config, train, make_mesh(mesh, jax.devices()[:6]))
    params = jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), setup.abstract.params
    )
    opt_state = setup.optimizer.init(split(params, setup.factors)[0])
    found = measured(config, train)
    assert found.parameters == on_a_device(params) < parameter_count(params) * 4
    assert found.moments == on_a_device(opt_state)
    counters = 4 * sum(x.ndim == 0 for x in jax.tree.leaves(opt_state))
    assert found.moments == 2 * found.gradients + counters
    assert (found.gradients < found.parameters) == bool(lora_rank)
    assert found.cache == 2 * LAYERS * (KV_HEADS // 3) * HEAD_DIM * 4


def test_the_cache_has_the_key_and_value_heads_of_all_layers_in_the_compute_type():
    assert measured(MODELS["decoder_only"], TRAIN).cache == 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
    half = dataclasses.replace(MODELS["encoder_decoder"], dtype="bfloat16")
    found = measured(half, TRAIN)
    assert found.cache == found.source_cache == 2 * LAYERS * KV_HEADS * HEAD_DIM * 2
    assert measured(MODELS["encoder_only"], TRAIN).cache == 0


def test_outputs_are_those_of_a_micro_batch_in_float32():
    wide = tiny("decoder_only", vocab_size=12, feed_forward_width=15)
    assert measured(wide, TRAIN).outputs == 26 * 12 * 4
    split = TrainConfig(accumulate=2, mesh=MeshConfig(tensor=3, fsdp=2))
    assert measured(wide, split).outputs == 26 * 12 * 4 // 12
    assert measured(MODELS["classifier"], TRAIN).outputs == 2 * 5 * 4


def test_a_mesh_that_does_not_divide_names_the_parameter():
    with pytest.raises(TrainError, match=r"feed_forward.* dimension 'mlp' of 13"):
        measured(MODELS["decoder_only"], TrainConfig(mesh=MeshConfig(tensor=3)))


def test_a_mesh_may_be_larger_than_this_machine():
    mesh = MeshConfig(data=64, fsdp=12)
    found = measured(MODELS["decoder_only"], TrainConfig(mesh=mesh))
    whole = measured(MODELS["decoder_only"], TRAIN)
    assert whole.parameters / 12 <= found.parameters < whole.parameters


# Sizes that the data decides --------------------------------------------------------------------


def test_what_is_not_known_yet_is_assumed_and_said(tmp_path):
    config = tiny("encoder_only", vocab_size=None, head_kind="classifier", head_outputs=None)
    data = DataConfig(objective="classification", tokenizer=TokenizerConfig(vocab_size=499))
    made, notes = complete(config, data)
    assert (made.vocab_size, made.head.outputs) == (499, 2)
    assert (
        "vocabulary of 499 entries assumed" in notes[0]
        and "data.classes" in notes[1]
        and len(notes) == 2
    )
    known = dataclasses.replace(data, classes=("a", "b", "c"))
    assert complete(dataclasses.replace(config, vocab_size=7), known)[0].head.outputs == 3
    assert complete(made, known) == (made, [])
    assert complete(config, DataConfig(objective="regression"))[0].head.outputs == 1


def test_a_model_that_another_run_will_replace_is_not_shown_without_a_word():
    train = TrainConfig(init_from="package:minilm")
    assert "package:minilm" in printed(tiny("decoder_only", vocab_size=None), LM, train)
    assert "package:minilm" not in printed(tiny("decoder_only"), LM, train)


def test_a_vocabulary_that_exists_is_counted(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\nc\n")
    data = DataConfig(tokenizer=TokenizerConfig(kind="wordpiece", path=str(path)))
    model, notes = complete(tiny("encoder_only", vocab_size=None), data)
    assert model.vocab_size == 7 and not notes
    missing = DataConfig(tokenizer=TokenizerConfig(path=str(tmp_path / "none.json")))
    with pytest.raises(DataError, match="none"):
        complete(tiny("encoder_only", vocab_size=None), missing)


# Output -----------------------------------------------------------------------------------------


def printed(
    model: ModelConfig, data: DataConfig, train: TrainConfig = TRAIN, width: int = 120, **how
) -> str:
    out = io.StringIO()
    inspect(
        "mine",
        model,
        data,
        train,
        Console(markup=False, file=out, width=width, soft_wrap=True),
        **how,
    )
    return out.getvalue()


def test_the_table_shows_counts_shares_and_totals():
    text = printed(MODELS["encoder_decoder"], TRANSLATION)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 6]
    total = next(row for row in rows if row[0] == "total")
    params = random_params(build(MODELS["encoder_decoder"]), *tokens(MODELS["encoder_decoder"]))
    assert total[2] == f"{parameter_count(params):,}" and total[3] == "100.0%"
    both = next(i for i, row in enumerate(rows) if row[0] == "both stacks")
    forward = next(row for row in rows[both:] if row[1] == "feed-forward")
    count = (LAYERS + 3) * (2 * WIDTH * INNER + INNER + WIDTH)
    assert forward[2:4] == [f"{count:,}", f"{count / parameter_count(params):.1%}"]
    assert "arXiv:2001.08361" in text and "3 x forward" in text and "13 tokens" in text


def test_names_are_those_that_patterns_are_searched_in():
    train = TrainConfig(optimizer=OptimizerConfig(freeze=(r"blocks\.0\.", "embedding")))
    text = printed(MODELS["decoder_only"], LM, train, names=True)
    row = next(line for line in text.splitlines() if "embedding.table" in line)
    assert "11 x 12" in row and "132" in row and "frozen" in row
    row = next(line for line in text.splitlines() if "decoder.blocks.*.feed_forward.up.k" in line)
    assert "2 x 12 x 13" in row and "0 ... 1" in row
    assert "frozen parameters need no gradient" in text
    assert "decoder.blocks" not in printed(MODELS["decoder_only"], LM)


def test_a_huge_model_is_inspected_without_allocating_it():
    wide = {"attention_heads": 32, "attention_kv_heads": 8, "feed_forward_width": 11008}
    config = tiny("decoder_only", **wide, width=4096, layers=32, vocab_size=32_000)
    before = sum(x.nbytes for x in jax.live_arrays())
    started = time.perf_counter()
    text = printed(config, LM, TrainConfig(mesh=MeshConfig(fsdp=32, tensor=8)))
    assert time.perf_counter() - started < 20
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 1e6
    assert f"{32 * (2 * 4096 * 11008 + 11008 + 4096):,}" in text


def test_the_length_can_be_chosen_and_must_be_one():
    assert "rows of 29 tokens" in printed(MODELS["decoder_only"], LM, length=29)
    with pytest.raises(TrainError, match="--length 0: give a positive number"):
        printed(MODELS["decoder_only"], LM, length=0)


def test_numbers_have_three_digits_and_a_unit():
    assert [number(x) for x in (0, 7, 999, 1000, 12_345, 999_600, 6.02e23)] == [
        "0 ", "7 ", "999 ", "1.00 k", "12.3 k", "1.00 M", "602 Z"
    ]  # fmt: skip
    assert [number(x, 1024) for x in (512, 1024, 1536 * 1024)] == ["512 ", "1.00 Ki", "1.50 Mi"]


def test_the_command_line_reaches_the_three_configs():
    default = InspectArguments(model=MODELS["decoder_only"], data=LM, train=TRAIN)
    flags = ["--model.layers", "3", "--train.mesh.fsdp", "2", "--length", "7", "--names"]
    chosen = parse(default, flags, "heedful inspect mine")
    assert chosen.model == dataclasses.replace(MODELS["decoder_only"], layers=3)
    assert (chosen.train.mesh.fsdp, chosen.length, chosen.names) == (2, 7, True)


# Masks ------------------------------------------------------------------------------------------


def drawn(model: ModelConfig, data: DataConfig) -> list[np.ndarray]:
    """Parse the printed masks into arrays, from top to bottom."""
    lines = printed(model, data, width=60).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("masks of a row"))
    rows = [line for line in lines[start + 2 :] if line.strip("█· \n") == "" and line.strip()]
    assert len(rows) % ROW == 0 and all(len(row.strip()) == 2 * ROW for row in rows)
    cells = np.array([[cell == "█" for cell in row.strip()[::2]] for row in rows])
    return list(cells.reshape(-1, ROW, ROW))


def test_a_packed_row_is_drawn_as_two_triangles():
    (mask,) = drawn(MODELS["decoder_only"], LM)
    wanted = np.zeros((ROW, ROW), bool)
    wanted[:8, :8], wanted[8:13, 8:13] = np.tri(8), np.tri(5)
    assert (mask == wanted).all()
    (mask,) = drawn(MODELS["encoder_only"], dataclasses.replace(LM, objective="masked_lm"))
    wanted[:8, :8], wanted[8:13, 8:13] = 1, 1
    assert (mask == wanted).all()


def test_heads_that_differ_are_drawn_together():
    steps = (1, 3, 1, 1, 1, 1)
    config = tiny("decoder_only", attention_window=1, attention_dilation=steps)
    (mask,) = drawn(config, dataclasses.replace(LM, packing=False))
    back = np.subtract.outer(np.arange(ROW), np.arange(ROW))
    wanted = np.isin(back, (0, 1, 3))
    wanted[13:], wanted[:, 13:] = False, False
    assert (mask == wanted).all()


def test_a_prefix_is_drawn_as_a_block():
    (mask,) = drawn(MODELS["decoder_only"], dataclasses.replace(LM, objective="prefix_lm"))
    wanted = np.zeros((ROW, ROW), bool)
    wanted[:13, :13] = np.tri(13) + (np.arange(13) < 6) > 0
    assert (mask == wanted).all()


def test_an_encoder_decoder_has_three_masks():
    encoder, own, cross = drawn(MODELS["encoder_decoder"], TRANSLATION)
    source, target = np.arange(ROW) < 13, np.arange(ROW) < 11
    assert (encoder == source[:, None] & source).all()
    assert (own == np.tri(ROW, dtype=bool) & target[:, None]).all()
    assert (cross == target[:, None] & source).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("decoder_only", LM),
        ("decoder_only", dataclasses.replace(LM, objective="prefix_lm")),
        ("encoder_only", dataclasses.replace(LM, objective="masked_lm")),
        ("encoder_decoder", TRANSLATION),
    ],
)
def test_the_drawn_masks_are_what_the_model_attends_to(name: str, data: DataConfig):
    """Allowed pairs have equal weights if all parameters are 0, and other pairs have weight 0."""
    config = MODELS[name]
    batch, _ = example(config, data)
    batch = {key: jnp.minimum(x, V - 1) for key, x in batch.items()}
    zeros = random_params(build(config), *tokens(config), scale=0.0)
    weights = attention_weights(config, zeros, batch)
    drawn = attention_masks(config, batch)
    assert weights.keys() == drawn.keys()
    for kind, mask in drawn.items():
        assert (np.asarray(weights[kind][-1, 0, -1] > 0) == mask.to_bool(ROW, ROW)[0, 0]).all()


def test_nothing_is_inspected_of_parameters_without_a_place():
    params = {"embedding": {"table": jax.ShapeDtypeStruct((V, WIDTH), jnp.float32)}}
    params["surprise"] = {"kernel": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    found = parts(MODELS["untied"], params, 7)
    assert [(part.stack, part.name, part.parameters) for part in found] == [
        ("input", "embeddings", V * WIDTH), ("input", "other", 15)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"attention_window": 2}, {"encoder": 5, "decoder": 3, "cross": 7}),
        (
            {
                "attention_core": "performer",
                "attention_performer": PerformerConfig(features=11),
            },
            {"encoder": 22, "decoder": 22, "cross": 22},
        ),
        (
            {
                "attention_core": "linformer",
                "attention_decoder_core": "dense",
                "attention_linformer": LinformerConfig(rank=3),
            },
            {"encoder": 6, "decoder": 7, "cross": 6},
        ),
    ],
)
def test_scores_cost_what_the_core_computes(changes, keys):
    config = tiny("encoder_decoder", **changes)
    found = {place: flops for place, (_, flops) in of(config, 7).items()}
    per_key = LAYERS * 2 * 2 * HEADS * HEAD_DIM
    assert found["encoder", "self-attention scores"] == keys["encoder"] * per_key
    assert found["decoder", "self-attention scores"] == keys["decoder"] * per_key
    assert found["decoder", "cross-attention scores"] == keys["cross"] * per_key


def test_the_cache_of_a_performer_has_one_size():
    config = tiny(
        "decoder_only",
        attention_core="performer",
        attention_performer=PerformerConfig(features=11),
    )
    numbers = KV_HEADS * (11 * HEAD_DIM + 11 + 11)
    assert memory(config, LM, TRAIN, set_up(config, TRAIN)).cache == LAYERS * numbers * 4
    assert "cache, for any number of tokens: sums of features" in printed(config, LM)
