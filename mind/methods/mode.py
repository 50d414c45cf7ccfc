"""MoDE: one LoRA expert a perspective, trained apart, then one mixture of them found without gradients (baselines, section 3).

The experts are the single-perspective students: where those variants are trained already, nothing is trained twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mind import config, progress
from mind.errors import ConfigError, DataError
from mind.methods.base import Mixture, Stage
from mind.methods.single import held_out
from mind.records import PERSPECTIVES, Example
from mind.students.loading import LoadedStudent, add_adapter, put_adapter, read_adapter
from mind.training.corpus import token_limit
from mind.training.layout import Forward, Group, encode_example, packed

Adapter = Mapping[str, Tensor]
"""Name of a LoRA matrix, `....lora_A.weight` (r, in) or `....lora_B.weight` (out, r) -> its values."""

STEP = 0.5
"""First standard deviation of the search, in units of a weight."""


def merge(experts: Sequence[Adapter], weights: Sequence[float], mode: Literal["lorahub", "exact"]) -> dict[str, Tensor]:
    """The mixture as one adapter.

    lorahub: A = sum w_i A_i and B = sum w_i B_i each by itself, as the authors do; so w and -w are the same student.
    exact: dW = sum w_i dW_i, as one adapter of rank K r: the A_i below each other, the w_i B_i beside each other.
    """
    mixed = {}
    for name in experts[0]:
        own = [expert[name] for expert in experts]
        if mode == "lorahub":
            mixed[name] = torch.stack([w * matrix for w, matrix in zip(weights, own, strict=True)]).sum(dim=0)
        elif ".lora_A." in name:
            mixed[name] = torch.cat(own, dim=0)
        else:
            mixed[name] = torch.cat([w * matrix for w, matrix in zip(weights, own, strict=True)], dim=1)
    return mixed


def search(
    score: Callable[[Sequence[float]], float], size: int, *, box: float, trials: int, seed: int
) -> tuple[list[float], float, list[float]]:
    """The point of [-box, box]^size with the lowest score that a (1+1) evolution strategy finds in `trials` tries, from 0.

    The step grows by a success and shrinks by a failure so that one try in five succeeds (Rechenberg 1973). The authors use nevergrad's
    NGOpt; the start, the box and the budget are theirs.

    Returns:
        The point, its score, and the best score after every try, that of the start first.
    """
    dice = random.Random(seed)
    best, step = [0.0] * size, STEP
    lowest = score(best)
    course = [lowest]
    for _ in range(trials):
        tried = [min(box, max(-box, w + dice.gauss(0, step))) for w in best]
        found = score(tried)
        step *= 1.5 if found < lowest else 1.5**-0.25
        if found < lowest:
            best, lowest = tried, found
        course.append(lowest)
    return best, lowest, course


class Mode(Mixture):
    """Stages: eight trainings from the untouched student; then `conclude` finds the weights on held-out questions and merges."""

    caption = (
        "MoDE: mixture of decoupled LoRA experts (Li et al. 2024). Experts by perspective, not by task; weights found on training "
        "questions that no expert saw, by a (1+1) evolution strategy in place of nevergrad; causal LM, the LoRA shape of all other rows."
    )

    @classmethod
    def stages(cls, settings: config.Resolved) -> tuple[Stage, ...]:
        own = settings.method
        assert isinstance(own, config.Mode)
        if settings.student.tuning != "lora":
            raise ConfigError(
                f"variant '{settings.name}': method 'mode' mixes LoRA adapters", wanted="tuning: lora", do="set student.tuning to lora"
            )
        share = settings.training.tokens and max(1, settings.training.tokens // len(PERSPECTIVES))  # 0 would be no budget at all
        training = settings.training.model_copy(update={"tokens": share})
        experts = [config.Single(perspective=name, hold_out=own.support) for name in PERSPECTIVES]
        return tuple(
            Stage(expert.perspective, settings.model_copy(update={"method": expert, "training": training}), fresh=True, shared=True)
            for expert in experts
        )

    @classmethod
    def conclude(
        cls, student: LoadedStudent, settings: config.Resolved, parts: Sequence[Path], examples: Sequence[Example]
    ) -> dict[str, float]:
        """The mixture becomes the student's adapter."""
        own = settings.method
        assert isinstance(own, config.Mode)
        experts = [read_adapter(part) for part in parts]
        student.model = add_adapter(student.model, settings.student.lora, len(experts) if own.merge == "exact" else 1).eval()
        limit = token_limit(student.model, settings.training)
        support = _support(student, held_out(examples, own.support, settings.seed), limit)
        if not support:
            raise DataError(
                "no question is left to weigh the experts of 'mode' on",
                wanted=f"more than one question in the dataset, with views of at most {limit} tokens",
            )
        forward = partial(packed, student.model)
        with progress.bar(f"mix {settings.name}", own.trials + 1, "mixtures") as bar:

            def score(weights: Sequence[float]) -> float:
                put_adapter(student.model, merge(experts, weights, own.merge))
                bar.advance()
                return mean_nll(support, forward) + own.l1 * sum(map(abs, weights)) / len(weights)

            weights, lowest, course = search(score, len(experts), box=own.box, trials=own.trials, seed=settings.seed)
        put_adapter(student.model, merge(experts, weights, own.merge))
        mixture = {f"mode/weight/{name}": weight for name, weight in zip(PERSPECTIVES, weights, strict=True)}
        return {"mode/objective": lowest, "mode/start": course[0], **mixture}


@torch.no_grad()
def mean_nll(groups: Sequence[Group], forward: Forward) -> float:
    """Mean over the supervised tokens of all responses, in nats."""
    outputs = [forward([group]) for group in groups]
    return float(sum(out.nll.sum() for out in outputs)) / int(sum(out.mask.sum() for out in outputs))


def _support(student: LoadedStudent, examples: Sequence[Example], limit: int) -> list[Group]:
    """These questions, each with its views of at most `limit` tokens.

    Whatever training.too_long says, longer ones are named and left out: by now all experts are trained.
    """
    whole = [encode_example(student.tokenizer, example, example.views, 0) for example in examples]
    kept = [question.up_to(limit) for question in whole]
    views, short = (sum(len(question.views) for question in questions) for questions in (whole, kept))
    if short < views:
        progress.console.print(f"mix: {views - short} of {views} held-out views have more than {limit} tokens and are left out")
    return [question.group() for question in kept if question.views]
