"""DVC as the one cache, on a real repository: what ran, what was restored, and workspaces for overridden settings."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mind import versioning
from mind.errors import ConfigError, DataError, PassingError, StageError
from mind.workspace import Workspace

STAGE = """import os, pathlib, sys
if trace := os.environ.get("MIND_STAGE_RAN"): pathlib.Path(trace).touch()
seed = [l for l in open("params.yaml") if l.startswith("seed")][0].split(":")[1].strip()
if seed == "99": sys.exit(75)
source, out = map(pathlib.Path, sys.argv[1:])
out.mkdir(parents=True)
(out / "content").write_text(seed + source.read_text() + pathlib.Path("mind/code.py").read_text())
"""
PIPELINE = """stages:
  snapshot: {cmd: python stage.py data/questions dataset, deps: [data/questions, mind, stage.py], params: [seed], outs: [dataset]}
  distill:
    matrix: {variant: "${run.variants}"}
    cmd: "python stage.py dataset/content students/${item.variant}"
    deps: [dataset, mind]
    params: [seed, "variants.${item.variant}"]
    outs: ["students/${item.variant}"]
"""
PARAMS = "seed: 1\nrun: {variants: [base, mind]}\nvariants: {base: {method: base}, mind: {method: mind}}\n"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / ".dvcignore").write_text("__pycache__\n")
    (tmp_path / "mind").mkdir()
    (tmp_path / "mind" / "code.py").write_text("# code")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "questions").write_text("?")
    dvc(tmp_path, "init", "--no-scm")
    dvc(tmp_path, "add", "data")
    return Workspace(tmp_path)


def dvc(root: Path, *args: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *args], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def content(workspace: Workspace) -> str:
    return (workspace.dataset / "content").read_text()


def test_a_stage_runs_once_and_then_has_nothing_to_do(workspace: Workspace) -> None:
    states = [versioning.bring_up_to_date(workspace, "snapshot").state for _ in range(2)]
    assert states == ["ran", "up to date"]
    assert versioning.bring_up_to_date(workspace, "snapshot", force=True).state == "ran"


def test_the_doors_agree_with_dvc_both_ways(workspace: Workspace) -> None:
    for target in ("snapshot", "distill@base", "distill@mind"):
        versioning.bring_up_to_date(workspace, target)
    assert "up to date" in dvc(workspace.root, "status")
    (workspace.root / "params.yaml").write_text(PARAMS.replace("seed: 1", "seed: 2"))
    dvc(workspace.root, "repro")
    assert {versioning.bring_up_to_date(workspace, t).state for t in ("snapshot", "distill@mind")} == {"up to date"}


def test_a_b_a_gives_the_files_of_a_without_running(workspace: Workspace) -> None:
    versioning.bring_up_to_date(workspace, "snapshot")
    first = content(workspace)
    (workspace.root / "params.yaml").write_text(PARAMS.replace("seed: 1", "seed: 2"))
    assert versioning.bring_up_to_date(workspace, "snapshot").state == "ran"
    (workspace.root / "params.yaml").write_text(PARAMS)
    outcome = versioning.bring_up_to_date(workspace, "snapshot")
    assert (outcome.state, outcome.cached, content(workspace)) == ("restored", True, first)


def test_deleted_files_are_restored(workspace: Workspace) -> None:
    versioning.bring_up_to_date(workspace, "snapshot")
    (workspace.dataset / "content").unlink()
    assert versioning.bring_up_to_date(workspace, "snapshot").cached
    assert content(workspace)


def test_code_is_an_input(workspace: Workspace) -> None:
    versioning.bring_up_to_date(workspace, "snapshot")
    (workspace.root / "mind" / "code.py").write_text("# other code")
    assert versioning.bring_up_to_date(workspace, "snapshot").state == "ran"


def test_another_version_of_mind_makes_what_this_one_made_stale(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = PIPELINE.replace(
        "[data/questions, mind, stage.py], params: [seed]", "[data/questions, stage.py], params: [seed, {code.yaml: [mind]}]"
    )
    (workspace.root / "dvc.yaml").write_text(pipeline)
    workspace.code.write_text(versioning.code_in_use())
    versioning.bring_up_to_date(workspace, "snapshot")
    assert versioning.is_settled(workspace, ["snapshot"])
    derived = versioning.derive(workspace, {"seed": 2})
    (derived.root / "stage.py").write_text(STAGE)
    versioning.ensure_data(derived)
    versioning.bring_up_to_date(derived, "snapshot")

    monkeypatch.setattr("mind.__version__", "99.0")
    assert not versioning.is_settled(workspace, ["snapshot"])
    assert [versioning.bring_up_to_date(workspace, "snapshot").state for _ in range(2)] == ["ran", "up to date"]
    assert "mind: 99.0\n" in workspace.code.read_text() and "mind: 99.0" in (workspace.root / "dvc.lock").read_text()
    assert not versioning.is_settled(derived, ["snapshot"])
    assert versioning.derive(workspace, {"seed": 2}) == derived
    assert versioning.bring_up_to_date(derived, "snapshot").state == "ran"

    monkeypatch.setattr("mind.__version__", "100.0")
    derived.code.unlink()
    assert "mind: 100.0\n" in versioning.derive(workspace, {"seed": 2}).code.read_text()


def test_beside_the_code_itself_no_version_is_written(workspace: Workspace) -> None:
    versioning.bring_up_to_date(workspace, "snapshot")
    assert not workspace.code.exists()


def test_overridden_settings_get_a_workspace_that_shares_the_cache(workspace: Workspace) -> None:
    versioning.bring_up_to_date(workspace, "snapshot")
    versioning.bring_up_to_date(workspace, "distill@mind")
    derived = versioning.derive(workspace, {"variants": {"mind": {"inertia": 0}}})
    assert derived.home == workspace.root and derived.root != workspace.root
    (derived.root / "stage.py").write_text(STAGE)
    versioning.ensure_data(derived)
    states = [versioning.bring_up_to_date(derived, t).state for t in ("snapshot", "distill@mind")]
    assert states == ["restored", "ran"]
    assert versioning.derive(workspace, {"variants": {"mind": {"inertia": 0}}}) == derived
    assert versioning.derive(workspace, {}) == workspace
    assert "distill@mind" not in dvc(workspace.root, "status")
    with pytest.raises(ConfigError, match="seeed: unknown key"):
        versioning.derive(workspace, {"seeed": 1})


def test_the_version_of_a_folder_is_the_hash_that_dvc_records(workspace: Workspace) -> None:
    versioning.bring_up_to_date(workspace, "snapshot")
    assert f"md5: {versioning.version_of(workspace.dataset)}" in (workspace.root / "dvc.lock").read_text()
    assert f"md5: {versioning.version_of(workspace.data)}" in (workspace.root / "data.dvc").read_text()


def test_failures_carry_the_exit_code_and_missing_inputs_are_named(workspace: Workspace) -> None:
    (workspace.root / "params.yaml").write_text(PARAMS.replace("seed: 1", "seed: 99"))
    with pytest.raises(StageError) as caught:
        versioning.bring_up_to_date(workspace, "snapshot")
    assert caught.value.exit_code == 75 and not workspace.dataset.exists()
    with pytest.raises(DataError, match="dataset"):
        versioning.bring_up_to_date(workspace, "distill@mind")
    with pytest.raises(DataError, match="distill@nobody"):
        versioning.bring_up_to_date(workspace, "distill@nobody")


def test_data_comes_back_from_the_cache_and_a_changed_one_is_left_alone(workspace: Workspace) -> None:
    (workspace.data / "questions").unlink()
    workspace.data.rmdir()
    versioning.ensure_data(workspace)
    assert (workspace.data / "questions").read_text() == "?"
    (workspace.data / "questions").write_text("mine")
    versioning.ensure_data(workspace)
    assert (workspace.data / "questions").read_text() == "mine"


def test_a_folder_without_dvc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dvc init"):
        versioning.bring_up_to_date(Workspace(tmp_path), "snapshot")


def test_what_was_pushed_comes_back_where_nothing_was_made(workspace: Workspace, tmp_path: Path) -> None:
    dvc(workspace.root, "remote", "add", "--default", "team", str(tmp_path / "team"))
    assert versioning.bring_up_to_date(workspace, "snapshot").state == "ran"
    wanted = content(workspace)
    dvc(workspace.root, "push", "--run-cache")
    shutil.rmtree(workspace.root / ".dvc" / "cache")
    shutil.rmtree(workspace.dataset)  # a clone has neither; dvc.lock comes with git
    dvc(workspace.root, "pull", "--run-cache", "--allow-missing")
    assert versioning.bring_up_to_date(workspace, "snapshot").state == "up to date"
    assert content(workspace) == wanted


def test_what_one_machine_made_another_restores(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> None:
    (workspace.root / "params.yaml").write_text(PARAMS.replace("run: {", "run: {share: true, "))
    store, other = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("other") / "clone"
    dvc(workspace.root, "remote", "add", "--default", "team", str(store))
    shutil.copytree(workspace.root, other, ignore=shutil.ignore_patterns("cache", "tmp"))
    assert versioning.bring_up_to_date(workspace, "snapshot").state == "ran"
    assert versioning.bring_up_to_date(Workspace(other), "snapshot").state == "restored"
    assert content(Workspace(other)) == content(workspace)
    shutil.rmtree(store)
    store.write_text("no folder")
    with pytest.raises(PassingError, match="snapshot is done, but could not be pushed"):
        versioning.bring_up_to_date(workspace, "snapshot")


def test_a_settled_line_is_known_and_so_is_what_unsettles_it(workspace: Workspace) -> None:
    assert not versioning.is_settled(workspace, ["snapshot"])
    versioning.bring_up_to_date(workspace, "snapshot")
    assert versioning.is_settled(workspace, ["snapshot"])
    assert not versioning.is_settled(workspace, ["snapshot", "distill@mind"])
    (workspace.dataset / "content").unlink()
    assert not versioning.is_settled(workspace, ["snapshot"])
    versioning.bring_up_to_date(workspace, "snapshot")
    (workspace.root / "params.yaml").write_text(PARAMS.replace("seed: 1", "seed: 2"))
    assert not versioning.is_settled(workspace, ["snapshot"])


def test_an_earlier_version_of_a_folder_and_what_it_was_made_from_are_known(workspace: Workspace) -> None:
    versioning.bring_up_to_date(workspace, "snapshot")
    first, wanted = versioning.version_of(workspace.dataset), content(workspace)
    (workspace.root / "params.yaml").write_text(PARAMS.replace("seed: 1", "seed: 2"))
    versioning.bring_up_to_date(workspace, "snapshot")
    assert versioning.stored(workspace, first)["content"].read_text() == wanted
    assert versioning.stored(workspace, f"{'0' * 32}.dir") == {}
    assert versioning.made_from(workspace, "dataset", first)["mind"] == versioning.version_of(workspace.root / "mind")
    assert versioning.made_from(workspace, "dataset", f"{'0' * 32}.dir") == {}
