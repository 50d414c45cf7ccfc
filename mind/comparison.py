"""reports/ of several variants -> which one helps, by how much, and whether that is more than chance. Called by the CLI and its `run`.

Every difference is paired: two students on the same questions. Intervals and tests are those of mind.statistics; the p values of a
column are corrected for the number of variants in it (Holm). Imports of numpy and matplotlib are late: the CLI imports this module.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mind.config import Config
from mind.errors import DataError
from mind.records import Prediction, read_jsonl
from mind.workspace import Workspace

if TYPE_CHECKING:
    from rich.table import Table

    from mind.latent import LatentMap
    from mind.statistics import Difference

Form = Literal["console", "json", "markdown", "latex"]

DOMAINS = {"id": "in distribution", "ood": "out of distribution"}
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Row:
    """One variant; what follows the metrics is against the reference, and empty for the reference itself."""

    variant: str
    metrics: Mapping[str, Any]  # its metrics.json
    differences: Mapping[str, Difference] = field(default_factory=dict)  # by benchmark and by domain, Holm-corrected p
    forgot: tuple[int, int] | None = None  # questions that the reference has right and this one wrong, of how many
    finding: str = ""
    latent: str = ""

    @property
    def sentences(self) -> list[str]:
        return [text for text in (self.finding, self.latent) if text]


@dataclass(frozen=True)
class Comparison:
    reference: str
    rows: tuple[Row, ...]  # the reference first
    missing: tuple[str, ...]  # variants without a report
    notes: tuple[str, ...]  # what a reader must know before trusting a number
    maps: Mapping[str, LatentMap] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, str]:
        """Key -> heading: the benchmarks of each domain, and the average of a domain with several."""
        found: dict[str, str] = {}
        for domain in DOMAINS:
            own = _benchmarks(self.rows, domain)
            found |= {name: f"{name}\n({domain})" for name in own}
            if len(own) > 1:
                found[domain] = f"average\n{domain}"
        return found


def compare(workspace: Workspace, config: Config, variants: Sequence[str] | None = None, reference: str | None = None) -> Comparison:
    """Read the reports of `variants` (default: run.variants) and compare each with `reference` (default: run.reference).

    Raises:
        ConfigError: a variant that is not defined.
        DataError: not one of them has a report, or a report is damaged.
    """
    reference = reference or config.run.reference
    names = list(dict.fromkeys([reference, *(variants or config.run.variants)]))
    for name in names:
        config.variant(name)
    reports = {name: _read(workspace.report(name)) for name in names if (workspace.report(name) / "metrics.json").is_file()}
    missing = tuple(name for name in names if name not in reports)
    if not reports:
        raise DataError(
            f"none of {', '.join(names)} has a report in {workspace.root / 'reports'}",
            wanted="at least one evaluated variant",
            do=f"run `mind run`, or `mind evaluate --variant {names[0]}`",
        )
    maps = {name: found for name in reports if (found := _read_map(workspace.report(name))) is not None}
    rows, notes = _rows(reports, reference, maps, config.seed)
    if reference in missing:
        notes = (f"The reference '{reference}' has no report: no differences.", *notes)
    return Comparison(reference, rows, missing, notes, maps)


# ------------------------------------------------------------------- reading

Grades = dict[str, dict[tuple[str, str], bool]]
"""benchmark -> (question id, gold answer) -> was it right."""


@dataclass(frozen=True)
class _Report:
    metrics: dict[str, Any]
    grades: Grades


def _read(folder: Path) -> _Report:
    path = folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        for score in metrics["benchmarks"].values():
            score["accuracy"], score["ci_low"], score["ci_high"], score["domain"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}", do=f"delete {folder} and run `mind evaluate` again") from None
    grades: Grades = {}
    for row in read_jsonl(folder / "predictions.jsonl", Prediction):
        grades.setdefault(row.benchmark, {})[row.id, row.gold] = row.correct
    return _Report(metrics, grades)


def _read_map(folder: Path) -> LatentMap | None:
    from mind.latent import read_map

    return read_map(folder)


# ----------------------------------------------------------------- comparing


def _rows(
    reports: Mapping[str, _Report], reference: str, maps: Mapping[str, LatentMap], seed: int
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    if reference not in reports:
        return tuple(Row(name, report.metrics) for name, report in reports.items()), ()
    base = reports[reference]
    others = {name: report for name, report in reports.items() if name != reference}
    notes = tuple(note for name, report in others.items() for note in _unpaired(name, report.grades, reference, base.grades))
    differences = _corrected({name: _differences(report, base, seed) for name, report in others.items()})
    rows = [Row(reference, base.metrics)]
    for name, report in others.items():
        pairs = _pairs(report.grades, base.grades).values()
        forgot = (sum(b and not a for pair in pairs for a, b in pair), sum(b for pair in pairs for _, b in pair))
        row = Row(name, report.metrics, differences[name], forgot)
        rows.append(replace(row, finding=_finding(row, reference), latent=_latent(name, reference, maps, seed)))
    return tuple(rows), notes


def _pairs(ours: Grades, theirs: Grades) -> dict[str, list[tuple[bool, bool]]]:
    """benchmark -> (variant right, reference right) on the questions that both answered."""
    shared = {name: [(ours[name][key], theirs[name][key]) for key in ours[name] if key in theirs[name]] for name in ours if name in theirs}
    return {name: pairs for name, pairs in shared.items() if pairs}


def _unpaired(name: str, ours: Grades, reference: str, theirs: Grades) -> Iterable[str]:
    """A sentence for each benchmark whose questions the two did not share."""
    for benchmark in dict.fromkeys([*theirs, *ours]):
        first, second = ours.get(benchmark, {}), theirs.get(benchmark, {})
        common = len(first.keys() & second.keys())
        if not first or not second:
            yield f"{benchmark}: answered by {name if first else reference} only; it counts in no difference of the two."
        elif common < max(len(first), len(second)):
            yield (
                f"{benchmark}: {name} answered {len(first)} questions and {reference} {len(second)}; "
                f"differences are on the {common} that both answered."
            )


def _differences(report: _Report, base: _Report, seed: int) -> dict[str, Difference]:
    """By benchmark and by domain."""
    from mind.statistics import macro_difference, paired_difference

    pairs = {name: ([a for a, _ in rows], [b for _, b in rows]) for name, rows in _pairs(report.grades, base.grades).items()}
    found = {name: paired_difference(*pair) for name, pair in pairs.items()}
    for domain in DOMAINS:
        own = [pair for name, pair in pairs.items() if report.metrics["benchmarks"][name]["domain"] == domain]
        if own:
            found[domain] = macro_difference(own, seed=seed)
    return found


def _corrected(differences: Mapping[str, Mapping[str, Difference]]) -> dict[str, dict[str, Difference]]:
    """The same with Holm's p in every column."""
    from mind.statistics import holm

    corrected: dict[str, dict[str, Difference]] = {name: {} for name in differences}
    for column in dict.fromkeys(key for own in differences.values() for key in own):
        names = [name for name, own in differences.items() if column in own]
        for name, p in zip(names, holm([differences[name][column].p for name in names]), strict=True):
            corrected[name][column] = replace(differences[name][column], p=p)
    return corrected


