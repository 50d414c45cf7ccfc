"""What a method is: the views a question gives, its loss, and what it learns beside the student. Used by the one loop in training.loop.

The loop owns the student, its optimizer and the order of the questions. A method sees the student only through `Forward`: groups of
views in, losses and features out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mind.records import Example
from mind.training.layout import Encoded, Forward, Outputs, encode_example


@dataclass(frozen=True)
class Setup:
    """What a method may know before training starts."""

    questions: int
    width: int  # of the student's hidden states
    batch_questions: int  # questions to one forward pass
    step_questions: int  # questions to one step of the student
    seed: int


@dataclass
class Terms:
    """One call of a method's loss. `total` is a SUM over the questions (the loop divides by those of the whole step)."""

    total: Tensor
    tokens: int  # supervised tokens that `total` learns from
    rows: list[dict[str, float]] = field(default_factory=list)  # one a question: metric -> value


class Method:
    """All views, each with the same weight; the others override what differs."""

    def __init__(self, options: Any, setup: Setup) -> None:
        self.options = options

    def select(self, example: Example) -> Mapping[str, str]:
        """The views of this example that the method trains on; none: the example is left out."""
        return example.views

    def encode(self, tokenizer: Any, example: Example, index: int) -> Encoded:
        return encode_example(tokenizer, example, self.select(example), index)

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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


def uniform_terms(counts: Sequence[int], outputs: Outputs) -> Terms:
    """sum over questions of the mean CE of their views; `counts`: views of each question."""
    per_question = torch.stack([ce.mean() for ce in outputs.ce().split(list(counts))])  # (S,) -> (Q,)
    rows = [{"train/loss": value, "train/sft": value} for value in per_question.detach().tolist()]
    return Terms(per_question.sum(), int(outputs.mask.sum()), rows)
