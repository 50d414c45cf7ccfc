"""The one training loop, for all methods: encoded questions in, a trained student and its history out. Called by stages.distill.

A step: `questions_per_step` x `accumulation` questions, one optimizer step. The state after any step, with the seed, decides all that
follows, so a resumed run takes the same course as an uninterrupted one (bit for bit on a CPU).
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mind import config, progress
from mind.errors import DataError
from mind.methods.base import Method, Setup, Terms
from mind.records import Example
from mind.students.loading import LoadedStudent
from mind.training import checkpoint
from mind.training.layout import LAYOUTS, Encoded, Forward, Group, Outputs

Log = Callable[[Mapping[str, float], int], None]
"""log(values, step): where metrics go while training runs (MLflow, in a stage)."""

BUILD = Callable[[Any, Setup], Method]


@dataclass(frozen=True)
class Trained:
    """What a run leaves beside the weights in the student: deterministic rows, and what was counted."""

    history: list[dict[str, float]]
    steps: int
    tokens: int  # supervised tokens learnt from
    questions: int
    left_out: dict[str, int]  # views and questions that were too long


def train(
    student: LoadedStudent,
    settings: config.Resolved,
    examples: Sequence[Example],
    *,
    build: BUILD,
    log: Log = lambda values, step: None,
    checkpoints: Path | None = None,
) -> Trained:
    """Train `student` in place (its model becomes a PEFT model when tuned by LoRA).

    Args:
        settings: the variant, resolved.
        build: options, setup -> method (methods.table.build).
        checkpoints: where this run, and no other, keeps its state; None keeps none.

    Raises:
        DataError: no question to train on, or one that is too long.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the state was saved.
    """
    torch.manual_seed(settings.seed)
    tuned = prepare_student(student, settings)
    method, encoded = None, None
    raise NotImplementedError
