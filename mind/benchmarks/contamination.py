"""Training questions, test questions -> which of the latter the student may have seen. Called by stages.evaluate."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mind.records import Question

WORDS = 8
"""Words in a row that two questions must share. Thirteen, the custom for web text, is longer than many of our questions."""


@dataclass(frozen=True)
class Contamination:
    """Ids of test questions that share `WORDS` words in a row with training (`overlap`), or equal a training question (`same`)."""

    overlap: tuple[str, ...]
    same: tuple[str, ...]


def contamination(tests: Sequence[Question], training: Iterable[str]) -> Contamination:
    """Compare word by word, without case and punctuation; a question shorter than `WORDS` must be equal as a whole."""
    seen: set[tuple[str, ...]] = set()
    whole: set[tuple[str, ...]] = set()
    for text in training:
        words = _words(text)
        whole.add(words)
        seen |= _runs(words)
    return Contamination(
        overlap=tuple(test.id for test in tests if _runs(_words(test.question)) & seen),
        same=tuple(test.id for test in tests if _words(test.question) in whole),
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


def _runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {words[start : start + WORDS] for start in range(max(1, len(words) - WORDS + 1))}
