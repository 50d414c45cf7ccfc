"""The stage evaluate with a tiny student: its report, its run, and that a stopped evaluation goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from mind import answering, forgetting, registry, scoring, store, tracking
from mind.answering import Answer
from mind.benchmarks.loading import Benchmark, load
from mind.config import Config, Run
from mind.errors import DataError
from mind.grading import NO_ANSWER, TOO_SLOW, WRONG, Grade, extract
from mind.methods.base import Method
from mind.methods.table import CLASSES
from mind.outputs import digest_path, write_manifest
from mind.params import validate
from mind.prompts import student_prompt
from mind.records import Example, Prediction, Question, Rationale, read_jsonl, write_jsonl
from mind.scoring import graded, measure, scalars, table
from mind.stages import evaluate
from mind.students import decoding
from mind.workspace import Workspace
from tests import tiny

LIMIT = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests of this file share: a tiny student and an MLflow store (made once: it takes seconds)."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.save(folder / "student")
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    (made.data / "benchmarks").mkdir(parents=True)
    for name, file in (("primer", "primer-test"), ("math", "test-math"), ("choice", "test-choice"), ("yesno", "test-yesno")):
        (made.data / "benchmarks" / f"{name}.jsonl").write_bytes((files("mind.starter") / f"{file}.jsonl").read_bytes())
    examples = tiny.examples(3)
    made.rationales.mkdir()
    made.dataset.mkdir()
    write_jsonl(made.rationales / "questions.jsonl", [Question(id=e.id, question=e.question, answer=e.answer) for e in examples])
    views = [(e.id, name, text) for e in examples for name, text in e.views.items()]
    rows = [Rationale(question_id=i, perspective=name, text=text, answer="1", accepted=True) for i, name, text in views]
    write_jsonl(made.rationales / "rationales.jsonl", rows)
    write_jsonl(made.dataset / "train.jsonl", examples)
    made.student("base").mkdir(parents=True)
    write_manifest(made.student("base"), stage="distill", inputs={"dataset": "d" * 32}, config={}, counts={}, fingerprint="f" * 64)
    return made


def settings(home: Path, **groups: dict[str, Any]) -> Config:
    evaluation = {"benchmarks": ["primer", "math", "choice", "yesno"], "limit": LIMIT, "max_new_tokens": 12, **groups.get("evaluation", {})}
    return validate(
        {
            "student": {"name": str(home / "student")},
            "evaluation": evaluation,
            "latent": groups.get("latent", {"questions": 0}),
            "tracking": {"uri": f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"},
        }
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each generation was asked for."""
    counts: list[int] = []
    generate = decoding.generate

    def counted(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        counts.append(len(prompts))
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr(decoding, "generate", counted)
    return counts


def report(workspace: Workspace) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(workspace.report("base").iterdir())}


def test_a_report_says_what_was_answered_and_how_well(home: Path, workspace: Workspace) -> None:
    config = settings(home)
    evaluate.run(config, workspace, "base")
    metrics = json.loads((workspace.report("base") / "metrics.json").read_text())
    rows = list(read_jsonl(workspace.report("base") / "predictions.jsonl", Prediction))
    assert len(rows) == 4 * LIMIT
    for name, score in metrics["benchmarks"].items():
        own = [row for row in rows if row.benchmark == name]
        assert score["n"] == len(own) == LIMIT
        assert score["accuracy"] == sum(row.correct for row in own) / LIMIT
        assert 0 <= score["ci_low"] <= score["accuracy"] <= score["ci_high"] <= 1
        assert score["mean_tokens"] == sum(row.tokens for row in own) / LIMIT
    assert {name: score["domain"] for name, score in metrics["benchmarks"].items()} == {
        "primer": "id",
        "math": "id",
        "choice": "ood",
        "yesno": "ood",
    }
    assert metrics["id"]["benchmarks"] == metrics["ood"]["benchmarks"] == 2
    assert metrics["contamination"]["primer"]["same"] == 0
    manifest = json.loads((workspace.report("base") / "manifest.json").read_text())
    assert manifest["inputs"]["benchmark/primer"] == load("primer", workspace, LIMIT).digest
    assert manifest["inputs"]["weights"] == digest_path(workspace.student("base"))
    assert manifest["inputs"]["dataset"] == "d" * 32  # what its student was made of is in its manifest too
    assert (workspace.report("base") / "accuracy.png").stat().st_size > 1000


