"""Benchmarks: every shipped description loads its rows, bad rows are named, a user's file is enough for a new one."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from mind.benchmarks.contamination import WORDS, contamination
from mind.benchmarks.loading import FOLDER_VARIABLE, _shuffled, catalogue, load, read_spec
from mind.errors import ConfigError, DataError, MindError, PassingError
from mind.records import Question
from mind.workspace import Workspace

STARTERS = {
    "primer": ("primer-test", 128, "id"),
    "math": ("test-math", 144, "id"),
    "choice": ("test-choice", 96, "ood"),
    "yesno": ("test-yesno", 96, "ood"),
}
PUBLIC = {  # and the gold answer of the seventh row
    "gsm8k": ("number", "id", "260"),
    "svamp": ("number", "id", "13"),
    "math500": ("math", "id", "27"),
    "csqa": ("choice", "ood", "D"),
    "strategyqa": ("yesno", "ood", "no"),
}
PUBLIC_FOLDER = os.environ.get(FOLDER_VARIABLE)
OWN = {
    "title": "Mine",
    "domain": "ood",
    "kind": "number",
    "licence": "MIT",
    "file": "mine.jsonl",
    "columns": {"question": "q", "answer": "a"},
}
GOOD = b'{"q": "x", "a": "1"}\n'


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """An empty one, which sees no benchmark files of this machine."""
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    for switch in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(switch, True)
    (tmp_path / "data" / "benchmarks").mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir()
    return Workspace(tmp_path)


def put(workspace: Workspace, file: str, rows: Iterable[Any]) -> Path:
    path = workspace.data / "benchmarks" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def describe(workspace: Workspace, name: str = "mine", **changes: Any) -> None:
    spec = {**OWN, **changes}
    (workspace.benchmarks / f"{name}.yaml").write_text(
        json.dumps({key: value for key, value in spec.items() if value is not None})
    )  # JSON is YAML


def test_rows_may_lie_beside_their_description(workspace: Workspace) -> None:
    describe(workspace)
    put(workspace, "mine.jsonl", [{"q": "What is 2 plus 2?", "a": "5"}])
    (workspace.benchmarks / "mine.jsonl").write_text('{"q": "What is 2 plus 2?", "a": "4"}\n')
    assert [question.answer for question in load("mine", workspace).questions] == ["4"]


def test_every_shipped_description_is_whole(workspace: Workspace) -> None:
    specs = {name: read_spec(path) for name, path in catalogue(workspace).items()}
    assert set(specs) == {*STARTERS, *PUBLIC, "gpqa-diamond"}
    for name, spec in specs.items():
        assert (spec.hub is None) == (name in STARTERS)


@pytest.mark.parametrize("name", STARTERS)
def test_the_starter_sets(name: str, workspace: Workspace) -> None:
    file, count, domain = STARTERS[name]
    shutil.copy(str(files("mind.starter") / f"{file}.jsonl"), workspace.data / "benchmarks" / f"{name}.jsonl")
    found = load(name, workspace)
    assert (len(found.questions), found.domain) == (count, domain)
    assert all(question.kind == found.kind for question in found.questions)
    assert len(load(name, workspace, limit=5).questions) == 5


@pytest.mark.skipif(not PUBLIC_FOLDER, reason=f"${FOLDER_VARIABLE} names no folder of public benchmark files")
@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_sets_in_their_hub_schemas(name: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PUBLIC_FOLDER
    monkeypatch.setenv(FOLDER_VARIABLE, PUBLIC_FOLDER)
    found = load(name, workspace)
    assert (found.kind, found.domain, found.questions[6].answer) == PUBLIC[name]
    assert len(found.questions) >= 100


def gpqa(count: int) -> list[dict[str, str]]:
    return [
        {
            "Record ID": f"rec{i}",
            "Question": f"What is the mass of invented particle {i}?\n",
            "Correct Answer": f"{i} GeV\n",
            "Incorrect Answer 1": f"{i + 1} GeV",
            "Incorrect Answer 2": f"{i + 2} GeV",
            "Incorrect Answer 3": f"{i + 3} GeV",
            "Subdomain": "Invented physics",
            "Explanation": "",
        }
        for i in range(count)
    ]


def test_gpqa_from_a_file_of_its_shape(workspace: Workspace) -> None:
    put(workspace, "gpqa-diamond/train.jsonl", gpqa(60))
    found = load("gpqa-diamond", workspace)
    for i, question in enumerate(found.questions):
        assert question.choices["ABCD".index(question.answer)] == f"{i} GeV"
    letters = Counter(question.answer for question in found.questions)
    assert set(letters) == set("ABCD") and max(letters.values()) < 30
    assert load("gpqa-diamond", workspace).digest == found.digest


@given(st.lists(st.text(min_size=1), min_size=4, max_size=4, unique=True), st.permutations([0, 1, 2]))
def test_the_order_of_options_depends_on_their_texts_alone(options: list[str], order: list[int]) -> None:
    right, *wrong = options
    shuffled, letter = _shuffled("q", right, wrong)
    assert shuffled["ABCD".index(letter)] == right
    assert _shuffled("q", right, [wrong[i] for i in order]) == (shuffled, letter)


def test_offline_says_what_to_do(workspace: Workspace) -> None:
    with pytest.raises(DataError, match="Idavidrein/gpqa is not in the local cache, and HF_HUB_OFFLINE is set") as caught:
        load("gpqa-diamond", workspace)
    assert "data/benchmarks" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "error", "raised", "said"),
    [
        ("gpqa-diamond", DatasetNotFoundError("gated"), DataError, "gated, and this machine has no access"),
        ("gsm8k", DatasetNotFoundError("Dataset 'openai/gsm8k' doesn't exist"), DataError, "doesn't exist"),
        ("gsm8k", ValueError("Unknown split 'test'"), DataError, "Unknown split"),
        ("gsm8k", ConnectionError("no route"), PassingError, "the hub does not answer"),
    ],
)
def test_what_the_hub_answers(
    name: str, error: Exception, raised: type[MindError], said: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(raised, match=said):
        load(name, workspace)


def test_the_hub_is_asked_for_the_pinned_rows(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return [{"question": "What is 1 plus 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}]

    monkeypatch.setattr("datasets.load_dataset", answer)
    assert load("gsm8k", workspace).questions[0].answer == "2"
    ((args, kwargs),) = asked
    assert args == ("openai/gsm8k", "main")
    assert kwargs["split"] == "test" and len(kwargs["revision"]) == 40


def test_a_description_may_name_the_hub_in_place_of_a_file(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: [{"q": "What is 1 plus 1?", "a": "2"}])
    describe(workspace, file=None, hub={"id": "us/freight", "split": "test"})
    assert load("mine", workspace).questions[0].answer == "2"
    describe(workspace, file=None)
    with pytest.raises(ConfigError, match="neither file nor hub"):
        load("mine", workspace)


def test_the_same_rows_have_the_same_digest_from_any_kind_of_file(workspace: Workspace) -> None:
    import pandas

    rows = [{"q": f"What is {i} plus 1?", "a": str(i + 1)} for i in range(4)]
    put(workspace, "mine.jsonl", rows)
    pandas.DataFrame(rows).to_parquet(workspace.data / "benchmarks" / "mine.parquet")
    with (workspace.data / "benchmarks" / "mine.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["q", "a"])
        writer.writeheader()
        writer.writerows(rows)
    digests = set()
    for kind in ("jsonl", "parquet", "csv"):
        describe(workspace, file=f"mine.{kind}")
        digests.add(load("mine", workspace).digest)
    assert len(digests) == 1
    put(workspace, "mine.jsonl", [*rows[:-1], {"q": "What is 3 plus 1?", "a": "5"}])
    describe(workspace)
    assert load("mine", workspace).digest not in digests


def test_a_users_file_wins_over_the_package_and_over_the_shared_folder(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "mine.jsonl").write_text('{"q": "shared?", "a": "1"}\n')
    monkeypatch.setenv(FOLDER_VARIABLE, str(shared))
    describe(workspace)
    assert load("mine", workspace).questions[0].question == "shared?"
    put(workspace, "mine.jsonl", [{"q": "own?", "a": "1"}])
    assert load("mine", workspace).questions[0].question == "own?"
    describe(workspace, "primer")
    assert load("primer", workspace).questions[0].question == "own?"


def test_an_unknown_benchmark_names_the_nearest(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="did you mean 'gsm8k'"):
        load("gsm8", workspace)


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([], "no rows"),
        ([{"q": "x", "a": "1"}, {"q": "y"}], "line 2: no column 'a'"),
        ([{"q": "x", "a": None}], "line 1: column 'a' is empty"),
        ([{"q": " ", "a": "1"}], "line 1: column 'q' is empty"),
        ([{"q": "x", "a": "a dozen"}], "line 1: column 'a': the answer 'a dozen' is not a number"),
        ([{"q": "x", "a": "1", "id": "z"}, {"q": "y", "a": "1", "id": "z"}], "line 2: the id 'z' stands twice"),
        ([{"q": "x\ud800", "a": "1"}], "line 1: question: Input should be a valid string"),
        ([["q", "a"]], "line 1: list"),
    ],
)
def test_bad_rows_are_named(rows: list[Any], fault: str, workspace: Workspace) -> None:
    put(workspace, "mine.jsonl", rows)
    describe(workspace, columns={"question": "q", "answer": "a", **({"id": "id"} if "stands" in fault else {})})
    with pytest.raises(DataError) as caught:
        load("mine", workspace)
    assert fault in str(caught.value) and "mine.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"q": "x", "c": "A or B", "a": "A"}, "holds text"),
        ({"q": "x", "c": ["one", ""], "a": "A"}, "no list of texts"),
        ({"q": "x", "c": {"label": ["1", "2"], "text": ["one", "two"]}, "a": "A"}, "labelled 12"),
        ({"q": "x", "c": ["one", "two"], "a": "C"}, "not one of the letters A, B"),
    ],
)
def test_bad_options_are_named(row: dict[str, Any], fault: str, workspace: Workspace) -> None:
    put(workspace, "mine.jsonl", [row])
    describe(workspace, kind="choice", columns={"question": "q", "answer": "a", "choices": "c"})
    with pytest.raises(DataError, match=fault):
        load("mine", workspace)


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("mine.jsonl", GOOD + b'{"q": "y", \n', "line 2: not JSON"),
        ("mine.jsonl", GOOD + b'\n\n{"q": "y", "a": "a dozen"}\n', "line 4: column 'a'"),
        ("mine.jsonl", GOOD + b'\n\n{"q": "y", \n', "line 4: not JSON"),
        ("mine.jsonl", GOOD + b'{"q": "y", "a": ' + b"9" * 5000 + b"}\n", "line 2: not JSON"),
        ("mine.jsonl", GOOD + b"[" * 100_000, "line 2: not JSON"),
        ("mine.jsonl", GOOD + '{"q": "café", "a": "1"}\n'.encode("latin-1"), "line 2: not UTF-8"),
        ("mine.csv", "q,a\nx,1\ncafé,1\n".encode("latin-1"), "line 3: not UTF-8"),
        ("mine.csv", b'q,a\nx,1\n"' + b"y" * 140_000 + b'",1\n', "row 2: field larger than field limit"),
        ("mine.csv", b'q,a\n"x,\nand y",1\ny,two\n', "row 2: column 'a'"),
        ("mine.parquet", b"PAR1 and then nothing", "no Parquet file that can be read"),
        ("mine.parquet", b"", "no Parquet file that can be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_by_its_place(file: str, content: bytes, fault: str, workspace: Workspace) -> None:
    (workspace.data / "benchmarks" / file).write_bytes(content)
    describe(workspace, file=file)
    with pytest.raises(DataError) as caught:
        load("mine", workspace)
    assert f"{file}" in str(caught.value) and fault in str(caught.value)


@pytest.mark.parametrize("file", ["mine.jsonl", "mine.csv"])
def test_a_byte_order_mark_and_ends_of_lines_of_windows_do_not_matter(file: str, workspace: Workspace) -> None:
    text = '{"q": "x", "a": "1"}\r\n' if file.endswith("jsonl") else "q,a\r\nx,1\r\n"
    (workspace.data / "benchmarks" / file).write_bytes(text.encode("utf-8-sig"))
    describe(workspace, file=file)
    assert [(question.question, question.answer) for question in load("mine", workspace).questions] == [("x", "1")]


@pytest.mark.parametrize(
    ("given", "read"), [("Level 5", 5), ("level 2", 2), (3.0, 3), ("3.0", 3), (" 4 ", 4), (1, 1), ("", None), (None, None)]
)
def test_difficulties_are_read_as_sets_write_them(given: Any, read: int | None, workspace: Workspace) -> None:
    put(workspace, "mine.jsonl", [{"q": "x", "a": "1", "d": given}])
    describe(workspace, columns={"question": "q", "answer": "a", "difficulty": "d"})
    assert load("mine", workspace).questions[0].difficulty == read


@pytest.mark.parametrize("given", ['"hard"', "1e999", "3.7", '"Level ?"', "true", "[1]", "NaN", "1" * 4000])
def test_a_difficulty_that_is_none_is_named(given: str, workspace: Workspace) -> None:
    (workspace.data / "benchmarks" / "mine.jsonl").write_text(f'{{"q": "x", "a": "1", "d": {given}}}\n')
    describe(workspace, columns={"question": "q", "answer": "a", "difficulty": "d"})
    with pytest.raises(DataError, match="line 1: column 'd': the difficulty .* is no whole number"):
        load("mine", workspace)


def test_a_missing_file_says_where_it_was_looked_for(workspace: Workspace) -> None:
    describe(workspace)
    with pytest.raises(DataError, match="no file mine.jsonl"):
        load("mine", workspace)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"domain": "far"}, "domain"),
        ({"columns": {"question": "q"}}, "columns.answer"),
        ({"speed": 1}, "speed"),
        ({"kind": "choice"}, "columns.choices"),
        ({"answer_pattern": "####"}, "no group"),
        ({"answer_pattern": "("}, "answer_pattern"),
        ({"title": None}, "title"),
    ],
)
def test_a_bad_description_is_refused(changes: dict[str, Any], fault: str, workspace: Workspace) -> None:
    put(workspace, "mine.jsonl", [{"q": "x", "a": "1"}])
    describe(workspace, **changes)
    with pytest.raises(ConfigError, match=fault):
        load("mine", workspace)


def test_a_description_that_is_no_yaml_is_refused_with_its_line(workspace: Workspace) -> None:
    (workspace.benchmarks / "mine.yaml").write_text("title: x\n  domain: [\n")
    with pytest.raises(ConfigError, match=r"mine.yaml, line \d"):
        load("mine", workspace)


# ---------------------------------------------------------------------- contamination


def question(text: str, name: str = "t") -> Question:
    return Question(id=name, question=text, answer="1")


def test_shared_words_are_found_whatever_their_case_and_stops() -> None:
    training = ["Once upon a time, Ravi set out 7 knives and 6 spoons for supper!"]
    copy = question("once upon a time ravi set out 7 knives and 6 spoons for supper", "copy")
    part = question("In the inn Ravi set out 7 knives and 6 spoons. How many?", "part")
    other = question("In the inn Ravi set out 7 knives and 9 spoons. How many?", "other")
    found = contamination([copy, part, other], training)
    assert found.same == ("copy",)
    assert found.overlap == ("copy", "part")


def test_short_questions_must_be_equal() -> None:
    assert WORDS > 3
    found = contamination([question("What is 2?", "a"), question("What is 3?", "b")], ["what is 2"])
    assert found.overlap == found.same == ("a",)


def test_the_starter_tests_are_not_in_the_starter_training_sets() -> None:
    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (files("mind.starter") / f"{name}.jsonl").read_text().splitlines()]

    training = [row["question"] for name in ("primer-train", "train") for row in read(name)]
    for name in ("primer-test", "test-math", "test-choice", "test-yesno"):
        found = contamination([question(row["question"], row["id"]) for row in read(name)], training)
        assert not found.same
        assert len(found.overlap) <= 3
