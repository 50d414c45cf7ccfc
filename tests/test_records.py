"""Files between stages: a bad row is named by line and field; an output folder is whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mind import memory, outputs
from mind.errors import DataError, MindError
from mind.records import Prediction, Question, read_jsonl, read_questions, write_jsonl

GOOD = '{"id": "a", "question": "1 + 1?", "answer": "2"}\n'


def test_rows_survive_a_round_trip(tmp_path: Path) -> None:
    rows = [
        Question(id="a", question="Ünï?", answer="2"),
        Question(id="b", question="q", answer="C", kind="choice", choices=("x", "y", "z")),
    ]
    assert write_jsonl(tmp_path / "q.jsonl", rows) == 2
    assert list(read_jsonl(tmp_path / "q.jsonl", Question)) == rows


def test_a_prediction_without_a_reason_can_be_read(tmp_path: Path) -> None:
    """As older reports hold them, and as they keep them in MLflow."""
    (tmp_path / "p.jsonl").write_text(
        '{"benchmark": "b", "id": "1", "output": "", "answer": null, "gold": "1", "correct": false, "tokens": 3}\n'
    )
    (row,) = read_jsonl(tmp_path / "p.jsonl", Prediction)
    assert row.reason == "" and not row.correct


def test_a_number_as_answer_becomes_text(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"id": "a", "question": "1 + 1?", "answer": 2}\n')
    assert read_questions(tmp_path / "q.jsonl")[0].answer == "2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD + "{oops\n", "line 2: not JSON"),
        (GOOD + "\n" + '{"id": "b", "question": "q"}\n', "line 3: field 'answer'"),
        (GOOD + '{"id": "b", "question": "q", "answer": "1", "anwser": "2"}\n', "field 'anwser'"),
        (GOOD + GOOD, "the id 'a' stands twice"),
        ("\n", "holds no question"),
        (GOOD + "[1]\n", "line 2"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(DataError) as caught:
        read_questions(tmp_path / "q.jsonl")
    assert says in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_questions(tmp_path / "absent.jsonl")


def test_an_output_is_whole_or_absent(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), outputs.stage_output(folder) as partial:
        (partial / "half").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with outputs.stage_output(folder) as partial:
        (partial / "whole").write_text("1")
    with pytest.raises(ZeroDivisionError), outputs.stage_output(folder) as partial:
        raise ZeroDivisionError
    assert (folder / "whole").read_text() == "1" and list(tmp_path.iterdir()) == [folder]


def test_an_output_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MindError, match="cannot write"), outputs.stage_output(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_full_disk_says_so_wherever_it_is_met(tmp_path: Path, number: int) -> None:
    with pytest.raises(MindError, match="free some space"), outputs.stage_output(tmp_path / "out"):
        raise OSError(number, os.strerror(number))  # of a write to an open file: no path


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS], ids=errno.errorcode.get)
def test_an_output_that_may_not_be_written_says_so_and_a_foreign_file_is_named_itself(tmp_path: Path, number: int) -> None:
    with pytest.raises(MindError, match="cannot write"), outputs.stage_output(tmp_path / "out") as partial:
        raise OSError(number, os.strerror(number), str(partial / "model"))
    for foreign in ((str(tmp_path / "key"),), ()):
        with pytest.raises(OSError) as caught, outputs.stage_output(tmp_path / "out"):
            raise OSError(number, os.strerror(number), *foreign)
        assert caught.value.errno == number


def test_an_error_of_the_work_inside_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), outputs.stage_output(tmp_path / "out"):
        (tmp_path / "absent").read_text()
    with pytest.raises(OSError) as caught, outputs.stage_output(tmp_path / "out"):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    assert memory.is_exhausted(caught.value)


def test_a_manifest_is_the_same_for_equal_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        outputs.write_manifest(tmp_path / name, stage="s", inputs={"x": "1"}, config={"b": 1, "a": 2}, counts={"n": 1})
    assert outputs.digest_path(tmp_path / "a") == outputs.digest_path(tmp_path / "b")
    assert outputs.read_manifest(tmp_path / "a")["counts"] == {"n": 1}
    (tmp_path / "a" / outputs.MANIFEST).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        outputs.read_manifest(tmp_path / "a")
    with pytest.raises(DataError, match="missing"):
        outputs.read_manifest(tmp_path / "absent")


def test_a_folder_digest_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = outputs.digest_path(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = outputs.digest_path(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, renamed, outputs.digest_path(tmp_path)}) == 3
