"""A registered student, a run or a variant -> where it came from: run, commit, dataset, rationales, teacher requests. `mind lineage`.

Each step is found by the digest that the step after it recorded, so it is what that student was made from, however the workspace looks
now: folders of earlier versions are read from DVC's cache, requests from the reply cache. What is no longer kept is said to be missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mind import registry, store, versioning
from mind.config import Config
from mind.errors import DataError
from mind.outputs import MANIFEST, read_manifest
from mind.records import Rationale, read_jsonl
from mind.workspace import Workspace

SHOWN_METRICS = ("eval/id/accuracy", "eval/ood/accuracy")


@dataclass(frozen=True)
class Lineage:
    """From the end back to the beginning; a step that is not known any more is empty."""

    run: dict[str, Any]
    dataset: dict[str, Any] = field(default_factory=dict)
    rationales: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    question: list[dict[str, Any]] = field(default_factory=list)  # the views of one question, when it was asked for

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def trace(workspace: Workspace, config: Config, name: str, question: str | None = None) -> Lineage:
    """Walk back from `name`: a registered model ('mind-smollm2-135m@mind', '.../3'), a run's id, or a variant (as it is in `students/`).

    Args:
        question: the id of one question of the dataset, to see each of its views with the request that bought it.

    Raises:
        DataError: the store has no such run, or the dataset no such question.
    """
    here = workspace.student(name)
    fingerprint = read_manifest(here)["fingerprint"] if name in config.variants and (here / MANIFEST).is_file() else None
    run = registry.look_up(workspace, config.tracking, name, fingerprint)
    if run is None:
        raise DataError(
            f"no run '{name}' in {store.database_of(workspace, config.tracking) or config.tracking.uri}",
            wanted="a variant, a run's id, or a registered student such as mind-smollm2-135m@mind",
            do="`mind run` makes runs; `mind up` shows them",
        )
    version = run["tags"].get("mind.dataset")
    if version is None:  # the untouched student
        return Lineage(run)
    files = _folder(workspace, workspace.dataset, version)
    dataset = {"version": version, **_dataset(files)}
    rows = _provenance(files)
    source = versioning.made_from(workspace, "dataset", version).get("rationales", "")
    rationales = _rationales(_folder(workspace, workspace.rationales, source), source)
    requests = [request for row in rows if row["fate"] == "kept" for request in row["requests"].values()]
    views = _views(workspace, files, rows, question) if question else []
    return Lineage(run, dataset, rationales, _teacher(workspace, rationales, requests), views)


def show(found: Lineage) -> Iterator[str]:
    """Lines for a terminal."""
    run, tags = found.run, found.run["tags"]
    for model in run["models"]:
        aliases = "".join(f" @{alias}" for alias in model["aliases"])
        yield f"student     {model['name']} version {model['version']}{aliases}"
    started = datetime.fromtimestamp(run["started"] / 1000, UTC).isoformat(timespec="seconds")
    yield f"run         {run['run']}  {run['name']}, {run['status'].lower()}, {started}"
    scores = ", ".join(f"{key} {run['metrics'][key]:.3f}" for key in SHOWN_METRICS if key in run["metrics"])
    told = {"method": "mind.method", "weights": "mind.student", "commit": "mind.git_commit", "flow run": "prefect.flow_run"}
    for label, tag in told.items():
        yield f"  {label:<9} {tags.get(tag, 'unknown')}"
    if scores:
        yield f"  {'results':<9} {scores}"
    if not found.dataset:
        yield "dataset     none: the untouched student"
        return
    yield f"dataset     {found.dataset['version']}  {_counted(found.dataset, ('questions', 'views'))}"
    yield f"rationales  {found.rationales.get('version') or 'unknown'}  {_counted(found.rationales, ('rows', 'accepted'))}"
    teacher = {"model": "unknown", "endpoint": "unknown", "prompts": "", **found.teacher}
    yield f"teacher     {teacher['model']} at {teacher['endpoint']}, prompts {teacher['prompts'][:12]}"
    yield f"  requests  {teacher['requests']} behind the dataset's views, {teacher['kept']} of them in {teacher['cache']}"
    for view in found.question:
        text = " ".join(view["text"].split())
        yield f"  {view['perspective']:<16} {view['request'][:12]}  {text[:90]}{'...' if len(text) > 90 else ''}"


def _counted(step: Mapping[str, Any], names: tuple[str, ...]) -> str:
    if names[0] not in step:
        return "not kept: neither the folder nor DVC's cache has it"
    return ", ".join(f"{step[name]} {name}" for name in names)


def _folder(workspace: Workspace, folder: Path, version: str) -> Mapping[str, Path]:
    """The files of a stage's output at that version: the folder itself while it is at it, else DVC's cache."""
    if not version:
        return {}
    if folder.exists() and versioning.version_of(folder) == version:
        return {path.name: path for path in folder.iterdir()}
    return versioning.stored(workspace, version)


def _dataset(files: Mapping[str, Path]) -> dict[str, Any]:
    if "manifest.json" not in files:
        return {}
    counts = json.loads(files["manifest.json"].read_text(encoding="utf-8"))["counts"]
    return {"questions": counts["questions"], "views": counts["views"], "fates": counts["fates"]}


def _provenance(files: Mapping[str, Path]) -> list[dict[str, Any]]:
    path = files.get("provenance.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path else []


def _rationales(files: Mapping[str, Path], version: str) -> dict[str, Any]:
    if "manifest.json" not in files:
        return {"version": version}
    manifest = json.loads(files["manifest.json"].read_text(encoding="utf-8"))
    rows = Counter(row.accepted for row in read_jsonl(files["rationales.jsonl"], Rationale))
    return {"version": version, "rows": rows.total(), "accepted": rows[True], "config": manifest["config"], "inputs": manifest["inputs"]}


def _teacher(workspace: Workspace, rationales: Mapping[str, Any], requests: list[str]) -> dict[str, Any]:
    asked = rationales.get("config", {})
    own = {key: asked.get("teacher", {}).get(key) for key in ("model", "endpoint", "temperature") if key in asked.get("teacher", {})}
    return {
        **own,
        **({"prompts": asked["prompts"]} if "prompts" in asked else {}),
        "requests": len(requests),
        "kept": _kept(workspace, requests),
        "cache": str(workspace.replies),
    }


def _kept(workspace: Workspace, requests: list[str]) -> int:
    """How many of the requests have their reply in the reply cache."""
    from mind.teacher.cache import ReplyCache

    if not workspace.replies.exists():
        return 0
    with ReplyCache(workspace.replies) as cache:
        return sum(cache.get(request) is not None for request in requests)


def _views(workspace: Workspace, files: Mapping[str, Path], rows: list[dict[str, Any]], question: str) -> list[dict[str, Any]]:
    """Each accepted view of one question with its request, and the reply's text where the cache has it."""
    from mind.teacher.cache import ReplyCache

    row = next((row for row in rows if row["id"] == question), None)
    if row is None:
        known = f"one of {len(rows)}, such as {rows[0]['id']}" if rows else ""
        raise DataError(f"the dataset of this run has no question '{question}'", wanted=known)
    with ReplyCache(workspace.replies) as cache:
        replies = {name: cache.get(request) for name, request in row["requests"].items()}
    return [
        {"perspective": name, "request": request, "text": reply.text if (reply := replies[name]) else ""}
        for name, request in row["requests"].items()
    ]