def verdict(difference: Difference) -> str:
    """ "the same", "better", "worse" or "within noise"."""
    if difference.gained == difference.lost == 0:
        return "the same"
    if difference.p >= SIGNIFICANT:
        return "within noise"
    return "better" if difference.value > 0 else "worse"


def _finding(row: Row, reference: str) -> str:
    """One sentence on both domains and on what was forgotten."""
    own = {label: row.differences[domain] for domain, label in DOMAINS.items() if domain in row.differences}
    if not own:
        return f"{row.variant} and {reference} have no question in common."
    if all(verdict(difference) == "the same" for difference in own.values()):
        return f"{row.variant} does not differ from {reference}: every question is graded the same."
    parts = []
    for label, difference in own.items():
        how = verdict(difference)
        said = f"{how} than {reference}" if how in ("better", "worse") else f"the same as {reference}" if how == "the same" else how
        parts.append(f"{said} {label} ({_points(difference.value)} points, {_span(difference)}, {_p(difference.p)})")
    lost, right = row.forgot or (0, 0)
    return f"{row.variant} is {'; '.join(parts)}. Of {right} questions that {reference} had right it has {lost} wrong."


def _latent(name: str, reference: str, maps: Mapping[str, LatentMap], seed: int) -> str:
    from mind.latent import against

    if name not in maps or reference not in maps:
        return ""
    try:
        return against(maps[name], maps[reference], seed).sentence(name, reference)
    except DataError:  # other held-out rationales: nothing to compare, which is no fault of either
        return ""


