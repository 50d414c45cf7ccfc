"""reports/ of several variants -> which one helps, by how much, and whether that is more than chance. Called by the CLI and its `run`.

A variant may have been trained with several seeds: they are one row. Every difference is paired: students on the same questions.
Intervals and tests are those of mind.statistics (docs/comparison.md); the p values of a column are corrected for the number of
variants in it (Holm). Imports of numpy, matplotlib, mlflow and torch are late: the CLI imports this module.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mind import registry, versioning
from mind.config import Config
from mind.errors import DataError, MindError
from mind.outputs import MANIFEST, read_manifest
from mind.records import DOMAINS, Prediction, read_jsonl
from mind.workspace import Workspace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mind.latent import Change, LatentMap, LatentReport
    from mind.statistics import Difference

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Row:
    """One variant; what follows `seconds` is against the reference, and empty for the reference itself."""

    variant: str
    metrics: Mapping[str, Any]  # its metrics.json; of several seeds their means, with intervals that hold the seeds' spread too
    method: str = ""
    seeds: Mapping[int | None, Mapping[str, Any]] = field(default_factory=dict)  # seed -> its metrics.json; None: not known
    tokens: float | None = None  # supervised tokens of one training (mean over seeds); None: not known, or not trained
    seconds: float | None = None  # of one training
    differences: Mapping[str, Difference] = field(default_factory=dict)  # by benchmark and by domain, Holm-corrected p
    forgot: tuple[float, float] | None = None  # questions that the reference has right and this one wrong, of how many; means over seeds
    finding: str = ""
    latent: str = ""
    beside: Mapping[str, Change] = field(default_factory=dict)  # student of one perspective -> its latent space against this one's

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
    writers: Mapping[str, LatentReport] = field(default_factory=dict)  # who wrote -> do their texts lie apart (docs/latent.md)

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

    @property
    def own_texts(self) -> list[str]:
        """A sentence for each set of students whose texts were clustered."""
        return [f"Own texts of {who}: {found.describe('students')}" for who, found in self.writers.items()]

    @property
    def repeated(self) -> bool:
        """Whether any row stands for several seeds."""
        return any(len(row.seeds) > 1 for row in self.rows)


def compare(workspace: Workspace, config: Config, variants: Sequence[str] | None = None, reference: str | None = None) -> Comparison:
    """Read the reports of `variants` (default: run.variants) and compare each with `reference` (default: run.reference).

    The repetitions of a variant that run.variants names belong to it.

    Raises:
        ConfigError: a variant that is not defined.
        DataError: not one of them has a report, or a report is damaged.
    """
    reference = config.variant(reference or config.run.reference).repeats or reference or config.run.reference
    chosen = [reference, *(variants or config.run.variants)]
    names = list(dict.fromkeys([*chosen, *(v for v in config.run.variants if config.variants[v].repeats in chosen)]))
    origin = {name: config.variant(name).repeats or name for name in names}
    folders = {name: workspace.report(name) for name in names if (workspace.report(name) / "metrics.json").is_file()}
    missing = tuple(name for name in names if name not in folders)
    if not folders:
        raise DataError(
            f"none of {', '.join(names)} has a report in {workspace.root / 'reports'}",
            wanted="at least one evaluated variant",
            do=f"run `mind run`, or `mind evaluate --variant {names[0]}`",
        )
    groups: dict[str, list[_Report]] = {}
    for name, folder in folders.items():
        own = config.variant(name)
        groups.setdefault(origin[name], []).append(_read(folder, workspace.student(name) / MANIFEST, own.seed, own.method.method))
    timed, notes = _timed(groups, workspace, config)
    maps = {name: found for name in groups if name in folders and (found := _read_map(folders[name])) is not None}
    result = _compared(timed, reference, missing, notes, maps, config.seed)
    writers, unlike = _writers(result.rows, folders, config)
    return replace(result, writers=writers, notes=(*result.notes, *unlike))


def compare_runs(workspace: Workspace, config: Config, variants: Sequence[str] | None = None, reference: str | None = None) -> Comparison:
    """The same from the finished runs of the MLflow experiment, whatever machine or workspace made them.

    Which: those of this workspace's dataset (without one: of the latest run's), of the student that `student.name` is in the latest
    of them, and of `variants` (default: all); of each variant and seed the latest. A run with other settings than the latest run of
    its variant is left out, and that is said.

    Raises:
        DataError: there is none.
        PassingError, MindError: the store does not answer, or refuses.
    """
    reference = reference or config.run.reference
    with registry.finished_runs(workspace, config.tracking) as finished:
        runs = [run for run in finished if _evaluated(run)]
        dataset = versioning.version_of(workspace.dataset) if workspace.dataset.is_dir() else _dataset_of_latest(runs)
        named = (run for run in runs if run.params.get("student.name") == config.student.name)
        student = next((run.tags.get("mind.student") for run in named if run.tags.get("mind.dataset") in (dataset, None)), None)
        wanted = [
            run
            for run in runs
            if run.tags.get("mind.student") == student
            and (run.tags.get("mind.dataset") == dataset or _is_untrained(run))
            and (variants is None or _origin(run) in (*variants, reference))
        ]
        chosen, notes = _latest_of_each(wanted)
        groups, unread = _read_runs(chosen)
    if not groups:
        raise DataError(
            f"the experiment '{config.tracking.experiment}' has no evaluated run of dataset {dataset} and student {config.student.name}",
            wanted="finished runs with a report",
            do="run `mind run` or `mind sweep`; `mind compare` without --runs reads this workspace's reports",
        )
    missing = tuple(name for name in dict.fromkeys((reference, *(variants or ()))) if name not in groups)
    place = {name: i for i, name in enumerate(config.variants)}
    groups = {name: groups[name] for name in sorted(groups, key=lambda name: (place.get(name, len(place)), name))}
    told = (f"From MLflow: dataset {dataset}, student {student}.", *notes, *unread)
    return _compared(groups, reference, missing, told, {}, config.seed)


# ------------------------------------------------------------------- reading

Key = tuple[str, str]
"""(question id, gold answer)."""

Grades = dict[str, dict[Key, tuple[bool, ...]]]
"""benchmark -> question -> was it right, with each seed."""


@dataclass(frozen=True)
class _Report:
    """One student's results."""

    metrics: dict[str, Any]
    grades: dict[str, dict[Key, bool]]
    method: str
    seed: int | None
    fingerprint: str | None  # of its run
    tokens: float | None
    seconds: float | None = None


