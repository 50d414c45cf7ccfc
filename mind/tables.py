"""A comparison -> what people read and programs parse: console, JSON, Markdown, LaTeX, pictures. Called by the CLI and the flows.

Numbers and sentences are those of mind.comparison; here is only their form. Imports of rich and matplotlib are late: the CLI imports this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mind.comparison import DOMAINS, SIGNIFICANT, Comparison, Row, count, p_value, points, verdict

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from mind.latent import Change
    from mind.separation import Measure

Form = Literal["console", "json", "markdown", "latex"]


def show(result: Comparison, form: Form = "console") -> None:
    """Print to standard output."""
    if form != "console":
        print({"json": to_json, "markdown": to_markdown, "latex": to_latex}[form](result))
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a log file has no edge
    for table in _tables(result, console.width):
        console.print(table)
    for line in _remarks(result):
        console.print(escape(line), soft_wrap=True)


def draw(result: Comparison, path: Path) -> None:
    """Accuracies and differences as a picture; its title says how the variant that gained most compares with the reference."""
    from mind import figures

    rows = [
        figures.Compared(
            row.variant,
            {key: score for key in result.columns if (score := _score(row, key))},
            {key: [_accuracy(metrics, key) for metrics in row.seeds.values()] for key in result.columns} if len(row.seeds) > 1 else {},
            {domain: (row.differences[domain], verdict(row.differences[domain])) for domain in DOMAINS if domain in row.differences},
        )
        for row in result.rows
    ]
    figures.comparison(rows, result.columns, result.reference, path, title=_headline(result))


def _headline(result: Comparison) -> str:
    compared = [row for row in result.rows if any(domain in row.differences for domain in DOMAINS)]
    if not compared:
        return ""
    best = max(compared, key=lambda row: sum(row.differences[domain].value for domain in DOMAINS if domain in row.differences))
    own = {label: best.differences[domain] for domain, label in DOMAINS.items() if domain in best.differences}
    gains = ", ".join(f"{points(difference.value)} points {label} ({verdict(difference)})" for label, difference in own.items())
    return f"{best.variant} against {result.reference}: {gains}"


def draw_latent(result: Comparison, path: Path) -> bool:
    """The latent maps of the reference and of all variants side by side; False where there is none to draw."""
    from mind import figures

    said = [row for row in result.rows if row.latent]
    said.sort(key=lambda row: row.method != "single")  # the title is of a variant that there are other students for, where there is one
    if result.maps:
        figures.latent_map(result.maps, path, title=said[-1].latent if said else "")
    return bool(result.maps)


def to_json(result: Comparison) -> str:
    captions = _captions(result)
    rows = [
        {
            "variant": row.variant,
            "method": row.method,
            "caption": captions.get(row.method, ""),
            "seeds": [{"seed": seed, **{key: _accuracy(metrics, key) for key in result.columns}} for seed, metrics in row.seeds.items()],
            "tokens": row.tokens,
            "seconds": row.seconds,
            "benchmarks": row.metrics["benchmarks"],
            **{domain: row.metrics[domain] for domain in DOMAINS if domain in row.metrics},
            "differences": {key: {**asdict(difference), "verdict": verdict(difference)} for key, difference in row.differences.items()},
            "forgot": {"lost": row.forgot[0], "of": row.forgot[1]} if row.forgot else None,
            "sentences": row.sentences,
            "latent": {one: {**asdict(change), "sentence": change.sentence(row.variant, one)} for one, change in row.beside.items()},
        }
        for row in result.rows
    ]
    written = {who: found.metrics("students") for who, found in result.writers.items()}
    told = {"reference": result.reference, "variants": rows, "own_texts": written, "missing": result.missing, "notes": result.notes}
    return json.dumps(told, indent=2)


def to_markdown(result: Comparison) -> str:
    columns = result.columns
    blocks = [
        f"Accuracy in %{_of_seeds(result)}, 95 % interval:",
        _markdown(["variant", *_flat(columns)], ([row.variant, *_accuracies(row, columns, " ")] for row in result.rows)),
    ]
    compared = [row for row in result.rows if row.differences]
    if compared:
        blocks += [
            f"Difference to `{result.reference}` in points, paired, 95 % interval; p corrected for the number of variants (Holm):",
            _markdown(["variant", *_flat(columns)], ([row.variant, *_gains(row, columns, " ")] for row in compared)),
        ]
    blocks += [
        f"What it took, and what of `{result.reference}` was forgotten:",
        _markdown(["variant", *SPENT], ([row.variant, *_spent(row)] for row in result.rows)),
    ]
    for title, own in _latents(result):
        names = dict.fromkeys(name for cells in own.values() for name in cells)
        blocks += [f"{title}:", _markdown(["", *own], ([name, *(cells.get(name, "") for cells in own.values())] for name in names))]
    blocks += ["\n".join(f"- {line}" for line in _remarks(result))] if list(_remarks(result)) else []
    captions = _captions(result)
    if captions:
        blocks.append("\n".join(f"- `{method}`: {caption}" for method, caption in captions.items()))
    return "\n\n".join(blocks)


def to_latex(result: Comparison) -> str:
    """A booktabs table: accuracies with intervals, and a dagger where a difference to the reference is more than noise."""
    columns = result.columns
    spent = SPENT[:3]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'c' * len(columns)}{'r' * len(spent)}}}",
        r"\toprule",
        " & ".join(["variant", *map(_tex, _flat(columns)), *spent]) + r" \\",
        r"\midrule",
    ]
    for row in result.rows:
        cells = []
        for key in columns:
            score = _score(row, key)
            dagger = r"$^\dagger$" if key in row.differences and verdict(row.differences[key]) in ("better", "worse") else ""
            cells.append(f"{_percent(score)}{dagger} {{\\scriptsize [{_ends(score, ', ')}]}}" if score else "--")
        lines.append(" & ".join([_tex(row.variant), *cells, *(cell.replace("-", "--") for cell in _spent(row)[:3])]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", rf"\caption{{{_tex_caption(result)}}}", r"\end{table}"])


def _tex_caption(result: Comparison) -> str:
    test = "exact McNemar test (averages: paired randomisation test)"
    interval = "Wilson intervals"
    if result.repeated:
        test += r", for rows of several seeds Welch's $t$ over questions and seeds"
        interval = "intervals (Wilson; of several seeds over questions and seeds)"
    texts = [
        f"Accuracy in \\%{_of_seeds(result)}, with 95\\,\\% {interval}. $^\\dagger$ differs from {_tex(result.reference)} on the same "
        f"questions: {test}, Holm-corrected $p < {SIGNIFICANT}$.",
        *(f"{_tex(method)}: {_tex(caption)}" for method, caption in _captions(result).items()),
    ]
    return " ".join(texts)


def _captions(result: Comparison) -> dict[str, str]:
    """method -> its paper and how ours deviates from it, where its class says so."""
    from mind.methods import table

    methods = dict.fromkeys(row.method for row in result.rows if row.method in table.CLASSES)
    found = {method: getattr(table.method_class(method), "caption", "") for method in methods}
    return {method: caption for method, caption in found.items() if caption}


def _of_seeds(result: Comparison) -> str:
    return ", mean over seeds" if result.repeated else ""


Cells = Callable[..., list[str]]
"""(row, columns) -> what stands in them."""


def _tables(result: Comparison, width: int) -> Iterator[RenderableType]:
    """Titled tables for a console of so many columns."""
    columns = result.columns
    compared = [row for row in result.rows if row.differences]
    title = f"Accuracy in %{_of_seeds(result)}, with 95 % intervals"
    yield from _fitting(title, result.rows, columns, [_accuracies, _accuracies_in_short], width)
    if compared:
        title = f"Difference to {result.reference} in points, on the same questions"
        yield from _fitting(title, compared, columns, [_gains, _gains_in_short], width)
    if any(cell != UNKNOWN for row in result.rows for cell in _spent(row)):
        yield _titled("What it took, and what was forgotten", _table(result.rows, SPENT, lambda row, _: _spent(row)))
    for title, own in _latents(result):
        for part in _in_parts(own, width):
            names = dict.fromkeys(name for cells in part.values() for name in cells)
            yield _titled(title, _grid("", list(part), {name: [cells.get(name, "") for cells in part.values()] for name in names}))


def _in_parts(columns: Mapping[str, Mapping[str, str]], width: int) -> Iterator[dict[str, Mapping[str, str]]]:
    """Columns -> those that stand beside each other on a console of that many columns, and those below them."""
    names = 2 + max(len(name) for cells in columns.values() for name in cells)
    part: dict[str, Mapping[str, str]] = {}
    used = names
    for heading, cells in columns.items():
        own = 1 + max(map(len, (heading, *cells.values())))
        if part and used + own > width:
            yield part
            part, used = {}, names
        part[heading] = cells
        used += own
    yield part


def _fitting(title: str, rows: Sequence[Row], columns: Mapping[str, str], forms: Sequence[Cells], width: int) -> Iterator[RenderableType]:
    """In full where that fits; else with less detail; else in two parts."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=10_000)
    for form in forms:
        made = _table(rows, columns, form)
        if Measurement.get(console, console.options, made).maximum <= width or (len(columns) == 1 and form is forms[-1]):
            yield _titled(f"{title}\n* more than noise (p < {SIGNIFICANT}, Holm)" if form is _gains_in_short else title, made)
            return
    names = list(columns)
    for part in (names[: -(-len(names) // 2)], names[-(-len(names) // 2) :]):
        yield from _fitting(title, rows, {name: columns[name] for name in part}, forms[-1:], width)


def _titled(title: str, table: Table) -> RenderableType:
    """A table's own title would be wrapped to its width."""
    from rich.console import Group
    from rich.text import Text

    return Group(Text(title, style="bold"), table)


def _table(rows: Sequence[Row], columns: Mapping[str, str] | Sequence[str], cells: Cells) -> Table:
    headings = list(columns.values()) if isinstance(columns, Mapping) else columns
    return _grid("variant", headings, {row.variant: cells(row, columns) for row in rows})


def _grid(corner: str, headings: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """Name -> its cells."""
    from rich import box
    from rich.table import Table

    made = Table(corner, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    for name, cells in rows.items():
        made.add_row(name, *cells)
    return made


def _remarks(result: Comparison) -> Iterable[str]:
    for row in result.rows:
        yield from row.sentences
    yield from result.own_texts
    yield from result.notes
    if result.missing:
        yield f"No report yet: {', '.join(result.missing)} (`mind evaluate --variant {result.missing[0]}`)."


def _accuracies(row: Row, columns: Iterable[str], gap: str = "\n") -> list[str]:
    return [f"{_percent(score)}{gap}({_ends(score, '-')})" if (score := _score(row, key)) else "" for key in columns]


def _accuracies_in_short(row: Row, columns: Iterable[str]) -> list[str]:
    return [f"{_percent(score)} {_ends(score, '-', 0)}" if (score := _score(row, key)) else "" for key in columns]


def _gains(row: Row, columns: Iterable[str], gap: str = "\n") -> list[str]:
    found = [row.differences.get(key) for key in columns]
    return [f"{points(d.value)}{gap}({points(d.low)} to {points(d.high)}){gap}{p_value(d.p)}" if d else "" for d in found]


def _gains_in_short(row: Row, columns: Iterable[str]) -> list[str]:
    found = [row.differences.get(key) for key in columns]
    marks = ["*" if d and verdict(d) in ("better", "worse") else " " for d in found]
    return [f"{points(d.value)}{mark}\n{points(d.low, 0)}..{points(d.high, 0)} " if d else "" for d, mark in zip(found, marks, strict=True)]


BESIDE = "Silhouette of the perspectives against each student of one perspective, 95 % interval, and drift (1 - CKA)"
WRITTEN = "Do texts that students wrote lie apart by who wrote them? Value (95 % interval; chance)"
MEASURES = ("components", "ari", "nmi", "purity", "silhouette")


def _latents(result: Comparison) -> Iterator[tuple[str, dict[str, dict[str, str]]]]:
    """Title, and column -> row -> cell, of the tables on latent spaces that there is something to say in."""
    beside = {row.variant: {one: _change(change) for one, change in row.beside.items()} for row in result.rows if row.beside}
    if beside:
        yield BESIDE, beside
    if result.writers:
        yield WRITTEN, {who: {name: _measure(getattr(found, name)) for name in MEASURES} for who, found in result.writers.items()}


def _change(change: Change) -> str:
    return f"{change.silhouette:+.2f} ({change.low:+.2f} to {change.high:+.2f}), drift {change.drift:.2f}"


def _measure(found: Measure) -> str:
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f}; {found.chance:.2f})"


SPENT = ("seeds", "supervised tokens", "seconds", "forgot")
UNKNOWN = "-"


def _spent(row: Row) -> list[str]:
    seeds = str(len(row.seeds)) if row.seeds and row.method != "base" else UNKNOWN
    cost = [f"{value:,.0f}" if value is not None else UNKNOWN for value in (row.tokens, row.seconds)]
    return [seeds, *cost, f"{count(row.forgot[0])} of {count(row.forgot[1])}" if row.forgot else UNKNOWN]


def _score(row: Row, key: str) -> Mapping[str, float] | None:
    return _score_in(row.metrics, key)


def _score_in(metrics: Mapping[str, Any], key: str) -> Mapping[str, float] | None:
    return metrics.get(key) if key in DOMAINS else metrics["benchmarks"].get(key)


def _accuracy(metrics: Mapping[str, Any], key: str) -> float | None:
    score = _score_in(metrics, key)
    return score["accuracy"] if score else None


def _percent(score: Mapping[str, float]) -> str:
    return f"{100 * score['accuracy']:.1f}"


def _ends(score: Mapping[str, float], between: str, digits: int = 1) -> str:
    return f"{100 * score['ci_low']:.{digits}f}{between}{100 * score['ci_high']:.{digits}f}"


def _flat(columns: Mapping[str, str]) -> list[str]:
    return [heading.replace("\n", " ") for heading in columns.values()]


def _markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---", *["--:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _tex(text: str) -> str:
    return "".join(f"\\{char}" if char in "&%$#_{}" else char for char in text)
