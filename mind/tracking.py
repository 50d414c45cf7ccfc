"""What a stage measures -> MLflow: one run a variant, continued where an earlier process stopped. Called by the stages.

Training of hours must outlive its tracking server: values are written by a thread of their own, kept and tried again while the
store does not answer, and what could not be stored in the end is said, not raised.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import posixpath
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mind import store
from mind.config import Tracking
from mind.outputs import digest_path
from mind.workspace import Workspace

BATCH = 990
"""Points a call: MLflow takes 1000 entities; a call a step costs three times as much (stack.md, 5)."""

FLUSH_SECONDS = 2.0
MAX_WAITING = 200_000  # points kept while the store does not answer, about 50 MB; beyond it the oldest go
CLOSE_SECONDS = 20.0  # how long the end of a run waits for a store that does not answer
LAST_TRIES_SECONDS = 1.0  # between the tries of that time
MAX_BACKOFF = 60.0
RETRY_SECONDS = (1.0, 4.0)  # before another try at what the caller waits for

PARAMS_A_CALL = 100
MAX_KEY, MAX_PARAM, MAX_TAG, MAX_DIGEST = 250, 6000, 8000, 36  # MLflow's limits, in characters


class Point(NamedTuple):
    key: str
    value: float
    time: int  # ms since the epoch
    step: int


@contextmanager
def open_run(
    workspace: Workspace,
    settings: Tracking,
    *,
    name: str,
    fingerprint: str,
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    dataset_digest: str | None = None,
    resume_finished: bool = False,
) -> Iterator[Run]:
    """A run of the experiment, open for the length of the block; it ends FINISHED, FAILED (an exception) or KILLED (Ctrl-C).

    The latest run of `fingerprint` is continued when it did not finish (a killed process leaves it RUNNING); its parameters and tags
    stay as they are, and a point (key, step) that it holds is not stored again. With `resume_finished` a finished run is continued too,
    and there a new value at a stored (key, step) supersedes the old one: an evaluation made anew.

    Args:
        name: the variant.
        fingerprint: equal for equal runs.
        tags: further tags, such as mind.method and mind.student.
        params: flat settings.
        dataset_digest: the DVC hash of the dataset, logged as tag and as input.

    Raises:
        PassingError: the tracking server does not answer.
        MindError: the store refuses (credentials, old schema, not a database).
    """
    with store.refusals(workspace, settings):
        client, experiment = store.connect(workspace, settings)
        found = store.latest(client, experiment, fingerprint)
        if found is None or (found.info.status == "FINISHED" and not resume_finished):
            found = client.create_run(experiment, run_name=name)
        else:
            client.update_run(found.info.run_id, status="RUNNING")
        own = _identity(workspace, name, fingerprint, dataset_digest)
        _describe(client, found, {**own, **(tags or {})}, params or {}, dataset_digest)
    run = Run(client, found, experiment, supersede=resume_finished)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.close(status)


class Run:
    """An open run: what a stage tells it reaches MLflow, soon. None of its methods raises because the store fails."""

    def __init__(self, client: Any, run: Any, experiment: str, *, supersede: bool) -> None:
        self.id: str = run.info.run_id
        self._client, self._experiment, self._supersede = client, experiment, supersede
        self._earlier: dict[str, dict[int, float] | None] = dict.fromkeys(run.data.metrics)  # key -> {step: value}, read when first needed
        self._lost: list[str] = []
        self._writer = _Writer(self._send)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep values for the next batch; returns at once.

        Raises:
            ValueError: a name that MLflow cannot store.
        """
        now = int(time.time() * 1000)
        for key in values:
            if not _is_name(key):
                raise ValueError(f"metric name {key!r}: wanted at most {MAX_KEY} letters, digits, spaces and _ - . / :")
        self._writer.put([Point(key, float(value), now, step) for key, value in values.items()])

    def figure(self, path: Path) -> None:
        """Store a picture under figures/ of the run."""
        self.artifact(path, "figures")

    def artifact(self, path: Path, folder: str = "") -> None:
        """Store a file, or what a folder holds, under `folder` of the run."""
        store = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        self._attempt(f"artifact {path.name}", lambda: store(self.id, str(path), folder or None))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags; one that the run has gets the new value."""
        from mlflow.entities import RunTag

        new = [RunTag(key, value[:MAX_TAG]) for key, value in tags.items()]
        self._attempt(f"tags {', '.join(tags)}", lambda: self._client.log_batch(self.id, tags=new))

    def register(self, folder: Path, model_name: str, alias: str) -> str | None:
        """Store `folder` as a logged model and as a version of the registered `model_name` that bears `alias`.

        A content that is registered already becomes no second version; only the alias moves to it.

        Returns:
            The address `models:/<name>@<alias>`, with the characters that MLflow refuses replaced; None when it could not be stored.
        """
        name, alias = _registry_name(model_name), _registry_alias(alias)
        return self._attempt(f"model {name}@{alias}", lambda: self._register(folder, name, alias))

    def close(self, status: str) -> None:
        """Write what waits, end the run and say what was lost."""
        points = self._writer.close()
        self._attempt("the run's end", lambda: self._client.set_terminated(self.id, status))
        lost = [*([f"{points} points"] if points else []), *self._lost]
        if lost:
            store.say(f"not stored in run {self.id}: {', '.join(lost)} (the stages' own folders have all of it)")

    def _register(self, folder: Path, name: str, alias: str) -> str:
        content = digest_path(folder)
        with contextlib.suppress(store.library().exceptions.MlflowException):  # there already; anything else shows in the next call
            self._client.create_registered_model(name)
        known = self._client.search_model_versions(f"name = '{name}' AND tag.`mind.content` = '{content}'")
        version = known[0].version if known else self._new_version(folder, name, content)
        self._client.set_registered_model_alias(name, alias, version)
        return f"models:/{name}@{alias}"

    def _new_version(self, folder: Path, name: str, content: str) -> str:
        from mlflow.entities import LoggedModelOutput

        tags = {"mind.content": content}
        model = self._client.create_logged_model(self._experiment, name=name.replace(".", "-"), source_run_id=self.id, tags=tags)
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(self.id, [LoggedModelOutput(model.model_id, step=0)])
        # not `models:/<id>`: MLflow 3.17 resolves that through its global tracking URI, which may be another store
        version = self._client.create_model_version(name, model.artifact_location, self.id, tags, model_id=model.model_id)
        return str(version.version)

    def _send(self, points: Iterable[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(p.key, p.value, p.time, p.step) for p in points if not self._is_stored(p)]
        if metrics:
            self._client.log_batch(self.id, metrics=metrics)

    def _is_stored(self, point: Point) -> bool:
        """Whether an earlier process has stored this point."""
        if point.key not in self._earlier:
            return False
        steps = self._earlier[point.key]
        if steps is None:
            steps = {m.step: m.value for m in self._client.get_metric_history(self.id, point.key)}
            self._earlier[point.key] = steps
        if point.step not in steps:
            return False
        return not self._supersede or _same(steps[point.step], point.value)

    def _attempt(self, what: str, action: Callable[[], Any]) -> Any:
        """What `action` returns; None, and a line in the account of losses, when the store refuses it again and again."""
        for wait in (*(() if self._writer.failing else RETRY_SECONDS), None):
            try:
                return action()
            except (store.library().exceptions.MlflowException, OSError) as error:  # the errors of requests are OSErrors
                if wait is None:
                    self._lost.append(what)
                    store.say(f"{what} could not be stored: {store.first_line(error)}")
                else:
                    time.sleep(wait)
        return None


class _Writer:
    """The thread between a loop that must not wait and a store that may fail.

    Points are sent in order, at most BATCH a call, when so many wait or FLUSH_SECONDS after the last look. What fails stays in front
    and is tried again, less and less often.
    """

    def __init__(self, send: Callable[[list[Point]], None]) -> None:
        self.failing = False
        self._send = send
        self._waiting: deque[Point] = deque()
        self._lost = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed_at: float | None = None
        self._thread = threading.Thread(target=self._work, name="mind-tracking", daemon=True)
        self._thread.start()

    def put(self, points: Iterable[Point]) -> None:
        with self._lock:
            self._waiting.extend(points)
            self._trim()
        if len(self._waiting) >= BATCH and not self.failing:
            self._wake.set()

    def close(self) -> int:
        """Wait until all is written, or the store has failed for CLOSE_SECONDS; return how many points were lost."""
        self._closed_at = time.monotonic()
        self._wake.set()
        self._thread.join()
        return self._lost + len(self._waiting)

    def _work(self) -> None:
        pause = FLUSH_SECONDS
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            closed_at = self._closed_at  # read before emptying: what was put before the closing is sent
            error = self._empty()
            self._note(error)
            if error is None:
                pause = FLUSH_SECONDS
                if closed_at is not None:
                    return
            else:
                pause = min(2 * pause, MAX_BACKOFF) if closed_at is None else LAST_TRIES_SECONDS
                if closed_at is not None and time.monotonic() - closed_at > CLOSE_SECONDS:
                    return

    def _empty(self) -> Exception | None:
        """Send what waits; the error that stopped it, if any."""
        while True:
            with self._lock:
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            if not batch:
                return None
            try:
                self._send(batch)
            except Exception as error:  # whatever it is, training goes on
                with self._lock:
                    self._waiting.extendleft(reversed(batch))
                    self._trim()
                return error

    def _note(self, error: Exception | None) -> None:
        """Say when the store stops to answer, and when it answers again: once each."""
        if error is not None and not self.failing:
            store.say(f"the store does not answer ({store.first_line(error)}); values are kept and tried again")
        if error is None and self.failing:
            store.say("the store answers again")
        self.failing = error is not None

    def _trim(self) -> None:
        while len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._lost += 1


def _identity(workspace: Workspace, name: str, fingerprint: str, dataset_digest: str | None) -> dict[str, str]:
    """The tags that every run bears; what is unknown is left out."""
    from mlflow.tracking.context.registry import resolve_tags

    tags = {
        "mind.variant": name,
        "mind.fingerprint": fingerprint,
        "mind.dataset": dataset_digest,
        "mind.git_commit": _git_commit(workspace.home),
        "prefect.flow_run": os.environ.get("PREFECT__FLOW_RUN_ID") or os.environ.get("MIND_FLOW_RUN"),
    }
    return {**resolve_tags(), **{key: value for key, value in tags.items() if value}}


def _git_commit(folder: Path) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _describe(client: Any, run: Any, tags: Mapping[str, str], params: Mapping[str, Any], dataset_digest: str | None) -> None:
    """Add the tags, parameters and input that the run does not have yet."""
    from mlflow.entities import Param, RunTag

    new_tags = [RunTag(key, str(value)[:MAX_TAG]) for key, value in tags.items() if key not in run.data.tags]
    texts = {_param_key(key): _param_text(value) for key, value in params.items()}
    new_params = [Param(key, text) for key, text in texts.items() if key not in run.data.params]
    client.log_batch(run.info.run_id, tags=new_tags)
    for start in range(0, len(new_params), PARAMS_A_CALL):
        client.log_batch(run.info.run_id, params=new_params[start : start + PARAMS_A_CALL])
    if dataset_digest and not run.inputs.dataset_inputs:
        client.log_inputs(run.info.run_id, [_dataset_input(dataset_digest)])


def _dataset_input(digest: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(name="dataset", digest=digest[:MAX_DIGEST], source_type="code", source=json.dumps({"tags": {"mind.dataset": digest}}))
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])


def _is_name(key: str) -> bool:
    """Whether MLflow takes it: its characters, its length, and no path that resolves to another name."""
    path = posixpath.normpath(key)
    return bool(re.fullmatch(rf"[\w/.\- :]{{1,{MAX_KEY}}}", key)) and path == key and path != "." and not path.startswith(("/", ".."))


def _param_key(key: str) -> str:
    key = re.sub(r"[^\w/.\- :]", "_", key)[:MAX_KEY]
    return key if _is_name(key) else key.replace("/", "_").strip(".") or "_"


def _param_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_PARAM else text[: MAX_PARAM - 1] + "…"


def _registry_name(name: str) -> str:
    return re.sub(r"[^\w.\-]+", "-", name).strip("-")


def _registry_alias(alias: str) -> str:
    """MLflow takes letters, digits, _ and -, but neither 'latest' nor what looks like a version ('v2')."""
    alias = re.sub(r"[^\w\-]", "_", alias)
    return f"variant-{alias}" if re.fullmatch(r"(?i)v\d+|latest", alias) else alias


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
