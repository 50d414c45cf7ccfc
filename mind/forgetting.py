"""reports/ -> how much of what the reference knew each student has forgotten, on the student's own MLflow run. Called when a line is done.

Not by the stage `evaluate`: a report would then depend on the reference's report, and another reference would make every report stale.
"""

from __future__ import annotations

from collections import defaultdict
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
    from mind.statistics import forgot

    shared: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for key in reference.keys() & own.keys():
        for name in ("eval/forgot", f"eval/{key[0]}/forgot"):
            shared[name].append((own[key], reference[key]))
    counts = {name: forgot(questions) for name, questions in shared.items()}
    return {name: lost / right for name, (lost, right) in counts.items() if right}


def _grades(report: Path) -> Grades:
    """Empty where there is no report."""
    path = report / "predictions.jsonl"
    return {(row.benchmark, row.id, row.gold): row.correct for row in read_jsonl(path, Prediction)} if path.is_file() else {}
