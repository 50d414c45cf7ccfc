"""Several processes that train one student: the course of one process, up to rounding; or that ask it. Real processes, joined by gloo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mind import outputs
from mind.params import load_config
from mind.records import Question, write_jsonl
from mind.stages import distill as stage
from mind.stages import evaluate
from mind.training.peers import Peers
from mind.workspace import Workspace
from tests import tiny

METANET = {"width": 16, "heads": 2, "warmup_epochs": 2, "accumulation": 2, "learning_rate": 1e-2}
MIND: dict[str, Any] = {"method": "mind", "refresh": 2, "metanet": METANET}


def in_processes(folder: Path, name: str, variant: str) -> None:
    command = [sys.executable, "-m", "mind.stages", name, "--variant", variant]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def distill(folder: Path, processes: int) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The adapter and the history of a student that so many processes have trained, five questions in steps of three."""
    workspace = Workspace(folder)
    workspace.dataset.mkdir(parents=True, exist_ok=True)
    write_jsonl(workspace.dataset / "train.jsonl", tiny.examples(5))
    outputs.write_manifest(workspace.dataset, stage="snapshot", inputs={}, config={}, counts={})
    tiny.save(folder / "tiny")
    settings = {
        "student": {"name": str(folder / "tiny"), "lora": {"r": 2, "alpha": 4}},
        "variants": {"mind": MIND},
        "run": {"variants": ["mind"], "reference": "mind"},
        "training": {"epochs": 2, "accumulation": 3, "log_steps": 1, "learning_rate": 1e-3, "processes": processes},
    }
    (folder / "params.yaml").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "dvc.yaml").touch()
    if processes == 1:
        stage.run(load_config(workspace.params), workspace, "mind")
    else:
        in_processes(folder, "distill", "mind")
    student = workspace.student("mind")
    rows = [json.loads(line) for line in (student / "history.jsonl").read_text().splitlines()]
    return load_file(student / "adapter" / "adapter_model.safetensors"), rows


@pytest.mark.slow
def test_two_processes_take_the_course_of_one(tmp_path: Path) -> None:
    one, other = distill(tmp_path / "one", 1), distill(tmp_path / "two", 2)
    assert len(one[1]) == len(other[1])
    for row, expected in zip(other[1], one[1], strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
    for name, value in one[0].items():
        torch.testing.assert_close(other[0][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    one, two = Workspace(tmp_path / "one"), Workspace(tmp_path / "two")
    settings: dict[str, Any] = {
        "student": {"name": str(tiny.save(tmp_path / "tiny"))},
        "variants": {"base": {"method": "base"}},
        "run": {"variants": ["base"]},
        "evaluation": {"benchmarks": ["primer"], "max_new_tokens": 8},
        "latent": {"questions": 0},
    }
    asked = [
        Question(id=f"q{i}", question=f"What is {i} plus {j}?", answer=str(i + j), topic="sums") for i, j in enumerate(range(5, 50, 7))
    ]
    for folder in (one.root / "data" / "benchmarks", one.rationales):
        folder.mkdir(parents=True)
    write_jsonl(one.root / "data" / "benchmarks" / "primer.jsonl", asked)
    write_jsonl(one.rationales / "questions.jsonl", asked)
    (one.root / "dvc.yaml").touch()
    one.params.write_text(json.dumps(settings))
    stage.run(load_config(one.params), one, "base")
    shutil.copytree(one.root, two.root)
    evaluate.run(load_config(one.params), one, "base")
    settings["evaluation"]["processes"] = 2
    two.params.write_text(json.dumps(settings))
    in_processes(two.root, "evaluate", "base")
    predictions = [(here.report("base") / "predictions.jsonl").read_bytes() for here in (one, two)]
    assert predictions[0] == predictions[1] and predictions[0].count(b"\n") == len(asked)
    kept = [line for file in (two.caches / "predictions").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(kept) == len(asked)  # nothing was asked twice


def test_alone_everything_is_one_s_own() -> None:
    tensors = [torch.ones(2), torch.zeros(3)]
    Peers().sum(tensors)
    assert Peers().share([1, 2, 3]) == [1, 2, 3] and Peers().gather("x") == ["x"] and Peers().first
    assert torch.equal(tensors[0], torch.ones(2))


def test_shares_are_all_of_it_and_nothing_twice() -> None:
    shares = [Peers(rank, 3).share(range(7)) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(7))
