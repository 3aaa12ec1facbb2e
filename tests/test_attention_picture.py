"""Test pictures of attention: the weights against a plain computation, axis labels and errors."""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tiny import HEADS, LAYERS, random_params, tiny

from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.tokenizer import Tokenizer
from heedful.model.transformer import build
from heedful.train.cli.arguments import AttentionArguments
from heedful.train.cli.flags import parse
from heedful.train.config import DecodeConfig, MeshConfig, TrainConfig
from heedful.train.errors import TrainError
from heedful.train.inference.translate import Translator
from heedful.train.inspection import attention_picture as module
from heedful.train.inspection.attention_picture import (
    MAX_TOKENS,
    _origin,
    attention_picture,
    draw,
    model_inputs,
)
from heedful.train.inspection.attention_weights import (
    _intermediates,
    attention_masks,
    attention_weights,
)
from heedful.train.inspection.token_labels import drawable, pieces
from heedful.train.load import Trained
from heedful.train.run import Run
from heedful.train.sharding import make_mesh

WORDS = "red green blue small large cat dog bird"


def trained(
    folder: Path, architecture: str, objective: str, steps: tuple = (3, 5), **changes
) -> Trained:
    """Return a run with random parameters and a vocabulary of words."""
    source = "homeassistant" if objective == "translation" else "shakespeare"
    data = DataConfig(source=source, objective=objective, tokenizer=TokenizerConfig(kind="words"))
    tokenizer = Tokenizer.train([WORDS], data.tokenizer, objective)
    model = tiny(architecture, vocab_size=tokenizer.vocab_size, **changes)
    tokens = [jnp.zeros((1, 1), jnp.int32)] * (2 if architecture == "encoder_decoder" else 1)
    train = TrainConfig(decode=DecodeConfig(beam=1, extra_length=3))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params = random_params(build(model), *tokens)
    return Trained(Run(folder, model, data, train), tokenizer, mesh, params, list(steps))


@pytest.fixture
def figures(monkeypatch) -> list:
    """Record the drawn figures, so that a test can read their axes and arrays."""
    kept = []

    def keep(*args):
        kept.append(draw(*args))
        return kept[-1]

    monkeypatch.setattr(module, "draw", keep)
    return kept


def picture(run: Trained, text: str, **options) -> Path:
    return attention_picture(run, text, Console(markup=False, file=io.StringIO()), **options)


# Numbers ----------------------------------------------------------------------------------------


def linear(p: dict, x: np.ndarray) -> np.ndarray:
    return np.tensordot(x, p["kernel"], 1) + p["bias"]


