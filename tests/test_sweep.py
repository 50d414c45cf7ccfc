"""A sweep: command, Prefect flow and DVC's cache across derived workspaces are real; the stages are a script that reports made-up answers.

The tests of this file share one workspace and run in order; each says what a user relies on. (tests/test_line.py has the real stages.)
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from mind import comparison, doors, versioning
from mind.errors import ConfigError, StageError
from mind.params import load_config, nest
from mind.workspace import Workspace

STAGE = """import json, os, pathlib, random, sys
pathlib.Path(os.environ["MIND_STAGE_RAN"]).touch()
stage, variant = [*sys.argv[1:], ""][:2]
if variant == "broken" and stage == "distill": sys.exit(2)
folder = {"distill": pathlib.Path("students") / variant, "evaluate": pathlib.Path("reports") / variant}.get(stage, pathlib.Path(stage))
folder.mkdir(parents=True)
(folder / "content").write_text(variant)
if stage == "distill":
    (folder / "manifest.json").write_text(json.dumps({"counts": {"tokens": len(variant)}}))
if stage == "evaluate":
    dice = random.Random(variant)
    right = [dice.random() < 0.5 for _ in range(40)]
    rows = [{"benchmark": "b", "id": str(i), "output": "", "answer": None, "gold": "1", "correct": r, "tokens": 1} for i, r in enumerate(right)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    score = {"accuracy": sum(right) / 40, "ci_low": 0.0, "ci_high": 1.0, "domain": "id"}
    (folder / "metrics.json").write_text(json.dumps({"benchmarks": {"b": score}, "id": score}))
"""
PIPELINE = """stages:
  synthesize: {cmd: python benchmarks/stage.py rationales, deps: [benchmarks], outs: [rationales]}
  snapshot: {cmd: python benchmarks/stage.py dataset, deps: [rationales], params: [seed], outs: [dataset]}
  distill:
    matrix: {variant: "${run.variants}"}
    cmd: python benchmarks/stage.py distill ${item.variant}
    deps: [dataset]
    params: [training, "variants.${item.variant}"]
    outs: ["students/${item.variant}"]
  evaluate:
    matrix: {variant: "${run.variants}"}
    cmd: python benchmarks/stage.py evaluate ${item.variant}
    deps: ["students/${item.variant}"]
    outs: ["reports/${item.variant}"]
"""
PARAMS = """seed: 17
run: {variants: [base, mind]}
training: {epochs: 1}
variants: {base: {method: base}, mind: {method: mind}, flat: {method: without_fusion}, broken: {method: without_fusion}}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    from prefect.testing.utilities import prefect_test_harness

    root = tmp_path_factory.mktemp("sweep")
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "stage.py").write_text(STAGE)
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "params.yaml").write_text(PARAMS)
    (root / "data").mkdir()
    (root / "data" / "questions").write_text("?")
    for command in ("init --no-scm -q", "add -q data"):
        subprocess.run([sys.executable, "-m", "dvc", *command.split()], cwd=root, check=True)
    with mock.patch.dict(os.environ), prefect_test_harness(server_startup_timeout=120):
        yield Workspace(root)


def test_a_variant_that_fails_stops_no_other(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError, match="1 of 8 stages failed: stage distill@broken failed") as caught:
        doors.sweep(workspace, {}, ["broken", "mind"], [17])
    said = capsys.readouterr()
    assert caught.value.exit_code == 1
    assert "[8 of 8] evaluate@mind" in said.err and "evaluate@broken" not in said.err
    assert "No report yet: broken" in said.out and "mind is" in said.out  # what there is is compared


def test_one_seed_and_one_variant_more_run_only_what_is_new(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    doors.sweep(workspace, {}, ["mind", "flat"], [17, 18])
    said = capsys.readouterr()
    assert "5 students in .mind/workspaces/" in said.err and ": base, mind, flat, mind-18, flat-18" in said.err
    assert "12 stages: 6 ran, 6 cached" in said.err
    order = [line for line in said.err.splitlines() if line.startswith(("[", "    "))]
    states = {target.split("] ")[1]: state.split(",")[0].strip() for target, state in zip(order[::2], order[1::2], strict=True)}
    new = {"distill@flat", "evaluate@flat", "distill@mind-18", "evaluate@mind-18", "distill@flat-18", "evaluate@flat-18"}
    assert {target for target, state in states.items() if state == "ran"} == new
    assert "mind (2 seeds) is" in said.out and " compare --markdown" in said.err


def test_the_same_sweep_again_has_nothing_to_do(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    doors.sweep(workspace, {}, ["mind", "flat"], [17, 18])
    assert "12 stages: 0 ran, 12 cached" in capsys.readouterr().err


def test_what_a_sweep_left_is_compared_by_variant(workspace: Workspace) -> None:
    here = versioning.derive_over_seeds(workspace, {}, ["mind", "flat"], [17, 18])
    result = comparison.compare(here, load_config(here.params))
    assert [(row.variant, list(row.seeds)) for row in result.rows] == [("base", [None]), ("mind", [17, 18]), ("flat", [17, 18])]
    assert result.rows[1].tokens == (len("mind") + len("mind-18")) / 2
    assert not (workspace.root / "reports").exists()  # the home's own folders are untouched


def test_settings_of_a_sweep_are_those_of_all_its_seeds(workspace: Workspace) -> None:
    here = versioning.derive_over_seeds(workspace, {"variants": {"mind": {"beta": 0.5}}}, ["mind"], [1, 2])
    config = load_config(here.params)
    assert config.run.variants == ("base", "mind-1", "mind-2")
    assert all(config.variant(name).method.beta == 0.5 for name in ("mind", "mind-1", "mind-2"))  # type: ignore[union-attr]


def test_a_benchmark_that_cannot_be_used_is_refused_by_the_flows_too(workspace: Workspace) -> None:
    from flows.main import mind
    from flows.sweep import sweep

    settings = {"evaluation.benchmarks": ["nope"]}
    for flow, given in ((mind, {"set": settings}), (sweep, {"set": nest(settings), "seeds": [17]})):
        with pytest.raises(ConfigError, match="unknown benchmark 'nope'"):
            flow(workspace.root, **given)


def test_an_unknown_variant_is_refused_before_anything_runs(workspace: Workspace) -> None:
    before = set(Path(workspace.caches / "workspaces").iterdir())
    with pytest.raises(ConfigError, match="unknown variant 'nobody'"):
        doors.sweep(workspace, {}, ["nobody"], [17])
    assert set(Path(workspace.caches / "workspaces").iterdir()) == before
