"""MLflow's store: reached, made where it is missing, its refusals in our words. mind/tracking.py writes to it, mind/registry.py reads.

MLflow (2-3 s) is imported when the store is opened.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mind.config import Tracking
from mind.errors import MindError, PassingError
from mind.progress import console
from mind.workspace import Workspace

KIND = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's pages then open on the table of runs; without it, on the traces of an agent that is not there."""

PAGES = "MIND_MLFLOW_PAGES"
"""The variable that names the address at which `mind up` serves the pages of a SQLite store."""

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # MLflow's own 120 s and 7 tries take half an hour to say that a server is gone
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "GIT_PYTHON_REFRESH": "quiet",
}


def database_of(workspace: Workspace, settings: Tracking) -> Path | None:
    """The SQLite file of the store (a relative one counts from the workspace's home); None when it is a server."""
    if not settings.uri.startswith("sqlite:///"):
        return None
    return workspace.home / settings.uri.removeprefix("sqlite:///")


def ui_hint(workspace: Workspace, settings: Tracking) -> str:
    """How to look at the runs: the command that serves MLflow's pages from here, or the server's address."""
    database = database_of(workspace, settings)
    if database is None:
        return settings.uri
    beside = Path(sys.executable).with_name("mlflow")
    command = "mlflow" if shutil.which("mlflow") == str(beside) or not beside.exists() else _from_here(beside)
    return f"{shlex.quote(command)} server --workers 1 --backend-store-uri {shlex.quote(f'sqlite:///{_from_here(database)}')}"


def make_store(workspace: Workspace, settings: Tracking) -> None:
    """Make a SQLite store and the experiment where they are missing, so that a server finds them whole. Raises as `tracking.open_run`."""
    with refusals(workspace, settings):
        connect(workspace, settings)


@contextmanager
def reading(workspace: Workspace, settings: Tracking) -> Iterator[tuple[Any, str] | None]:
    """The client and the experiment's id, to read from in the block; None where no store was made yet. Raises as `tracking.open_run`."""
    database = database_of(workspace, settings)
    if database is not None and not database.exists():
        yield None
        return
    with refusals(workspace, settings):
        yield connect(workspace, settings)


def connect(workspace: Workspace, settings: Tracking) -> tuple[Any, str]:
    """The client and the experiment's id; makes both database and experiment where they are missing.

    A fresh SQLite database is made under a lock: of several processes that MLflow lets do it at once, all fail and it stays broken.
    """
    from filelock import FileLock

    mlflow = library()
    database = database_of(workspace, settings)
    if database is None:
        return _experiment(mlflow, settings.uri.rstrip("/"), settings.experiment, None)
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):
        return _experiment(mlflow, f"sqlite:///{database}", settings.experiment, (database.parent / "artifacts").as_uri())


def _experiment(mlflow: Any, uri: str, name: str, artifacts: str | None) -> tuple[Any, str]:
    client = mlflow.tracking.MlflowClient(uri, uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client, client.create_experiment(name, artifacts, tags=KIND)
        except mlflow.exceptions.MlflowException as error:  # a server: another process was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise MindError(
            f"the MLflow experiment '{name}' is deleted",
            do=f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or another name in tracking.experiment",
        )
    if artifacts and found.artifact_location != artifacts:
        say(f"the workspace was moved: artifacts of experiment '{name}' still go to {found.artifact_location}")
    return client, found.experiment_id


def latest(client: Any, experiment: str, fingerprint: str) -> Any | None:
    wanted = f"tags.`mind.fingerprint` = '{fingerprint}'"
    runs = client.search_runs([experiment], wanted, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0] if runs else None


def library() -> Any:
    """MLflow, silent: no telemetry, no migration log, no links on stdout."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints a traceback for what we catch
    import mlflow.tracking

    return mlflow


@contextmanager
def refusals(workspace: Workspace, settings: Tracking) -> Iterator[None]:
    """The errors of MLflow, and of the database below it, at the opening of a run -> ours."""
    from alembic.util.exc import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (library().exceptions.MlflowException, SQLAlchemyError, CommandError, OSError) as error:
        raise _refusal(error, database_of(workspace, settings), settings) from error


def _refusal(error: Exception, database: Path | None, settings: Tracking) -> MindError:
    text = str(error)
    if database is not None and re.search("out-of-date database schema|locate revision", text):
        return MindError(
            f"{database} was made by another version of MLflow",
            do=f"copy it, then run `mlflow db upgrade sqlite:///{database}`; if it is the newer one, install that version",
        )
    found = f"the MLflow store {database or settings.uri} cannot be used: {first_line(error)}"
    if database is not None:
        return MindError(found, wanted="a database that MLflow made", do="move it away: it is made anew")
    if re.search(r"error code 40[13]", text):
        return MindError(found, do="set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    return PassingError(found, do="start the server, or set tracking.uri: sqlite:///mlflow/mlflow.db")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _from_here(path: Path) -> str:
    """A path below the current folder relative to it, others whole."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def say(text: str) -> None:
    console.print(f"tracking: {text}", style="yellow", markup=False, soft_wrap=True)
