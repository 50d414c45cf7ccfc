"""What long work says of itself."""

from __future__ import annotations

import pytest

from mind import progress


def test_the_time_left_is_known_before_the_first_unit_is_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    shown = progress.Bar("evaluate", 10, "answers", None)
    shown.started -= 20  # seconds ago
    shown.under_way(2.0)
    assert "evaluate: 0/10  0.1 answers/s  0:01:20 left" in capsys.readouterr().err
    shown.under_way(0.0)
    shown.advance(4, note="primer")
    assert "evaluate: 4/10  0.2 answers/s  primer  0:00:30 left" in capsys.readouterr().err


def test_no_time_left_is_guessed_from_next_to_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    shown = progress.Bar("evaluate", 300, "answers", None)
    shown.started -= 60
    shown.under_way(0.2)
    assert capsys.readouterr().err == "evaluate: 0/300  0.00333 answers/s\n"


def test_what_an_earlier_process_did_is_not_in_the_rate() -> None:
    shown = progress.Bar("train", 100, "questions", None)
    shown.resume(90)
    shown.started -= 10
    shown.advance(5)
    assert shown.rate() == pytest.approx(0.5, rel=0.01)
