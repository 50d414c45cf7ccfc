"""A workspace that runs the whole line in seconds: a tiny student, few questions. For tests and benches of the doors.

workspace = workspaces.make(tmp_path, {"run": {"variants": ["base"]}})
workspaces.kill(workspace, "distill@mind", share=0.5)
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from mind import initialise, outputs, versioning
from mind.errors import StageError
from mind.progress import FILE
from mind.workspace import Workspace
from tests import tiny

SMALL: dict[str, dict[str, Any]] = {
    "synthesis": {"limit": 10},
    "student": {"lora": {"r": 2, "alpha": 4}},
    "training": {"epochs": 1, "questions_per_step": 2},
    "evaluation": {"benchmarks": ["primer", "choice", "yesno"], "limit": 3, "max_new_tokens": 8},
    "latent": {"questions": 4},
}


def make(folder: Path, changes: Mapping[str, Mapping[str, Any]]) -> Workspace:
    """`mind init folder/work`, with a tiny student beside it and `changes` on top of SMALL."""
    student = tiny.save(folder / "student")
    initialise.make(folder / "work", student=str(student))
    settings(folder / "work", {**SMALL, **changes})
    return Workspace(folder / "work")


def settings(folder: Path, groups: Mapping[str, Mapping[str, Any]]) -> None:
    """Change params.yaml, comments kept."""
    params, yaml = folder / "params.yaml", YAML()
    raw = yaml.load(params.read_text())
    for group, values in groups.items():
        raw[group].update(values)
    yaml.dump(raw, params)


def output(workspace: Workspace, target: str) -> Path:
    """The folder that a stage of dvc.yaml writes."""
    stage, _, variant = target.partition("@")
    if variant:
        return workspace.student(variant) if stage == "distill" else workspace.report(variant)
    return workspace.rationales if stage == "synthesize" else workspace.dataset


def digest(workspace: Workspace, target: str) -> str:
    return outputs.digest_path(output(workspace, target))


def forget(workspace: Workspace, target: str) -> None:
    """As if the stage had never run: no output, no saved state of any stage."""
    shutil.rmtree(output(workspace, target))
    shutil.rmtree(workspace.caches)


def kill(workspace: Workspace, target: str, share: float, after: float = 60.0) -> str:
    """Run a stage and kill -9 it when its own bar has passed `share`, or `after` seconds; where that was ("" when it ended before)."""
    place: list[str] = []
    ended = threading.Event()

    def watch(told: Path) -> None:
        began, reached = time.monotonic(), False
        while not ended.wait(0.002):
            done, total, label = told.read_text().split(" ")[:3] if told.exists() else ("0", "0", "")
            own = label == target.partition("@")[0]
            passed = int(done) / int(total) >= share if own else reached  # what follows its own bar is behind it
            reached |= own
            if passed or time.monotonic() - began > after:
                for process in psutil.Process().children(recursive=True):
                    if "mind.stages" in process.cmdline():
                        process.kill()
                        place.append(f"{done} of {total}")
                        return

    with tempfile.TemporaryDirectory() as folder:
        watcher = threading.Thread(target=watch, args=(Path(folder) / "progress",))
        watcher.start()
        try:
            versioning.bring_up_to_date(workspace, target, force=True, variables={FILE: str(Path(folder) / "progress")})
        except StageError as error:
            assert error.exit_code == 137, error
        finally:
            ended.set()
            watcher.join()
    return "".join(place)
