"""The features that MetaNet scores by, of every question: on disk, because they outgrow memory (20 kB a question of a small student).

The file is no part of a checkpoint and still in step with it. What has changed since the checkpoint before last lies in memory and in the
checkpoint; a change reaches the file only when two newer states are safe. So whichever of the two newest checkpoints a run goes on from,
the file holds nothing that is newer than the one before it.

Letters: N questions, K views, H width.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mind.errors import MindError
from mind.training.peers import Peers

NAME = "features.bin"

Changes = dict[int, Tensor]
"""Question -> its row (1 + K, H): the features of the question, and of its views."""


class Features:
    """(N, 1 + K, H) float32, rows read and written one by one. All processes of a training share the file; the first one tends it."""

    def __init__(self, questions: int, views: int, width: int, folder: Path | None, peers: Peers) -> None:
        self._count, self._shape, self._peers = questions, (1 + views, width), peers
        self._bytes = 4 * (1 + views) * width
        self._file = _opened(folder, peers)
        weakref.finalize(self, os.close, self._file)
        self._at_once = True  # until the first step: a run that is killed by then starts again
        self._kept = folder is not None
        self._recent: Changes = {}  # since the newest checkpoint
        self._before: Changes = {}  # between that and the one before it

    def put(self, row: int, question: Tensor, views: Mapping[int, Tensor]) -> None:
        """Of a question (H,) and of some of its views (H,) each; the others stay as they are."""
        values = self.row(row).clone()
        values[0] = question
        for view, features in views.items():
            values[1 + view] = features
        if self._at_once:
            self._write(row, values)
        else:
            self._recent[row] = values

    def row(self, row: int) -> Tensor:
        """(1 + K, H)"""
        for changes in (self._recent, self._before):
            if row in changes:
                return changes[row]
        content = os.pread(self._file, self._bytes, row * self._bytes)
        return torch.frombuffer(bytearray(content), dtype=torch.float32).view(self._shape)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of questions and of their views: (Q,) -> (Q, H), (Q, K, H)."""
        found = torch.stack([self.row(row) for row in rows.tolist()])
        return found[:, 0], found[:, 1:]

    def changes(self, rows: Sequence[int]) -> Changes:
        """Of these questions, for the other processes; nothing as long as all write to the file."""
        return {} if self._at_once else {row: self._recent[row] for row in rows if row in self._recent}

    def adopt(self, changes: Changes) -> None:
        """What another process has changed."""
        if not self._at_once:
            self._recent.update(changes)

    def clear(self) -> None:
        """Before the rows of all questions come."""
        if self._peers.first:
            os.ftruncate(self._file, 0)
            os.ftruncate(self._file, self._count * self._bytes)
        self._peers.gather(None)

    def begin(self) -> None:
        """All rows have come; from now on they change in step with the checkpoints, where there are any."""
        if self._kept:
            os.fsync(self._file)
        self._peers.gather(None)
        self._at_once = not self._kept

    # ---- resume

    def state_dict(self) -> dict[str, Any]:
        return {"recent": _as_tensors(self._recent), "before": _as_tensors(self._before)}

    def saved(self) -> None:
        """The state is safe on disk: what was changed before the state before it goes to the file."""
        self._settle(self._before)
        self._before, self._recent = self._recent, {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if os.fstat(self._file).st_size != self._count * self._bytes:
            raise MindError("the features beside the checkpoint are missing", do="delete the folder of the checkpoint and run again")
        self._settle(_as_changes(state["before"]))
        self._before, self._recent, self._at_once = _as_changes(state["recent"]), {}, False

    def _settle(self, changes: Changes) -> None:
        if self._peers.first and changes:
            for row, values in changes.items():
                self._write(row, values)
            os.fsync(self._file)
        self._peers.gather(None)  # nobody reads before it is written

    def _write(self, row: int, values: Tensor) -> None:
        os.pwrite(self._file, values.to(torch.float32).contiguous().numpy().tobytes(), row * self._bytes)


def _opened(folder: Path | None, peers: Peers) -> int:
    """The one file of all processes; without a folder it is gone when they end."""
    name = ""
    if peers.first:
        handle, name = tempfile.mkstemp(prefix="mind-features-") if folder is None else (None, str(folder / NAME))
        if handle is None:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(name, os.O_RDWR | os.O_CREAT)
        os.close(handle)
    name = peers.gather(name)[0]
    file = os.open(name, os.O_RDWR)
    peers.gather(None)  # all have opened it
    if peers.first and folder is None:
        Path(name).unlink()
    return file


def _as_tensors(changes: Changes) -> list[Tensor]:
    """Which questions, and their rows."""
    return [torch.tensor(list(changes), dtype=torch.long), torch.stack(list(changes.values())) if changes else torch.empty(0)]


def _as_changes(tensors: list[Tensor]) -> Changes:
    questions, rows = tensors
    return dict(zip(questions.tolist(), rows.unbind() if len(questions) else (), strict=True))
