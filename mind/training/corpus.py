"""Examples -> encoded questions that are tokenised once and read as training asks for them. Called by the loop.

With a folder (`.mind/encoded/KEY`) they lie there as JSON Lines and stay: the next run with the same dataset and tokenizer opens them. The
key names all that decides them. Without one they are kept in memory.
"""

from __future__ import annotations

import json
import os
import weakref
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import TypeAdapter

from mind import config, progress
from mind.errors import DataError
from mind.methods.base import Method
from mind.outputs import stage_output
from mind.records import Example, Lazy
from mind.training.layout import Encoded

QUESTIONS, STARTS, SUMMARY = "questions.jsonl", "starts.bin", "summary.json"


@dataclass
class Summary:
    """What is known of all encoded questions together."""

    questions: int = 0
    views: int = 0
    tokens: int = 0  # supervised
    views_left_out: int = 0
    questions_left_out: int = 0


@dataclass(frozen=True)
class Corpus:
    """The questions that a method trains on, in the order of the dataset."""

    questions: Sequence[Encoded]
    summary: Summary

    @property
    def left_out(self) -> dict[str, int]:
        return {"views": self.summary.views_left_out, "questions": self.summary.questions_left_out}


def token_limit(model: Any, options: config.Training) -> int:
    """Tokens that a prompt with one of its views may have: training.max_tokens, or less where the student sees less."""
    own = getattr(model.config, "max_position_embeddings", None) or options.max_tokens
    window = getattr(model.config, "sliding_window", None) or own  # inside its window, a sliding layer is a plain one
    return min(options.max_tokens, own, window)


def encode_all(tokenizer: Any, method: Method, examples: Sequence[Example], limit: int, too_long: str) -> Corpus:
    """The questions in memory.

    Raises:
        DataError: a prompt with a view is longer than `limit` and `too_long` is 'refuse'; or nothing is left.
    """
    summary = Summary()
    return Corpus(list(_encoded(tokenizer, method, examples, limit, too_long, summary)), summary)


def encode_to(folder: Path, tokenizer: Any, method: Method, examples: Sequence[Example], limit: int, too_long: str) -> None:
    """Write the questions to `folder`, unless an equal run has done it. Raises what `encode_all` does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # of two variants that want the same at once, the second finds it done
        if not (folder / SUMMARY).is_file():
            _write(folder, tokenizer, method, examples, limit, too_long)


def _write(folder: Path, tokenizer: Any, method: Method, examples: Sequence[Example], limit: int, too_long: str) -> None:
    codec, summary, starts = TypeAdapter(type(method).encoded), Summary(), array("q", [0])
    with stage_output(folder) as partial:
        with (partial / QUESTIONS).open("wb") as file, progress.bar("tokenise", len(examples), "questions") as bar:
            for question in _encoded(tokenizer, method, examples, limit, too_long, summary):
                starts.append(starts[-1] + file.write(codec.dump_json(question) + b"\n"))
                bar.advance()
        (partial / STARTS).write_bytes(starts.tobytes())
        (partial / SUMMARY).write_text(json.dumps(asdict(summary)), encoding="utf-8")


def open_corpus(folder: Path, method: Method) -> Corpus:
    """What `encode_to` has left."""
    return Corpus(_Stored(folder, type(method).encoded), Summary(**json.loads((folder / SUMMARY).read_text(encoding="utf-8"))))


def _encoded(tokenizer: Any, method: Method, examples: Sequence[Example], limit: int, too_long: str, summary: Summary) -> Iterator[Encoded]:
    """Encode one by one, and count in `summary`."""
    for index, example in enumerate(examples):
        whole = method.encode(tokenizer, example, index)
        kept = whole.up_to(limit)
        if kept.longest < whole.longest and too_long == "refuse":
            raise DataError(
                f"question '{example.id}' has {whole.longest} tokens with its longest view",
                wanted=f"at most {limit} (training.max_tokens, or the student's own limit)",
                do="raise training.max_tokens, or set training.too_long: drop",
            )
        summary.views_left_out += _rationales(whole) - _rationales(kept)
        if not kept.views:
            summary.questions_left_out += 1
            continue
        summary.questions += 1
        summary.views += len(kept.views)
        summary.tokens += sum(len(view.ids) for view in kept.views.values())
        yield kept
    if not summary.questions:
        raise DataError(f"none of {len(examples)} questions has a view to train on", wanted="at least one", do="look into the dataset")


def _rationales(question: Encoded) -> int:
    """How many it has: its views; those of `sbs` stand apart, each under a prompt of its own."""
    return len(getattr(question, "explain", question.views))


class _Stored(Lazy[Encoded]):
    """Questions on disk: in memory stands where each begins, eight bytes a question."""

    def __init__(self, folder: Path, kind: type[Encoded]) -> None:
        self._codec = TypeAdapter(kind)
        self._starts = array("q", (folder / STARTS).read_bytes())
        self._file = os.open(folder / QUESTIONS, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def item(self, place: int) -> Encoded:
        start, end = self._starts[place], self._starts[place + 1]
        return self._codec.validate_json(os.pread(self._file, end - start, start))