def _read(folder: Path, student: Path, seed: int | None, method: str) -> _Report:
    """The report in `folder`; `student`: the manifest of the student that it is of, which may be gone."""
    path = folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        for score in metrics["benchmarks"].values():
            score["accuracy"], score["ci_low"], score["ci_high"], score["domain"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}", do=f"delete {folder} and run `mind evaluate` again") from None
    grades: dict[str, dict[Key, bool]] = {}
    for row in read_jsonl(folder / "predictions.jsonl", Prediction):
        grades.setdefault(row.benchmark, {})[row.id, row.gold] = row.correct
    fingerprint = read_manifest(folder).get("fingerprint") if (folder / MANIFEST).exists() else None
    tokens = read_manifest(student.parent)["counts"].get("tokens") if student.exists() else None
    return _Report(metrics, grades, method, None if method == "base" else seed, fingerprint, tokens)


def _read_map(folder: Path) -> LatentMap | None:
    from mind.latent import read_map

    return read_map(folder)


def _timed(
    groups: Mapping[str, Sequence[_Report]], workspace: Workspace, config: Config
) -> tuple[dict[str, list[_Report]], tuple[str, ...]]:
    """The same with the seconds of training that MLflow remembers, and a note where it cannot be asked."""
    fingerprints = {report.fingerprint for own in groups.values() for report in own if report.fingerprint and report.tokens}
    found: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    try:
        found = registry.values(workspace, config.tracking, fingerprints, "train/seconds") if fingerprints else {}
    except MindError as error:
        notes = (f"Seconds of training are not known: {error.found}.",)
    timed = {name: [replace(report, seconds=found.get(report.fingerprint or "")) for report in own] for name, own in groups.items()}
    return timed, notes


# ------------------------------------------------------------ reading from MLflow


def _origin(run: registry.Finished) -> str:
    """The row that a run belongs to."""
    repeats = run.params.get("repeats", "null")
    return run.tags["mind.variant"] if repeats == "null" else repeats


