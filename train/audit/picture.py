"""Draw the masks of an audit as text and as a PNG; colours mark leaks and blindness."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.columns import Columns
from rich.console import Group
from rich.text import Text

from heedful.data.writing import write_whole
from heedful.model import mask_picture
from heedful.train.audit import declared
from heedful.train.audit.audit import Audit

MAY_NOT_SEE, SOME, SEES, LEAK, BLIND = range(5)
MARKS = {
    MAY_NOT_SEE: mask_picture.MAY_NOT,
    SOME: mask_picture.SOME,
    SEES: mask_picture.MAY,
    LEAK: "!!",
    BLIND: "??",
}
COLOURS = {MAY_NOT_SEE: "0.93", SOME: "0.65", SEES: "0.3", LEAK: "#d62728", BLIND: "#1f77b4"}
MEANING = {
    MAY_NOT_SEE: "may not and does not see",
    SOME: "some heads see",
    SEES: "may and does see",
    LEAK: "leak: sees what it must not",
    BLIND: "blind: does not see what it may",
}
MAX_TEXT, MAX_LABELS = 32, 64
"""Largest lengths of rows that are drawn as text, and of rows with tokens on their axes."""
AXES = (
    "queries down, keys across; the number after a token is that of its document in the row,\n"
    "- is padding, and black lines are the borders of documents"
)
ROWS = 2
"""Number of rows that are drawn: a full row, and a row with padding."""
CELL, MIN_PANEL, FONT = 0.14, 2.2, 7
"""Size of a token on an axis and smallest size of a panel (inches), and size of labels (points)."""

States = Int[np.ndarray, "T S"]


def states(seen: declared.Pairs, may: declared.Pairs) -> Int[np.ndarray, "B T S"]:
    """Classify each pair of query and key, over all heads."""
    result = np.where(seen.all(1), SEES, np.where(seen.any(1), SOME, MAY_NOT_SEE))
    result = np.where((may & ~seen).any(1), BLIND, result)
    return np.where((seen & ~may).any(1), LEAK, result)


def panels(audit: Audit) -> list[tuple[str, str, Int[np.ndarray, "B T S"]]]:
    """Return (title, input of the keys, states of the pairs) of each mask, then of all layers."""
    subject = audit.subject
    result = []
    for attention, mask in audit.masks.items():
        keys = "inputs" if attention.kind == "self" else "encoder_inputs"
        pairs = states(mask, np.broadcast_to(subject.pairs[attention], mask.shape))
        result.append((f"mask of {subject.attentions[attention]}", keys, pairs))
    for key, may in declared.reaches(subject.model, subject.batch).items():
        through = f"{subject.where(*key)}: all layers"
        result.append((through, key[1], states(audit.dependence[key][:, None], may[:, None])))
    return result


def as_text(audit: Audit) -> Group:
    """Return the masks of the first rows in block characters, and the lengths of documents."""
    pictures = []
    for title, _, pairs in panels(audit)[: len(audit.masks)]:
        for row, states in enumerate(pairs[:ROWS]):
            lines = "\n".join("".join(MARKS[s] for s in line) for line in states.tolist())
            pictures.append(Text(f"{title}, row {row}\n{lines}\n", no_wrap=True))
    legend = "queries down, keys across: " + ", ".join(
        f"{MARKS[state]} {MEANING[state]}" for state in MARKS
    )
    rows = [f"row {row}: {_facts(audit.subject.batch, row)}" for row in range(ROWS)]
    return Group(Text("\n".join([legend, *rows]) + "\n"), Columns(pictures, padding=(0, 3)))


def _facts(batch: declared.Batch, row: int) -> str:
    """Describe the documents, the prefix and the padding of a row."""
    facts = []
    for side, name in (("encoder_", "source: "), ("", "target: ")):
        if f"{side}segment_ids" in batch:
            ids = batch[f"{side}segment_ids"][row]
            counts = [str(n) for n in np.bincount(ids)[1:]]
            noun = "documents" if len(counts) > 1 else "a document"
            text = f"{noun} of {', '.join(counts)} tokens, {(ids == 0).sum()} of padding"
            facts.append((name if "encoder_inputs" in batch else "") + text)
    if "prefix_len" in batch:
        facts.append(f"a prefix of {batch['prefix_len'][row]}")
    return "; ".join(facts)


def write_png(audit: Audit, title: str, path: Path, software: str) -> None:
    """Draw the masks of the first rows, and below them the dependences through all layers."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from heedful.train.inspection.token_labels import drawable

    batch = audit.subject.batch
    drawn = [
        (name, keys, row, pairs[row]) for name, keys, pairs in panels(audit) for row in range(ROWS)
    ]
    columns = ROWS * max(1, min(len(audit.masks), 3))
    lines = -(-len(drawn) // columns)
    T = max(x.shape[1] for name, x in batch.items() if name.endswith("inputs"))
    size = max(CELL * T, MIN_PANEL) + 0.9
    figure = Figure(figsize=(columns * size, lines * (size + 0.3) + 1.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    colours = ListedColormap(list(COLOURS.values()))
    for panel, cell in zip(axes.flat, [*drawn, *[None] * (axes.size - len(drawn))], strict=True):
        if cell is None:
            panel.remove()
            continue
        name, keys, row, pairs = cell
        panel.imshow(pairs, cmap=colours, vmin=0, vmax=len(COLOURS) - 1, interpolation="none")
        panel.set_title(f"{name}\nrow {row}", fontsize=FONT + 1)
        panel.xaxis.tick_top()
        panel.tick_params(length=2)
        pooled, source = len(pairs) == 1, name.startswith(("mask of encoder ", "encoder "))
        sides = ("encoder_inputs" if source else "inputs", keys)
        for side, axis in zip(sides, (panel.yaxis, panel.xaxis), strict=True):
            ids = batch[side.removesuffix("inputs") + "segment_ids"][row]
            labels = ["output"] if pooled and axis is panel.yaxis else _labels(audit, side, row)
            if len(labels) <= MAX_LABELS:
                texts, families, _ = drawable(labels)
                turn = 90 if axis is panel.xaxis else 0
                axis.set_ticks(range(len(texts)), texts, rotation=turn, fontsize=FONT - 1)
                for label in axis.get_ticklabels():
                    label.set(fontfamily=families, parse_math=False)
            draw = panel.axvline if axis is panel.xaxis else panel.axhline
            if not (pooled and axis is panel.yaxis):
                for border in np.flatnonzero(np.diff(ids)):
                    draw(border + 0.5, color="black", linewidth=0.6)
    patches = [Patch(facecolor=COLOURS[state], label=MEANING[state]) for state in MEANING]
    figure.suptitle(f"{title}\n{AXES}", fontsize=FONT + 3, parse_math=False)
    figure.legend(
        handles=patches, loc="outside lower center", ncols=3, fontsize=FONT, frameon=False
    )
    png = BytesIO()
    figure.savefig(png, format="png", dpi=120, metadata={"Software": software, "Title": title})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, png.getvalue())


def _labels(audit: Audit, side: str, row: int) -> Sequence[Any]:
    """Return the tokens of a row with the numbers of their documents."""
    from heedful.train.inspection.token_labels import pieces

    batch = audit.subject.batch
    tokens = pieces(audit.subject.dataset.tokenizer, batch[side][row])
    ids = batch[side.removesuffix("inputs") + "segment_ids"][row]
    return [f"{token} {i}" if i else "-" for token, i in zip(tokens, ids, strict=True)]
