"""A benchmark's name -> its questions, checked. Called by stages.evaluate.

A benchmark is one small YAML file: where its rows are and which column means what. Those of the package can be overridden, and
others added, by files in the workspace's folder `benchmarks/`. Rows are looked for in this order: beside the YAML file, data/benchmarks/
of the workspace, the folder $MIND_BENCHMARKS_DIR, the workspace itself, the hub.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from mind.config import Settings
from mind.errors import ConfigError, DataError, PassingError, nearest
from mind.grading import check_gold
from mind.outputs import digest_json
from mind.records import Kind, Question
from mind.workspace import Workspace

FOLDER_VARIABLE = "MIND_BENCHMARKS_DIR"
"""Names a folder of benchmark files in their hub schemas: <name>/<split>.jsonl."""

FAULTS_SHOWN = 5
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of such bytes
LEVEL = re.compile(r"(?:level\s*)?([+-]?\d{1,9})(?:\.0*)?", re.IGNORECASE)
Domain = Literal["id", "ood"]
Row = Mapping[str, Any]
Placed = tuple[str, Row]
"""A row and where it stands, as a person looks for it: "line 4" of a JSON Lines file, "row 3" of a table."""


class Columns(Settings):
    """Which column of a row means what. `choices` holds the options (a list, or the hub's {label, text}) and `answer` then a letter;
    or `answer` is the text of the right option and `wrong` names the columns of the others: these are shuffled by a hash of the row."""

    question: str
    answer: str
    id: str | None = None  # without: the row's number
    choices: str | None = None
    wrong: tuple[str, ...] = ()
    topic: str | None = None
    difficulty: str | None = None


class Hub(Settings):
    id: str
    split: str
    config: str | None = None
    revision: str = "main"
    gated: bool = False


class Spec(Settings):
    """A benchmark file as a whole."""

    title: str
    domain: Domain
    kind: Kind
    licence: str
    file: str | None = None  # JSONL, CSV or Parquet; without it the hub alone is asked
    hub: Hub | None = None
    columns: Columns
    answer_pattern: str | None = None  # a regular expression whose first group is the answer within the answer column

    @model_validator(mode="after")
    def _whole(self) -> Spec:
        if (self.kind == "choice") != bool(self.columns.choices or self.columns.wrong):
            raise ValueError("kind 'choice' goes with columns.choices or columns.wrong, and no other kind does")
        if self.file is None and self.hub is None:
            raise ValueError("neither file nor hub says where the rows are")
        if self.answer_pattern is not None and re.compile(self.answer_pattern).groups < 1:
            raise ValueError("answer_pattern has no group")
        return self


@dataclass(frozen=True)
class Benchmark:
    """`digest` names the questions: the same rows give the same digest wherever they were read from."""

    name: str
    domain: Domain
    kind: Kind
    questions: list[Question]
    digest: str


def catalogue(workspace: Workspace) -> dict[str, Path]:
    """Benchmark name -> the file that describes it; the workspace's own win over the package's."""
    folders = (Path(__file__).parent, workspace.benchmarks)
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def describe(name: str, workspace: Workspace) -> tuple[Path, Spec]:
    """The file of benchmark `name`, and what it says. Reads no rows.

    Raises:
        ConfigError: no benchmark of that name, or its YAML file is malformed.
    """
    known = catalogue(workspace)
    if name not in known:
        raise ConfigError(
            f"unknown benchmark '{name}'{nearest(name, known)}",
            wanted=f"one of {', '.join(sorted(known))}",
            do=f"mend evaluation.benchmarks, or describe it in {workspace.home / 'benchmarks' / name}.yaml",
        )
    return known[name], read_spec(known[name])


def load(name: str, workspace: Workspace, limit: int | None = None) -> Benchmark:
    """The first `limit` questions (all without it) of benchmark `name`.

    Raises:
        ConfigError: no benchmark of that name, or its YAML file is malformed.
        DataError: its rows are nowhere to be had, or some are malformed (names them).
        PassingError: the hub does not answer.
    """
    path, spec = describe(name, workspace)
    source, rows = _rows(name, spec, path.parent, workspace)
    questions = _questions(source, rows, spec)[:limit]
    return Benchmark(name, spec.domain, spec.kind, questions, digest_json([question.model_dump() for question in questions]))


def read_spec(path: Path) -> Spec:
    """Raises ConfigError with every fault of the file."""
    try:
        return Spec.model_validate(YAML(typ="safe").load(path.read_text(encoding="utf-8")))
    except MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}" if error.problem_mark else "somewhere"
        raise ConfigError(f"{path}, {place}: {error.problem}", wanted="valid YAML") from None
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        )
        raise ConfigError(f"{path}: {faults}", wanted=f"the keys {', '.join(Spec.model_fields)}", do="see docs/evaluation.md") from None
    except re.error as error:
        raise ConfigError(f"{path}: answer_pattern: {error}", wanted="a regular expression with one group") from None


# ------------------------------------------------------------------- where rows are


def _rows(name: str, spec: Spec, beside: Path, workspace: Workspace) -> tuple[str, list[Placed]]:
    named = os.environ.get(FOLDER_VARIABLE)
    folders = [beside, workspace.data / "benchmarks", *([Path(named)] if named else []), workspace.home]
    places = [folder / spec.file for folder in folders] if spec.file else []
    for place in places:
        if place.is_file():
            return str(place), list(_read(place))
    if spec.hub is not None:
        return f"{spec.hub.id} ({spec.hub.split})", _numbered(_from_hub(name, spec.hub))
    raise DataError(
        f"benchmark '{name}': no file {spec.file}",
        wanted=f"it in one of {', '.join(str(place.parent) for place in dict.fromkeys(places))}",
        do="`dvc pull data.dvc` brings the starter sets back; put files of your own into data/benchmarks",
    )


def _read(path: Path) -> Iterable[Placed]:
    readers: dict[str, Callable[[Path], Iterable[Placed]]] = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown kind of file '{path.suffix}'", wanted=f"one of {', '.join(readers)}")
    return readers[path.suffix](path)


def _numbered(rows: Iterable[Row]) -> list[Placed]:
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _read_jsonl(path: Path) -> Iterator[Placed]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: of a number with thousands of digits too
            what = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{path}, line {number}: not JSON ({what})", wanted="one JSON object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: {type(row).__name__}", wanted="one JSON object a line")
        yield f"line {number}", row


def _read_csv(path: Path) -> Iterator[Placed]:
    number = 0
    try:
        for number, row in enumerate(csv.DictReader(_lines(path)), 1):
            yield f"row {number}", row
    except csv.Error as error:
        raise DataError(f"{path}, row {number + 1}: {error}", wanted="a CSV file", do="look for a quote that is never closed") from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file with their ends, because a cell of a CSV file may hold some."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        for number, line in enumerate(lines, 1):
            if NOT_UTF8.search(line):
                raise DataError(f"{path}, line {number}: not UTF-8", wanted="a file in UTF-8", do="save it in that encoding")
            yield line


def _read_parquet(path: Path) -> list[Placed]:
    import pyarrow.parquet

    try:
        return _numbered(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: no Parquet file that can be read ({reason})", wanted="a whole one", do="copy or write it again") from None


def _from_hub(name: str, hub: Hub) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants

    page = f"https://huggingface.co/datasets/{hub.id}"
    try:
        return list(datasets.load_dataset(hub.id, hub.config, split=hub.split, revision=hub.revision))
    except DatasetNotFoundError as error:
        if hub.gated:
            raise DataError(
                f"benchmark '{name}': {hub.id} is gated, and this machine has no access to it",
                wanted="an account that has accepted the conditions of the set",
                do=f"accept them at {page} and log in (`hf auth login`), or put its rows into data/benchmarks",
            ) from None
        raise DataError(f"benchmark '{name}': {error}", do=f"check {page}") from None
    except ConnectionError as error:
        if constants.HF_HUB_OFFLINE:
            raise DataError(
                f"benchmark '{name}': {hub.id} is not in the local cache, and HF_HUB_OFFLINE is set",
                wanted=f"its rows in data/benchmarks or in the folder ${FOLDER_VARIABLE}",
                do="unset HF_HUB_OFFLINE, or take the benchmark out of evaluation.benchmarks",
            ) from None
        raise PassingError(
            f"benchmark '{name}': the hub does not answer ({error})", do="try again, or put its rows into data/benchmarks"
        ) from None
    except ValueError as error:  # unknown configuration or split
        raise DataError(f"benchmark '{name}': {error}", do=f"check {page}") from None


# ------------------------------------------------------------------ rows -> questions


def _questions(source: str, rows: list[Placed], spec: Spec) -> list[Question]:
    questions: dict[str, Question] = {}
    faults = []
    for number, (place, row) in enumerate(rows, 1):
        try:
            question = _question(row, number, spec)
        except ValidationError as error:  # names the field; its own words take several lines
            faults += [f"{place}: {fault['loc'][0]}: {fault['msg']}" for fault in error.errors()]
            continue
        except ValueError as error:
            faults.append(f"{place}: {error}")
            continue
        if question.id in questions:
            faults.append(f"{place}: the id '{question.id}' stands twice")
        questions[question.id] = question
    if not rows:
        faults.append("no rows")
    if faults:
        more = f" (and {len(faults) - FAULTS_SHOWN} more)" if len(faults) > FAULTS_SHOWN else ""
        raise DataError(
            f"{source}: {'; '.join(faults[:FAULTS_SHOWN])}{more}", do="mend the rows, or `columns` in the benchmark's YAML file"
        )
    return list(questions.values())


def _question(row: Row, number: int, spec: Spec) -> Question:
    """Raises ValueError saying what is wrong with the row."""
    columns = spec.columns
    text = _cell(row, columns.question).strip()
    answer = _answer(row, spec)
    choices: tuple[str, ...] = ()
    if columns.wrong:
        choices, answer = _shuffled(text, answer, [_cell(row, column).strip() for column in columns.wrong])
    elif columns.choices:
        choices = _choices(row, columns.choices)
    if fault := check_gold(answer, spec.kind, choices):
        raise ValueError(f"column '{columns.answer}': {fault}")
    if not text:
        raise ValueError(f"column '{columns.question}' is empty")
    topic = row.get(columns.topic) if columns.topic else None
    return Question(
        id=_cell(row, columns.id) if columns.id else str(number),
        question=text,
        answer=answer,
        kind=spec.kind,
        choices=choices,
        topic=str(topic) if topic else None,
        difficulty=_difficulty(row, columns.difficulty) if columns.difficulty else None,
    )


def _difficulty(row: Row, column: str) -> int | None:
    """3, 3.0, "3" or "Level 3", as MATH has it on the hub."""
    value = row.get(column)
    if value in (None, ""):
        return None
    found = LEVEL.fullmatch(str(value).strip())
    if found is None:
        raise ValueError(f"column '{column}': the difficulty {value!r} is no whole number")
    return int(found[1])


def _cell(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise ValueError(
            f"no column '{column}' (it has {', '.join(map(str, row))})" if column not in row else f"column '{column}' is empty"
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _answer(row: Row, spec: Spec) -> str:
    answer = _cell(row, spec.columns.answer).strip()
    if spec.answer_pattern is None:
        return answer
    found = re.search(spec.answer_pattern, answer)
    if found is None:
        raise ValueError(f"column '{spec.columns.answer}': nothing matches {spec.answer_pattern!r}")
    return found[1].strip()


def _choices(row: Row, column: str) -> tuple[str, ...]:
    """The options of a list, of the hub's {label, text}, or of a CSV cell that holds a JSON list."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"column '{column}' holds text; wanted a list") from None
    if isinstance(value, Mapping):
        labels = "".join(map(str, value.get("label", ())))
        if not string.ascii_uppercase.startswith(labels):
            raise ValueError(f"column '{column}' is labelled {labels}; wanted A, B, C, ...")
        value = value.get("text")
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"column '{column}' holds no list of texts")
    return tuple(text.strip() for text in value)


def _shuffled(question: str, right: str, wrong: list[str]) -> tuple[tuple[str, ...], str]:
    """The options in an order that depends on their texts alone, and the letter of the right one."""

    def place(option: tuple[str, bool]) -> bytes:
        return hashlib.sha256("\0".join(["mind", question, option[0]]).encode()).digest()

    options = sorted([(right, True), *((text, False) for text in wrong)], key=place)
    letter = string.ascii_uppercase[[is_right for _, is_right in options].index(True)]
    return tuple(text for text, _ in options), letter
