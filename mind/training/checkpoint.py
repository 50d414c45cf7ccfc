"""A run's whole state on disk, for a run that is killed and goes on. Called by the loop; a folder holds one run: `step-00000050.pt`, ...

A file is written aside, hashed, and renamed, so it is whole or absent; its sha256 lies beside it. A damaged file is deleted and the one
before it read. Files are read as tensors and plain containers only, never as code.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mind import memory
from mind.errors import MindError

KEPT = 2


def save(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write the state after `step`; older ones go, except the one before.

    Raises:
        MindError: no space left, or the folder cannot be written.
    """
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        _digest_path(path).write_text(_digest(partial), encoding="ascii")
        partial.replace(path)
        for old in _files(folder)[:-KEPT]:
            _delete(old)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        raise MindError(
            f"cannot write the checkpoint {path}: {error}",
            wanted="a writable folder with space left",
            do="free some space and run again: training goes on from the checkpoint before",
        ) from error


def load(folder: Path) -> dict[str, Any] | None:
    """The newest state that is whole; None where there is none. Says on stderr what is damaged, and deletes it: else it would count as
    newer than what a run that starts again from an earlier step saves.

    Raises:
        MemoryError, RuntimeError: no memory for a state, which may be whole.
    """
    for path in reversed(_files(folder)):
        try:
            wanted = _digest_path(path).read_text(encoding="ascii")
            if wanted == _digest(path):
                return torch.load(path, map_location="cpu", weights_only=True)
            why = "its sha256 differs from the one written beside it"
        except Exception as error:  # a torn file shows itself in many ways; each means: use the one before
            if memory.is_exhausted(error):
                raise
            why = f"{type(error).__name__}: {error}"
        print(f"warning: checkpoint {path} is damaged ({why}); deleting it", file=sys.stderr, flush=True)
        with suppress(OSError):  # where it cannot be deleted nothing can be saved either, and `save` says so
            _delete(path)
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)  # of several processes that read it, another may have been first
    _digest_path(path).unlink(missing_ok=True)


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