def test_the_results_are_in_the_students_run(home: Path, workspace: Workspace) -> None:
    config = settings(home, latent={"questions": 8})
    evaluate.run(config, workspace, "base")
    metrics = json.loads((workspace.report("base") / "metrics.json").read_text())
    run_id = registry.find_run(workspace, config.tracking, "f" * 64)
    client = MlflowClient(f"sqlite:///{store.database_of(workspace, config.tracking)}")
    stored = client.get_run(run_id).data.metrics
    for name in ("primer", "choice"):
        for key in ("accuracy", "ci_low", "ci_high"):
            assert stored[f"eval/{name}/{key}"] == pytest.approx(metrics["benchmarks"][name][key])
    assert stored["eval/math/overlap"] == metrics["contamination"]["math"]["overlap"] and stored["eval/primer/same"] == 0
    levels = metrics["benchmarks"]["math"]["by_difficulty"]
    assert stored["eval/math/difficulty/1/accuracy"] == pytest.approx(levels["1"]["accuracy"])
    assert stored["eval/id/accuracy"] == pytest.approx(metrics["id"]["accuracy"])
    assert stored["eval/ood/ci_high"] == pytest.approx(metrics["ood"]["ci_high"])
    for name in ("components", "ari", "silhouette"):
        assert stored[f"latent/{name}"] == pytest.approx(metrics["latent"][name]["value"])
    pictures = {file.path for file in client.list_artifacts(run_id, "figures")}
    assert pictures >= {"figures/accuracy.png", "figures/latent.png"}


