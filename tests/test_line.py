"""The whole line with a tiny random student, as a user runs it: the command, DVC, Prefect, MLflow and the embedded teacher are all real.

The tests of this file share one workspace and run in order; each says what a user relies on.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mind import outputs, versioning
from mind.records import PERSPECTIVES
from mind.workspace import Workspace
from tests import workspaces

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspaces.make(tmp_path_factory.mktemp("line"), {"run": {"variants": ["base", "mind"]}})


def run(workspace: Workspace, *command: str) -> subprocess.CompletedProcess[str]:
    activated = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # dvc.yaml says `python`
    environment = {**os.environ, "PATH": activated, "COLUMNS": "160"}
    return subprocess.run([sys.executable, "-m", *command], cwd=workspace.root, capture_output=True, text=True, env=environment)


def mind(workspace: Workspace, *args: str) -> str:
    done = run(workspace, "mind.cli", *args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_one_command_runs_the_line_and_says_what_came_out(workspace: Workspace) -> None:
    said = mind(workspace, "run")
    assert "6 stages: 6 ran" in said
    assert versioning.version_of(workspace.dataset) in said
    assert "--backend-store-uri" in said and "Traceback" not in said
    for name in ("base", "mind"):
        assert name in said
    assert (workspace.student("mind") / "adapter" / "adapter_model.safetensors").exists()
    assert not (workspace.student("base") / "adapter").exists()


def test_a_second_run_is_all_cached(workspace: Workspace) -> None:
    assert "0 ran, 6 cached" in mind(workspace, "run")


def test_dvc_has_nothing_to_do_after_the_flow(workspace: Workspace) -> None:
    assert "up to date" in run(workspace, "dvc", "status").stdout
    before = (workspace.root / "dvc.lock").read_text()
    assert run(workspace, "dvc", "repro").returncode == 0
    assert (workspace.root / "dvc.lock").read_text() == before


def test_the_dataset_version_is_in_every_later_manifest_and_run(workspace: Workspace) -> None:
    version = versioning.version_of(workspace.dataset)
    assert version in json.dumps(outputs.read_manifest(workspace.student("mind")))
    assert version in json.dumps(outputs.read_manifest(workspace.report("mind")))
    with sqlite3.connect(workspace.root / "mlflow" / "mlflow.db") as database:
        tags = dict(
            database.execute(
                "select t.key, t.value from tags t join runs r on r.run_uuid = t.run_uuid where r.name = 'mind' and t.key like 'mind.%'"
            )
        )
        metrics = {
            row[0]
            for row in database.execute("select distinct m.key from metrics m join runs r on r.run_uuid = m.run_uuid where r.name = 'mind'")
        }
        status = dict(
            database.execute(
                "select r.name, r.status from runs r join experiments e on e.experiment_id = r.experiment_id where e.name = 'mind'"
            )
        )
        registered = {row[0] for row in database.execute("select alias from registered_model_aliases")}
    assert tags["mind.dataset"] == version and tags["mind.method"] == "mind" and "mind.fingerprint" in tags
    assert {
        "train/loss",
        "train/consistency",
        "metanet/loss",
        "metanet/selected",
        "eval/primer/accuracy",
        "eval/primer/ci_low",
        "eval/ood/accuracy",
    } <= metrics
    assert {f"metanet/weight/{p}" for p in PERSPECTIVES} | {f"inertia/filtered/{p}" for p in PERSPECTIVES} <= metrics
    assert status == dict.fromkeys(("base", "mind"), "FINISHED")
    assert "mind" in registered


def test_a_report_has_numbers_predictions_and_pictures(workspace: Workspace) -> None:
    report = workspace.report("mind")
    metrics = json.loads((report / "metrics.json").read_text())
    assert set(metrics["benchmarks"]) == {"primer", "choice", "yesno"}
    assert all(b["ci_low"] <= b["accuracy"] <= b["ci_high"] for b in metrics["benchmarks"].values())
    assert len((report / "predictions.jsonl").read_text().splitlines()) == 9
    assert {"inertia.png", "weights.png", "latent.png"} <= {p.name for p in report.glob("*.png")}


def test_dvc_knows_the_numbers_and_the_bars_of_every_variant(workspace: Workspace) -> None:
    shown = json.loads(run(workspace, "dvc", "metrics", "show", "--json").stdout)[""]["data"]
    metrics = json.loads((workspace.report("mind") / "metrics.json").read_text())
    assert set(shown) == {f"reports/{name}.json" for name in ("base", "mind")}
    assert shown["reports/mind.json"]["data"]["eval/primer/accuracy"] == metrics["benchmarks"]["primer"]["accuracy"]
    drawn = json.loads(run(workspace, "dvc", "plots", "show", "--json").stdout)
    assert {f"reports/{name}.csv" for name in ("base", "mind")} <= set(drawn.get("data", drawn))


def test_compare_speaks_to_people_and_programs(workspace: Workspace) -> None:
    assert "primer" in mind(workspace, "compare")
    table = json.loads(run(workspace, "mind.cli", "compare", "--json").stdout)
    assert "mind" in json.dumps(table)
    assert "|" in mind(workspace, "compare", "--markdown")


def test_runs_and_reports_tell_the_same(workspace: Workspace) -> None:
    def rows(*more: str) -> dict[str, Any]:
        done = run(workspace, "mind.cli", "compare", "--json", *more)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)["variants"]
        return {row["variant"]: {**row, "sentences": None} for row in told}  # of the latent maps only reports tell

    found = rows("--runs")
    assert found == rows() and list(found) == ["base", "mind"]
    assert found["mind"]["tokens"] > 0 and found["mind"]["seconds"] > 0


def test_tasks_show_the_state_cached(workspace: Workspace) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import TaskRunFilter
    from prefect.testing.utilities import prefect_test_harness

    from flows.main import mind as flow

    with prefect_test_harness(server_startup_timeout=120):
        states = flow(workspace.root)
        with get_client(sync_client=True) as client:
            shown = {r.name: r.state_name for r in client.read_task_runs(task_run_filter=TaskRunFilter())}
    assert set(states.values()) == {"up to date"}
    assert shown == dict.fromkeys(states, "Cached")


def test_the_flow_has_nothing_to_do_after_dvc(workspace: Workspace) -> None:
    params = workspace.params
    params.write_text(params.read_text().replace("limit: 3", "limit: 2"))
    done = run(workspace, "dvc", "repro", "--pull")
    assert done.returncode == 0 and "Running stage 'evaluate@mind'" in done.stdout and "Running stage 'distill" not in done.stdout
    assert "0 ran, 6 cached" in mind(workspace, "run")


def test_a_deleted_student_comes_back_without_training(workspace: Workspace) -> None:
    shutil.rmtree(workspace.student("mind"))
    assert "distill@mind: restored" in mind(workspace, "distill", "--variant", "mind")
    assert (workspace.student("mind") / "adapter" / "adapter_model.safetensors").exists()


def test_other_settings_live_in_a_workspace_of_their_own(workspace: Workspace) -> None:
    before = outputs.digest_path(workspace.student("mind"))
    said = mind(workspace, "distill", "--variant", "mind", "--set", "variants.mind.inertia=0")
    assert "synthesize: restored" in said and "snapshot: restored" in said and "distill@mind: " not in said
    derived = next((workspace.root / ".mind" / "workspaces").iterdir())
    assert outputs.digest_path(workspace.student("mind")) == before
    assert outputs.digest_path(derived / "students" / "mind") != before


def test_every_row_of_the_table_trains_and_compares(workspace: Workspace) -> None:
    rows = ["sbs", "mcc", "mode", "edit", "without-fusion", "mind"]
    few = "variants.mode.support=2"  # the dataset has five questions, and no expert sees those that the mixture is found on
    said = mind(workspace, "sweep", "--variants", ",".join(rows), "--seeds", "17", "--set", few)
    assert "16 stages: 10 ran, 6 cached" in said  # synthesis, dataset, base and mind are those of the line
    derived = next(line.split()[3].rstrip(":") for line in said.splitlines() if " students in .mind/workspaces/" in line)
    told = json.loads(run(Workspace(workspace.root / derived), "mind.cli", "compare", "--runs", "--json").stdout)["variants"]
    assert {row["variant"] for row in told} == {"base", *rows}
    for row in told[1:]:
        assert row["tokens"] > 0 and row["seconds"] > 0 and row["caption"], row["variant"]
        assert {"primer", "ood"} <= set(row["differences"]), row["variant"]


def test_a_failed_stage_is_said_once_and_loses_nothing(workspace: Workspace) -> None:
    done = run(workspace, "mind.cli", "run", "--set", "synthesis.questions=nope")
    assert done.returncode == 2
    assert "nope" in done.stderr and "Traceback" not in done.stderr
    assert "up to date" in run(workspace, "dvc", "status").stdout


@pytest.mark.parametrize(("target", "share"), [("distill@mind", 0.0), ("evaluate@mind", 1.0)])
def test_a_stage_killed_with_9_and_tried_again_ends_in_the_same_output(workspace: Workspace, target: str, share: float) -> None:
    wanted = workspaces.digest(workspace, target)
    workspaces.forget(workspace, target)
    assert workspaces.kill(workspace, target, share), "it ended before it could be killed"
    assert not workspaces.output(workspace, target).exists()
    versioning.bring_up_to_date(workspace, target, force=True)
    assert workspaces.digest(workspace, target) == wanted
