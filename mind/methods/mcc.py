"""MCC: two diverse rationales of a question at every step, and agreement of the answers they lead to (baselines, section 2)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mind import config
from mind.methods.base import Drawing, Terms
from mind.records import Example
from mind.training.layout import Encoded, Forward, Outputs
from mind.training.losses import symmetric_kl


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|A & B| / |A | B|; 0 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 0.0


def pick_diverse(texts: Mapping[str, str], count: int, dice: random.Random) -> list[str]:
    """The names of `count` texts that are unlike each other: greedy max-min on the Jaccard index of their words.

    Starts with the least similar pair; then, one by one, the text whose nearest chosen one is farthest. Ties fall by `dice`.
    """
    words = {name: frozenset(re.findall(r"\w+", text.lower())) for name, text in texts.items()}
    names = list(texts)
    dice.shuffle(names)
    if len(names) <= max(count, 2):
        return sorted(names, key=list(texts).index)
    chosen = [*min(((a, b) for a, b in combinations(names, 2)), key=lambda pair: jaccard(words[pair[0]], words[pair[1]]))]
    while len(chosen) < count:
        rest = [name for name in names if name not in chosen]
        chosen.append(min(rest, key=lambda name: max(jaccard(words[name], words[other]) for other in chosen)))
    return sorted(chosen, key=list(texts).index)


@dataclass(frozen=True)
class Pool(Encoded):
    """`views` are those that a step draws its two from."""

    def up_to(self, limit: int) -> Encoded:
        """The views that are short enough; none where fewer than two are."""
        kept = super().up_to(limit)
        return kept if len(kept.views) > 1 else replace(kept, views={})


class Mcc(Drawing):
    """L = 1/2 [CE(v1) + CE(v2)] + a * symmetric KL between the answer distributions after v1 and after v2; gradient into both."""

    caption = (
        "MCC: multi-CoT consistent distillation (Chen et al. 2023). The pool is chosen by words, not by the unpublished n-gram filter; "
        "no LoRA on the output head; a = 0.01 and T = 1 by default (the authors' scripts differ among themselves)."
    )
    options: config.Mcc
    encoded = Pool

    def select(self, example: Example) -> Mapping[str, str]:
        dice = random.Random(f"{self.lots.seed}/{example.id}")
        names = pick_diverse(example.views, self.options.pool, dice)
        return {name: example.views[name] for name in names} if len(names) > 1 else {}

    def encode(self, tokenizer: Any, example: Example, index: int) -> Pool:
        whole = super().encode(tokenizer, example, index)
        return Pool(whole.index, whole.id, whole.prompt, whole.views)

    def loss(self, questions: Sequence[Encoded], forward: Forward) -> Terms:
        pairs = [self.lots.draw(question.index).sample(list(question.views), 2) for question in questions]
        outputs = forward([question.group(pair) for question, pair in zip(questions, pairs, strict=True)])
        sft = outputs.ce().view(-1, 2).mean(dim=1)  # (2 Q,) -> (Q,)
        apart = torch.stack([self._apart(outputs, 2 * row) for row in range(len(questions))])
        losses = sft + self.options.consistency * apart
        values = torch.stack([losses, sft, apart], dim=1).tolist()
        rows = [{"train/loss": loss, "train/sft": ce, "train/consistency": kl} for loss, ce, kl in values]
        return Terms(losses.sum(), int(outputs.mask.sum()), rows)

    def _apart(self, outputs: Outputs, first: int) -> Tensor:
        """How differently the two views `first` and `first + 1` answer."""
        left, right = outputs.answer_logprobs([first, first + 1], self.options.temperature)
        return symmetric_kl(left, right)