def by_hand(p: dict, x: np.ndarray, context: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Compute weights [N, T, S] one query of one head at a time, over the allowed keys."""
    q, k = linear(p["query"], x), linear(p["key"], context)
    weights = np.zeros((q.shape[1], len(x), len(context)))
    for head, t in np.ndindex(weights.shape[:2]):
        may = np.flatnonzero(allowed[t])
        scores = k[may, head * k.shape[1] // q.shape[1]] @ q[t, head] / np.sqrt(q.shape[2])
        weights[head, t, may] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return weights


def after_attention(p: dict, x: np.ndarray, weights: np.ndarray, name: str) -> np.ndarray:
    """Return x after self-attention `name`, the residual connection and the post-norm."""
    v = np.repeat(linear(p[name]["value"], x), 2, axis=1)
    mixed = np.einsum("nts,snh->tnh", weights, v)
    y = x + np.tensordot(mixed, p[name]["out"]["kernel"], 2) + p[name]["out"]["bias"]
    norm = p[f"{name}_norm"]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    return y * norm["scale"] + norm["bias"]


def drawn_numbers(figure) -> list[np.ma.MaskedArray]:
    return [panel.images[0].get_array() for panel in figure.axes if panel.get_title()]


@pytest.mark.parametrize("which", ["encoder", "self", "cross"])
def test_the_drawn_numbers_are_the_softmax_of_the_scores(tmp_path, figures, which: str):
    """The test compares the weights of layer 2, whose input is the output of layer 1."""
    run = trained(tmp_path, "encoder_decoder", "translation")
    text, target = "red cat dog", "blue large bird red green"
    sown = _intermediates(run.run.model, run.params, dict(model_inputs(run, text, target)))
    hidden = {
        stack: np.float64(sown[stack]["blocks"]["hidden"][0][:, 0])
        for stack in ("encoder", "decoder")
    }
    stack = "encoder" if which == "encoder" else "decoder"
    p = jax.tree.map(lambda x: np.float64(x[1]), run.params[stack]["blocks"])
    x, full = hidden[stack][0], np.ones((6, 4), bool)
    past = full[:4, :4] if which == "encoder" else np.tri(6, dtype=bool)
    wanted = by_hand(p["self_attention"], x, x, past)
    if which == "cross":
        query = after_attention(p, x, wanted, "self_attention")
        wanted = by_hand(p["cross_attention"], query, hidden["encoder"][-1], full)
    picture(run, text, target=target, which=which)
    ((figure, _),) = figures
    numbers = drawn_numbers(figure)
    assert len(numbers) == HEADS
    np.testing.assert_allclose(np.ma.filled(numbers, 0.0), wanted, atol=1e-5)
    limits = {panel.images[0].get_clim() for panel in figure.axes if panel.get_title()}
    assert limits == {(0, np.max(numbers))}


def test_what_may_not_be_looked_at_is_masked_and_not_small(tmp_path, figures):
    run = trained(tmp_path, "decoder_only", "causal_lm")
    picture(run, "red cat dog bird")
    ((figure, _),) = figures
    hidden = ~np.tri(5, dtype=bool)
    assert all((np.ma.getmaskarray(array) == hidden).all() for array in drawn_numbers(figure))
    panels = [panel for panel in figure.axes if panel.get_title()]
    assert all(panel.patch.get_hatch() and panel.patch.get_facecolor()[0] > 0.8 for panel in panels)
    assert "masked" in figure.legends[0].get_texts()[0].get_text()


def test_the_mean_is_over_the_heads(tmp_path, figures):
    run = trained(tmp_path, "encoder_only", "masked_lm")
    picture(run, "red cat dog", mean=True, layer=1)
    picture(run, "red cat dog", layer=1)
    (mean, _), (each, _) = figures
    (array,), arrays = drawn_numbers(mean), drawn_numbers(each)
    np.testing.assert_allclose(array, np.mean(arrays, 0), atol=1e-6)
    np.testing.assert_allclose(array.sum(-1), 1, atol=1e-5)
    assert not mean.legends and f"mean of {HEADS} heads" in mean.axes[0].get_title()


def test_layers_are_told_apart(tmp_path):
    run = trained(tmp_path, "decoder_only", "causal_lm")
    weights = attention_weights(run.run.model, run.params, model_inputs(run, "red cat", None))
    assert weights.keys() == {"self"} and weights["self"].shape == (LAYERS, 1, HEADS, 3, 3)
    assert not np.allclose(weights["self"][0], weights["self"][1])


# Pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "mean"), [(1, False), (5, False), (12, True)])
def test_a_png_has_a_panel_for_each_head(tmp_path, figures, heads: int, mean: bool):
    sizes = {"width": 120, "attention_heads": heads, "attention_kv_heads": heads}
    run = trained(tmp_path, "decoder_only", "causal_lm", **sizes)
    path = picture(run, "red cat", mean=mean)
    ((figure, notes),) = figures
    panels = [panel for panel in figure.axes if panel.get_title()]
    assert len(panels) == (1 if mean else heads) and len(figure.axes) == len(panels) + 1
    assert notes == []
    with Image.open(path) as image:
        assert image.format == "PNG" and image.info["Software"] == "heedful"
        assert image.size == tuple(np.floor(figure.get_size_inches() * figure.dpi).astype(int))


def test_axes_and_title_say_what_is_shown(tmp_path, figures):
    run = trained(tmp_path / "mine", "encoder_decoder", "translation", steps=(1000, 1500))
    path = picture(run, "red cat", target="dog bird blue", layer=1)
    assert path.parent == tmp_path / "mine" and path.exists()
    assert path.name.startswith("attention.cross.layer1.red-cat.")
    ((figure, _),) = figures
    for panel in figure.axes[:HEADS]:
        assert [x.get_text() for x in panel.get_xticklabels()] == ["red", "cat", "<eos>"]
        shown = [y.get_text() for y in panel.get_yticklabels()]
        assert shown == ["<bos>", "dog", "bird", "blue"]
    title = figure.get_suptitle()
    for part in (
        "“red cat” → “dog bird blue”",
        "mine",
        "cross-attention",
        f"layer 1 of {LAYERS}",
        "1,000 to 1,500",
    ):
        assert part in title


def test_each_text_has_a_file_of_its_own(tmp_path):
    run = trained(tmp_path / "mine", "encoder_only", "masked_lm")
    texts = ["red", "red cat", "red / cat", "中"]
    assert len({picture(run, text, mean=True) for text in texts}) == len(texts)
    assert picture(run, "red", mean=True) in set((tmp_path / "mine").iterdir())


def test_the_origin_of_the_parameters_is_one_checkpoint_or_the_range_of_several():
    assert _origin([7000]) == "checkpoint of step 7,000"
    assert _origin([3, 5, 11]) == "mean of 3 checkpoints, steps 3 to 11"


def test_the_target_is_the_models_own_output_unless_it_is_given(tmp_path, monkeypatch):
    run = trained(tmp_path, "encoder_decoder", "translation")
    translator = Translator(
        run.run.model, run.run.train.decode, run.tokenizer, run.params, run.mesh
    )
    (written,) = translator(["red cat dog"])
    monkeypatch.setattr(module, "Translator", lambda *_: translator)  # already compiled
    tokens, _ = read(run, "red cat dog")
    assert tokens[0] == "<bos>"
    assert " ".join(x for x in tokens[1:] if x not in ("<bos>", "<pad>")) == written
    inputs = model_inputs(run, "red cat dog", None, needs_target=False)
    assert inputs["inputs"].shape == (1, 1)


def test_signs_of_formulas_are_drawn_as_they_stand(tmp_path, figures):
    labels = ["$\\frac$", "a_b^", "$x$"]  # The first label is not a formula that can be drawn.
    figure, _ = draw(
        np.full((1, 3, 3), 1 / 3, np.float32),
        np.ones((1, 3, 3), bool),
        labels,
        labels,
        "$t$",
        ["h"],
    )
    figure.savefig(tmp_path / "a.png")
    assert [x.get_text() for x in figure.axes[0].get_xticklabels()] == labels


@pytest.mark.parametrize("mean", [False, True])
def test_heads_of_another_dilation_are_drawn_with_their_own_mask(tmp_path, figures, mean: bool):
    steps = (1, 2, 1, 1, 1, 1)
    window = {"attention_window": 1, "attention_dilation": steps}
    run = trained(tmp_path, "encoder_only", "masked_lm", **window)
    picture(run, "red cat dog bird", mean=mean)
    ((figure, _),) = figures
    near, *others = (
        ~np.ma.getmaskarray(panel.images[0].get_array())
        for panel in figure.axes[: len(steps)]
        if panel.images
    )
    back = abs(np.subtract.outer(np.arange(6), np.arange(6)))
    np.testing.assert_array_equal(near, back <= (2 if mean else 1))
    if not mean:
        far = others[0]
        np.testing.assert_array_equal(far, (back == 0) | (back == 2))


# Inputs -----------------------------------------------------------------------------------------


def read(run: Trained, text: str, target: str | None = None) -> tuple[list[str], dict]:
    inputs = model_inputs(run, text, target)
    assert all(array.shape[0] == 1 for array in inputs.values())
    return pieces(run.tokenizer, np.asarray(inputs["inputs"][0])), dict(inputs)


def test_texts_are_framed_as_in_training(tmp_path):
    causal = trained(tmp_path, "decoder_only", "causal_lm")
    assert read(causal, "red cat")[0] == ["<bos>", "red", "cat"]
    masked = trained(tmp_path, "encoder_only", "masked_lm")
    assert read(masked, "red cat")[0] == ["<bos>", "red", "cat", "<eos>"]
    pair = trained(
        tmp_path,
        "encoder_only",
        "classification",
        head_kind="classifier",
        head_outputs=2,
        type_vocab_size=2,
    )
    tokens, inputs = read(pair, "red cat", "dog")
    assert tokens == ["<bos>", "red", "cat", "<eos>", "dog", "<eos>"]
    assert inputs["type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]
    assert attention_weights(pair.run.model, pair.params, inputs)["self"].shape[-1] == 6


def test_a_prefix_is_seen_by_all(tmp_path):
    run = trained(tmp_path, "decoder_only", "prefix_lm")
    tokens, inputs = read(run, "red cat", "dog bird")
    assert tokens == ["<bos>", "red", "cat", "dog", "bird"]
    allowed = np.asarray(attention_masks(run.run.model, inputs)["self"].to_bool(5, 5))[0, 0]
    assert (allowed == (np.tri(5) + (np.arange(5) < 3) > 0)).all()
    weights = attention_weights(run.run.model, run.params, inputs)["self"]
    assert (np.asarray(weights[0, 0, 0] > 0) == allowed).all()


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "layer = 3: give a layer from 1 to 2"),
        ({"layer": 0}, "layer = 0: give a layer from 1 to 2"),
        ({"which": "cross"}, "which = cross: the decoder_only of .* has only self"),
        ({"text": " \n"}, "the text is empty"),
        ({"text": "red " * MAX_TOKENS}, f"{MAX_TOKENS + 1} tokens, but .* only up to {MAX_TOKENS}"),
        ({"target": "red"}, "target: causal_lm of .* reads one text"),
        ({"output": Path("a.jpg")}, "--output a.jpg must end with .png"),
    ],
)
def test_mistakes_are_named(tmp_path, options: dict, message: str):
    run = trained(tmp_path, "decoder_only", "causal_lm")
    options = {"text": "red cat", **options}
    with pytest.raises(TrainError, match=message):
        picture(run, options.pop("text"), **options)
    assert not list(tmp_path.iterdir())


def test_an_empty_target_is_named(tmp_path):
    run = trained(tmp_path, "encoder_decoder", "translation")
    with pytest.raises(TrainError, match="the target is empty"):
        picture(run, "red", target="")
    with pytest.raises(TrainError, match=f"the target has {MAX_TOKENS + 1} tokens"):
        picture(run, "red", target="red " * (MAX_TOKENS + 1))


def test_a_file_of_the_user_is_kept_and_a_former_picture_replaced(tmp_path):
    run = trained(tmp_path, "encoder_only", "masked_lm")
    photo, notes = tmp_path / "photo.png", tmp_path / "notes.png"
    Image.new("RGB", (3, 5)).save(photo)
    notes.write_text("mine")
    for path in (photo, notes):
        before = path.read_bytes()
        with pytest.raises(TrainError, match="not a picture of heedful"):
            picture(run, "red", mean=True, output=path)
        assert path.read_bytes() == before
    path = picture(run, "red", mean=True, output=tmp_path / "new" / "a.png")
    before = path.read_bytes()
    picture(run, "red cat dog", mean=True, output=path)
    assert path.read_bytes() != before


def test_the_command_line():
    flags = ["--which", "self", "--layer", "2", "--mean", "--target", "a b", "--output", "x.png"]
    chosen = parse(AttentionArguments(), flags, "heedful attention run")
    assert (chosen.which, chosen.layer, chosen.mean) == ("self", 2, True)
    assert (chosen.target, chosen.output, chosen.checkpoint) == ("a b", Path("x.png"), None)


# Labels -----------------------------------------------------------------------------------------


def labels(kind: str, text: str, corpus: list[str], objective: str = "causal_lm") -> list[str]:
    config = TokenizerConfig(kind=kind, vocab_size=300)
    tokenizer = Tokenizer.train(corpus, config, objective)
    (ids,) = tokenizer.encode_batch([text])
    return pieces(tokenizer, np.append(tokenizer.bos, ids))


def test_pieces_are_readable_whatever_the_tokenizer():
    assert labels("bpe", "the the\n\tthé", ["the the the"] * 9) == [
        "<bos>", "the", "␣the", "↵", "⇥", "t", "h", "\\xc3", "\\xa9"
    ]  # fmt: skip
    assert labels("bpe", "łąka", ["łąka łąka"] * 9)[1:] == ["łąka"]
    assert labels("bytes", "a ∑", ["a"])[1:] == ["a", "␣", "\\xe2", "\\x88", "\\x91"]
    assert labels("chars", "b a\n", ["a b\n"])[1:] == ["b", "␣", "a", "↵"]
    assert labels("words", "a@@ b c", ["a@@ b"])[1:] == ["a@@", "b", "<unk>"]
    assert labels("wordpiece", "cdc", ["c d cc cd dc dd"])[1:] == ["cd", "##c"]


def test_an_id_beyond_the_vocabulary_is_a_number():
    tokenizer = Tokenizer.train([WORDS], TokenizerConfig(kind="words"), "causal_lm")
    assert pieces(tokenizer, [4, tokenizer.vocab_size + 7])[1] == f"#{tokenizer.vocab_size + 7}"


def test_characters_that_no_font_has_are_written_as_code_points():
    shown, families, notes = drawable(["мягких", "␣a\uf8f0", "\U0010fffe"])
    assert shown[0] == "мягких" and shown[1] == "␣a[F8F0]" and shown[2] == "[10FFFE]"
    assert families[0] == "DejaVu Sans" and len(notes) == 1 and "\uf8f0" in notes[0]
    assert drawable(["a"]) == (["a"], ["DejaVu Sans"], [])


def test_another_font_helps_out_where_the_first_has_no_glyph():
    from matplotlib import font_manager

    first = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    other = font_manager.get_font(font_manager.findfont("STIXGeneral")).get_charmap()
    character = chr(min(set(other) - set(first)))
    shown, families, notes = drawable(["a" + character])
    assert shown == ["a" + character] and len(families) == 2 and not notes


def test_a_picture_needs_no_display(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    monkeypatch.delenv("DISPLAY", raising=False)
    run = trained(tmp_path, "encoder_only", "masked_lm")
    assert picture(run, "red", mean=True).exists()
