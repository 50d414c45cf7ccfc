"""mind.reevaluation with real (tiny) students in a real registry: what lacks a result is found, measured once, and stays on the student's run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from mind import config, doors, outputs, params, reevaluation, registry, scoring, store, tracking
from mind.config import Config
from mind.params import validate
from mind.reevaluation import Accuracy, Pending, Result
from mind.students import decoding
from mind.students.loading import save_student
from mind.workspace import Workspace
from tests import tiny

SHAPE = "title: T\ndomain: id\nkind: number\nlicence: none\nfile: {file}\ncolumns: {{question: question, answer: answer}}\n"
LIMIT = 5


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The untouched student, evaluated by nobody, and a trained one in the registry; shared, because an MLflow store takes seconds."""
    made = Workspace(tmp_path_factory.mktemp("home"))
    (made.data / "benchmarks").mkdir(parents=True)
    rows(made, "sums", [(f"What is {i} plus 1?", i + 1) for i in range(8)])
    tiny.save(made.root / "student")
    settings = made_config(made)
    for variant, method in (("base", {"method": "base"}), ("mind", {"method": "mind"})):
        folder = made.student(variant)
        folder.mkdir(parents=True)
        own = settings.variant(variant)
        if variant == "mind":
            save_student(tiny.load(seed=1), config.Student(name=str(made.root / "student"), tuning="full"), folder)
        content = {"method": method if variant == "base" else own.method.model_dump(), "student": own.student.model_dump()}
        outputs.write_manifest(folder, stage="distill", inputs={}, config=content, counts={}, fingerprint=variant * 8)
        with tracking.open_run(made, settings.tracking, name=variant, fingerprint=variant * 8) as run:
            if variant == "mind":
                run.register(folder, "mind-tiny", "mind")
    return made


def rows(workspace: Workspace, name: str, pairs: Sequence[tuple[str, int]]) -> None:
    file = workspace.data / "benchmarks" / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"question": question, "answer": str(answer)}) + "\n" for question, answer in pairs))
    workspace.benchmarks.mkdir(exist_ok=True)
    (workspace.benchmarks / f"{name}.yaml").write_text(SHAPE.format(file=file.name))


def made_config(workspace: Workspace, **evaluation: Any) -> Config:
    return validate(
        {
            "student": {"name": str(workspace.root / "student")},
            "variants": {"base": {"method": "base"}, "mind": {"method": "mind"}},
            "evaluation": {"benchmarks": ["sums"], "limit": LIMIT, "max_new_tokens": 8, **evaluation},
        }
    )


def pairs(found: Sequence[Pending]) -> list[tuple[str, str, str]]:
    return [(one.variant, one.student, one.benchmark) for one in found]


def test_a_pair_is_measured_once_and_again_when_its_questions_change(home: Workspace) -> None:
    settings = made_config(home)
    todo = reevaluation.pending(settings, home)
    assert pairs(todo) == [("base", "untrained", "sums"), ("mind", "mind-tiny@1", "sums")]
    results = [reevaluation.evaluate(settings, home, one) for one in todo]
    assert [result.old for result in results] == [None, None] and not any(result.regression for result in results)
    assert reevaluation.pending(settings, home) == []

    client = MlflowClient(f"sqlite:///{store.database_of(home, settings.tracking)}")
    run_id = registry.find_run(home, settings.tracking, "mind" * 8)
    run = client.get_run(run_id)
    assert run.data.metrics["eval/sums/accuracy"] == results[1].new.value and run.info.status == "FINISHED"
    assert scoring.latest(run.data.tags, "sums") == (results[1].new.correct, LIMIT)
    folder = f"reevaluated/sums/{todo[1].digest[:16]}"
    assert {Path(file.path).name for file in client.list_artifacts(run_id, folder)} == {"metrics.json", "predictions.jsonl"}

    rows(home, "sums", [(f"What is {i} plus 2?", i + 2) for i in range(8)])
    again = reevaluation.pending(settings, home)
    assert pairs(again) == pairs(todo) and again[0].digest != todo[0].digest
    result = reevaluation.evaluate(settings, home, again[1])
    assert result.old == results[1].new
    assert pairs(reevaluation.pending(settings, home)) == [("base", "untrained", "sums")]


def test_a_file_dropped_into_the_folder_is_found(home: Workspace) -> None:
    settings = made_config(home)
    rows(home, "dropped", [("What is 2 plus 2?", 4), ("What is 3 plus 3?", 6)])
    try:
        assert {one.benchmark for one in reevaluation.pending(settings, home)} >= {"dropped"}
    finally:
        (home.benchmarks / "dropped.yaml").unlink()


