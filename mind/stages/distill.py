"""dataset/ -> students/V: the student trained by the method of variant V; for `base` only a manifest that names the weights.

A killed run goes on from its checkpoint in `.mind/checkpoints`, in the same MLflow run: both are named by the run's fingerprint.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from mind import __version__, outputs, tracking
from mind.config import Config, Resolved, flatten
from mind.methods import table
from mind.progress import console
from mind.records import Example, read_jsonl
from mind.students.loading import find_student, load_student, save_student
from mind.training.loop import Trained, train
from mind.versioning import version_of
from mind.workspace import Workspace


def run(config: Config, workspace: Workspace, variant: str | None) -> None:
    """Write students/V and its run.

    Raises:
        ConfigError, DataError: an unknown variant; the dataset is missing, malformed or has a question that is too long.
        StudentError: a student that cannot be loaded.
        PassingError: the hub or the tracking server does not answer.
        KeyboardInterrupt: stopped; the next call goes on.
    """
    assert variant is not None, "distill runs once a variant"
    settings = config.variant(variant)
    if settings.method.method == "base":
        _keep_base(config, workspace, settings)
        return
    outputs.read_manifest(workspace.dataset)
    examples = list(read_jsonl(workspace.dataset / "train.jsonl", Example))
    dataset = version_of(workspace.dataset)
    student = load_student(settings.student)
    resolved = settings.model_dump(mode="json")
    fingerprint = outputs.digest_json({"config": resolved, "dataset": dataset, "student": student.identity, "mind": __version__})
    checkpoints, folder = workspace.checkpoints(fingerprint), workspace.student(variant)
    started = time.monotonic()
    with _tracked(config, workspace, settings, student.identity, fingerprint, dataset) as tracked:
        trained = train(student, settings, examples, table.build, log=tracked.log, checkpoints=checkpoints)
        with outputs.stage_output(folder) as partial:
            save_student(student, settings.student, partial)
            _write_history(partial, trained)
            inputs = {"dataset": dataset, "student": student.identity}
            counts = {name: value for name, value in vars(trained).items() if name != "history"}
            outputs.write_manifest(partial, stage="distill", inputs=inputs, config=resolved, counts=counts, fingerprint=fingerprint)
        address = tracked.register(folder, f"mind-{Path(settings.student.name).name}", variant)
    shutil.rmtree(checkpoints, ignore_errors=True)
    _say(settings, trained, time.monotonic() - started, address)


def _keep_base(config: Config, workspace: Workspace, settings: Resolved) -> None:
    """The untouched student: nothing of the dataset is in its manifest, so its evaluation outlives every new dataset."""
    _, identity = find_student(settings.student)
    own = {
        "name": settings.name,
        "method": {"method": "base"},
        "student": settings.student.model_dump(include={"name", "revision", "dtype"}),
    }
    fingerprint = outputs.digest_json({"config": own, "student": identity, "mind": __version__})
    with (
        _tracked(config, workspace, settings, identity, fingerprint, None),
        outputs.stage_output(workspace.student(settings.name)) as folder,
    ):
        outputs.write_manifest(folder, stage="distill", inputs={"student": identity}, config=own, counts={}, fingerprint=fingerprint)
    console.print(f"distill {settings.name}: the untouched student, {identity}")


def _tracked(config: Config, workspace: Workspace, settings: Resolved, identity: str, fingerprint: str, dataset: str | None) -> Any:
    tags = {"mind.method": settings.method.method, "mind.student": identity}
    params = flatten(settings.model_dump(mode="json"))
    return tracking.open_run(
        workspace, config.tracking, name=settings.name, fingerprint=fingerprint, tags=tags, params=params, dataset_digest=dataset
    )


def _write_history(folder: Path, trained: Trained) -> None:
    rows = (json.dumps(row) + "\n" for row in trained.history)
    (folder / "history.jsonl").write_text("".join(rows), encoding="utf-8")


def _say(settings: Resolved, trained: Trained, seconds: float, address: str | None) -> None:
    first, last = trained.history[0], trained.history[-1]
    console.print(
        f"distill {settings.name}: {trained.questions} questions, {trained.views} views, {trained.steps} steps, "
        f"{trained.tokens:,} supervised tokens, {seconds:.0f} s; loss {first['train/loss']:.2f} -> {last['train/loss']:.2f}"
    )
    if any(trained.left_out.values()):
        left = ", ".join(f"{count} {what}" for what, count in trained.left_out.items() if count)
        console.print(f"  left out: {left} (too long for training.max_tokens, or nothing there for this method)")
    weights = sorted(((value, name) for name, value in last.items() if name.startswith("metanet/weight/")), reverse=True)
    if weights:
        names = ", ".join(f"{name.rpartition('/')[2]} {value:.2f}" for value, name in weights[:4])
        console.print(f"  MetaNet keeps {last['metanet/selected']:.1f} of {len(weights)} views; heaviest: {names}")
    if address:
        console.print(f"  registered as {address}")
