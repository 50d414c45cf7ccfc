"""reports/ -> how much of what the reference knew each student has forgotten, on the student's own MLflow run. Called when a line is done.

Not by the stage `evaluate`: a report would then depend on the reference's report, and another reference would make every report stale.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mind import registry, tracking
from mind.config import Config
from mind.errors import MindError
from mind.outputs import MANIFEST, read_manifest
from mind.progress import console
from mind.records import Prediction, read_jsonl
from mind.workspace import Workspace

Grades = dict[tuple[str, str, str], bool]
"""benchmark, question id and gold answer -> was it right."""


def record(workspace: Workspace, config: Config) -> None:
    """Log `eval/forgot` and `eval/<benchmark>/forgot`, and tag the run with the reference. A store that fails is said, not raised."""
    reference = _grades(workspace.report(config.run.reference))
    names = [name for name in config.run.variants if name != config.run.reference and (workspace.report(name) / MANIFEST).is_file()]
    found = {read_manifest(workspace.report(name))["fingerprint"]: name for name in names} if reference else {}
    try:
        stored = registry.values(workspace, config.tracking, found, "eval/forgot")
        for fingerprint, name in found.items():
            shares = forgotten(_grades(workspace.report(name)), reference)
            if shares and stored.get(fingerprint) != shares["eval/forgot"]:
                with tracking.open_run(workspace, config.tracking, name=name, fingerprint=fingerprint, resume_finished=True) as run:
                    run.log(shares, step=0)
                    run.tag({"mind.reference": config.run.reference})
    except MindError as error:
        console.print(f"what was forgotten is not in MLflow: {error.found}", style="yellow", markup=False)


def forgotten(own: Grades, reference: Grades) -> dict[str, float]:
    """Share of the questions that the reference has right and this student wrong, of those that the reference has right and both
    answered: in all, and by benchmark. Nothing where the reference has none of them right."""
    lost: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for key, known in reference.items():
        if known and key in own:
            right.update((key[0], ""))
            lost.update((key[0], "") if not own[key] else ())
    return {f"eval/{name}/forgot" if name else "eval/forgot": lost[name] / count for name, count in right.items()}


def _grades(report: Path) -> Grades:
    """Empty where there is no report."""
    path = report / "predictions.jsonl"
    return {(row.benchmark, row.id, row.gold): row.correct for row in read_jsonl(path, Prediction)} if path.is_file() else {}