def _is_untrained(run: registry.Finished) -> bool:
    return run.tags.get("mind.method") == "base"


def _evaluated(run: registry.Finished) -> bool:
    return "mind.variant" in run.tags and any(key.startswith("eval/") for key in run.metrics)


def _dataset_of_latest(runs: Iterable[registry.Finished]) -> str | None:
    return next((run.tags["mind.dataset"] for run in runs if "mind.dataset" in run.tags), None)


def _latest_of_each(runs: Iterable[registry.Finished]) -> tuple[dict[str, list[registry.Finished]], list[str]]:
    """variant -> its latest run of each seed, by seed, and what was left out; `runs` come latest first."""
    chosen: dict[str, dict[str, registry.Finished]] = {}
    others: dict[str, int] = {}
    for run in runs:
        own = chosen.setdefault(_origin(run), {})
        if own and not _alike(run, next(iter(own.values()))):
            others[_origin(run)] = others.get(_origin(run), 0) + 1
        else:
            own.setdefault("" if _is_untrained(run) else run.params.get("seed", ""), run)
    notes = [f"{name}: runs left out because their settings differ from those of its latest: {count}." for name, count in others.items()]
    return {name: [own[seed] for seed in sorted(own, key=lambda seed: (len(seed), seed))] for name, own in chosen.items()}, notes


OWN = {"name", "seed", "repeats", "student.name"}
"""Settings in which runs of one row may differ: the student itself is told by its weights, and a folder has other names elsewhere."""


def _alike(run: registry.Finished, other: registry.Finished) -> bool:
    """Whether two runs trained under the same settings, as far as both know them (a later version knows more)."""
    known = (run.params.keys() & other.params.keys()) - OWN
    return _is_untrained(run) or all(run.params[key] == other.params[key] for key in known)


def _read_runs(chosen: Mapping[str, Sequence[registry.Finished]]) -> tuple[dict[str, list[_Report]], list[str]]:
    """Their reports, out of the runs' artifacts, and a sentence for each run that has none."""
    groups: dict[str, list[_Report]] = {}
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        for name, runs in chosen.items():
            for run in runs:
                here = Path(folder) / run.id
                if not (run.download("report", here) and run.download("student", here)):
                    notes.append(f"{name}: run {run.id} holds no report (an earlier version made it); it does not count.")
                    continue
                seed = int(run.params["seed"]) if run.params.get("seed", "").lstrip("-").isdigit() else None
                report = _read(here / "report", here / "student" / MANIFEST, seed, run.tags.get("mind.method", ""))
                groups.setdefault(name, []).append(replace(report, seconds=run.metrics.get("train/seconds")))
    return groups, notes


# ----------------------------------------------------------------- comparing


def _compared(
    groups: Mapping[str, Sequence[_Report]],
    reference: str,
    missing: tuple[str, ...],
    notes: Iterable[str],
    maps: Mapping[str, LatentMap],
    seed: int,
) -> Comparison:
    """The rows of a table, the reference first."""
    from mind.statistics import forgot

    order = sorted(groups, key=lambda name: name != reference)
    grades = {name: _grades(groups[name]) for name in order}
    rows = {name: _row(name, groups[name], grades[name]) for name in order}
    found = [*notes, *(note for name in order for note in _uneven(name, groups[name], grades[name]))]
    if reference not in groups:
        absent = f"The reference '{reference}' has no report: no differences."
        return Comparison(reference, tuple(rows.values()), missing, (absent, *found), maps)
    others = order[1:]
    found += [note for name in others for note in _unpaired(name, grades[name], reference, grades[reference])]
    untrained = {name for name in order if groups[name][0].method == "base"}
    pairs = {name: _pairs(grades[name], grades[reference]) for name in others}
    differences = _corrected({name: _differences(pairs[name], rows[name], bool(untrained & {name, reference}), seed) for name in others})
    singles = [name for name in others if groups[name][0].method == "single"]
    for name in others:
        row = replace(rows[name], differences=differences[name], forgot=forgot(_by_question(pairs[name])))
        beside = _beside(name, maps, singles, seed)
        rows[name] = replace(
            row, finding=_finding(row, reference), latent=_latent(name, reference, maps, list(beside), seed), beside=beside
        )
    found += _single_seeds([row for name, row in rows.items() if name not in untrained])
    return Comparison(reference, tuple(rows.values()), missing, tuple(found), maps)


