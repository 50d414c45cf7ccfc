"""What MLflow holds, read back: runs, and the versions of registered students. Used by comparison, lineage and re-evaluation."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mind import store
from mind.config import Tracking
from mind.workspace import Workspace

RUNS_A_CALL = 500


def find_run(workspace: Workspace, settings: Tracking, fingerprint: str) -> str | None:
    """The id of the latest run of `fingerprint`, or None. Raises as `tracking.open_run`."""
    found = _latest(workspace, settings, fingerprint)
    return found.info.run_id if found else None


def values(workspace: Workspace, settings: Tracking, fingerprints: Iterable[str], key: str) -> dict[str, float]:
    """fingerprint -> the last value of metric `key` in its latest run, where there is one. Raises as `tracking.open_run`."""
    with store.reading(workspace, settings) as opened:
        if opened is None:
            return {}
        client, experiment = opened
        found = {fingerprint: store.latest(client, experiment, fingerprint) for fingerprint in fingerprints}
    return {fingerprint: run.data.metrics[key] for fingerprint, run in found.items() if run and key in run.data.metrics}


class Finished:
    """A finished run as the store remembers it."""

    def __init__(self, client: Any, run: Any) -> None:
        self._client = client
        self.id: str = run.info.run_id
        self.tags: dict[str, str] = run.data.tags
        self.params: dict[str, str] = run.data.params
        self.metrics: dict[str, float] = run.data.metrics

    def download(self, name: str, folder: Path) -> bool:
        """Copy an artifact folder of the run to `folder`/`name`; False when the run has none of that name."""
        if not self._client.list_artifacts(self.id, name):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        self._client.download_artifacts(self.id, name, str(folder))
        return True


@contextmanager
def finished_runs(workspace: Workspace, settings: Tracking) -> Iterator[list[Finished]]:
    """The finished runs of the experiment, latest first, to read from within the block. Raises as `tracking.open_run`."""
    with store.reading(workspace, settings) as opened:
        if opened is None:
            yield []
            return
        client, experiment = opened
        order = {"max_results": RUNS_A_CALL, "order_by": ["attributes.start_time DESC"]}
        search = partial(client.search_runs, [experiment], "attributes.status = 'FINISHED'", **order)
        yield [Finished(client, run) for run in _pages(search)]


def page(workspace: Workspace, settings: Tracking, fingerprint: str) -> str | None:
    """Where MLflow's pages show the latest run of `fingerprint`: its address, or its id while no pages are served; None without a run."""
    found = _latest(workspace, settings, fingerprint)
    pages = os.environ.get(store.PAGES) if store.database_of(workspace, settings) else settings.uri.rstrip("/")
    if found is None or not pages:
        return found.info.run_id if found else None
    return f"{pages}/#/experiments/{found.info.experiment_id}/runs/{found.info.run_id}"


def look_up(workspace: Workspace, settings: Tracking, name: str, fingerprint: str | None = None) -> dict[str, Any] | None:
    """What the store knows of a run: by its id (or the start of it), by a registered model ('NAME@ALIAS', 'NAME/3', with or without
    'models:/'), or the latest run of that name. None when there is none.

    Args:
        fingerprint: of the runs of that name, this one's are meant: other settings may have made a later one.

    Returns:
        `run`, `name`, `status`, `started` (ms since the epoch), `tags`, `metrics`, and `models`: name, version and aliases of each
        student that was registered from it (only the named one, when a model was named).

    Raises:
        PassingError, MindError: as `tracking.open_run`.
    """
    with store.reading(workspace, settings) as opened:
        if opened is None:
            return None
        client, experiment = opened
        versions = _model_versions(client, name)
        if versions:
            run = client.get_run(versions[0].run_id)
        else:
            own = store.latest(client, experiment, fingerprint) if fingerprint else None
            run = own or next(iter(_runs_named(client, experiment, name)), None)
            if run is None:
                return None
            versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")
        models = [{"name": v.name, "version": v.version, "aliases": _aliases(client, v)} for v in versions]
    return {
        "run": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "started": run.info.start_time,
        "tags": dict(run.data.tags),
        "metrics": dict(run.data.metrics),
        "models": models,
    }


