"""Numbers -> pictures (PNG). Called by stages.evaluate and `mind compare`; the only module that knows matplotlib.

Every picture says its finding in the title, labels its axes with units, and gives each perspective the same colour and mark wherever
it appears (Paul Tol's muted palette, which colour-blind readers can tell apart). Equal numbers give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mind.records import PERSPECTIVES

if TYPE_CHECKING:
    from mind.latent import LatentMap

Rows = Sequence[Mapping[str, Any]]
Series = tuple[NDArray[np.float64], NDArray[np.float64]]

COLORS = dict(zip(PERSPECTIVES, ("#332288", "#88CCEE", "#117733", "#44AA99", "#999933", "#CC6677", "#882255", "#AA4499"), strict=True))
MARKS = dict(zip(PERSPECTIVES, "os^DvPX<", strict=True))
VARIANTS = ("#7F7F7F", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of the variants in their order (Okabe and Ito); the first, as a rule the base student, is grey."""

INK, FAINT = "#222222", "#D8D8D8"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#EBEBEB",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
}
DPI = 150
DOMAINS = {"id": "in distribution", "ood": "out of distribution"}


def inertia(history: Rows, path: Path) -> None:
    """Filtered against instant loss of each perspective over the steps of training; nothing is drawn where no row has them."""
    names = [name for name in PERSPECTIVES if len(_series(history, f"inertia/filtered/{name}")[0])]
    if not names:
        return
    pairs = {name: (_series(history, f"inertia/instant/{name}"), _series(history, f"inertia/filtered/{name}")) for name in names}
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    with _figure(path, 9, 1.4 + 1.75 * rows, _inertia_title(pairs)) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for axes, name in zip(grid, names, strict=False):
            instant, filtered = pairs[name]
            axes.plot(*instant, color=COLORS[name], alpha=0.45, linewidth=1)
            axes.plot(*filtered, color=COLORS[name], linewidth=2.2)
            axes.set_title(_spoken(name), color=COLORS[name], fontweight="bold", loc="left", pad=4)
            axes.margins(x=0.02)
        for axes in list(grid)[len(names) :]:
            axes.remove()
        figure.supxlabel("training step", fontsize=10)
        figure.supylabel("loss of the view (nats a token)", fontsize=10)
        lines = [_line(linewidth=1, alpha=0.6), _line(linewidth=2.2)]
        figure.legend(lines, ["instant loss", "filtered loss (what MetaNet learns from)"], loc="outside lower right", ncols=2, fontsize=9)