def _grades(reports: Sequence[_Report]) -> Grades:
    """Of the questions that every seed answered."""
    first = reports[0].grades
    shared = {name: [key for key in own if all(key in report.grades.get(name, {}) for report in reports)] for name, own in first.items()}
    return {name: {key: tuple(r.grades[name][key] for r in reports) for key in keys} for name, keys in shared.items() if keys}


def _row(name: str, reports: Sequence[_Report], grades: Grades) -> Row:
    """The variant by itself."""
    metrics = reports[0].metrics if len(reports) == 1 else _merged(reports, grades)
    seeds = {report.seed: report.metrics for report in reports}
    tokens, seconds = (_mean([getattr(report, key) for report in reports]) for key in ("tokens", "seconds"))
    return Row(name, metrics, reports[0].method, seeds, tokens, seconds)


def _merged(reports: Sequence[_Report], grades: Grades) -> dict[str, Any]:
    """metrics.json of several seeds: means, and the intervals of means over questions and seeds."""
    import numpy as np

    from mind.statistics import repeated_accuracy

    right = {name: np.array(list(own.values())).T for name, own in grades.items()}  # (S, N) a benchmark
    metrics: dict[str, Any] = {"benchmarks": {}}
    for name, own in right.items():
        scores = [report.metrics["benchmarks"][name] for report in reports]
        means = {key: _mean([score.get(key) for score in scores]) for key in ("answer_rate", "mean_tokens")}
        metrics["benchmarks"][name] = {"n": own.shape[1], **_score_of(repeated_accuracy([own])), "domain": scores[0]["domain"], **means}
    for domain in DOMAINS:
        inside = [own for name, own in right.items() if metrics["benchmarks"][name]["domain"] == domain]
        if inside:
            metrics[domain] = {**_score_of(repeated_accuracy(inside)), "benchmarks": len(inside)}
    return metrics


def _score_of(interval: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("accuracy", "ci_low", "ci_high"), interval, strict=True))


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is not known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


Pairs = dict[str, tuple["NDArray[Any]", "NDArray[Any]"]]
"""benchmark -> right and wrong of the variant (S, N) and of the reference (S', N), on the questions that both answered."""


def _pairs(ours: Grades, theirs: Grades) -> Pairs:
    import numpy as np

    keys = {name: [key for key in ours[name] if key in theirs[name]] for name in ours if name in theirs}
    return {
        name: (np.array([ours[name][key] for key in shared]).T, np.array([theirs[name][key] for key in shared]).T)
        for name, shared in keys.items()
        if shared
    }


def _by_question(pairs: Pairs) -> Iterator[tuple[float, float]]:
    """Which share of the seeds has a question right: of the variant, of the reference."""
    for ours, theirs in pairs.values():
        yield from zip(ours.mean(axis=0), theirs.mean(axis=0), strict=True)


def _uneven(name: str, reports: Sequence[_Report], grades: Grades) -> Iterator[str]:
    """A sentence for each benchmark whose questions the seeds did not share."""
    for benchmark in dict.fromkeys(key for report in reports for key in report.grades):
        sizes = [len(report.grades.get(benchmark, {})) for report in reports]
        common = len(grades.get(benchmark, {}))
        if common < max(sizes):
            yield f"{benchmark}: the seeds of {name} answered {', '.join(map(str, sizes))} questions; the {common} that all answered count."


def _unpaired(name: str, ours: Grades, reference: str, theirs: Grades) -> Iterator[str]:
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


def _single_seeds(trained: Sequence[Row]) -> Iterator[str]:
    """A sentence on the rows whose interval is of one student while others' is of a method."""
    single = [row.variant for row in trained if len(row.seeds) == 1]
    if single and len(single) < len(trained):
        yield (
            f"Trained with one seed: {', '.join(single)}. Their intervals hold for these students; how far another seed would differ is "
            f"not in them (in a difference to a row of several seeds, that row's spread stands for it)."
        )


