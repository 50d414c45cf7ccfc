"""An output folder is whole or absent: a stage writes to a temporary sibling and renames it at the end."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mind import __version__
from mind.errors import DataError, MindError

MANIFEST = "manifest.json"

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""What the system says of a place that cannot be written."""


@contextmanager
def stage_output(folder: Path) -> Iterator[Path]:
    """A temporary sibling to write to; becomes `folder` on success, is removed on failure.

    Raises:
        MindError: no space left, or the folder cannot be written. Any other error of the work inside passes unchanged.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    inside = False  # the work of a whole stage, most errors of which are not about this folder
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        inside = True
        yield partial
        inside = False
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    except OSError as error:
        closed = error.errno in CLOSED and (not inside or str(error.filename).startswith(str(partial)))
        if error.errno not in FULL and not closed:
            raise
        raise MindError(
            f"cannot write {folder}: {error.strerror or error}",
            wanted="a writable folder with space left",
            do="free some space and run again: finished work is kept",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def digest_bytes(*parts: bytes) -> str:
    """sha256 (hex) over length-prefixed parts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()


def digest_json(value: Any) -> str:
    """sha256 (hex) of canonical JSON: the same value gives the same digest in every process."""
    return digest_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode())


def digest_path(path: Path) -> str:
    """sha256 (hex) of a file, or of a folder's relative names and contents."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != ".gitignore")
    return digest_bytes(*(part for p in files for part in (p.relative_to(path).as_posix().encode(), digest_path(p).encode())))


def digest_code(*names: str) -> str:
    """sha256 (hex) of these modules and packages of mind, by their paths in it: what a result kept outside DVC depends on."""
    root = Path(__file__).parent
    sources = [path for name in names for path in ([root / name] if name.endswith(".py") else sorted((root / name).rglob("*.py")))]
    return digest_json({path.relative_to(root).as_posix(): digest_path(path) for path in sources})


def write_manifest(
    folder: Path, *, stage: str, inputs: Mapping[str, str], config: Mapping[str, Any], counts: Mapping[str, Any], **more: Any
) -> None:
    """Say where an output came from. Nothing in it may vary between equal runs: no clock, no host, no run id.

    Args:
        inputs: name -> digest of everything that was read.
        config: the resolved settings that the stage used.
        counts: what is inside.
    """
    content = {"stage": stage, "mind": __version__, "inputs": dict(inputs), "config": dict(config), "counts": dict(counts), **more}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output folder.

    Raises:
        DataError: the folder or its manifest is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing", wanted="the finished output of an earlier stage", do="run `mind run`, or the stage that makes it"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}", do=f"delete {folder} and run its stage again") from None
