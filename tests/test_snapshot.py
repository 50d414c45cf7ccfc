"""The rule of selection: hard questions all kept, easy ones thinned, and nothing varies between equal runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from mind import outputs, versioning
from mind.config import Config
from mind.errors import DataError
from mind.params import validate
from mind.records import PERSPECTIVES, Example, Mistake, MistakenView, Question, Rationale, read_jsonl, write_jsonl
from mind.stages import snapshot
from mind.workspace import Workspace


def pool(count: int, wrong: int = 0) -> tuple[list[Question], list[Rationale]]:
    """`count` questions with eight replies each, of which the first `wrong` perspectives were refused."""
    questions = [Question(id=f"q{i}", question=f"{i} + 1?", answer=str(i + 1)) for i in range(count)]
    rationales = [
        Rationale(
            question_id=q.id,
            perspective=p,
            text=f"{p} of {q.id}",
            answer=q.answer,
            accepted=k >= wrong,
            reason="" if k >= wrong else "wrong answer",
            request=f"{q.id}/{p}",
        )
        for q in questions
        for k, p in enumerate(PERSPECTIVES)
    ]
    return questions, rationales


def mistake(number: int, perspective: str, accepted: bool = True) -> Mistake:
    return Mistake(question_id=f"q{number}", perspective=perspective, text="slip", answer="9", accepted=accepted, request=f"m{number}")


def choose(questions: list[Question], rationales: list[Rationale], config: Config) -> tuple[list[Example], list[snapshot.Provenance]]:
    return snapshot.select(questions, rationales, [], config)


def with_rule(**rule: object) -> Config:
    return validate({"snapshot": rule})


def test_difficulty_is_the_share_of_refused_first_replies() -> None:
    _, rationales = pool(1, wrong=2)
    second = Rationale(question_id="q0", perspective=PERSPECTIVES[0], text="t", answer="1", accepted=True, attempt=2)
    assert snapshot.difficulty([*rationales, second]) == 0.25
    assert snapshot.difficulty([]) == 1


def test_hard_questions_are_all_kept_and_easy_ones_thinned() -> None:
    easy, hard = pool(400), pool(50, wrong=3)
    rule = with_rule(easy_below=0.2, easy_keep=0.5)
    kept, provenance = choose(*easy, rule)
    assert 150 < len(kept) < 250
    assert {row.fate for row in provenance} == {"kept", "down-sampled"}
    assert len(choose(*hard, rule)[0]) == 50


def test_a_pool_that_grows_keeps_its_earlier_draws() -> None:
    rule = with_rule(easy_keep=0.5)
    small = {e.id for e in choose(*pool(100), rule)[0]}
    large = {e.id for e in choose(*pool(200), rule)[0]}
    assert small == {i for i in large if int(i[1:]) < 100}


def test_views_are_the_accepted_ones_in_order_and_the_rest_has_a_reason() -> None:
    questions, rationales = pool(1, wrong=3)
    (example,), (row,) = choose(questions, list(reversed(rationales)), with_rule())
    assert tuple(example.views) == PERSPECTIVES[3:]
    assert row.dropped == dict.fromkeys(PERSPECTIVES[:3], "wrong answer")
    assert row.requests[PERSPECTIVES[7]] == f"q0/{PERSPECTIVES[7]}"


def test_a_mistake_comes_with_the_view_that_it_copies_and_only_with_it() -> None:
    questions, rationales = pool(4, wrong=2)
    accepted, refused = PERSPECTIVES[5], PERSPECTIVES[0]
    mistakes = [mistake(0, accepted), mistake(1, refused), mistake(2, accepted, accepted=False)]
    examples, provenance = snapshot.select(questions, rationales, mistakes, with_rule())
    assert [e.mistake for e in examples] == [MistakenView(perspective=accepted, text="slip", answer="9"), None, None, None]
    assert [row.mistake for row in provenance] == ["m0", "", "", ""]


def test_too_few_views_and_the_limit_drop_a_question() -> None:
    assert choose(*pool(3, wrong=6), with_rule(min_views=3))[0] == []
    kept, provenance = choose(*pool(5), with_rule(limit=2))
    assert [e.id for e in kept] == ["q0", "q1"] and provenance[4].fate == "over the limit"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    questions, rationales = pool(12, wrong=1)
    with outputs.stage_output(tmp_path / "rationales") as folder:
        write_jsonl(folder / "questions.jsonl", questions)
        write_jsonl(folder / "rationales.jsonl", rationales)
        write_jsonl(folder / "mistakes.jsonl", [mistake(0, PERSPECTIVES[5])])
        outputs.write_manifest(folder, stage="synthesize", inputs={}, config={}, counts={})
    return Workspace(tmp_path)


def test_equal_runs_make_the_same_dataset_version(workspace: Workspace) -> None:
    snapshot.run(with_rule(), workspace)
    first = versioning.version_of(workspace.dataset)
    snapshot.run(with_rule(), workspace)
    assert versioning.version_of(workspace.dataset) == first
    snapshot.run(with_rule(limit=5), workspace)
    assert versioning.version_of(workspace.dataset) != first
    assert len(list(read_jsonl(workspace.dataset / "train.jsonl", Example))) == 5
    counts = outputs.read_manifest(workspace.dataset)["counts"]
    assert (counts["views"], counts["mistakes"]) == (35, 1)


def test_an_empty_dataset_is_an_error_that_keeps_the_old_one(workspace: Workspace) -> None:
    snapshot.run(with_rule(), workspace)
    with pytest.raises(DataError, match="no question of 12 is left"):
        snapshot.run(with_rule(min_views=8), workspace)
    assert (workspace.dataset / "train.jsonl").exists()