def _benchmarks(rows: Iterable[Row], domain: str) -> list[str]:
    found = (name for row in rows for name, score in row.metrics["benchmarks"].items() if score["domain"] == domain)
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------- showing


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
    for table in _tables(result):
        console.print(table)
    for line in _remarks(result):
        console.print(escape(line), soft_wrap=True)


def draw(result: Comparison, path: Path) -> None:
    """The accuracy table as a picture; its title says how the variant that gained most compares with the reference."""
    from mind import figures

    figures.accuracy({row.variant: row.metrics for row in result.rows}, path, title=_headline(result))


def _headline(result: Comparison) -> str:
    compared = [row for row in result.rows if any(domain in row.differences for domain in DOMAINS)]
    if not compared:
        return ""
    best = max(compared, key=lambda row: sum(row.differences[domain].value for domain in DOMAINS if domain in row.differences))
    own = {label: best.differences[domain] for domain, label in DOMAINS.items() if domain in best.differences}
    gains = ", ".join(f"{_points(difference.value)} points {label} ({verdict(difference)})" for label, difference in own.items())
    return f"{best.variant} against {result.reference}: {gains}"


def draw_latent(result: Comparison, path: Path) -> bool:
    """The latent maps of the reference and of the variants side by side (four at most); False where there is none to draw."""
    from mind import figures

    drawn = dict(list(result.maps.items())[:4])
    if drawn:
        figures.latent_map(
            drawn, path, title=next((row.latent for row in reversed(result.rows) if row.variant in drawn and row.latent), "")
        )
    return bool(drawn)


def to_json(result: Comparison) -> str:
    rows = [
        {
            "variant": row.variant,
            "benchmarks": row.metrics["benchmarks"],
            **{domain: row.metrics[domain] for domain in DOMAINS if domain in row.metrics},
            "differences": {key: {**asdict(difference), "verdict": verdict(difference)} for key, difference in row.differences.items()},
            "forgot": {"lost": row.forgot[0], "of": row.forgot[1]} if row.forgot else None,
            "sentences": row.sentences,
        }
        for row in result.rows
    ]
    return json.dumps({"reference": result.reference, "variants": rows, "missing": result.missing, "notes": result.notes}, indent=2)


def to_markdown(result: Comparison) -> str:
    columns = result.columns
    blocks = [
        "Accuracy in %, 95 % interval:",
        _markdown(["variant", *_flat(columns)], ([row.variant, *_accuracies(row, columns, " ")] for row in result.rows)),
    ]
    compared = [row for row in result.rows if row.differences]
    if compared:
        heading = ["variant", *_flat(columns), "forgot"]
        cells = ([row.variant, *_gains(row, columns, " "), _forgot(row)] for row in compared)
        blocks += [
            f"Difference to `{result.reference}` in points, paired, 95 % interval; p corrected for the number of variants (Holm):",
            _markdown(heading, cells),
        ]
    blocks += ["\n".join(f"- {line}" for line in _remarks(result))] if list(_remarks(result)) else []
    return "\n\n".join(blocks)


