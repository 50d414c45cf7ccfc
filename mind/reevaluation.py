"""The registry and the benchmark files -> which students lack a result on which questions, and those results. Called by the CLI and a flow.

A pair is a version of a registered student, or the untouched student, and the content of a benchmark: `evaluation.benchmarks` and every
file in the workspace's `benchmarks/`. What was measured is a tag of the student's own MLflow run (scoring.done_tags), so a nightly call
finds a benchmark that is new, or whose rows have changed, and measures that alone. reports/ belongs to DVC and is left as it is.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from mind import outputs, registry, tracking
from mind.config import AnyMethod, Config, Student
from mind.errors import DataError, MindError
from mind.progress import console
from mind.records import write_jsonl
from mind.workspace import Workspace

if TYPE_CHECKING:
    from mind.benchmarks.loading import Benchmark


@dataclass(frozen=True)
class Pending:
    """A student and a benchmark on whose questions it has not been measured."""

    variant: str
    student: str  # model@version of the registry, or "untrained"
    benchmark: str
    digest: str  # of its questions; empty when they could not be loaded
    questions: int
    fingerprint: str  # of the student's run
    version: registry.Version | None  # None: the untouched student

    def __str__(self) -> str:
        what = f"{self.questions} questions" if self.digest else "its questions cannot be loaded"
        return f"{self.variant} ({self.student}) on {self.benchmark}: {what}"


@dataclass(frozen=True)
class Accuracy:
    value: float
    low: float
    high: float
    correct: int
    n: int


@dataclass(frozen=True)
class Result:
    """What came out for one pair. `old`: the student's result on the benchmark of that name before its questions changed."""

    pending: Pending
    new: Accuracy
    old: Accuracy | None

    @property
    def regression(self) -> bool:
        """Whether the student does worse than before by more than chance: the 95 % interval of the difference lies below 0."""
        from mind.statistics import unpaired_difference

        if self.old is None:
            return False
        return unpaired_difference((self.new.correct, self.new.n), (self.old.correct, self.old.n)).high < 0

    def __str__(self) -> str:
        before = f", before {100 * self.old.value:.1f} %" if self.old else ""
        worse = ": a regression" if self.regression else ""
        span = f"{100 * self.new.low:.1f} to {100 * self.new.high:.1f}"
        return f"{self.pending}: {100 * self.new.value:.1f} % (95 % interval {span}){before}{worse}"


def pending(config: Config, workspace: Workspace) -> list[Pending]:
    """Every pair without a result, the oldest student first.

    A benchmark that cannot be loaded stands at the end, with every student: measuring it says why, after all the others.

    Raises:
        PassingError: the tracking server does not answer.
    """
    benchmarks, broken = _benchmarks(config, workspace)
    students = list(_students(config, workspace))
    todo = [
        Pending(variant, student, benchmark.name, benchmark.digest, len(benchmark.questions), fingerprint, version)
        for variant, student, fingerprint, tags, version in students
        for benchmark in benchmarks
        if not _is_done(tags, benchmark)
    ]
    return todo + [
        Pending(variant, student, name, "", 0, fingerprint, version)
        for name in broken
        for variant, student, fingerprint, _, version in students
    ]


def evaluate(config: Config, workspace: Workspace, pending: Pending) -> Result:
    """Measure one pair and put the result on the student's run: its metrics, its tag, its predictions under `reevaluated/`.

    Raises:
        ConfigError, DataError: a benchmark that is malformed, or has changed since it was found pending; a student that the store has lost.
        StudentError, TeacherError, PassingError: as of the stage `evaluate`.
    """
    from mind import answering, scoring
    from mind.benchmarks.loading import load

    benchmark = load(pending.benchmark, workspace, config.evaluation.limit)
    if not pending.digest:  # it has been mended meanwhile
        pending = replace(pending, digest=benchmark.digest, questions=len(benchmark.questions))
    if benchmark.digest != pending.digest:
        raise DataError(f"benchmark '{pending.benchmark}' has changed meanwhile", do="run `mind reevaluate` again")
    with _folder_of(config, workspace, pending) as folder:
        who = _examinee(pending, folder)
        rows = scoring.graded(benchmark, answering.answer([benchmark], who, config.evaluation, workspace, config.seed)[0])
        result = scoring.score(benchmark, rows)
        tags = registry.run_tags(workspace, config.tracking, pending.fingerprint) or {}
        before = scoring.latest(tags, benchmark.name)
        _track(config, workspace, pending, result, rows)
    return Result(pending, _accuracy(result["correct"], result["n"]), _accuracy(*before) if before else None)