def _model_versions(client: Any, name: str) -> list[Any]:
    """The version that 'NAME@ALIAS' or 'NAME/VERSION' names; none for anything else."""
    found = re.fullmatch(r"(?:models:/)?([^@/]+)(?:@([^@/]+)|/(\d+))", name)
    if not found:
        return []
    model, alias, version = found.groups()
    with contextlib.suppress(store.library().exceptions.MlflowException):
        return [client.get_model_version_by_alias(model, alias) if alias else client.get_model_version(model, version)]
    return []


def _runs_named(client: Any, experiment: str, name: str) -> list[Any]:
    """The latest first: those of that name, else the one whose id begins so."""
    newest = {"order_by": ["attributes.start_time DESC"]}
    quoted = name.replace("'", "")
    found = client.search_runs([experiment], f"attributes.run_name = '{quoted}'", max_results=1, **newest)
    if not found and re.fullmatch(r"[0-9a-f]{6,32}", name):
        found = client.search_runs([experiment], f"attributes.run_id LIKE '{name}%'", max_results=1, **newest)
    return list(found)


def _aliases(client: Any, version: Any) -> list[str]:
    """Search results come without aliases in MLflow 3.17; the registered model knows them."""
    known = client.get_registered_model(version.name).aliases
    return sorted(alias for alias, number in known.items() if str(number) == str(version.version))


@dataclass(frozen=True)
class Version:
    """One version of a registered student, with what its run says."""

    model: str
    number: str
    aliases: tuple[str, ...]
    content: str  # digest of the student's folder
    source: str  # where the store keeps it
    variant: str
    fingerprint: str
    tags: Mapping[str, str]  # of its run


def versions(workspace: Workspace, settings: Tracking) -> list[Version]:
    """All versions of all students of the registry whose runs are in this experiment, the oldest first. Raises as `tracking.open_run`."""
    with store.reading(workspace, settings) as opened:
        if opened is None:
            return []
        client, experiment = opened
        found = []
        for model in _pages(client.search_registered_models):
            aliases: dict[str, list[str]] = {}
            for alias, number in model.aliases.items():
                aliases.setdefault(str(number), []).append(alias)
            for version in _pages(partial(client.search_model_versions, f"name = '{model.name}'")):
                run = _run_of(client, version)
                if run is None or run.info.experiment_id != experiment or "mind.content" not in version.tags:
                    continue
                number = str(version.version)
                found.append(
                    Version(
                        model=model.name,
                        number=number,
                        aliases=tuple(sorted(aliases.get(number, ()))),
                        content=version.tags["mind.content"],
                        source=version.source,
                        variant=run.data.tags["mind.variant"],
                        fingerprint=run.data.tags["mind.fingerprint"],
                        tags=dict(run.data.tags),
                    )
                )
    return sorted(found, key=lambda version: (version.model, int(version.number)))


def run_tags(workspace: Workspace, settings: Tracking, fingerprint: str) -> dict[str, str] | None:
    """The tags of the latest run of `fingerprint`; None without one. Raises as `tracking.open_run`."""
    found = _latest(workspace, settings, fingerprint)
    return dict(found.data.tags) if found else None


def fetch(workspace: Workspace, settings: Tracking, version: Version, folder: Path) -> Path:
    """Copy a registered student from the store into `folder`; where it lies then. Raises as `tracking.open_run`."""
    with store.refusals(workspace, settings):
        client, _ = store.connect(workspace, settings)
        download = store.library().artifacts.download_artifacts
        return Path(download(artifact_uri=version.source, dst_path=str(folder), tracking_uri=client.tracking_uri))


def _latest(workspace: Workspace, settings: Tracking, fingerprint: str) -> Any | None:
    with store.reading(workspace, settings) as opened:
        return store.latest(*opened, fingerprint) if opened else None


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All that a search of the store finds."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _run_of(client: Any, version: Any) -> Any | None:
    """The run that made a version; None when it was deleted or is none of ours."""
    try:
        run = client.get_run(version.run_id)
    except store.library().exceptions.MlflowException:
        return None
    return run if run.info.lifecycle_stage == "active" and "mind.fingerprint" in run.data.tags else None
