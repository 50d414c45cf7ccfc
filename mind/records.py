"""What crosses a boundary: the rows of the files that stages hand to each other, and how they are read and written.

Question -> (teacher) -> Rationale -> (judge, snapshot) -> Example -> (distil, evaluate) -> Prediction
"""

from __future__ import annotations

import json
import os
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mind.errors import DataError

PERSPECTIVES = (
    "formal_symbolic",
    "intuitive",
    "decomposition",
    "planning",
    "analogy",
    "socratic",
    "contrastive",
    "counterfactual",
)
"""The eight ways of thinking, in the order of every table, picture and MetaNet head."""

DOMAINS = {"id": "in distribution", "ood": "out of distribution"}
"""How a benchmark's questions stand to those of the dataset, in the order of every table and picture."""

Kind = Literal["number", "choice", "yesno", "math"]
"""What an answer is: a number, an option letter, yes or no, or a LaTeX / symbolic expression."""

ANSWER_LINE = "The answer is {answer}."
"""The one line that ends every target text y_k = r_k + answer line (method, section 1)."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Question(Record):
    """One problem with its gold answer. `choices` only for kind 'choice', where `answer` is a letter."""

    id: str = Field(min_length=1, max_length=200)
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    kind: Kind = "number"
    choices: tuple[str, ...] = ()
    topic: str | None = None
    difficulty: int | None = None

    @field_validator("answer", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class Rationale(Record):
    """One reply of the teacher with the judge's verdict: a row of rationales/rationales.jsonl.

    `text` is the reasoning without its answer line; `request` the digest of the request that bought it.
    """

    question_id: str
    perspective: str
    text: str
    answer: str | None
    accepted: bool
    reason: str = ""  # why it was dropped; empty when accepted
    attempt: int = 1
    request: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    scores: dict[str, int] = {}  # of the LLM judge, where one was asked: steps and fidelity, 1 to 5


class Mistake(Record):
    """The teacher's wrong solution of one question: a row of rationales/mistakes.jsonl (`synthesis.mistakes`).

    A copy of the accepted view `perspective` up to one key step, then wrong to the end. `text` is without its answer line.
    """

    question_id: str
    perspective: str  # '' when the reply names none
    text: str
    answer: str | None
    accepted: bool
    reason: str = ""  # why it cannot be used; empty when accepted
    request: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class MistakenView(Record):
    """An accepted `Mistake` as a question of the dataset holds it: the view that it copies, its text, its wrong answer."""

    perspective: str
    text: str
    answer: str


class Example(Record):
    """One question of the dataset with the rationales that were accepted: a row of dataset/train.jsonl."""

    id: str
    question: str
    answer: str
    kind: Kind = "number"
    choices: tuple[str, ...] = ()
    topic: str | None = None
    difficulty: float = Field(ge=0, le=1)  # 1 - share of the first replies that the judge accepted
    views: dict[str, str]  # perspective -> rationale, in the order of PERSPECTIVES
    mistake: MistakenView | None = None  # of one of these views


class Prediction(Record):
    """One generated answer and its grade: a row of reports/V/predictions.jsonl."""

    benchmark: str
    id: str
    output: str
    answer: str | None  # as extracted; None when no answer was found
    gold: str
    correct: bool
    reason: str = ""  # why it is not correct, as grading.Grade says it; empty when correct and in older reports
    tokens: int  # of all samples
    confidence: float | None = None  # the student's probability of the answer it stated; of several samples the share that agrees
    samples: tuple[str, ...] = ()  # all outputs, where several were drawn


R = TypeVar("R", bound=Record)
T = TypeVar("T")


def read_jsonl(path: Path, kind: type[R]) -> Iterator[R]:
    """Yield the rows of a JSON Lines file as `kind`; blank lines are passed over.

    Raises:
        DataError: the file is missing, or a row is malformed (names the line and the field).
    """
    with _opened(path, kind) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parsed(path, number, line, kind)


class Lazy(Sequence[T]):
    """A sequence that makes an item when it is asked for; a slice of it is made of the same items, no earlier."""

    @abstractmethod
    def item(self, place: int) -> T:
        """The one at `place`, 0 <= place < len."""

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[T]: ...
    def __getitem__(self, place: int | slice) -> T | Sequence[T]:
        places = range(len(self))[place]
        return Subset(self, places) if isinstance(places, range) else self.item(places)


class Rows(Lazy[R]):
    """The rows of a JSON Lines file, each read when it is asked for: what stands in memory does not grow with the rows' size.

    Raises:
        DataError: as `read_jsonl`; a malformed row when it is read.
    """

    def __init__(self, path: Path, kind: type[R]) -> None:
        self._path, self._kind = path, kind
        self._numbers, self._starts = array("q"), array("q")
        place = 0
        with _opened(path, kind) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    self._numbers.append(number)
                    self._starts.append(place)
                place += len(line)
            self._starts.append(place)
            self._file = os.dup(lines.fileno())
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._numbers)

    def item(self, place: int) -> R:
        start, end = self._starts[place], self._starts[place + 1]  # of this row and the next: blank lines between do not matter
        return _parsed(self._path, self._numbers[place], os.pread(self._file, end - start, start), self._kind)


class Subset(Lazy[T]):
    """The items at some places of a sequence."""

    def __init__(self, whole: Sequence[T], places: Sequence[int]) -> None:
        self._whole, self._places = whole, places

    def __len__(self) -> int:
        return len(self._places)

    def item(self, place: int) -> T:
        return self._whole[self._places[place]]


def _opened(path: Path, kind: type[R]) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", wanted=f"a JSON Lines file of {kind.__name__} rows") from None


def _parsed(path: Path, number: int, line: bytes, kind: type[R]) -> R:
    try:
        return kind.model_validate(json.loads(line))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason})", wanted="one JSON object a line") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})",
            wanted="one JSON object a line",
        ) from None
    except ValidationError as error:
        faults = "; ".join(f"field '{'.'.join(map(str, e['loc'])) or '(row)'}': {e['msg']}" for e in error.errors())
        known = ", ".join(kind.model_fields)
        raise DataError(f"{path}, line {number}: {faults}", wanted=f"the fields {known}") from None


def read_questions(path: Path) -> list[Question]:
    """All questions of a pool, with unique ids.

    Raises:
        DataError: missing, malformed or empty file, or an id that stands twice.
    """
    questions = list(read_jsonl(path, Question))
    if not questions:
        raise DataError(f"{path} holds no question", wanted="at least one JSON row with id, question and answer")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(f"{path}: the id '{question.id}' stands twice", wanted="a unique id a question", do="rename one of them")
        seen.add(question.id)
    return questions


def write_jsonl(path: Path, rows: Iterable[Record]) -> int:
    """Write rows as JSON Lines (UTF-8, keys in field order, defaults included); return how many."""
    count = 0
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(row.model_dump_json() + "\n")
            count += 1
    return count
