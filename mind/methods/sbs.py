"""SbS, distilling step by step: predict the answer and explain it, two tasks told apart by a marker (baselines, section 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mind import config
from mind.methods.base import Drawing, Stage, Terms
from mind.prompts import problem
from mind.records import PERSPECTIVES, Example, Question
from mind.training.layout import Encoded, Forward, Group, encode_text

PREDICT, EXPLAIN = "predict: ", "explain: "


@dataclass(frozen=True)
class Tasks(Encoded):
    """`prompt` and `views` are those of the prediction; `explain`: view -> the explanation, under a prompt of its own."""

    explain: Mapping[str, Group]

    def up_to(self, limit: int) -> Tasks:
        """The prediction and the explanations that are short enough; nothing where one of the two tasks would be missing."""
        kept = {name: group for name, group in self.explain.items() if _length(group) <= limit}
        whole = kept and _length(self.group()) <= limit
        return replace(self, explain=kept) if whole else replace(self, views={}, explain={})

    @property
    def longest(self) -> int:
        """Tokens of the longer task with its longest text; 0 for a question without tasks."""
        return max(map(_length, [self.group(), *self.explain.values()])) if self.views else 0


class Sbs(Drawing):
    """L = a * CE(predict) + (1 - a) * CE(explain), the two means taken apart: an answer weighs as much as a whole rationale."""

    caption = (
        "SbS: distilling step by step (Hsieh et al. 2023). Decoder with LoRA in place of T5 with full fine-tuning, marker first in the "
        "user turn; labels are the gold answers. The student answers directly, without reasoning; (explain) asks the other task."
    )
    options: config.Sbs
    encoded = Tasks

    @classmethod
    def prompt(cls, options: config.Sbs, question: Question | Example) -> str:
        return (PREDICT if options.answers == "predict" else EXPLAIN) + problem(question.question, question.choices)

    @classmethod
    def stages(cls, settings: config.Resolved) -> tuple[Stage, ...]:
        trained = settings.method.model_copy(update={"answers": "predict"})  # both rows of the table are one student
        return (Stage("", settings.model_copy(update={"method": trained}), shared=True),)

    def select(self, example: Example) -> Mapping[str, str]:
        names = PERSPECTIVES if self.options.view == "all" else (self.options.view,)
        return {name: example.views[name] for name in names if name in example.views}

    def encode(self, tokenizer: Any, example: Example, index: int) -> Tasks:
        task = problem(example.question, example.choices)
        predict = encode_text(tokenizer, PREDICT + task, example.answer)
        explain = {name: encode_text(tokenizer, EXPLAIN + task, text) for name, text in self.select(example).items()}
        return Tasks(index, example.id, predict.prompt, {"predict": predict.responses[0]} if explain else {}, explain)

    def loss(self, questions: Sequence[Encoded], forward: Forward) -> Terms:
        groups = [group for question in questions for group in self._pair(question)]
        outputs = forward(groups)
        predict, explain = outputs.ce().view(-1, 2).unbind(dim=1)  # (2 Q,) -> (Q,), (Q,)
        a = self.options.label_weight
        losses = a * predict + (1 - a) * explain
        values = torch.stack([losses, predict, explain], dim=1).tolist()
        rows = [{"train/loss": both, "sbs/predict": label, "sbs/explain": rationale} for both, label, rationale in values]
        return Terms(losses.sum(), int(outputs.mask.sum()), rows)

    def _pair(self, question: Encoded) -> tuple[Group, Group]:
        assert isinstance(question, Tasks)
        names = sorted(question.explain, key=PERSPECTIVES.index)
        return question.group(), question.explain[self.lots.draw(question.index).choice(names)]


def _length(group: Group) -> int:
    return len(group.prompt) + len(group.responses[0].ids)