def test_a_stopped_evaluation_goes_on_and_ends_in_the_same_bytes(
    home: Path, workspace: Workspace, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(home)
    evaluate.run(config, workspace, "base")
    whole = report(workspace)
    for path in (workspace.caches / "predictions").iterdir():
        path.unlink()
    add, added = answering._Kept.add, iter(range(9))

    def stop(kept: Any, answer: Answer) -> None:
        if next(added, None) is None:
            raise KeyboardInterrupt
        add(kept, answer)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(answering._Kept, "add", stop)
        evaluate.run(config, workspace, "base")
    assert report(workspace) == whole  # the earlier report is still there, and nothing half-made beside it
    assert not list(workspace.root.glob("reports/.*"))
    kept = sorted((workspace.caches / "predictions").iterdir())
    assert sum(len(path.read_bytes().splitlines()) for path in kept) == 9
    torn = kept[0].read_bytes()
    kept[0].write_bytes(torn[:-7])  # the power went while its last line was written
    evaluate.run(config, workspace, "base")
    assert asked == [4 * LIMIT, 4 * LIMIT, 4 * LIMIT - 8]
    assert report(workspace) == whole
    assert torn in kept[0].read_bytes()


def test_what_was_answered_is_not_asked_again(home: Path, workspace: Workspace, asked: list[int]) -> None:
    evaluate.run(settings(home, evaluation={"benchmarks": ["primer"]}), workspace, "base")
    evaluate.run(settings(home, evaluation={"benchmarks": ["primer", "yesno"]}), workspace, "base")
    evaluate.run(settings(home, evaluation={"benchmarks": ["primer"], "batch_tokens": 300}), workspace, "base")
    assert asked == [LIMIT, LIMIT, 0]


@pytest.mark.parametrize("changed", ["weights", "settings", "questions"])
def test_what_decides_the_answers_asks_again(changed: str, home: Path, workspace: Workspace, asked: list[int]) -> None:
    evaluate.run(settings(home, evaluation={"benchmarks": ["primer"]}), workspace, "base")
    tokens = 12
    if changed == "weights":
        write_manifest(workspace.student("base"), stage="distill", inputs={}, config={}, counts={}, fingerprint="e" * 64)
    elif changed == "settings":
        tokens = 13
    else:
        file = workspace.data / "benchmarks" / "primer.jsonl"
        file.write_text(file.read_text().replace("knives", "forks"))
    evaluate.run(settings(home, evaluation={"benchmarks": ["primer"], "max_new_tokens": tokens}), workspace, "base")
    assert asked == [LIMIT, LIMIT]


class Marked(Method):
    """A method that words its prompts in its own way, as SbS does."""

    @classmethod
    def prompt(cls, options: Any, question: Question | Example) -> str:
        return f"[rationale] {super().prompt(options, question)}"


def test_a_student_is_asked_as_its_method_asks(home: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    generate = decoding.generate

    def kept(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        asked.extend(prompts)
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr(decoding, "generate", kept)
    monkeypatch.setitem(CLASSES, "base", "tests.test_evaluate:Marked")
    evaluate.run(settings(home, evaluation={"benchmarks": ["primer"]}), workspace, "base")
    texts = [tiny.tokenizer().decode(ids) for ids in asked]
    questions = load("primer", workspace, LIMIT).questions
    assert all(f"[rationale] {student_prompt(q.question, q.kind, q.choices)}" in t for q, t in zip(questions, texts, strict=True))


def test_what_was_forgotten_is_on_the_students_run(home: Path, workspace: Workspace) -> None:
    config = settings(home, evaluation={"benchmarks": ["primer", "yesno"]}).model_copy(update={"run": Run(variants=("base", "mind"))})
    for variant, right in (("base", (1, 1, 1, 0)), ("mind", (1, 0, 1, 1))):
        names = ("primer", "primer", "yesno", "yesno")
        rows = [
            Prediction(benchmark=name, id=str(i), output="", answer=None, gold="1", correct=bool(one), tokens=1)
            for i, (name, one) in enumerate(zip(names, right, strict=True))
        ]
        workspace.report(variant).mkdir(parents=True)
        write_jsonl(workspace.report(variant) / "predictions.jsonl", rows)
        write_manifest(workspace.report(variant), stage="evaluate", inputs={}, config={}, counts={}, fingerprint=f"forgot-{variant}")
    with tracking.open_run(workspace, config.tracking, name="mind", fingerprint="forgot-mind"):
        pass
    forgetting.record(workspace, config)
    client = MlflowClient(f"sqlite:///{store.database_of(workspace, config.tracking)}")
    run = client.get_run(registry.find_run(workspace, config.tracking, "forgot-mind"))
    assert run.data.metrics == {"eval/forgot": pytest.approx(1 / 3), "eval/primer/forgot": 0.5, "eval/yesno/forgot": 0.0}
    assert run.data.tags["mind.reference"] == "base"
    forgetting.record(workspace, config)  # nothing new: the run is left alone
    assert client.get_run(run.info.run_id).info.end_time == run.info.end_time


def test_nothing_known_is_nothing_forgotten() -> None:
    key = ("primer", "1", "2")
    assert forgetting.forgotten({key: False}, {key: False}) == {}
    assert forgetting.forgotten({}, {key: True}) == {}


def test_the_training_log_becomes_curves_and_pictures(tmp_path: Path) -> None:
    rows = [{"step": step, "train/loss": 2 / step, **({"metanet/weight/socratic": 0.5} if step > 1 else {})} for step in (1, 2, 3)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.draw_training(tmp_path / "history.jsonl", tmp_path)
    assert (tmp_path / "curves.csv").read_text().splitlines()[:3] == ["step,train/loss,metanet/weight/socratic", "1,2.0,", "2,1.0,0.5"]
    assert (tmp_path / "weights.png").exists() and not (tmp_path / "inertia.png").exists()


def test_a_missing_student_is_said(home: Path, workspace: Workspace) -> None:
    with pytest.raises(DataError, match=r"students/base/manifest.json is missing"):
        evaluate.run(settings(home), Workspace(workspace.root / "elsewhere"), "base")


# ------------------------------------------------------------------- grades and averages


def benchmark(
    name: str, golds: list[str], domain: Any = "id", topics: list[str | None] | None = None, levels: list[int | None] | None = None
) -> Benchmark:
    rows = zip(golds, topics or [None] * len(golds), levels or [None] * len(golds), strict=True)
    questions = [
        Question(id=str(i), question=f"What is {i}?", answer=gold, topic=topic, difficulty=level)
        for i, (gold, topic, level) in enumerate(rows)
    ]
    return Benchmark(name, domain, "number", questions, "")


def answers(texts: list[str]) -> Iterator[list[Answer]]:
    return ([Answer(id=str(i), output=text, tokens=10 + i)] for i, text in enumerate(texts))


def test_answers_are_graded_by_the_one_grader() -> None:
    rows = graded(benchmark("b", ["1", "2", "3"]), answers(["The answer is 1.", "The answer is 3.", "I do not know"]))
    assert [(row.answer, row.correct) for row in rows] == [("1", True), ("3", False), (None, False)]
    assert [row.answer for row in rows] == [extract(row.output) for row in rows]
    assert [row.reason for row in rows] == ["", WRONG, NO_ANSWER]


def test_answers_too_slow_to_compare_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    own = benchmark("b", ["1", "2"])
    assert "too_slow" not in scoring.score(own, graded(own, answers(["1", "3"])))
    monkeypatch.setattr(scoring, "grade", lambda *_: Grade(False, "9^9^9", TOO_SLOW))
    assert scoring.score(own, graded(own, answers(["1", "3"])))["too_slow"] == 2


def test_averages_give_each_benchmark_the_same_weight() -> None:
    sets = [benchmark("a", ["1"] * 2), benchmark("b", ["1"] * 8), benchmark("c", ["1"] * 2, "ood")]
    texts = [["1", "1"], ["1"] * 2 + ["2"] * 6, ["2", "3"]]
    metrics = measure(sets, [graded(b, answers(t)) for b, t in zip(sets, texts, strict=True)], [])
    assert metrics["id"]["accuracy"] == pytest.approx((1 + 0.25) / 2)
    assert metrics["ood"]["accuracy"] == 0
    assert metrics["benchmarks"]["a"]["mean_tokens"] == 10.5


def test_groups_of_questions_are_told_apart_where_they_are_known() -> None:
    known = benchmark("a", ["1", "1", "1"], topics=["sum", "sum", "product"])
    metrics = measure([known], [graded(known, answers(["1", "2", "1"]))], [])
    groups = metrics["benchmarks"]["a"]["by_topic"]
    assert {name: (group["n"], group["correct"]) for name, group in groups.items()} == {"product": (1, 1), "sum": (2, 1)}
    assert "by_difficulty" not in metrics["benchmarks"]["a"]


def test_difficulties_are_told_apart_and_reach_the_run() -> None:
    known = benchmark("a", ["1", "1", "1", "1"], levels=[3, 1, 3, None])
    metrics = measure([known], [graded(known, answers(["1", "1", "2", "1"]))], [])
    groups = metrics["benchmarks"]["a"]["by_difficulty"]
    assert {level: (group["n"], group["correct"]) for level, group in groups.items()} == {"1": (1, 1), "3": (2, 1)}
    logged = scalars(metrics)
    assert (logged["eval/a/difficulty/1/accuracy"], logged["eval/a/difficulty/3/accuracy"]) == (1, 0.5)


def test_questions_seen_in_training_are_reported() -> None:
    own = benchmark("a", ["1", "1"])
    metrics = measure([own], [graded(own, answers(["1", "1"]))], [Question(id="t", question="what is 1", answer="1")])
    assert metrics["contamination"]["a"] == {"overlap": 1, "same": 1, "ids": ["1"]}
    logged = scalars(metrics)
    assert logged["eval/a/overlap"] == logged["eval/a/same"] == 1
    assert table("mind", metrics).caption == "1 of 2 questions of a share 8 words in a row with a training question (1 the same)"
    clean = measure([own], [graded(own, answers(["1", "1"]))], [])
    assert scalars(clean)["eval/a/overlap"] == 0 and not table("mind", clean).caption


def test_a_damaged_line_of_kept_answers_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    good = Answer(id="1", output="The answer is 1.\n", tokens=3).model_dump_json() + "\n"
    path.write_text(good + '{"id": "2", "out\n' + "\x00\x00\n" + good.replace('"1"', '"3"'))
    assert set(answering._Kept(tmp_path / "kept").answers) == {("1", 0), ("3", 0)}
    assert len(path.read_text().splitlines()) == 2
