"""What a person who watches a flow in Prefect's pages sees beside its states: how far a stage is, and what came out of the run.

Only flows on a server are watched; `mind run` in its own process shows the same at the terminal and pays nothing for this.
"""

from __future__ import annotations

import base64
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.context import get_run_context
from prefect.settings import PREFECT_API_URL

from mind import comparison, registry, tables
from mind.config import Config
from mind.errors import DataError
from mind.outputs import read_manifest
from mind.progress import FILE
from mind.workspace import Workspace

LOOK_SECONDS = 3.0


def watched() -> bool:
    """Whether this flow runs on a server that somebody can look at."""
    return bool(PREFECT_API_URL.value()) and "MIND_UNWATCHED" not in os.environ


@contextmanager
def progress(target: str) -> Iterator[Mapping[str, str]]:
    """A progress artifact that follows the bar of the stage's process; gives the environment by which that process tells it."""
    if not watched():
        yield {}
        return
    shown: Any = create_progress_artifact(progress=0.0, key=key(target), description=target)
    done = threading.Event()
    with TemporaryDirectory() as folder:
        told = Path(folder) / "progress"
        follower = threading.Thread(target=_follow, args=(told, shown, done, get_run_context()), daemon=True)
        follower.start()
        try:
            yield {FILE: str(told)}
        finally:
            done.set()
            follower.join()
    update_progress_artifact(artifact_id=shown, progress=100.0)  # not reached by a stage that failed


def _follow(told: Path, shown: Any, done: threading.Event, context: Any) -> None:
    """Every few seconds: what the stage says of its bar ('done total label  note') -> the artifact."""
    said = ""
    while not done.wait(LOOK_SECONDS):
        line = told.read_text(encoding="utf-8") if told.exists() else ""
        if line and line != said:
            said = line
            count, total, text = line.split(" ", 2)
            percent = min(100.0, 100 * int(count) / max(int(total), 1))
            update_progress_artifact(artifact_id=shown, progress=percent, description=f"{text} ({count} of {total})")


def results(workspace: Workspace, config: Config) -> None:
    """The comparison of the variants, its picture, and where the runs are in MLflow, as one artifact."""
    if not watched():
        return
    try:
        compared = comparison.compare(workspace, config, list(config.run.variants))
    except DataError:  # nothing was evaluated
        return
    picture = workspace.reports / "comparison.png"
    tables.draw(compared, picture)
    encoded = base64.b64encode(picture.read_bytes()).decode("ascii")
    links = "\n".join(f"- {line}" for line in _links(workspace, config))
    text = f"{tables.to_markdown(compared)}\n\n![accuracy](data:image/png;base64,{encoded})\n\nRuns in MLflow:\n\n{links}\n"
    create_markdown_artifact(key=key("comparison", workspace), markdown=text, description=f"comparison of {workspace.root}")


def _links(workspace: Workspace, config: Config) -> Iterator[str]:
    for name in config.run.variants:
        fingerprint = read_manifest(workspace.student(name))["fingerprint"]
        page = registry.page(workspace, config.tracking, fingerprint)
        yield f"[{name}]({page})" if page and page.startswith("http") else f"{name}: {page or 'no run'}"


def key(name: str, workspace: Workspace | None = None) -> str:
    """An artifact's name: small letters, digits and dashes; a derived workspace has its own."""
    own = "" if workspace is None or workspace.root == workspace.home else f"-{workspace.root.name}"
    return re.sub(r"[^a-z0-9]+", "-", f"{name}{own}".lower()).strip("-")
