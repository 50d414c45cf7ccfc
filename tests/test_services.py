"""`mind up` as a user meets it: real servers, a real worker, deployments run from another process, and nothing left behind.

The tests of this file share one set of services and run in order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest

from mind import prefect_store, processes, services
from mind.errors import ConfigError, MindError
from mind.workspace import Workspace
from tests import workspaces

pytestmark = pytest.mark.timeout(400)

CHANGES = {
    "run": {"variants": ["base"]},
    "synthesis": {"limit": 4},
    "snapshot": {"easy_keep": 1.0},
    "evaluation": {"benchmarks": ["primer"], "limit": 2, "max_new_tokens": 4},
    "latent": {"questions": 0},
}


@dataclass
class Up:
    workspace: Workspace
    process: subprocess.Popen[str]
    said: str

    @property
    def api(self) -> str:
        return self.found(r"PREFECT_API_URL=(\S+)")

    def found(self, pattern: str) -> str:
        match = re.search(pattern, self.said)
        assert match, self.said
        return match[1]

    def prefect(self, *args: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PREFECT_API_URL": self.api, "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "prefect", *args], cwd=self.workspace.root.parent, env=environment, capture_output=True, text=True
        )

    def run(self, deployment: str, *parameters: str) -> subprocess.CompletedProcess[str]:
        given = [word for parameter in parameters for word in ("-p", parameter)]
        return self.prefect("deployment", "run", deployment, "--watch", "--watch-interval", "1", "--watch-timeout", "350", *given)


def start(workspace: Workspace) -> Up:
    command = [sys.executable, "-m", "mind.cli", "up", "--prefect-port", "0", "--mlflow-port", "0"]
    process = subprocess.Popen(command, cwd=workspace.root, stderr=subprocess.PIPE, text=True)
    killer = threading.Timer(300, process.kill)
    killer.start()
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "Ctrl-C stops" in line:
            break
    killer.cancel()
    return Up(workspace, process, said)


FAR = """name: mind
deployments:
  - name: far
    entrypoint: flows.main.mind
    work_pool: {{name: far, job_variables: {{working_dir: {folder}}}}}
    pull:
      - prefect.deployments.steps.git_clone: {{repository: {repository}, branch: main, clone_directory_name: work}}
      - prefect.deployments.steps.set_working_directory: {{directory: work}}
      - prefect.deployments.steps.run_shell_script: {{script: dvc pull --run-cache --allow-missing}}
