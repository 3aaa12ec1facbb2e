"""Tables and a plot of measurements."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FROM = 4096  # Shorter lengths do not show how the time grows.
Key = tuple[str, int]


def growth(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """Fit the exponent e of values ~ lengths^e to logarithms; None for less than 2 points."""
    if len(lengths) < 2:
        return None
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def tables(results: Mapping[str, Any], peers: Mapping[str, str]) -> str:
    """Return all tables, then the environment and the skipped cases."""
    lines = []
    for causal, backward, points in groups(results["points"]):
        title = f"{_mask(causal)}, {_mode(backward)}"
        lengths = sorted({length for _, length in points})
        names = list(dict.fromkeys(name for name, _ in points))
        measured = {key: point for key, point in points.items() if "skipped" not in point}
        times = {key: 1000 * statistics.median(p["seconds"]) for key, p in measured.items()}
        memory = {key: p["memory"] / 2**20 for key, p in measured.items()}
        for noun, unit, values in (("time", "ms", times), ("memory", "MiB", memory)):
            lines += _table(f"{title}: {noun} ({unit})", names, lengths, values, values)
        pairs = [(name, peers[name]) for name in names if peers.get(name) in names]
        pairs += [(name, "dense") for name in names if "dense" in names and name in peers]
        pairs = [(a, b) for a, b in pairs if a != b]
        faster: dict[Key, float] = {}
        smaller: dict[Key, float] = {}
        for a, b in pairs:
            for length in lengths:
                ours, theirs = measured.get((a, length)), measured.get((b, length))
                if ours and theirs:
                    key = f"{b} / {a}", length
                    rounds = zip(ours["seconds"], theirs["seconds"], strict=True)
                    faster[key] = statistics.median(y / x for x, y in rounds)
                    smaller[key] = theirs["memory"] / max(ours["memory"], 1)
        rows = [f"{b} / {a}" for a, b in pairs]
        for noun, values in (("time", faster), ("memory", smaller)):
            title_of_ratio = f"{title}: ratio of {noun}, above 1 where the second is better"
            lines += _table(title_of_ratio, rows, lengths, values, None) if values else []
    lines.append("")
    for part, facts in results["environment"].items():
        lines.append(f"{part}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    lines += ["", *_left_out(results["points"])]
    return "\n".join(lines).strip()


def groups(points: Iterable[dict]) -> list[tuple[bool, bool, dict[Key, dict]]]:
    """Group the points by (causal, backward), each group by (name, length)."""
    found: dict[tuple[bool, bool], dict[Key, dict]] = {}
    for point in points:
        group = found.setdefault((point["causal"], point["backward"]), {})
        group[point["name"], point["length"]] = point
    return [(*key, group) for key, group in found.items()]


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plot time and memory over the length on logarithmic axes; each mask and mode has a row."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    kinds = groups(results["points"])
    figure, axes = plt.subplots(
        len(kinds), 2, figsize=(11, 4 * len(kinds)), squeeze=False, layout="constrained"
    )
    reads: list[tuple[str, Callable[[dict], float]]] = [
        ("seconds", lambda point: statistics.median(point["seconds"])),
        ("MiB", lambda point: point["memory"] / 2**20),
    ]
    for row, (causal, backward, points) in zip(axes, kinds, strict=True):
        for axis, (unit, read) in zip(row, reads, strict=True):
            axis.set(xlabel="tokens", ylabel=unit, title=f"{_mask(causal)}, {_mode(backward)}")
            for i, name in enumerate(dict.fromkeys(name for name, _ in points)):
                shown = sorted(
                    (length, read(point))
                    for (other, length), point in points.items()
                    if other == name and "skipped" not in point
                )
                style = "o-" if name in results["settings"]["core"] else "s--"
                lengths, values = [x for x, _ in shown], [y for _, y in shown]
                axis.plot(lengths, values, style, color=f"C{i}", label=name, markersize=4)
            if all("skipped" in point for point in points.values()):
                continue
            axis.set(xscale="log", yscale="log")
            ticks = sorted({length for _, length in points})
            axis.set_xticks(ticks, [f"{length:,}" for length in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        row[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _table(
    title: str,
    names: Sequence[str],
    lengths: Sequence[int],
    values: Mapping[Key, float],
    fitted: Mapping[Key, float] | None,
) -> list[str]:
    """Return a table, names by lengths; the last column is the exponent of the values `fitted`."""
    width = max(map(len, names))
    head = " " * width + "".join(f"{length:>10,}" for length in lengths)
    lines = ["", title, head + ("    growth" if fitted else "")]
    for name in names:
        cells = [values.get((name, length)) for length in lengths]
        line = f"{name:{width}}" + "".join(f"{_number(cell):>10}" for cell in cells)
        if fitted:
            long = [n for n in lengths if n >= FROM and (name, n) in fitted]
            exponent = growth(long, [fitted[name, n] for n in long])
            line += f"{'-' if exponent is None else f'{exponent:.2f}':>10}"
        lines.append(line)
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _left_out(points: Iterable[dict]) -> list[str]:
    """Return a line for each skipped attention and reason, with the lengths of that reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for point in points:
        if "skipped" in point:
            kind = f"{point['name']}, {_mask(point['causal'])}, {_mode(point['backward'])}"
            found.setdefault((kind, point["skipped"]), []).append(f"{point['length']:,}")
    return [f"- {kind}, {' '.join(at)}: {reason}" for (kind, reason), at in found.items()]


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


def _mode(backward: bool) -> str:
    return "forward+backward" if backward else "forward"
