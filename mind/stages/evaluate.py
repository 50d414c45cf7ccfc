"""students/V -> reports/V: every benchmark answered and graded, accuracy with intervals, latent analysis, figures.

Answers outlive a killed evaluation (mind.answering). Grades are not kept: they are made anew from the answers.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mind import figures, latent, outputs, tracking
from mind.answering import Examinee, answer
from mind.benchmarks.loading import Benchmark, load
from mind.config import Config
from mind.encoder import load_encoder
from mind.progress import console
from mind.records import Example, Question, read_questions, write_jsonl
from mind.scoring import done_tags, graded, measure, scalars, table
from mind.training.peers import Peers, launch, launched
from mind.workspace import Workspace


def run(config: Config, workspace: Workspace, variant: str | None) -> None:
    """Write reports/V from students/V, and add its results to the student's run.

    Raises:
        ConfigError, DataError: an unknown or malformed benchmark; the student, the rationales or the dataset are missing.
        StudentError: a student that cannot be loaded.
        TeacherError: the endpoint of backend openai refuses.
        PassingError: the hub, the endpoint or the tracking server does not answer.
    """
    assert variant is not None, "evaluate runs once a variant"
    if config.evaluation.processes > 1 and not launched():
        launch(config.evaluation.processes, "-m", "mind.stages", "evaluate", "--variant", variant)
        return
    source = workspace.student(variant)
    manifest = outputs.read_manifest(source)
    resolved = config.variant(variant)
    who = Examinee(variant, resolved.method, resolved.student, source)
    benchmarks = [load(name, workspace, config.evaluation.limit) for name in config.evaluation.benchmarks]
    peers = Peers.here()
    if not peers.first:
        with peers.silently():
            answer(benchmarks, who, config.evaluation, workspace, config.seed, peers)
        return
    training = read_questions(workspace.rationales / "questions.jsonl")
    held_out = latent.held_out_examples(workspace, config) if config.latent.questions else []
    with outputs.stage_output(workspace.report(variant)) as folder:
        answers = answer(benchmarks, who, config.evaluation, workspace, config.seed, peers)
        predictions = [graded(benchmark, own) for benchmark, own in zip(benchmarks, answers, strict=True)]
        metrics = measure(benchmarks, predictions, training)
        if held_out:
            student = who.student
            found = latent.analyse(student.model, student.tokenizer, held_out, who.ask, config.latent, config.seed)
            found.map.write(folder)
            figures.latent_map({variant: found.map}, folder / "latent.png", title=found.sentence)
            metrics["latent"] = found.metrics()
            if config.latent.encoder:
                metrics["latent"]["own_words"] = _own_words(held_out, who, config, workspace, folder).metrics()
        write_jsonl(folder / "predictions.jsonl", [row for rows in predictions for row in rows])
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        figures.accuracy({variant: metrics}, folder / "accuracy.png")
        draw_training(source / "history.jsonl", folder)
        digests = {benchmark.name: benchmark.digest for benchmark in benchmarks}
        inputs = {**manifest["inputs"], "weights": who.weights, **{f"benchmark/{name}": digest for name, digest in digests.items()}}
        settings = {group: getattr(config, group).model_dump(mode="json") for group in ("evaluation", "latent")}
        counts = {benchmark.name: len(benchmark.questions) for benchmark in benchmarks}
        fingerprint = manifest["fingerprint"]
        outputs.write_manifest(folder, stage="evaluate", inputs=inputs, config=settings, counts=counts, fingerprint=fingerprint)
        _track(config, workspace, variant, fingerprint, metrics, digests, folder)
    summarise(workspace, variant, metrics)
    console.print(table(variant, metrics))
    for found in (metrics.get("latent", {}), metrics.get("latent", {}).get("own_words", {})):
        if "sentence" in found:
            console.print(found["sentence"])


def summarise(workspace: Workspace, variant: str, metrics: dict[str, Any]) -> None:
    """reports/V.json and reports/V.csv: the numbers that `dvc metrics diff` and `dvc plots diff` compare.

    They lie beside the folder, because DVC does not look for metrics inside an output that is a folder.
    """
    rows = [(name, *(score[key] for key in ("accuracy", "ci_low", "ci_high"))) for name, score in metrics["benchmarks"].items()]
    numbers = json.dumps(scalars(metrics), indent=2) + "\n"
    (workspace.reports / f"{variant}.json").write_text(numbers, encoding="utf-8")
    with (workspace.reports / f"{variant}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("benchmark", "accuracy", "ci_low", "ci_high"), *rows])


def _own_words(held_out: Sequence[Example], who: Examinee, config: Config, workspace: Workspace, folder: Path) -> latent.OwnWords:
    """The student's own reasoning on the questions of the latent analysis, beside the teacher's; kept in `folder` for `mind compare`."""
    assert config.latent.encoder
    encoder = load_encoder(config.latent.encoder)
    shown = {"id", "question", "answer", "kind", "choices"}
    questions = [Question(**example.model_dump(include=shown)) for example in held_out]
    benchmark = Benchmark("held-out", "id", "number", questions, outputs.digest_json([one.model_dump() for one in questions]))
    (answers,) = answer([benchmark], who, config.evaluation.model_copy(update={"samples": 1}), workspace, config.seed)
    written = latent.own_texts(held_out, [samples[0].output for samples in answers], encoder)
    written.write(folder)
    return latent.own_words(held_out, written, encoder, config.seed)


def _track(
    config: Config, workspace: Workspace, variant: str, fingerprint: str, metrics: dict[str, Any], digests: dict[str, str], folder: Path
) -> None:
    """Results, pictures and the report itself -> the student's run, with a tag for each benchmark that says which questions were asked."""
    with tracking.open_run(workspace, config.tracking, name=variant, fingerprint=fingerprint, resume_finished=True) as tracked:
        tracked.log(scalars(metrics), step=0)
        for name, result in metrics["benchmarks"].items():
            tracked.tag(done_tags(name, digests[name], result))
        for picture in sorted(folder.glob("*.png")):
            tracked.figure(picture)
        for name in ("manifest.json", "metrics.json", "predictions.jsonl"):  # `mind compare --runs` reads them
            tracked.artifact(folder / name, "report")
        tracked.artifact(workspace.student(variant) / "manifest.json", "student")


def draw_training(history: Path, folder: Path) -> None:
    """curves.csv, and the pictures of what the student's training log holds; nothing for a student that was not trained."""
    if not history.exists():
        return
    rows = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    names = dict.fromkeys(["step", *(name for row in rows for name in row)])
    with (folder / "curves.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    figures.inertia(rows, folder / "inertia.png")
    figures.weights(rows, folder / "weights.png")