"""


def published(workspace: Workspace, folder: Path) -> Path:
    """The workspace as a team has it: what is not data in a git repository, data in a DVC remote of that repository."""
    for kept in (".dvc", "benchmarks"):
        (folder / "team" / kept).mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml", "dvc.lock", "data.dvc", "code.yaml", ".gitignore", "benchmarks/README.md"):
        shutil.copy(workspace.root / name, folder / "team" / name)
    (folder / "team" / ".dvc" / "config").write_text(f"[core]\n    remote = team\n['remote \"team\"']\n    url = {folder / 'store'}\n")
    for command in ("init -q -b main", "add -A", "-c user.name=us -c user.email=us@example.org commit -q -m line"):
        subprocess.run(["git", *command.split()], cwd=folder / "team", check=True)
    config = workspace.root / ".dvc" / "config.local"
    config.write_text(f"['remote \"team\"']\n    url = {folder / 'store'}\n")
    subprocess.run([sys.executable, "-m", "dvc", "push", "-q", "--run-cache", "--remote", "team"], cwd=workspace.root, check=True)
    return folder / "team"


def flow_run(up: Up, done: subprocess.CompletedProcess[str]) -> Any:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    identity = re.search(r"UUID: (\S+)", done.stdout)
    assert identity, done.stdout + done.stderr
    with temporary_settings({PREFECT_API_URL: up.api}), get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(identity[1]))


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    started = start(workspaces.make(tmp_path_factory.mktemp("up"), CHANGES))
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.send_signal(signal.SIGINT)
            started.process.wait(60)


def test_it_says_where_everything_is(up: Up) -> None:
    assert "prefect deployment run mind/full --watch" in up.said
    assert httpx.get(up.found(r"Prefect +(\S+)")).status_code == 200
    assert httpx.get(up.found(r"MLflow +(\S+)")).status_code == 200


def test_nothing_listens_but_on_loopback_and_hosts_are_checked(up: Up) -> None:
    family = psutil.Process(up.process.pid).children(recursive=True)
    listening = {c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening and listening <= {"127.0.0.1", "::1"}
    for address in (f"{up.api}/health", up.found(r"MLflow +(\S+)")):
        assert httpx.get(address, headers={"Host": "evil.example"}).status_code in (400, 403)
    foreign = httpx.options(f"{up.api}/flows/", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"})
    assert "access-control-allow-origin" not in foreign.headers
    assert httpx.post(f"{up.api}/flow_runs/filter", json={}).status_code == 403  # no CSRF token


def test_a_second_one_in_the_same_workspace_is_refused(up: Up) -> None:
    second = subprocess.run([sys.executable, "-m", "mind.cli", "up"], cwd=up.workspace.root, capture_output=True, text=True)
    assert second.returncode == 2 and "serves" in second.stderr and "already" in second.stderr


def test_a_deployment_runs_the_line_from_another_shell(up: Up) -> None:
    done = up.run("mind/full")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (up.workspace.report("base") / "metrics.json").exists()
    shown = up.prefect("artifact", "inspect", "comparison").stdout
    assert "Accuracy in %" in shown and "data:image/png" in shown and "/#/experiments/" in shown


def test_a_benchmark_that_is_dropped_is_measured_by_the_next_scheduled_run(up: Up) -> None:
    folder = up.workspace.benchmarks
    folder.mkdir(exist_ok=True)
    (folder / "dozens.jsonl").write_text('{"id": "d1", "question": "How many eggs are two dozen eggs?", "answer": "24"}\n')
    described = {"title": "Dozens", "domain": "ood", "kind": "number", "licence": "ours", "file": "benchmarks/dozens.jsonl"}
    columns = {"columns": {"id": "id", "question": "question", "answer": "answer"}}
    (folder / "dozens.yaml").write_text(json.dumps({**described, **columns}))
    assert "0 3 * * *" in up.prefect("deployment", "inspect", "reevaluate/nightly").stdout
    done = up.run("reevaluate/nightly")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dozens" in up.prefect("artifact", "inspect", "reevaluation").stdout
    assert flow_run(up, done).state.message == "1 of 1 measured"


def test_a_worker_that_knows_only_the_server_clones_pulls_and_runs(up: Up, tmp_path: Path) -> None:
    repository, clean = published(up.workspace, tmp_path), tmp_path / "clean"
    clean.mkdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    known = {"PREFECT_API_URL": up.api, "HOME": str(clean), "PATH": path, "DO_NOT_TRACK": "true", "PREFECT_WORKER_QUERY_SECONDS": "1"}
    start = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "far", "--type", "process", "--run-once"]
    (tmp_path / "far.yaml").write_text(FAR.format(folder=clean, repository=repository))
    assert up.prefect("work-pool", "create", "far", "--type", "process").returncode == 0
    told = up.prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(tmp_path / "far.yaml"))
    assert told.returncode == 0, told.stdout + told.stderr
    assert up.prefect("deployment", "run", "mind/far").returncode == 0
    worker = subprocess.run(start, cwd=clean, env=known, capture_output=True, text=True, timeout=200)
    said = worker.stdout + worker.stderr
    assert [line.partition("Task run ")[2].partition("(")[0] for line in said.splitlines() if "Task run" in line] == [
        f"'{stage}' - Finished in state Cached" for stage in ("synthesize", "snapshot", "distill@base", "evaluate@base")
    ], said
    assert (clean / "work" / "reports" / "base" / "metrics.json").exists()


def test_a_parameter_of_a_wrong_type_is_refused_at_once(up: Up) -> None:
    done = up.run("mind/full", "variants=7")
    assert done.returncode == 1 and "Validation failed for field 'variants'" in done.stdout + done.stderr


def test_a_failed_run_ends_with_1_bears_its_parameters_and_says_why(up: Up) -> None:
    done = up.run("mind/full", 'set={"trainig.epochs": 1}')
    run = flow_run(up, done)
    assert done.returncode == 1 and run.name == "mind trainig.epochs=1"
    assert "did you mean 'training'?" in run.state.message


def test_ctrl_c_stops_all(up: Up) -> None:
    family = psutil.Process(up.process.pid).children(recursive=True)
    assert len(family) >= 3
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0
    while any(map(processes.runs, family)):  # a killed process is gone a moment later; pytest's time limit ends this
        time.sleep(0.05)


# ------------------------------------------------------- without Prefect and MLflow


def sleeper(tmp_path: Path, name: str, code: str) -> services.Service:
    service = services.Service(name, [sys.executable, "-c", code], lambda: True, tmp_path / f"{name}.log", {})
    service.start(tmp_path)
    return service


def test_a_service_that_dies_is_named_with_its_last_words_and_the_others_stop(tmp_path: Path) -> None:
    stays = sleeper(tmp_path, "patient", "import time; time.sleep(60)")
    dies = sleeper(tmp_path, "fragile", "print('no disk'); raise SystemExit(3)")
    with pytest.raises(MindError, match=r"fragile ended with exit code 3:\n +no disk"), services.stopping([stays, dies]):
        services.watch([stays, dies])
    assert stays.ended() is not None


def test_children_of_a_service_stop_with_it_and_a_deaf_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "STOP_SECONDS", 1.0)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    parent = sleeper(tmp_path, "parent", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}])")
    while "ready" not in parent.log.read_text():
        time.sleep(0.05)
    assert parent.process is not None
    (child,) = psutil.Process(parent.process.pid).children()
    parent.stop()
    assert parent.ended() is not None
    while processes.runs(child):
        time.sleep(0.05)


def test_a_service_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "START_SECONDS", 0.3)
    silent = services.Service("silent", [sys.executable, "-c", "import time; time.sleep(60)"], lambda: False, tmp_path / "silent.log", {})
    silent.start(tmp_path)
    with pytest.raises(MindError, match="silent does not answer"):
        silent.wait()
    silent.stop()


def test_a_port_is_the_wanted_one_or_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert services.port("127.0.0.1", None, number) not in (0, number)
        with pytest.raises(ConfigError, match=f"port {number} of 127.0.0.1 cannot be used"):
            services.port("127.0.0.1", number, 4200)
    assert services.port("127.0.0.1", None, number) == number
    with pytest.raises(ConfigError, match="an address of this machine"):
        services.port("192.0.2.1", None, 4200)


def test_an_address_for_everybody_wants_a_name() -> None:
    with pytest.raises(ConfigError, match="--allow NAME"):
        services.public_name("0.0.0.0", ())
    names = [services.public_name(*given) for given in (("0.0.0.0", ("mind.example",)), ("10.0.0.5", ()), ("::1", ()))]
    assert names == ["mind.example", "10.0.0.5", "[::1]"]


def test_deployments_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    (tmp_path / "prefect.yaml").write_text("deployments: [{name: full, entrypoint: flows.absent.flow, work_pool: {name: mind}}]\n")
    nowhere = services.environment(Workspace(tmp_path), "http://127.0.0.1:9/api")
    with pytest.raises(MindError, match=r"prefect.yaml cannot be deployed"):
        services.deploy(Workspace(tmp_path), nowhere, tmp_path / "deploy.log")


def test_a_workspace_without_deployments_says_where_to_get_them(tmp_path: Path) -> None:
    from mind.params import validate

    with pytest.raises(ConfigError, match="no prefect.yaml"):
        services.up(Workspace(tmp_path), validate({}), host="127.0.0.1", prefect_port=0, mlflow_port=0, allow=())


def test_the_kept_schema_is_that_of_the_installed_prefect(tmp_path: Path) -> None:
    import prefect
    from alembic.script import ScriptDirectory

    migrations = Path(prefect.__file__).parent / "server" / "database" / "_migrations"
    head = ScriptDirectory(migrations, version_locations=[migrations / "versions" / "sqlite"]).get_current_head()
    assert prefect_store.revision() == head, "run `python -m mind.prefect_store`"
    prefect_store.prepare(tmp_path)
    before = (tmp_path / "prefect.db").stat().st_ino
    prefect_store.prepare(tmp_path)  # never replaces a database
    assert (tmp_path / "prefect.db").stat().st_ino == before


def test_a_temporary_server_ends_with_its_run_also_by_kill_9(tmp_path: Path) -> None:
    code = (
        "import os, time; from pathlib import Path; from mind import services; from mind.workspace import Workspace\n"
        f"with services.temporary(Workspace(Path({str(tmp_path)!r}))) as server:\n"
        "    server.wait(); print(server.process.pid, os.environ['PREFECT_API_URL'], flush=True); time.sleep(60)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    pid, api = run.stdout.readline().split()
    assert httpx.get(f"{api}/health").status_code == 200
    assert httpx.get(f"{api}/health", headers={"Host": "evil.example"}).status_code == 400
    server = psutil.Process(int(pid))
    run.kill()
    run.wait()
    server.wait(timeout=20)
