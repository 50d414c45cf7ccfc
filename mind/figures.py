"""Numbers -> pictures (PNG). Called by stages.evaluate and `mind compare`; the only module that knows matplotlib.

Every picture says its finding in the title, labels its axes with units, and gives each perspective the same colour and mark wherever
it appears (Paul Tol's muted palette, which colour-blind readers can tell apart, its cyan darkened to be seen as a line). Equal numbers
give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mind.records import DOMAINS, PERSPECTIVES

if TYPE_CHECKING:
    from mind.latent import LatentMap
    from mind.statistics import Difference

Rows = Sequence[Mapping[str, Any]]
Series = tuple[NDArray[np.float64], NDArray[np.float64]]

COLORS = dict(zip(PERSPECTIVES, ("#332288", "#4AA8D8", "#117733", "#44AA99", "#999933", "#CC6677", "#882255", "#AA4499"), strict=True))
MARKS = dict(zip(PERSPECTIVES, "os^DvPX<", strict=True))
VARIANTS = ("#7F7F7F", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of the variants in their order (Okabe and Ito); the first, as a rule the base student, is grey."""

VERDICTS = {"better": ("#0072B2", "o"), "worse": ("#D55E00", "D"), "within noise": ("#8A8A8A", "o"), "the same": ("#8A8A8A", "o")}
"""Colour and mark of a difference (Okabe and Ito); one within noise is hollow too, so that a grey print tells them apart."""

INK, QUIET = "#222222", "#777777"
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
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}
DPI = 150
PANELS = 5  # latent maps in a row: the untouched student, a variant and one student for each of eight perspectives are two rows
UNDATED = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""What would make other bytes of equal numbers: matplotlib's version, the time."""


