"""From a student back to the requests that bought its rationales: over what a real line of stages has left, also after it has moved on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mind import lineage, outputs, tracking, versioning
from mind.config import Config
from mind.errors import DataError
from mind.params import load_config
from mind.workspace import Workspace
from tests import workspaces

CHANGES = {"run": {"variants": ["base"]}, "synthesis": {"limit": 4, "mistakes": False}, "snapshot": {"easy_keep": 1.0}}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Config]:
    """Two stages through DVC, and a run with a registered folder as `distill` leaves it."""
    workspace = workspaces.make(tmp_path_factory.mktemp("lineage"), CHANGES)
    for target in ("synthesize", "snapshot"):
        versioning.bring_up_to_date(workspace, target)
    config = load_config(workspace.params)
    folder = workspace.root / "made"
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes(b"weights")
    version = versioning.version_of(workspace.dataset)
    tags = {"mind.method": "mind", "mind.student": "tiny"}
    with tracking.open_run(workspace, config.tracking, name="mind", fingerprint="f", tags=tags, dataset_digest=version) as run:
        run.log({"eval/id/accuracy": 0.5}, 0)
        run.register(folder, "mind-tiny", "mind")
    with tracking.open_run(workspace, config.tracking, name="base", fingerprint="b"):
        pass
    return workspace, config


def test_every_name_of_a_student_leads_to_the_same_origin(line: tuple[Workspace, Config]) -> None:
    workspace, config = line
    found = lineage.trace(workspace, config, "mind")
    run = found.run["run"]
    for name in (run, run[:8], "mind-tiny@mind", "models:/mind-tiny@mind", "mind-tiny/1"):
        assert lineage.trace(workspace, config, name).dataset == found.dataset, name
    assert found.run["models"] == [{"name": "mind-tiny", "version": 1, "aliases": ["mind"]}]


def test_the_steps_carry_what_the_stages_wrote(line: tuple[Workspace, Config]) -> None:
    workspace, config = line
    found = lineage.trace(workspace, config, "mind")
    manifest = outputs.read_manifest(workspace.dataset)
    assert found.dataset["version"] == versioning.version_of(workspace.dataset)
    assert found.dataset["questions"] == manifest["counts"]["questions"] == 4
    assert found.rationales["version"] == versioning.version_of(workspace.rationales)
    assert (found.rationales["rows"], found.rationales["accepted"]) == (32, 32)
    assert (found.teacher["model"], found.teacher["requests"], found.teacher["kept"]) == ("recorded", 32, 32)
    said = "\n".join(lineage.show(found))
    for part in (found.run["run"], found.dataset["version"], "mind-tiny version 1 @mind", "32 rows, 32 accepted", "eval/id/accuracy 0.500"):
        assert part in said
    assert json.loads(found.to_json())["dataset"] == found.dataset


def test_a_question_shows_its_views_and_their_requests(line: tuple[Workspace, Config]) -> None:
    workspace, config = line
    first = json.loads((workspace.dataset / "provenance.jsonl").read_text().splitlines()[0])
    views = lineage.trace(workspace, config, "mind", first["id"]).question
    assert {view["perspective"]: view["request"] for view in views} == first["requests"]
    kept = {
        json.loads(line)["request"]: json.loads(line)["text"]
        for line in (workspace.rationales / "rationales.jsonl").read_text().splitlines()
    }
    assert all(kept[view["request"]] in view["text"] for view in views)
    with pytest.raises(DataError, match=f"no question 'x'\n.*one of 4, such as {first['id']}"):
        lineage.trace(workspace, config, "mind", "x")


def test_an_earlier_version_is_read_from_the_cache(line: tuple[Workspace, Config]) -> None:
    workspace, config = line
    before = lineage.trace(workspace, config, "mind")
    workspaces.settings(workspace.root, {"synthesis": {"limit": 3}})
    for target in ("synthesize", "snapshot"):
        versioning.bring_up_to_date(workspace, target)
    assert versioning.version_of(workspace.dataset) != before.dataset["version"]
    assert lineage.trace(workspace, config, "mind") == before


def test_what_is_not_known_is_said(line: tuple[Workspace, Config], tmp_path: Path) -> None:
    workspace, config = line
    assert "none: the untouched student" in "\n".join(lineage.show(lineage.trace(workspace, config, "base")))
    for name in ("nobody", "mind-tiny@absent", "mind-tiny/7", "it's"):
        with pytest.raises(DataError, match=re.escape(f"no run '{name}'")):
            lineage.trace(workspace, config, name)
    with pytest.raises(DataError, match="no run"):
        lineage.trace(Workspace(tmp_path), config, "mind")


def test_a_dataset_that_nobody_kept_is_said_to_be_missing(line: tuple[Workspace, Config]) -> None:
    workspace, config = line
    with tracking.open_run(workspace, config.tracking, name="lost", fingerprint="l", dataset_digest=f"{'0' * 32}.dir"):
        pass
    assert "not kept" in "\n".join(lineage.show(lineage.trace(workspace, config, "lost")))
