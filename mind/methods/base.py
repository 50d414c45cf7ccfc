"""What a method is: the views a question gives, its loss, and what it learns beside the student. Used by the one loop in training.loop.

The loop owns the student, its optimizer and the order of the questions. A method sees the student only through `Forward`: groups of
views in, losses and features out. Most methods are one training; one of several stages says so in `stages`, and one that puts their
results together does it in `conclude`.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mind.config import Resolved
from mind.prompts import student_prompt
from mind.records import Example, Question
from mind.students.loading import LoadedStudent
from mind.training.layout import Encoded, Forward, Outputs, encode_example
from mind.training.peers import Peers


@dataclass(frozen=True)
class Setup:
    """What a method may know before training starts."""

    questions: int  # of `examples`
    width: int  # of the student's hidden states
    batch_questions: int  # questions to one forward pass
    step_questions: int  # questions to one step of the student
    seed: int
    peers: Peers = field(default_factory=Peers)  # the processes that train together
    examples: Sequence[Example] = ()
    folder: Path | None = None  # for what is too large for a checkpoint; where that is kept, and gone when training has ended


@dataclass
class Terms:
    """One call of a method's loss. `total` is a SUM over the questions (the loop divides by those of the whole step)."""

    total: Tensor
    tokens: int  # supervised tokens that `total` learns from
    rows: list[dict[str, float]] = field(default_factory=list)  # one a question: metric -> value


@dataclass(frozen=True)
class Stage:
    """One training of those that make a student, with an optimizer of its own."""

    name: str
    settings: Resolved
    fresh: bool = False  # from the untouched student; else from where the stage before ended
    shared: bool = False  # its result is kept for other variants that contain the same training


class Method:
    """All views, each with the same weight; the others override what differs."""

    caption: ClassVar[str] = ""
    """Paper and deviations from it, for the caption of a table."""

    @classmethod
    def stages(cls, settings: Resolved) -> tuple[Stage, ...]:
        """The trainings that make this student, in order."""
        return (Stage("", settings),)

    @classmethod
    def examples(cls, options: Any, examples: Sequence[Example], seed: int) -> Sequence[Example]:
        """Those of the dataset that the method may train on."""
        return examples

    encoded: ClassVar[type[Encoded]] = Encoded
    """What `encode` makes of a question."""

    @classmethod
    def encoding(cls, options: Any, seed: int) -> Mapping[str, Any]:
        """What decides what `encode` makes: variants for which this is equal share the tokenised dataset."""
        return {**options.model_dump(mode="json"), "seed": seed}

    def __init__(self, options: Any, setup: Setup) -> None:
        self.options = options

    @classmethod
    def prompt(cls, options: Any, question: Question | Example) -> str:
        """What the student is asked: the same in training and in evaluation."""
        return student_prompt(question.question, question.kind, question.choices)

    def select(self, example: Example) -> Mapping[str, str]:
        """The views of this example that the method trains on; none: the example is left out."""
        return example.views

    def encode(self, tokenizer: Any, example: Example, index: int) -> Encoded:
        return encode_example(tokenizer, example, self.select(example), index, self.prompt(self.options, example))

    def prepare(self, questions: Sequence[Encoded], forward: Forward) -> None:
        """Before the first step, on the untouched student; `forward` carries no gradient here."""

    def loss(self, questions: Sequence[Encoded], forward: Forward) -> Terms:
        """The loss of these questions, from as many forward passes as the method needs."""
        outputs = forward([question.group() for question in questions])
        return uniform_terms([len(question.views) for question in questions], outputs)

    def after_step(self) -> None:
        """The student has just made a step."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors, numbers, and dicts and lists of them."""
        return {}

    def saved(self) -> None:
        """The state that `state_dict` gave lies safely on disk."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


class Lots:
    """Seeded draws of a question, another at every visit; a resumed run draws the same."""

    def __init__(self, seed: int, peers: Peers) -> None:
        self.seed, self.peers = seed, peers
        self.visits: Counter[int] = Counter()
        self.drawn: list[int] = []  # in this step

    def draw(self, index: int) -> random.Random:
        """The dice of this visit of question `index`."""
        self.drawn.append(index)
        return random.Random(f"{self.seed}/{index}/{self.visits[index] + self.drawn.count(index)}")

    def after_step(self) -> None:
        """Every process learns which questions all of them have visited."""
        for drawn in self.peers.gather(self.drawn):
            self.visits.update(drawn)
        self.drawn = []

    def state_dict(self) -> dict[int, int]:
        return dict(self.visits)

    def load_state_dict(self, state: Mapping[int, int]) -> None:
        self.visits = Counter(state)


class Drawing(Method):
    """A method that draws which views of a question a step takes; its draws outlive a killed run."""

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.lots = Lots(setup.seed, setup.peers)

    def after_step(self) -> None:
        self.lots.after_step()

    def state_dict(self) -> dict[str, Any]:
        return {"lots": self.lots.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.lots.load_state_dict(state["lots"])


def uniform_terms(counts: Sequence[int], outputs: Outputs) -> Terms:
    """sum over questions of the mean CE of their views; `counts`: views of each question."""
    per_question = torch.stack([ce.mean() for ce in outputs.ce().split(list(counts))])  # (S,) -> (Q,)
    rows = [{"train/loss": value, "train/sft": value} for value in per_question.detach().tolist()]
    return Terms(per_question.sum(), int(outputs.mask.sum()), rows)


class Mixture(Method):
    """A method whose student is what `conclude` makes of all stages' results, not what the last stage left."""

    @classmethod
    @abstractmethod
    def conclude(cls, student: LoadedStudent, settings: Resolved, parts: Sequence[Path], examples: Sequence[Example]) -> dict[str, float]:
        """Give the untouched `student` what the stages' folders `parts` add up to; returns what is worth a row of the history."""