def inertia(history: Rows, path: Path) -> None:
    """Filtered against instant loss of each perspective over the steps of training; nothing is drawn where no row has them."""
    pairs = {name: tuple(_series(history, f"inertia/{kind}/{name}") for kind in ("instant", "filtered")) for name in PERSPECTIVES}
    pairs = {name: pair for name, pair in pairs.items() if all(len(values) for _, values in pair)}
    if not pairs:
        return
    columns = min(4, len(pairs))
    rows = -(-len(pairs) // columns)
    with _figure(path, 9, 1.4 + 1.75 * rows, _inertia_title(pairs)) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (name, (instant, filtered)) in zip(grid.flat, pairs.items(), strict=False):
            axes.plot(*_smooth(*instant), color=COLORS[name], alpha=0.5, linewidth=1)
            axes.plot(*_smooth(*filtered), color=COLORS[name], linewidth=2.2)
            axes.set_title(_spoken(name), color=COLORS[name], fontweight="bold", loc="left", pad=4)
            axes.margins(x=0.02)
        for axes in grid.flat[len(pairs) :]:
            axes.set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("training step")
        figure.supylabel("loss of the view (nats a token)", fontsize=10)
        lines = [_line(linewidth=1, alpha=0.6), _line(linewidth=2.2)]
        figure.legend(lines, ["instant loss", "filtered loss (what MetaNet learns from)"], loc="outside lower right", ncols=2)


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
        axes.set(xlabel="training step", ylabel="weight in the student's loss (%)")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        uniform = 100 / len(series)
        axes.axhline(uniform, color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        middle = axes.get_yaxis_transform()  # x in shares of the axes, y in data
        axes.text(0.5, uniform, "uniform", transform=middle, color=QUIET, fontsize=8, ha="center", va="bottom")
        ends = {name: (float(steps[-1]), 100 * float(values[-1])) for name, (steps, values) in series.items()}
        for name, height in _apart({name: end for name, (_, end) in ends.items()}, 0.052 * axes.get_ylim()[1]).items():
            axes.annotate(
                f"{_spoken(name)}  {ends[name][1]:.0f} %",
                ends[name],
                xytext=(1.025, height),
                textcoords=middle,
                color=COLORS[name],
                va="center",
                fontsize=9,
                arrowprops={
                    "arrowstyle": "-",
                    "color": COLORS[name],
                    "linewidth": 0.6,
                    "alpha": 0.6,
                    "relpos": (0, 0.5),
                    "shrinkA": 1,
                    "shrinkB": 3,
                },
                annotation_clip=False,
            )


def accuracy(reports: Mapping[str, Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Accuracy with 95 % intervals by benchmark and variant, in and out of distribution apart.

    Args:
        reports: variant -> its metrics.json; the order is that of the colours and of the legend.
        title: the finding; by default the averages of the best variant.
    """
    bands = list(_bands(reports))
    colors = dict(zip(reports, (VARIANTS if len(reports) > 1 else VARIANTS[1:]) * len(reports), strict=False))
    thickness = {"heading": 0.26, "benchmark": 0.16 + 0.19 * len(reports), "average": 0.16 + 0.19 * len(reports)}  # inches
    with _figure(path, 9, 1.5 + sum(thickness[band.kind] for band in bands), title or _accuracy_title(reports)) as figure:
        axes = figure.subplots()
        edge = 0.0
        ticks = {}
        for band in bands:
            center, edge = edge + thickness[band.kind] / 2, edge + thickness[band.kind]
            if band.kind == "heading":
                axes.axhspan(edge - thickness["heading"], edge, color="#F2F2F2", zorder=0)
                axes.text(0.008, center, band.label, transform=axes.get_yaxis_transform(), color=QUIET, fontsize=9, va="center")
                continue
            ticks[center] = band
            for place, (variant, score) in enumerate(band.scores.items()):
                if score is not None:
                    _dot(axes, score, center + 0.19 * (place - (len(reports) - 1) / 2), colors[variant])
        axes.set_yticks(list(ticks), [band.label for band in ticks.values()])
        for tick, band in zip(axes.get_yticklabels(), ticks.values(), strict=True):
            tick.set(fontweight="bold" if band.kind == "average" else "normal", color=INK)
        axes.set(xlabel="accuracy (% of questions; bars: 95 % interval)", ylim=(edge, 0))
        axes.set_xlim(0, 1.06 * axes.get_xlim()[1])
        axes.grid(axis="y", visible=False)
        if len(reports) > 1:
            marks = [_line(color=color, marker="o", linewidth=2) for color in colors.values()]
            figure.legend(marks, list(reports), loc="outside lower center", ncols=min(len(reports), 4))


class Compared(NamedTuple):
    """One row of the comparison, all in shares of questions."""

    variant: str
    scores: Mapping[str, Mapping[str, float]]  # column -> accuracy, ci_low, ci_high
    seeds: Mapping[str, Sequence[float | None]]  # column -> accuracy with each seed; empty where there is one only
    differences: Mapping[str, tuple[Difference, str]]  # domain -> difference to the reference, and its verdict


def comparison(rows: Sequence[Compared], columns: Mapping[str, str], reference: str, path: Path, title: str = "") -> None:
    """A panel of accuracies for each column, and below a forest of the differences to the reference, in and out of distribution.

    Args:
        rows: from top to bottom.
        columns: key -> heading of the accuracies, in the order of the panels.
    """
    compared = [row for row in rows if row.differences]
    across = min(len(columns), 4)
    down = -(-len(columns) // across)
    high = 0.42 + 0.21 * len(rows), 0.5 + 0.25 * len(compared)  # inches of a panel of accuracies, and of differences
    heights = [*([high[0] + 0.55] * down), *([high[1] + 0.75] if compared else [])]
    with _figure(path, 10, 0.9 + sum(heights), title or f"Accuracy of {len(rows)} variants") as figure:
        blocks = figure.subfigures(2, 1, height_ratios=[sum(heights[:down]), heights[-1]], squeeze=False)[:, 0] if compared else [figure]
        grid = blocks[0].subplots(down, across, sharey=True, squeeze=False)
        for axes, (key, heading) in zip(grid.flat, columns.items(), strict=False):
            _accuracies(axes, rows, key, reference)
            axes.set_title(heading.replace("\n", " "), loc="left", fontweight="bold" if key in DOMAINS else "normal")
        for axes in grid.flat[len(columns) :]:
            axes.set_visible(False)
        single = "; strokes: single seeds" if any(row.seeds for row in rows) else ""
        blocks[0].supxlabel(f"accuracy (% of questions; bars: 95 % interval{single}; dashed: {reference})", fontsize=9)
        if compared:
            _forest(blocks[1], compared, reference)


def _accuracies(axes: Any, rows: Sequence[Compared], key: str, reference: str) -> None:
    """A dot with its interval for each row that has this column."""
    for place, row in enumerate(rows):
        score = row.scores.get(key)
        if score is None:
            continue
        value, low, high = (100 * score[name] for name in ("accuracy", "ci_low", "ci_high"))
        own = row.variant == reference
        color = QUIET if own else VERDICTS["better"][0]
        if own:
            axes.axvline(value, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.plot([low, high], [place, place], color=color, linewidth=2.2, alpha=0.5, solid_capstyle="round")
        singles = [100 * seed for seed in row.seeds.get(key, ()) if seed is not None]
        axes.plot(singles, [place] * len(singles), color=INK, marker="|", markersize=6, linestyle="", alpha=0.7)
        axes.plot(value, place, color=color, marker="o", markersize=5.5, markeredgecolor="white", markeredgewidth=0.7)
        axes.annotate(f"{value:.0f}", (high, place), xytext=(4, 0), textcoords="offset points", color=color, va="center", fontsize=7.5)
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.08 * axes.get_xlim()[1])
    axes.tick_params(labelsize=8.5)
    axes.grid(axis="y", visible=False)


def _forest(block: Any, rows: Sequence[Compared], reference: str) -> None:
    """The differences of each domain, blue where better, vermilion where worse, hollow and grey within noise."""
    domains = [domain for domain in DOMAINS if any(domain in row.differences for row in rows)]
    panels = block.subplots(1, len(domains), sharey=True, sharex=True, squeeze=False)[0]
    for axes, domain in zip(panels, domains, strict=True):
        axes.axvline(0, color="#555555", linewidth=1, zorder=1)
        for place, row in enumerate(rows):
            if domain not in row.differences:
                continue
            difference, verdict = row.differences[domain]
            color, mark = VERDICTS[verdict]
            inside = color if verdict in ("better", "worse") else "white"
            low, high = 100 * difference.low, 100 * difference.high
            axes.plot([low, high], [place, place], color=color, linewidth=1.8, solid_capstyle="butt")
            axes.plot(100 * difference.value, place, color=color, marker=mark, markersize=6, markerfacecolor=inside, markeredgewidth=1.4)
            text = f"{100 * difference.value:+.1f}"
            axes.annotate(text, (high, place), xytext=(5, 0), textcoords="offset points", color=INK, va="center", fontsize=8)
        axes.set_title(f"difference to {reference}, {DOMAINS[domain]}", loc="left", fontweight="bold")
        axes.set_yticks(range(len(rows)), [row.variant for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.tick_params(labelsize=8.5)
        axes.grid(axis="y", visible=False)
    block.supxlabel("points, on the same questions (bars: 95 % interval; colour: after correction for the number of variants)", fontsize=9)
    shown = dict.fromkeys(verdict for row in rows for _, verdict in row.differences.values())
    marks = [
        _line(color=VERDICTS[v][0], marker=VERDICTS[v][1], markerfacecolor=VERDICTS[v][0] if v in ("better", "worse") else "white")
        for v in shown
    ]
    block.legend(marks, list(shown), loc="outside upper right", ncols=len(shown), fontsize=8.5)


def latent_map(maps: Mapping[str, LatentMap], path: Path, title: str = "") -> None:
    """t-SNE of held-out rationales by perspective, a panel a student; the measure in a panel's title is of the full space.

    Args:
        maps: student -> its map.
    """
    names = [name for name in PERSPECTIVES if any(name in drawn.perspectives for drawn in maps.values())]
    rows = -(-len(maps) // PANELS)
    columns = -(-len(maps) // rows)
    title = title or "Held-out rationales in the student's latent space, by perspective"
    with _figure(path, 2.2 + 4.2 * columns, 0.7 + 4.5 * rows, title) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(maps) :]:
            axes.set_visible(False)
        for axes, (student, drawn) in zip(grid.flat, maps.items(), strict=False):
            labels = np.array(drawn.perspectives)
            for name in names:
                x, y = drawn.coordinates[labels == name].T
                axes.scatter(x, y, s=34, color=COLORS[name], marker=MARKS[name], edgecolor="white", linewidth=0.6, label=_spoken(name))
            axes.set_title(f"{student}   silhouette of the perspectives {drawn.silhouettes.mean():.2f}", loc="left")
            axes.set(xticks=[], yticks=[], xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)")
            axes.set_box_aspect(1)
        handles, texts = axes.get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside right center", labelspacing=0.9, handletextpad=0.3)


# ------------------------------------------------------------------- findings


def _inertia_title(pairs: Mapping[str, Sequence[Series]]) -> str:
    instant, filtered = (np.concatenate([np.abs(np.diff(pair[kind][1])) for pair in pairs.values()]) for kind in (0, 1))
    if not len(instant) or instant.mean() <= 1.05 * filtered.mean():
        return "Instant and filtered loss of each perspective move alike"
    return (
        f"The filtered loss moves {instant.mean() / max(filtered.mean(), 1e-9):.1f} times less from one logged step to the next "
        f"than the instant one ({filtered.mean():.2f} against {instant.mean():.2f} nats)"
    )


def _weights_title(series: Mapping[str, Series]) -> str:
    end = {name: float(values[-1]) for name, (_, values) in series.items()}
    first, *others = sorted(end, key=end.__getitem__, reverse=True)
    if end[first] < 1.25 / len(end):
        return f"MetaNet keeps the weights of the {len(end)} perspectives near uniform"
    second = f" and {_spoken(others[0])} ({100 * end[others[0]]:.0f} %)" if others else ""
    return f"MetaNet turns to {_spoken(first)} ({100 * end[first]:.0f} % of the weight){second}"


def _accuracy_title(reports: Mapping[str, Mapping[str, Any]]) -> str:
    averages = {name: {d: 100 * report[d]["accuracy"] for d in DOMAINS if d in report} for name, report in reports.items()}
    best = max(averages, key=lambda name: sum(averages[name].values()))
    return f"{best}: " + ", ".join(f"{value:.1f} % {DOMAINS[domain]}" for domain, value in averages[best].items())


# ---------------------------------------------------------------------- parts


@contextmanager
def _figure(path: Path, width: float, height: float, title: str) -> Iterator[Any]:
    """A figure of this size in inches, titled and saved when the block is done: as SVG or PDF by the path's ending, else as PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    form = path.suffix.lower().removeprefix(".")
    form = form if form in UNDATED else "png"
    with rc_context({**STYLE, "svg.hashsalt": "mind"}):
        figure = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
        figure.suptitle(fill(title, int(10.3 * width)), x=0.012, ha="left", fontsize=11, fontweight="bold")
        yield figure
        figure.savefig(path, format=form, metadata=UNDATED[form])


class _Band(NamedTuple):
    """One row of the accuracy picture."""

    kind: Literal["heading", "benchmark", "average"]
    label: str
    scores: Mapping[str, Any]  # variant -> score, None where it has none


def _bands(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[_Band]:
    """From top to bottom: a domain's heading, its benchmarks, and their average where there are several."""
    for domain, heading in DOMAINS.items():
        own = dict.fromkeys(name for r in reports.values() for name, score in r["benchmarks"].items() if score["domain"] == domain)
        if own:
            yield _Band("heading", heading, {})
        for name in own:
            yield _Band("benchmark", name, {variant: report["benchmarks"].get(name) for variant, report in reports.items()})
        if len(own) > 1:
            yield _Band("average", "average", {variant: report.get(domain) for variant, report in reports.items()})


def _dot(axes: Any, score: Mapping[str, float], height: float, color: str) -> None:
    value, low, high = (100 * score[key] for key in ("accuracy", "ci_low", "ci_high"))
    axes.plot([low, high], [height, height], color=color, linewidth=2.4, solid_capstyle="round", alpha=0.55)
    axes.plot(value, height, color=color, marker="o", markersize=6.5, markeredgecolor="white", markeredgewidth=0.8)
    axes.annotate(f"{value:.1f}", (high, height), xytext=(5, 0), textcoords="offset points", color=color, va="center", fontsize=8)


def _series(history: Rows, key: str) -> Series:
    """Steps and values of the rows that have this key."""
    rows = [(float(row["step"]), float(row[key])) for row in history if row.get(key) is not None]
    steps, values = np.array(rows, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _smooth(steps: NDArray[np.float64], values: NDArray[np.float64]) -> Series:
    """Mean of the neighbours within an eighth of the series on either side: single steps are other questions and would hide the trend."""
    reach = len(values) // 8
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
