"""The processes that work on one student together (`training.processes`, `evaluation.processes`), as the work sees them; alone, it is free.

Each process has the whole student and takes its share of a step's questions; gradients are summed before the step, so every process
makes the same step, and the course is that of one process up to rounding. `launch` starts them; Accelerate joins them in a group. In an
evaluation each answers its share of the questions.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from mind import progress
from mind.errors import StageError

PATIENCE = timedelta(days=1)
"""How long a process waits for the others: a share of an evaluation, or the first look at a large dataset, may take hours."""

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """This process among those that work together: its place, from 0, and how many they are."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Peers:
        """The group that this process is in."""
        if not launched():
            return cls()
        PartialState(timeout=PATIENCE)  # joins it: nccl on GPUs, gloo on CPUs
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @contextmanager
    def silently(self) -> Iterator[None]:
        """What the others would say, the first one says."""
        os.environ.pop(progress.FILE, None)
        with Path(os.devnull).open("w", encoding="utf-8") as nothing, redirect_stderr(nothing):
            yield

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Which of these this process works on."""
        return items[self.rank :: self.count]

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """In place: each becomes the sum over all processes. The same shapes in the same order everywhere."""
        own = list(tensors)
        if self.count == 1 or not own:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in own])
        flat = flat.to(PartialState().device)  # nccl knows no tensors of the CPU, where MetaNet lives
        dist.all_reduce(flat)
        for tensor, total in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
            tensor.detach().copy_(total.view_as(tensor))

    def gather(self, thing: T) -> list[T]:
        """What every process has, in the order of their ranks."""
        if self.count == 1:
            return [thing]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, thing)
        return found


ALONE = Peers()


def launched() -> bool:
    """Whether this process is one of those that `launch` (or `accelerate launch`, torchrun) has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(count: int, *arguments: str) -> None:
    """Run `python ARGUMENTS` in `count` processes that are one group, and wait for them.

    Raises:
        StageError: one of them failed; with its exit code.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    own = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(own, sys.executable)(*arguments)
    except ChildFailedError as error:
        code = next(iter(error.failures.values())).exitcode
        raise StageError(f"{count} processes together ended with exit code {code}", exit_code=code if code > 0 else 128 - code) from None