def to_latex(result: Comparison) -> str:
    """A booktabs table: accuracies with intervals, and a dagger where a difference to the reference is more than noise."""
    columns = result.columns
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'c' * len(columns)}}}",
        r"\toprule",
        " & ".join(["variant", *map(_tex, _flat(columns))]) + r" \\",
        r"\midrule",
    ]
    for row in result.rows:
        cells = []
        for key in columns:
            score = _score(row, key)
            dagger = r"$^\dagger$" if key in row.differences and verdict(row.differences[key]) in ("better", "worse") else ""
            cells.append(f"{_percent(score)}{dagger} {{\\scriptsize [{_ends(score, ', ')}]}}" if score else "--")
        lines.append(" & ".join([_tex(row.variant), *cells]) + r" \\")
    caption = (
        f"Accuracy in \\%, with 95\\,\\% Wilson intervals. $^\\dagger$ differs from {_tex(result.reference)} on the same questions: "
        f"exact McNemar test (averages: paired randomisation test), Holm-corrected $p < {SIGNIFICANT}$."
    )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", rf"\caption{{{caption}}}", r"\end{table}"])


def _tables(result: Comparison) -> Iterable[Table]:
    from rich import box
    from rich.table import Table

    columns = result.columns
    look: Any = {"box": box.SIMPLE_HEAD, "title_justify": "left", "title_style": "bold"}
    accuracies = Table("variant", title="Accuracy in %, with 95 % intervals", **look)
    for heading in columns.values():
        accuracies.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        accuracies.add_row(row.variant, *_accuracies(row, columns, "\n"))
    yield accuracies
    compared = [row for row in result.rows if row.differences]
    if compared:
        gains = Table("variant", title=f"Difference to {result.reference} in points, on the same questions", **look)
        for heading in [*columns.values(), "forgot"]:
            gains.add_column(heading, justify="right", no_wrap=True)
        for row in compared:
            gains.add_row(row.variant, *_gains(row, columns, "\n"), _forgot(row))
        yield gains


def _remarks(result: Comparison) -> Iterable[str]:
    for row in result.rows:
        yield from row.sentences
    yield from result.notes
    if result.missing:
        yield f"No report yet: {', '.join(result.missing)} (`mind evaluate --variant {result.missing[0]}`)."


def _accuracies(row: Row, columns: Iterable[str], gap: str) -> list[str]:
    return [f"{_percent(score)}{gap}({_ends(score, '-')})" if (score := _score(row, key)) else "" for key in columns]


def _gains(row: Row, columns: Iterable[str], gap: str) -> list[str]:
    found = [row.differences.get(key) for key in columns]
    return [f"{_points(d.value)}{gap}({_points(d.low)} to {_points(d.high)}){gap}{_p(d.p)}" if d else "" for d in found]


def _score(row: Row, key: str) -> Mapping[str, float] | None:
    return row.metrics.get(key) if key in DOMAINS else row.metrics["benchmarks"].get(key)


def _forgot(row: Row) -> str:
    return f"{row.forgot[0]} of {row.forgot[1]}" if row.forgot else ""


def _percent(score: Mapping[str, float]) -> str:
    return f"{100 * score['accuracy']:.1f}"


def _ends(score: Mapping[str, float], between: str) -> str:
    return f"{100 * score['ci_low']:.1f}{between}{100 * score['ci_high']:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _span(difference: Difference) -> str:
    return f"95 % interval {_points(difference.low)} to {_points(difference.high)}"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _flat(columns: Mapping[str, str]) -> list[str]:
    return [heading.replace("\n", " ") for heading in columns.values()]


def _markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---", *["--:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _tex(text: str) -> str:
    return "".join(f"\\{char}" if char in "&%$#_{}" else char for char in text)