def _differences(pairs: Pairs, row: Row, untrained: bool, seed: int) -> dict[str, Difference]:
    """By benchmark and by domain."""
    from mind.statistics import repeated_difference

    found = {name: repeated_difference([pair], untrained=untrained, seed=seed) for name, pair in pairs.items()}
    for domain in DOMAINS:
        own = [pair for name, pair in pairs.items() if row.metrics["benchmarks"][name]["domain"] == domain]
        if own:
            found[domain] = repeated_difference(own, untrained=untrained, seed=seed)
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
        parts.append(f"{said} {label} ({points(difference.value)} points, {span(difference)}, {p_value(difference.p)})")
    lost, right = row.forgot or (0, 0)
    said = f"{row.variant} ({len(row.seeds)} seeds)" if len(row.seeds) > 1 else row.variant
    return f"{said} is {'; '.join(parts)}. Of {count(right)} questions that {reference} had right it has {count(lost)} wrong."


def _latent(name: str, reference: str, maps: Mapping[str, LatentMap], singles: Sequence[str], seed: int) -> str:
    """A student's latent space beside the reference's, and those of `singles`, students of one perspective each, where some are."""
    from mind.latent import against, against_several

    if name not in maps or reference not in maps:
        return ""
    try:
        said = [against(maps[name], maps[reference], seed).sentence(name, reference)]
    except DataError:  # other held-out rationales: nothing to compare, which is no fault of either
        return ""
    if len(singles) > 1:
        change = against_several(maps[name], [maps[one] for one in singles], seed)
        said.append(change.sentence(name, f"{len(singles)} students of one perspective each"))
    return " ".join(said)


def _beside(name: str, maps: Mapping[str, LatentMap], singles: Sequence[str], seed: int) -> dict[str, Change]:
    """A student's latent space against that of each student of one perspective; those themselves are not put beside each other."""
    from mind.latent import against

    if name not in maps or name in singles:
        return {}
    found = {}
    for one in singles:
        if one in maps:
            with suppress(DataError):  # other held-out rationales, as in `_latent`
                found[one] = against(maps[name], maps[one], seed)
    return found


def _writers(rows: Sequence[Row], folders: Mapping[str, Path], config: Config) -> tuple[dict[str, LatentReport], list[str]]:
    """Do the texts that the students of one perspective wrote lie apart, alone and with each other trained student among them?

    Empty where fewer than two of them left texts. Students that were asked otherwise are left out, with a sentence.
    """
    from mind.latent import measure_writers, read_texts
    from mind.progress import bar

    written = {row.variant: own for row in rows if row.variant in folders and (own := read_texts(folders[row.variant])) is not None}
    methods = {row.variant: row.method for row in rows if row.variant in written and row.method != "base"}
    singles = [name for name, method in methods.items() if method == "single"]
    if len(singles) < 2:
        return {}, []
    first = written[singles[0]]
    alike = [name for name in methods if (written[name].questions, written[name].encoder) == (first.questions, first.encoder)]
    notes = [
        f"{name}: its own texts answer other questions than those of {singles[0]}, or another encoder read them; they are not clustered."
        for name in methods
        if name not in alike
    ]
    singles = [name for name in singles if name in alike]
    if len(singles) < 2:
        return {}, notes
    sets = {f"{len(singles)} single-perspective students": singles}
    sets |= {f"these and {name}": [*singles, name] for name in alike if name not in singles}
    found = {}
    with bar("clustering what students wrote", len(sets), "sets") as shown:  # seconds each: the chance level refits the mixture
        for label, names in sets.items():
            found[label] = measure_writers({name: written[name] for name in names}, config.latent, config.seed)
            shown.advance()
    return found, notes


def _benchmarks(rows: Iterable[Row], domain: str) -> list[str]:
    found = (name for row in rows for name, score in row.metrics["benchmarks"].items() if score["domain"] == domain)
    return list(dict.fromkeys(found))


def points(share: float, digits: int = 1) -> str:
    return f"{100 * share:+.{digits}f}"


def count(number: float) -> str:
    """Of questions; a mean over seeds may be broken."""
    return f"{number:.1f}".removesuffix(".0")


def span(difference: Difference) -> str:
    return f"95 % interval {points(difference.low)} to {points(difference.high)}"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
