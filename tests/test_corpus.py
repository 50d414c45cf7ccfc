"""Datasets that are read as training asks for them: the same questions, the same course, nothing tokenised twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mind import config
from mind.errors import DataError
from mind.methods.base import Setup
from mind.methods.features import NAME, Features
from mind.methods.table import build
from mind.records import Example, Rows, read_jsonl, write_jsonl
from mind.training import checkpoint, corpus, loop
from mind.training.peers import Peers
from tests import tiny
from tests.test_training import MIND, PLAIN, Stop, assert_same, resolved, stop_at

SETUP = Setup(questions=6, width=32, batch_questions=1, step_questions=1, seed=3)
EVERY = [config.Mind(), PLAIN, config.Single(perspective="planning"), config.Sbs(view="all"), config.Mcc(), config.Edit()]


# ---------------------------------------------------------------------- rows


def test_rows_are_those_of_the_file_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_jsonl(path, tiny.examples(5))
    path.write_text(path.read_text().replace("\n", "\n\n", 1), encoding="utf-8")  # blank lines are passed over
    rows, all_rows = Rows(path, Example), list(read_jsonl(path, Example))
    assert len(rows) == 5 and list(rows) == all_rows and rows[-1] == all_rows[-1] and rows[3] == all_rows[3]
    assert list(rows[1::2]) == all_rows[1::2] and rows[1:][-1] == all_rows[-1]
    with pytest.raises(IndexError):
        rows[5]


def test_a_malformed_row_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_jsonl(path, tiny.examples(3))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"id": "x"}', lines[2]]), encoding="utf-8")
    rows = Rows(path, Example)
    assert rows[2].id == "sum-2"
    with pytest.raises(DataError, match="line 2: field 'question'"):
        rows[1]
    with pytest.raises(DataError, match="cannot read"):
        Rows(tmp_path / "absent.jsonl", Example)


# -------------------------------------------------------------------- corpus


@pytest.mark.parametrize("options", EVERY, ids=lambda options: options.method)
def test_what_is_stored_is_what_was_encoded(tmp_path: Path, options: Any) -> None:
    method, tokenizer, examples = build(options, SETUP), tiny.tokenizer(), tiny.examples(6)
    memory = corpus.encode_all(tokenizer, method, examples, 200, "drop")
    corpus.encode_to(tmp_path / "x", tokenizer, method, examples, 200, "drop")
    stored = corpus.open_corpus(tmp_path / "x", method)
    assert stored.summary == memory.summary
    assert list(stored.questions) == memory.questions
    assert [type(question) for question in stored.questions] == [type(question) for question in memory.questions]
    assert list(stored.questions[0].views) == list(memory.questions[0].views)


def test_a_corpus_is_tokenised_once_and_a_failed_one_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, tokenizer, examples = build(PLAIN, SETUP), tiny.tokenizer(), tiny.examples(6)
    with pytest.raises(DataError, match="tokens with its longest view"):
        corpus.encode_to(tmp_path / "x", tokenizer, method, examples, 180, "refuse")
    assert not (tmp_path / "x").exists()
    corpus.encode_to(tmp_path / "x", tokenizer, method, examples, 500, "refuse")
    corpus.encode_to(tmp_path / "x", None, method, examples, 500, "refuse")  # a second time nothing is asked of a tokenizer


def train(folder: Path, *, log: loop.Log = lambda values, step: None, method: Any = MIND, stored: bool = True) -> Any:
    student, examples = tiny.load(), tiny.examples(6)
    settings = resolved(method, epochs=4)
    places = {"checkpoints": folder / "checkpoints", "encoded": folder / "encoded"} if stored else {}
    return loop.train(student, settings, examples, build, log=log, **places), student


@pytest.mark.parametrize("method", [MIND, config.Mcc()], ids=["mind", "mcc"])
def test_a_stored_corpus_takes_the_course_of_one_in_memory(tmp_path: Path, method: Any) -> None:
    assert_same(train(tmp_path, method=method), train(tmp_path, method=method, stored=False))


# ------------------------------------------------------------------ features


def test_a_run_goes_on_from_either_of_its_newest_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The features on disk are ahead of the older one; what it needs of them lies in it."""
    whole = train(tmp_path / "whole")
    with pytest.raises(Stop):
        train(tmp_path, log=stop_at(14))
    newest = sorted((tmp_path / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(b"torn")
    assert_same(train(tmp_path), whole)
    assert newest.name in capsys.readouterr().err


def test_a_run_that_dies_right_after_a_checkpoint_goes_on_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, saved = train(tmp_path / "whole"), checkpoint.save

    def dying(folder: Path, step: int, state: Any) -> None:
        saved(folder, step, state)
        if step == 9:
            raise Stop

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(Stop):
        train(tmp_path)
    monkeypatch.undo()
    assert_same(train(tmp_path), whole)


def test_checkpoints_do_not_grow_with_the_features_of_the_dataset(tmp_path: Path) -> None:
    train(tmp_path)
    state = checkpoint.load(tmp_path / "checkpoints")
    assert state is not None
    rows = [len(changes[0]) for changes in state["method"]["memory"]["features"].values()]
    assert max(rows) <= 3  # a checkpoint every three steps of one question
    assert (tmp_path / "checkpoints" / NAME).stat().st_size == 6 * 9 * 32 * 4


def test_features_are_read_as_they_were_written(tmp_path: Path) -> None:
    for folder in (tmp_path, None):
        features = Features(3, 2, 4, folder, Peers())
        features.clear()
        features.put(1, torch.ones(4), {1: torch.full((4,), 2.0)})
        features.begin()
        features.put(1, torch.full((4,), 3.0), {})
        questions, views = features.rows(torch.tensor([1, 2]))
        assert questions[0].tolist() == [3] * 4 and views[0].tolist() == [[0] * 4, [2] * 4]
        assert not questions[1].any() and not views[1].any()