def _track(config: Config, workspace: Workspace, pending: Pending, result: dict[str, Any], rows: Any) -> None:
    from mind import scoring

    run = tracking.open_run(workspace, config.tracking, name=pending.variant, fingerprint=pending.fingerprint, resume_finished=True)
    with run as tracked, tempfile.TemporaryDirectory() as name:
        folder = Path(name) / pending.digest[:16]
        folder.mkdir()
        write_jsonl(folder / "predictions.jsonl", rows)
        (folder / "metrics.json").write_text(json.dumps({"benchmarks": {pending.benchmark: result}}, indent=2) + "\n", encoding="utf-8")
        tracked.log(scoring.scalars({"benchmarks": {pending.benchmark: result}}), step=0)
        tracked.artifact(folder, f"reevaluated/{pending.benchmark}/{folder.name}")
        tracked.tag(scoring.done_tags(pending.benchmark, pending.digest, result))  # last: a pair counts as done when all of it is stored


def _accuracy(correct: int, n: int) -> Accuracy:
    from mind.statistics import wilson

    return Accuracy(correct / n, *wilson(correct, n), correct, n)


# ------------------------------------------------------------------- what there is


def _benchmarks(config: Config, workspace: Workspace) -> tuple[list[Benchmark], list[str]]:
    """Those that the settings name, and all that a person has put into benchmarks/; apart, the names of those that cannot be loaded."""
    from mind.benchmarks.loading import load

    own = sorted(path.stem for path in workspace.benchmarks.glob("*.yaml"))
    found, broken = [], []
    for name in dict.fromkeys([*config.evaluation.benchmarks, *own]):
        try:
            found.append(load(name, workspace, config.evaluation.limit))
        except MindError:
            console.print(f"benchmark '{name}' cannot be loaded; the others are measured first", markup=False)
            broken.append(name)
    return found, broken


def _students(config: Config, workspace: Workspace) -> Iterator[tuple[str, str, str, Any, registry.Version | None]]:
    """Variant, name, fingerprint and tags of the untouched students that were evaluated here, and of all in the registry."""
    for variant, settings in config.variants.items():
        manifest = workspace.student(variant) / outputs.MANIFEST
        if settings.method.method == "base" and manifest.is_file():
            fingerprint = outputs.read_manifest(workspace.student(variant))["fingerprint"]
            tags = registry.run_tags(workspace, config.tracking, fingerprint)
            if tags is not None:
                yield variant, "untrained", fingerprint, tags, None
    for version in registry.versions(workspace, config.tracking):
        yield version.variant, f"{version.model}@{version.number}", version.fingerprint, version.tags, version


def _is_done(tags: Any, benchmark: Benchmark) -> bool:
    from mind.scoring import is_done

    return is_done(tags, benchmark.name, benchmark.digest)


@contextmanager
def _folder_of(config: Config, workspace: Workspace, pending: Pending) -> Iterator[Path]:
    """The student's folder: that of the workspace where it is the same student, else a copy from the store for the length of the block."""
    own = workspace.student(pending.variant)
    version = pending.version
    if version is None or (own.is_dir() and outputs.digest_path(own) == version.content):
        yield own
        return
    with tempfile.TemporaryDirectory() as name:
        yield registry.fetch(workspace, config.tracking, version, Path(name))


def _examinee(pending: Pending, folder: Path) -> Any:
    """The student as its own manifest describes it: params.yaml may say something else by now."""
    from mind.answering import Examinee

    settings = outputs.read_manifest(folder)["config"]
    try:
        method, student = TypeAdapter(AnyMethod).validate_python(settings["method"]), Student.model_validate(settings["student"])
    except ValidationError as error:
        raise DataError(
            f"{pending.student} was made by a mind with other settings: {error.errors()[0]['msg']}", do="distill it again"
        ) from None
    return Examinee(pending.variant, method, student, folder)
