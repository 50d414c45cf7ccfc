"""EDIT: fine-tuning, then the key steps that tell a rationale from a mistaken copy of it (baselines, section 4).

The second stage trains on the tokens alone in which the two differ: up on the correct side, slightly down on the mistaken one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mind import config
from mind.methods.base import Method, Stage, Terms
from mind.methods.single import demand_mistakes
from mind.records import Example
from mind.training.layout import Encoded, Forward, encode
from mind.training.losses import weighted_ce

CORRECT, MISTAKEN = "correct", "mistaken"


def edit_marks(correct: Sequence[int], mistaken: Sequence[int]) -> tuple[list[int], list[int]]:
    """1 where a token has no counterpart in the other sequence, by one minimum edit path; two lists as long as the sequences.

    Unit costs, common prefix stripped, one backtrace from the end that prefers deletion, then insertion, then substitution.
    """
    start = next((i for i, (a, b) in enumerate(zip(correct, mistaken, strict=False)) if a != b), min(len(correct), len(mistaken)))
    a, b = correct[start:], mistaken[start:]
    cost = _levenshtein(a, b)
    marks_a, marks_b = [0] * len(correct), [0] * len(mistaken)
    i, j = len(a), len(b)
    while i or j:
        if i and j and a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            continue
        delete = i > 0 and cost[i][j] == cost[i - 1][j] + 1
        insert = not delete and j > 0 and cost[i][j] == cost[i][j - 1] + 1
        if not insert:
            i -= 1
            marks_a[start + i] = 1
        if not delete:
            j -= 1
            marks_b[start + j] = 1
    return marks_a, marks_b


def _levenshtein(a: Sequence[int], b: Sequence[int]) -> list[list[int]]:
    """Table of edit distances of all prefixes: (len(a) + 1) x (len(b) + 1)."""
    table = [list(range(len(b) + 1))]
    for i, left in enumerate(a, 1):
        above, row = table[-1], [i]
        for j, right in enumerate(b, 1):
            row.append(above[j - 1] if left == right else 1 + min(above[j], row[-1], above[j - 1]))
        table.append(row)
    return table


@dataclass(frozen=True)
class Pair(Encoded):
    """`views` are the correct and the mistaken text; `marks` their key tokens."""

    marks: Mapping[str, Sequence[int]]

    def up_to(self, limit: int) -> Pair:
        """Both texts or neither: one alone has nothing to be compared with."""
        return self if self.longest <= limit else replace(self, views={}, marks={})


class Edit(Method):
    """L = 1/|R+| sum w+_t nll_t(correct) + 1/|R-| sum w-_t c_t nll_t(mistaken), summed over pairs.

    w+ = alpha on key tokens and gamma elsewhere, w- = -beta on key tokens and 0 elsewhere; c_t = 1[nll_t < ceiling], without gradient.
    """

    caption = (
        "EDIT: mistake-driven key steps (Dai et al. 2024). Mistakes are corrupted copies of correct rationales only (the paper's D+-), "
        "the second stage goes on with the same adapter at 1/40 of the learning rate; the NLL that is capped is the shifted one."
    )
    options: config.Edit
    encoded = Pair

    @classmethod
    def stages(cls, settings: config.Resolved) -> tuple[Stage, ...]:
        """Fine-tuning, which another variant may share, and the key steps. A budget of tokens is halved between them."""
        own = settings.method
        assert isinstance(own, config.Edit)
        first: Any = config.Single(perspective="copied") if own.first == "copied" else config.WithoutFusion()
        half = settings.training.tokens and max(1, settings.training.tokens // 2)  # 0 would be no budget at all
        tuned = settings.training.model_copy(update={"tokens": half})
        rate = settings.training.learning_rate * own.rate
        second = tuned.model_copy(update={"epochs": own.epochs, "learning_rate": rate})
        return (
            Stage("sft", settings.model_copy(update={"method": first, "training": tuned}), shared=True),
            Stage("key-steps", settings.model_copy(update={"training": second})),
        )

    @classmethod
    def examples(cls, options: config.Edit, examples: Sequence[Example], seed: int) -> Sequence[Example]:
        demand_mistakes(examples)
        return examples

    def select(self, example: Example) -> Mapping[str, str]:
        if example.mistake is None or example.mistake.perspective not in example.views:
            return {}
        return {CORRECT: example.views[example.mistake.perspective], MISTAKEN: example.mistake.text}

    def encode(self, tokenizer: Any, example: Example, index: int) -> Pair:
        texts = self.select(example)
        prompt = self.prompt(self.options, example)
        if not texts or example.mistake is None:
            return Pair(index, example.id, (), {}, {})
        ids, correct = encode(tokenizer, prompt, texts[CORRECT], example.answer)
        _, mistaken = encode(tokenizer, prompt, texts[MISTAKEN], example.mistake.answer)
        marks = dict(zip((CORRECT, MISTAKEN), edit_marks(correct.ids, mistaken.ids), strict=True))
        return Pair(index, example.id, ids, {CORRECT: correct, MISTAKEN: mistaken}, marks)

    def loss(self, questions: Sequence[Encoded], forward: Forward) -> Terms:
        pairs = [question for question in questions if isinstance(question, Pair)]
        outputs = forward([pair.group([CORRECT, MISTAKEN]) for pair in pairs])
        weights = self._weights([pair.marks[side] for pair in pairs for side in (CORRECT, MISTAKEN)], outputs.nll)
        up, down = weighted_ce(outputs.nll, weights, outputs.mask).view(-1, 2).unbind(dim=1)
        values = torch.stack([up + down, up, -down], dim=1).tolist()
        rows = [{"train/loss": both, "edit/correct": correct, "edit/mistaken": mistaken} for both, correct, mistaken in values]
        return Terms((up + down).sum(), int(outputs.mask.sum()), rows)

    def _weights(self, marks: Sequence[Sequence[int]], nll: Tensor) -> Tensor:
        """Signed weights (2 Q, T) of every token: correct and mistaken rows in turn, 0 on padding."""
        options = self.options
        weights = torch.zeros_like(nll)
        for row, own in enumerate(marks):
            key = torch.tensor(own, device=nll.device, dtype=nll.dtype)
            mistaken = row % 2 == 1
            weights[row, : len(own)] = -options.beta * key if mistaken else options.alpha * key + options.gamma * (1 - key)
        capped = nll.detach() >= options.ceiling
        capped[0::2] = False
        return weights.masked_fill(capped, 0.0)