def weights(history: Rows, path: Path) -> None:
    """MetaNet's weight of each perspective over the steps of training; nothing is drawn where no row has one."""
    series = {name: _smooth(*_series(history, f"metanet/weight/{name}")) for name in PERSPECTIVES}
    series = {name: pair for name, pair in series.items() if len(pair[0])}
    if not series:
        return
    with _figure(path, 9, 4.4, _weights_title(series)) as figure:
        axes = figure.subplots()
        for name, (steps, values) in series.items():
            axes.plot(
                steps, 100 * values, color=COLORS[name], linewidth=2, marker=MARKS[name], markevery=max(1, len(steps) // 8), markersize=5
            )
        uniform = 100 / len(series)
        axes.axhline(uniform, color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        last = max(steps[-1] for steps, _ in series.values())
        ends = {name: 100 * float(values[-1]) for name, (_, values) in series.items()}
        axes.set(xlabel="training step", ylabel="weight in the student's loss (%)")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        top = axes.get_ylim()[1]
        for name, height in _apart(ends, 0.058 * top).items():
            text = f"{_spoken(name)}  {ends[name]:.0f} %"
            axes.annotate(
                text,
                (last, height),
                xytext=(10, 0),
                textcoords="offset points",
                color=COLORS[name],
                va="center",
                fontsize=9,
                annotation_clip=False,
            )
        axes.annotate("uniform", (axes.get_xlim()[0], uniform), xytext=(4, 3), textcoords="offset points", color="#777777", fontsize=8)


def accuracy(reports: Mapping[str, Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Accuracy with 95 % intervals by benchmark and variant, in and out of distribution apart.

    Args:
        reports: variant -> its metrics.json; the order is that of the colours and of the legend.
        title: the finding; by default the averages of the first and the last variant.
    """
    bands = list(_bands(reports))
    heights = [0.36 + 0.2 * len(reports)] * len(bands)
    with _figure(path, 9, 1.5 + sum(heights) + 0.1 * len(bands), title or _accuracy_title(reports)) as figure:
        axes = figure.subplots()
        spread = np.linspace(-0.3, 0.3, len(reports)) if len(reports) > 1 else np.zeros(1)
        for row, (_, _, scores) in enumerate(bands):
            for (variant, score), shift, color in zip(scores.items(), spread, _variant_colors(reports).values(), strict=True):
                if score is not None:
                    _dot(axes, score, row + shift, color)
        axes.set_yticks(range(len(bands)), [label for label, _, _ in bands])
        for tick, (_, average, _) in zip(axes.get_yticklabels(), bands, strict=True):
            tick.set(fontweight="bold" if average else "normal", color=INK)
        for row in range(1, len(bands)):
            starts_domain = bands[row - 1][1]  # an average closes its domain
            axes.axhline(row - 0.5, color="#AAAAAA" if starts_domain else "#EFEFEF", linewidth=1)
        axes.set(xlabel="accuracy (% of questions; bars: 95 % interval)", ylim=(len(bands) - 0.5, -0.5))
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        marks = [_line(color=color, marker="o", linewidth=2) for color in _variant_colors(reports).values()]
        figure.legend(marks, list(reports), loc="outside lower center", ncols=min(len(reports), 6))


def latent_map(maps: Mapping[str, LatentMap], path: Path, title: str = "") -> None:
    """t-SNE of held-out rationales by perspective, a panel a student; the measure in a panel's title is of the full space.

    Args:
        maps: student -> its map, at most four.
    """
    names = [name for name in PERSPECTIVES if any(name in drawn.perspectives for drawn in maps.values())]
    with _figure(path, 1.2 + 4.2 * len(maps), 5.4, title or "Held-out rationales in the student's latent space, by perspective") as figure:
        for axes, (student, drawn) in zip(figure.subplots(1, len(maps), squeeze=False).flat, maps.items(), strict=True):
            labels = np.array(drawn.perspectives)
            for name in names:
                x, y = drawn.coordinates[labels == name].T
                axes.scatter(x, y, s=34, color=COLORS[name], marker=MARKS[name], edgecolor="white", linewidth=0.6, label=_spoken(name))
            axes.set_title(f"{student}   silhouette of the perspectives {drawn.silhouettes.mean():.2f}", loc="left")
            axes.set(xticks=[], yticks=[], xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)")
            axes.set_box_aspect(1)
        handles, texts = axes.get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=4, columnspacing=1.6, handletextpad=0.3)


# ------------------------------------------------------------------- findings


def _inertia_title(pairs: Mapping[str, tuple[Series, Series]]) -> str:
    fell, held = (float(np.mean([_fall(pair[which][1]) for pair in pairs.values()])) for which in (0, 1))
    return f"While the student's loss {_moved(fell)}, the filtered loss {_moved(held)}: MetaNet follows what lasts, not the last step"


def _fall(values: NDArray[np.float64]) -> float:
    """Mean of the first tenth less mean of the last tenth."""
    tenth = max(1, len(values) // 10)
    return float(values[:tenth].mean() - values[-tenth:].mean())


def _moved(fall: float) -> str:
    return f"fell by {fall:.2f} nats" if fall >= 0 else f"rose by {-fall:.2f} nats"


def _weights_title(series: Mapping[str, Series]) -> str:
    end = {name: float(values[-max(1, len(values) // 4) :].mean()) for name, (_, values) in series.items()}
    first, second = sorted(end, key=end.__getitem__, reverse=True)[:2] if len(end) > 1 else (*end, *end)
    uniform = 1 / len(end)
    if end[first] < 1.25 * uniform:
        return f"MetaNet keeps the weights of the {len(end)} perspectives near uniform"
    return f"MetaNet turns to {_spoken(first)} ({end[first]:.0%}) and {_spoken(second)} ({end[second]:.0%} in the last quarter)"


def _accuracy_title(reports: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(reports)
    first, last = reports[names[0]], reports[names[-1]]
    parts = []
    for domain, label in DOMAINS.items():
        if domain in first and domain in last:
            value = 100 * last[domain]["accuracy"]
            gain = f", {value - 100 * first[domain]['accuracy']:+.1f} points on {names[0]}" if len(names) > 1 else ""
            parts.append(f"{value:.1f} % {label}{gain}")
    return f"{names[-1]}: " + "; ".join(parts)


# ---------------------------------------------------------------------- parts


@contextmanager
def _figure(path: Path, width: float, height: float, title: str) -> Iterator[Any]:
    """A figure of this size in inches, titled and saved when the block is done."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        figure.suptitle(fill(title, int(11.5 * width)), x=0.012, ha="left", fontsize=12, fontweight="bold")
        yield figure
        figure.savefig(path, format="png", metadata={"Software": None})  # the version of matplotlib would change the bytes


def _bands(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """(label, is it an average, variant -> score or None) from top to bottom: a domain's benchmarks, then its average."""
    for domain, label in DOMAINS.items():
        own = dict.fromkeys(name for r in reports.values() for name, score in r["benchmarks"].items() if score["domain"] == domain)
        for name in own:
            yield name, False, {variant: report["benchmarks"].get(name) for variant, report in reports.items()}
        if any(domain in report for report in reports.values()):
            yield f"average\n{label}", True, {variant: report.get(domain) for variant, report in reports.items()}


def _dot(axes: Any, score: Mapping[str, float], height: float, color: str) -> None:
    value, low, high = (100 * score[key] for key in ("accuracy", "ci_low", "ci_high"))
    axes.plot([low, high], [height, height], color=color, linewidth=2.4, solid_capstyle="round", alpha=0.55)
    axes.plot(value, height, color=color, marker="o", markersize=6.5, markeredgecolor="white", markeredgewidth=0.8)
    axes.annotate(f"{value:.1f}", (high, height), xytext=(5, 0), textcoords="offset points", color=color, va="center", fontsize=8)


def _variant_colors(variants: Mapping[str, Any]) -> dict[str, str]:
    return {name: VARIANTS[i % len(VARIANTS)] for i, name in enumerate(variants)}


def _series(history: Rows, key: str) -> Series:
    """Steps and values of the rows that have this key."""
    rows = [(float(row["step"]), float(row[key])) for row in history if row.get(key) is not None]
    steps, values = np.array(rows, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _smooth(steps: NDArray[np.float64], values: NDArray[np.float64]) -> Series:
    """Mean of the neighbours within a twentieth of the series on either side: what is drawn of single steps would hide the trend."""
    reach = len(values) // 20
    return steps, np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])


def _apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """The same heights, moved up as little as it takes to stand `gap` apart."""
    moved: dict[str, float] = {}
    lowest = -np.inf
    for name in sorted(heights, key=heights.__getitem__):
        moved[name] = max(heights[name], lowest)
        lowest = moved[name] + gap
    return moved


def _line(color: str = "#555555", **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, **style)


def _spoken(name: str) -> str:
    return name.replace("_", " ")