def test_a_student_that_is_only_in_the_store_is_the_same_student(home: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder in the workspace was overwritten by another training: the registered one is measured, from a copy."""
    settings = made_config(home, max_new_tokens=9)
    rows(home, "others", [("What is 5 plus 2?", 7), ("What is 1 plus 3?", 4)])
    asked: list[str] = []
    generate = decoding.generate

    def seen(model: Any, *args: Any, **options: Any) -> Any:
        asked.append(f"{float(model.lm_head.weight.sum()):.4f}")
        return generate(model, *args, **options)

    monkeypatch.setattr(decoding, "generate", seen)
    (todo,) = [one for one in reevaluation.pending(settings, home) if (one.variant, one.benchmark) == ("mind", "others")]
    moved = home.student("mind").rename(home.root / "moved")
    try:
        tiny.save(home.student("mind"), seed=2)
        reevaluation.evaluate(settings, home, todo)
    finally:
        (home.benchmarks / "others.yaml").unlink()
        for path in home.student("mind").iterdir():
            path.unlink()
        home.student("mind").rmdir()
        moved.rename(home.student("mind"))
    assert asked == [f"{float(tiny.model(seed=1).lm_head.weight.sum()):.4f}"]


def test_questions_that_changed_meanwhile_are_not_measured_under_the_old_name(home: Workspace) -> None:
    settings = made_config(home)
    rows(home, "moving", [("What is 2 plus 2?", 4), ("What is 3 plus 3?", 6)])
    try:
        todo = next(one for one in reevaluation.pending(settings, home) if one.benchmark == "moving")
        rows(home, "moving", [("What is 2 plus 3?", 5)])
        with pytest.raises(reevaluation.DataError, match="changed meanwhile"):
            reevaluation.evaluate(settings, home, todo)
    finally:
        (home.benchmarks / "moving.yaml").unlink()


def test_a_benchmark_that_cannot_be_loaded_stops_no_other(home: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """It stands at the end and fails there: the others are measured by then, and the command exits as for its error."""
    settings = made_config(home)
    (home.root / "params.yaml").write_text(params.dump_raw(settings.model_dump(mode="json")))
    rows(home, "broken", [("What is 2 plus 2?", 4)])
    rows(home, "whole", [("What is 2 plus 2?", 4)])
    file = home.data / "benchmarks" / "broken.jsonl"
    file.write_text('{"question": "What is 2 plus 2?", "answer": "four"}\n')
    try:
        todo = pairs(reevaluation.pending(settings, home))
        assert todo[-2:] == [("base", "untrained", "broken"), ("mind", "mind-tiny@1", "broken")]
        assert {name for _, _, name in todo[:-2]} >= {"whole"} and "broken" not in {name for _, _, name in todo[:-2]}
        doors.reevaluate(home, dry_run=True)
        assert "benchmark 'broken' cannot be loaded" in capsys.readouterr().err
        with pytest.raises(reevaluation.DataError, match=r"broken.jsonl: line 1: .*'four' is not a number"):
            doors.reevaluate(home)
        assert pairs(reevaluation.pending(settings, home)) == todo[-2:]
        last = reevaluation.pending(settings, home)[-1]
        rows(home, "broken", [("What is 2 plus 2?", 4)])  # mended after it was looked for
        assert reevaluation.evaluate(settings, home, last).pending.digest
        assert pairs(reevaluation.pending(settings, home)) == [("base", "untrained", "broken")]
    finally:
        for name in ("broken", "whole"):
            (home.benchmarks / f"{name}.yaml").unlink()


def test_without_a_store_there_is_nothing_to_measure(tmp_path: Path) -> None:
    empty = Workspace(tmp_path)
    (empty.data / "benchmarks").mkdir(parents=True)
    rows(empty, "sums", [("What is 2 plus 2?", 4)])
    assert reevaluation.pending(made_config(empty), empty) == []
    assert not (tmp_path / "mlflow").exists()


@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [((80, 100), (50, 100), True), ((80, 100), (75, 100), False), ((50, 100), (80, 100), False), (None, (0, 9), False)],
)
def test_a_regression_is_more_than_chance(old: tuple[int, int] | None, new: tuple[int, int], worse: bool) -> None:
    todo = Pending("mind", "mind-tiny@1", "sums", "d" * 64, new[1], "f", None)
    result = Result(todo, reevaluation._accuracy(*new), reevaluation._accuracy(*old) if old else None)
    assert result.regression is worse
    assert ("regression" in str(result)) is worse
    assert isinstance(result.new, Accuracy) and result.new.low <= result.new.value <= result.new.high


def test_the_command_says_what_it_would_do(home: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    (home.root / "params.yaml").write_text(params.dump_raw(made_config(home).model_dump(mode="json")))
    rows(home, "fresh", [("What is 2 plus 2?", 4)])
    try:
        doors.reevaluate(home, dry_run=True)
    finally:
        (home.benchmarks / "fresh.yaml").unlink()
    assert "to measure: mind (mind-tiny@1) on fresh: 1 questions" in capsys.readouterr().err
