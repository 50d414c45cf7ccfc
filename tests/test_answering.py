"""mind.answering: samples and votes, and a student behind a server, over the wire. Resuming is in tests/test_evaluate.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mind import config
from mind.answering import Answer, Examinee, answer
from mind.benchmarks.loading import Benchmark
from mind.config import Evaluation, Mind
from mind.errors import ConfigError, StudentError, TeacherError
from mind.params import validate
from mind.records import Prediction, Question
from mind.scoring import BINS, calibration, graded, scalars
from mind.workspace import Workspace
from tests import tiny
from tests.hostile import Call, Server, completion, endpoint, refusal


def benchmark(count: int = 3, kind: Any = "number", choices: tuple[str, ...] = ()) -> Benchmark:
    gold = {"number": "13", "choice": "A"}[kind]
    rows = [Question(id=f"q{i}", question=f"What is 6 and {i}?", answer=gold, kind=kind, choices=choices) for i in range(count)]
    return Benchmark("sums", "id", kind, rows, "d")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("student"))


@pytest.fixture
def who(folder: Path, tmp_path: Path) -> Examinee:
    left = tmp_path / "students" / "mind"
    left.mkdir(parents=True)
    (left / "manifest.json").write_text("{}")
    return Examinee("mind", Mind(), config.Student(name=str(folder)), left)


# ------------------------------------------------------------------- samples


def test_samples_are_drawn_apart_and_the_same_again(who: Examinee, tmp_path: Path) -> None:
    settings = Evaluation(max_new_tokens=8, samples=3, temperature=1.0)
    first = answer([benchmark()], who, settings, Workspace(tmp_path / "a"), 17)[0]
    assert [[one.sample for one in own] for own in first] == [[0, 1, 2]] * 3
    assert len({one.output for own in first for one in own}) > 3
    assert answer([benchmark()], who, settings, Workspace(tmp_path / "b"), 17)[0] == first
    assert answer([benchmark()], who, settings, Workspace(tmp_path / "c"), 18)[0] != first
    fewer = settings.model_copy(update={"batch_tokens": 1})
    assert answer([benchmark(2)], who, fewer, Workspace(tmp_path / "d"), 17)[0] == first[:2]  # neither batch nor neighbours matter


def test_more_samples_keep_the_earlier_ones(who: Examinee, tmp_path: Path) -> None:
    here = Workspace(tmp_path)
    two = answer([benchmark()], who, Evaluation(max_new_tokens=8, samples=2), here, 17)[0]
    (file,) = (here.caches / "predictions").iterdir()
    before = file.read_bytes()
    three = answer([benchmark()], who, Evaluation(max_new_tokens=8, samples=3), here, 17)[0]
    assert [own[:2] for own in three] == two
    assert file.read_bytes().startswith(before) and len(file.read_bytes().splitlines()) == 9


def vote(*texts: str, kind: Any = "number", choices: tuple[str, ...] = ()) -> Prediction:
    samples = [Answer(id="q0", output=text, tokens=2, sample=i) for i, text in enumerate(texts)]
    (row,) = graded(benchmark(1, kind, choices), [samples])
    return row


@pytest.mark.parametrize(
    ("texts", "answer", "share"),
    [
        (("The answer is 12.", "The answer is 13.", "It is $13.00"), "13", 2 / 3),  # after reading, not as written
        (("The answer is 12.", "The answer is 13."), "12", 1 / 2),  # a tie goes to the first
        (("no idea", "well", "The answer is 13."), "13", 1 / 3),  # what gives no answer has no vote
        (("no idea", "well"), None, None),  # and what is not stated has no confidence
    ],
)
def test_the_most_frequent_answer_counts(texts: tuple[str, ...], answer: str | None, share: float | None) -> None:
    row = vote(*texts)
    assert (row.answer, row.samples, row.tokens) == (answer, texts, 2 * len(texts))
    assert row.confidence == (share if share is None else pytest.approx(share))
    assert row.correct is (answer == "13")


def test_one_answer_keeps_its_own_confidence_and_no_copy() -> None:
    (row,) = graded(benchmark(1), [[Answer(id="q0", output="The answer is 13.", tokens=5, confidence=0.25)]])
    assert (row.correct, row.confidence, row.samples) == (True, 0.25, ())


# --------------------------------------------------------------- calibration


def rows(*pairs: tuple[float | None, bool]) -> list[Prediction]:
    return [
        Prediction(benchmark="b", id=str(i), output="", answer="1", gold="1", correct=right, tokens=1, confidence=sure)
        for i, (sure, right) in enumerate(pairs)
    ]


def test_calibration_of_one_who_knows_and_of_one_who_boasts() -> None:
    honest = calibration(rows(*[(0.75, i % 4 > 0) for i in range(40)]))["calibration"]
    assert honest["ece"] == pytest.approx(0) and honest["brier"] == pytest.approx(0.75 * 0.0625 + 0.25 * 0.5625)
    boasting = calibration(rows(*[(1.0, False)] * 10))["calibration"]
    assert boasting["ece"] == boasting["brier"] == 1 and boasting["bins"][0]["from"] == (BINS - 1) / BINS


def test_calibration_weighs_its_bins_by_their_size() -> None:
    found = calibration(rows((0.05, True), (0.95, True), (0.95, True), (0.95, False)))["calibration"]
    assert found["ece"] == pytest.approx((1 * 0.95 + 3 * abs(0.95 - 2 / 3)) / 4)
    assert sum(one["n"] for one in found["bins"]) == found["n"] == 4


def test_without_a_stated_answer_there_is_nothing_to_calibrate() -> None:
    assert calibration(rows((None, True))) == {}
    assert calibration(rows((None, True), (0.5, False)))["calibration"]["n"] == 1


def test_samples_that_state_nothing_are_left_out_of_calibration() -> None:
    voted = [vote("no idea", "well"), vote("The answer is 13.", "The answer is 13."), vote("The answer is 13.", "hm")]
    found = calibration(voted)["calibration"]
    assert (found["n"], found["confidence"]) == (2, 0.75)


def test_calibration_reaches_the_run() -> None:
    found = scalars({"benchmarks": {"b": {"accuracy": 0.5, **calibration(rows((0.5, True), (0.5, False)))}}})
    assert found == {"eval/b/accuracy": 0.5, "eval/b/confidence": 0.5, "eval/b/ece": 0.0, "eval/b/brier": 0.25}


# ------------------------------------------------------------- behind a server


async def answers(call: Call) -> None:
    text = call.body["messages"][0]["content"]
    await call.send(completion(f"<think>hm</think>{text[-2]}: the answer is 13."))


@pytest.fixture
def server() -> Iterator[Server]:
    with endpoint(answers) as found:
        yield found


def served(server: Server, **more: Any) -> Evaluation:
    return validate(
        {"evaluation": {"backend": "openai", "endpoint": {"base_url": server.url, "model": "org/{variant}"}, **more}}
    ).evaluation


def test_a_served_student_is_asked_once(server: Server, who: Examinee, tmp_path: Path) -> None:
    here = Workspace(tmp_path)
    settings = served(server, max_new_tokens=99)
    found = answer([benchmark()], who, settings, here, 17)[0]
    assert [[one.output for one in own] for own in found] == [[f"{i}: the answer is 13."] for i in range(3)]
    assert [own[0].tokens for own in found] == [5, 5, 5]
    bodies = sorted((call.body for call in server.calls), key=str)
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in bodies} == {("org/mind", 0.0, 99)}
    assert bodies[0]["messages"][0]["content"] == who.ask(benchmark().questions[0])
    assert answer([benchmark()], who, settings, here, 17)[0] == found and len(server.calls) == 3
    (who.folder / "manifest.json").write_text('{"trained": "again"}')
    answer([benchmark()], Examinee("mind", who.method, who.settings, who.folder), settings, here, 17)
    assert len(server.calls) == 6  # other weights under the same name
    assert "student" not in vars(who)  # nobody needed its weights here


def test_samples_of_a_served_student_are_separate_requests(server: Server, who: Examinee, tmp_path: Path) -> None:
    settings = served(server, samples=3, temperature=0.9)
    found = answer([benchmark(2)], who, settings, Workspace(tmp_path), 17)[0]
    assert [len(own) for own in found] == [3, 3] and len(server.calls) == 6
    assert {call.body["temperature"] for call in server.calls} == {0.9}


def test_a_refusing_server_ends_the_evaluation(who: Examinee, tmp_path: Path) -> None:
    async def refuses(call: Call) -> None:
        await call.send(refusal("no such model", "model_not_found"), 404)

    with endpoint(refuses) as server, pytest.raises(TeacherError, match="knows no model 'org/mind'"):
        answer([benchmark()], who, served(server), Workspace(tmp_path), 17)


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"backend": "openai"}, "wants endpoint"),
        ({"endpoint": {"base_url": "embedded", "model": "m"}}, "embedded teacher has no student"),
        ({"endpoint": {"base_url": "http://localhost:1/v1", "model": "m", "temperature": 0.1}}, "evaluation.temperature"),
        ({"endpoint": {"model": "m"}}, "missing"),
    ],
)
def test_an_endpoint_that_cannot_be_meant_is_refused(group: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate({"evaluation": group})


def test_without_vllm_its_backend_says_what_else_there_is(who: Examinee, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(StudentError, match="evaluation.backend: hf"):
        answer([benchmark()], who, Evaluation(backend="vllm"), Workspace(tmp_path), 17)
