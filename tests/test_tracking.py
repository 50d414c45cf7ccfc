"""mind.tracking against a real MLflow on SQLite: what is stored, what is continued, what is lost when the store fails."""

from __future__ import annotations

import http.server
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mind import doctor, registry, store, tracking
from mind.config import Tracking
from mind.errors import MindError, PassingError
from mind.params import validate
from mind.workspace import Workspace

RACE = Tracking(experiment="race")

WORKER = """
import os, signal, sys, time
from pathlib import Path
from mind import tracking
from mind.config import Tracking
from mind.workspace import Workspace

name = sys.argv[2]
with tracking.open_run(Workspace(Path(sys.argv[1])), Tracking(experiment="race"), name=name, fingerprint=name, params={"lr": 1}) as run:
    for step in range(5):
        run.log({"train/loss": step / 10, "metanet/loss": 1.0}, step)
    if name == "killed":
        deadline = time.monotonic() + 120
        while run._client.get_run(run.id).data.metrics.get("train/loss") != 0.4 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="session")
def race(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three processes (this one too) open a fresh database at once, one is killed in its run; the other tests copy what they leave."""
    root = tmp_path_factory.mktemp("race")
    command = [sys.executable, "-c", WORKER, str(root)]
    processes = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for name in ("one", "killed")]
    with tracking.open_run(Workspace(root), RACE, name="here", fingerprint="here") as run:
        for step in range(5):
            run.log({"train/loss": step / 10}, step)
    outputs = [p.communicate(timeout=200)[0].decode() for p in processes]
    return SimpleNamespace(root=root, codes=[p.returncode for p in processes], outputs=outputs)


@pytest.fixture
def workspace(race: SimpleNamespace, tmp_path: Path) -> Workspace:
    """A workspace with a database that exists already (making one takes seconds)."""
    (tmp_path / "mlflow").mkdir()
    shutil.copy(race.root / "mlflow" / "mlflow.db", tmp_path / "mlflow")
    return Workspace(tmp_path)


def client_of(workspace: Workspace) -> Any:
    uri = f"sqlite:///{workspace.root}/mlflow/mlflow.db"
    return store.library().tracking.MlflowClient(uri, uri)


def points(workspace: Workspace, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client_of(workspace).get_metric_history(run_id, key)]


# ------------------------------------------------------------------ processes


def test_three_processes_may_open_a_fresh_database_at_once(race: SimpleNamespace) -> None:
    assert race.codes == [0, -signal.SIGKILL], race.outputs
    for name, status in (("here", "FINISHED"), ("one", "FINISHED"), ("killed", "RUNNING")):
        run_id = registry.find_run(Workspace(race.root), RACE, name)
        assert run_id
        assert client_of(Workspace(race.root)).get_run(run_id).info.status == status
        assert points(Workspace(race.root), run_id, "train/loss") == [(step, step / 10) for step in range(5)]


def test_nothing_is_printed_while_all_goes_well(race: SimpleNamespace) -> None:
    assert race.outputs == ["", ""]


def test_a_killed_run_is_continued_without_storing_a_point_twice(workspace: Workspace) -> None:
    killed = registry.find_run(workspace, RACE, "killed")
    with tracking.open_run(workspace, RACE, name="killed", fingerprint="killed", params={"lr": 2, "epochs": 3}) as run:
        assert run.id == killed
        for step in range(3, 7):
            run.log({"train/loss": step / 10, "train/tokens_per_second": 5.0}, step)
    assert points(workspace, run.id, "train/loss") == [(step, step / 10) for step in range(7)]
    assert len(points(workspace, run.id, "train/tokens_per_second")) == 4
    stored = client_of(workspace).get_run(run.id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"lr": "1", "epochs": "3"}  # a parameter once logged stays


def test_the_database_of_an_overridden_run_is_that_of_its_home(tmp_path: Path) -> None:
    derived = Workspace(tmp_path / ".mind" / "workspaces" / "abc")
    assert store.database_of(derived, Tracking()) == tmp_path / "mlflow" / "mlflow.db"
    assert store.database_of(derived, Tracking(uri="sqlite:////data/runs.db")) == Path("/data/runs.db")
    assert store.database_of(derived, Tracking(uri="http://server:5000")) is None


# ------------------------------------------------------------------------ runs


@pytest.mark.parametrize(("error", "status"), [(None, "FINISHED"), (RuntimeError("boom"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_how_a_run_ends_is_stored_and_its_values_are_kept(workspace: Workspace, error: BaseException | None, status: str) -> None:
    def body() -> None:
        with tracking.open_run(workspace, Tracking(), name="mind", fingerprint="f") as run:
            run.log({"train/loss": 1.5}, 7)
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            body()
    else:
        body()
    run_id = registry.find_run(workspace, Tracking(), "f")
    assert run_id
    assert client_of(workspace).get_run(run_id).info.status == status
    assert points(workspace, run_id, "train/loss") == [(7, 1.5)]


def test_a_finished_run_is_continued_only_when_asked_and_then_new_values_supersede(workspace: Workspace) -> None:
    def evaluate(accuracy: float, *, resume: bool) -> str:
        with tracking.open_run(workspace, Tracking(), name="mind", fingerprint="f", resume_finished=resume) as run:
            run.log({"eval/primer/accuracy": accuracy, "latent/ari": float("nan")}, 0)
        return run.id

    first = evaluate(0.5, resume=False)
    assert evaluate(0.5, resume=True) == first  # equal: nothing new
    assert len(points(workspace, first, "eval/primer/accuracy")) == len(points(workspace, first, "latent/ari")) == 1
    assert evaluate(0.4, resume=True) == first
    assert client_of(workspace).get_run(first).data.metrics["eval/primer/accuracy"] == 0.4
    second = evaluate(0.5, resume=False)
    assert second != first
    assert registry.find_run(workspace, Tracking(), "f") == second
    assert registry.find_run(workspace, Tracking(), "another") is None


def test_the_doctor_counts_the_runs(race: SimpleNamespace) -> None:
    (check,) = doctor._tracking(validate({}), Workspace(race.root))
    assert check.ok and check.found.endswith(": 3 runs")


def test_looking_for_a_run_makes_no_database(tmp_path: Path) -> None:
    assert registry.find_run(Workspace(tmp_path), Tracking(), "f") is None
    assert not list(tmp_path.iterdir())


def test_a_run_says_where_it_came_from(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(workspace.root), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "flow-7")
    digest = "0123456789abcdef0123456789abcdef.dir"
    with tracking.open_run(workspace, Tracking(), name="sbs", fingerprint="f", tags={"mind.method": "sbs"}, dataset_digest=digest) as run:
        pass
    tags = client_of(workspace).get_run(run.id).data.tags
    wanted = {"mind.variant": "sbs", "mind.method": "sbs", "mind.fingerprint": "f", "mind.dataset": digest, "mind.git_commit": commit}
    assert {**tags, **wanted, "prefect.flow_run": "flow-7", "mlflow.runName": "sbs"} == tags
    experiment = client_of(workspace).get_experiment_by_name("mind").experiment_id
    assert [r.info.run_id for r in client_of(workspace).search_runs([experiment], f"dataset.digest = '{digest}'")] == [run.id]


def test_unknown_origins_are_left_out(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT__FLOW_RUN_ID", "MIND_FLOW_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(workspace.root.parent))
    with tracking.open_run(workspace, Tracking(), name="base", fingerprint="f") as run:
        pass
    stored = client_of(workspace).get_run(run.id)
    assert not {"mind.git_commit", "mind.dataset", "prefect.flow_run"} & set(stored.data.tags)
    assert not stored.inputs.dataset_inputs


def test_parameters_are_stored_as_json_and_cut_to_what_mlflow_takes(workspace: Workspace) -> None:
    many = {f"group.key{i}": i for i in range(150)}
    odd = {"none": None, "flag": True, "list": [1, "a"], "text": "x", "long": "y" * 9000, "prices.a/b@c": 1.5}
    with tracking.open_run(workspace, Tracking(), name="mind", fingerprint="f", params={**many, **odd}) as run:
        pass
    params = client_of(workspace).get_run(run.id).data.params
    assert len(params) == 156
    assert params["none"], params["flag"] == ("null", "true")
    assert params["list"] == '[1, "a"]'
    assert params["text"] == "x"
    assert params["prices.a/b_c"] == "1.5"
    assert params["long"] == "y" * 5999 + "…"


def test_a_metric_name_that_mlflow_refuses_is_refused_at_once(workspace: Workspace) -> None:
    with tracking.open_run(workspace, Tracking(), name="mind", fingerprint="f") as run:
        for name in ("a=b", "a//b", "../a", ".", "", "k" * 251):
            with pytest.raises(ValueError, match="metric name"):
                run.log({name: 1.0}, 0)


@settings(max_examples=50)
@given(st.text(min_size=1, max_size=300), st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=50), st.lists(st.integers())))
def test_every_parameter_passes_mlflows_own_check(key: str, value: object) -> None:
    from mlflow.utils.validation import _validate_param

    _validate_param(tracking._param_key(key), tracking._param_text(value))


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_every_variant_name_gives_an_alias_that_mlflow_takes(variant: str) -> None:
    from mlflow.utils.validation import _validate_model_alias_name, _validate_model_alias_name_reserved

    alias = tracking._registry_alias(variant)
    _validate_model_alias_name(alias)
    _validate_model_alias_name_reserved(alias)


# ------------------------------------------------------------------- artifacts


def test_figures_files_and_folders_arrive(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "curve.png").write_bytes(b"png")
    (folder / "a.json").write_text("{}")
    with tracking.open_run(workspace, Tracking(), name="mind", fingerprint="f") as run:
        run.figure(folder / "curve.png")
        run.artifact(folder / "a.json")
        run.artifact(folder, "all")
    root = next((workspace.root / "mlflow" / "artifacts").glob(f"**/{run.id}/artifacts"))
    assert sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()) == [
        "a.json",
        "all/a.json",
        "all/curve.png",
        "figures/curve.png",
    ]


@pytest.fixture
def student(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(os.urandom(200_000))
    (folder / "manifest.json").write_text('{"stage": "distill"}')
    return folder


def test_a_registered_student_comes_back_bit_by_bit(workspace: Workspace, student: Path, tmp_path: Path) -> None:
    with tracking.open_run(workspace, Tracking(), name="v2", fingerprint="f") as run:
        address = run.register(student, "mind-org/smollm2:135m", "v2")
    assert address == "models:/mind-org-smollm2-135m@variant-v2"
    mlflow = store.library()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{workspace.root}/mlflow/mlflow.db")  # as a user does, by MLFLOW_TRACKING_URI
    try:
        back = Path(mlflow.artifacts.download_artifacts(address, dst_path=str(tmp_path / "back")))
    finally:
        mlflow.set_tracking_uri(before)
    for path in ("adapter/adapter_model.safetensors", "manifest.json"):
        assert (back / path).read_bytes() == (student / path).read_bytes()
    outputs = client_of(workspace).get_run(run.id).outputs.model_outputs
    assert client_of(workspace).get_logged_model(outputs[0].model_id).status == "READY"


def test_the_same_student_is_no_second_version_and_an_alias_follows_its_student(workspace: Workspace, student: Path) -> None:
    client = client_of(workspace)
    with tracking.open_run(workspace, Tracking(), name="mind", fingerprint="f") as run:
        run.register(student, "mind-smol", "mind")
        run.register(student, "mind-smol", "sbs")
        assert client.get_registered_model("mind-smol").aliases == {"mind": 1, "sbs": 1}
        (student / "manifest.json").write_text('{"stage": "another"}')
        run.register(student, "mind-smol", "mind")
    assert client.get_registered_model("mind-smol").aliases == {"mind": 2, "sbs": 1}
    assert len(client.search_model_versions("name = 'mind-smol'")) == 2


# ------------------------------------------------------------------ the writer


def some_points(count: int) -> list[tracking.Point]:
    return [tracking.Point("k", float(i), i, i) for i in range(count)]


@given(st.lists(st.booleans(), max_size=6), st.lists(st.integers(0, 40), max_size=8))
def test_whatever_fails_every_point_is_sent_once_and_in_order(failures: list[bool], sizes: list[int]) -> None:
    """The law of the writer, for any pattern of failing calls."""
    sent: list[tracking.Point] = []
    plan = iter(failures)

    def send(batch: list[tracking.Point]) -> None:
        assert len(batch) <= 7
        if next(plan, False):
            raise OSError("down")
        sent.extend(batch)

    wanted = some_points(sum(sizes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "BATCH", 7)
        patch.setattr(tracking, "FLUSH_SECONDS", 0.001)
        patch.setattr(tracking, "LAST_TRIES_SECONDS", 0.001)
        patch.setattr(tracking, "MAX_BACKOFF", 0.002)
        patch.setattr(store, "say", lambda text: None)
        writer = tracking._Writer(send)
        start = 0
        for size in sizes:
            writer.put(wanted[start : start + size])
            start += size
        assert writer.close() == 0
    assert sent == wanted


def test_a_store_that_hangs_does_not_hold_up_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.01)
    hold = threading.Event()
    writer = tracking._Writer(lambda batch: hold.wait(30) and None)
    started = time.monotonic()
    for point in some_points(5000):
        writer.put([point])
    assert time.monotonic() - started < 2
    hold.set()
    assert writer.close() == 0


def test_what_waits_is_bounded_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "MAX_WAITING", 50)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.0)
    monkeypatch.setattr(tracking, "LAST_TRIES_SECONDS", 0.01)
    said: list[str] = []
    monkeypatch.setattr(store, "say", said.append)

    def down(batch: list[tracking.Point]) -> None:
        raise OSError("down")

    writer = tracking._Writer(down)
    writer.put(some_points(80))
    assert [p.step for p in writer._waiting] == list(range(30, 80))
    assert writer.close() == 80
    assert len(said) == 1


def test_values_are_stored_while_the_run_is_open(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.05)
    with tracking.open_run(workspace, Tracking(), name="mind", fingerprint="f") as run:
        run.log({"train/loss": 1.0}, 1)
        deadline = time.monotonic() + 20
        while not points(workspace, run.id, "train/loss") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert points(workspace, run.id, "train/loss") == [(1, 1.0)]


# --------------------------------------------------------------- failing stores


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(store, "say", lines.append)
    for name, value in (("FLUSH_SECONDS", 0.05), ("LAST_TRIES_SECONDS", 0.05), ("CLOSE_SECONDS", 0.2), ("RETRY_SECONDS", (0.01,))):
        monkeypatch.setattr(tracking, name, value)
    return lines


def sql(workspace: Workspace, command: str) -> None:
    with closing(sqlite3.connect(workspace.root / "mlflow" / "mlflow.db", timeout=20)) as database, database:
        database.execute(command)


def wait_for(said: list[str], text: str) -> None:
    deadline = time.monotonic() + 20
    while not any(text in line for line in said) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert any(text in line for line in said), said


def test_a_store_that_fails_for_a_while_loses_nothing(workspace: Workspace, said: list[str]) -> None:
    with tracking.open_run(workspace, Tracking(), name="mind", fingerprint="f") as run:
        sql(workspace, "ALTER TABLE metrics RENAME TO gone")
        for step in range(20):
            run.log({"train/loss": step / 4}, step)
        wait_for(said, "does not answer")
        sql(workspace, "ALTER TABLE gone RENAME TO metrics")
        wait_for(said, "answers again")
    assert points(workspace, run.id, "train/loss") == [(step, step / 4) for step in range(20)]
    assert len(said) == 2


def test_a_store_that_fails_for_good_ends_no_run_and_the_loss_is_said(workspace: Workspace, said: list[str], student: Path) -> None:
    with tracking.open_run(workspace, Tracking(), name="mind", fingerprint="f") as run:
        sql(workspace, "ALTER TABLE metrics RENAME TO gone")
        sql(workspace, "ALTER TABLE registered_models RENAME TO gone_too")
        run.log({"a": 1.0, "b": 2.0}, 0)
        wait_for(said, "does not answer")
        assert run.register(student, "mind-smol", "mind") is None
        run.figure(workspace.root / "missing.png")
    assert f"not stored in run {run.id}: 2 points, model mind-smol@mind, artifact missing.png" in said[-1]


def test_a_server_that_does_not_answer_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with (
        pytest.raises(PassingError, match="start the server"),
        tracking.open_run(Workspace(tmp_path), Tracking(uri="http://127.0.0.1:9"), name="mind", fingerprint="f"),
    ):
        pass


@pytest.fixture
def refusing_server() -> Iterator[str]:
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_wants_credentials_is_no_passing_failure(tmp_path: Path, refusing_server: str) -> None:
    with pytest.raises(MindError, match="MLFLOW_TRACKING_TOKEN") as caught:
        registry.find_run(Workspace(tmp_path), Tracking(uri=refusing_server), "f")
    assert not isinstance(caught.value, PassingError)


@pytest.mark.parametrize(
    ("damage", "advice"),
    [
        ("UPDATE alembic_version SET version_num = '451aebb31d03'", "mlflow db upgrade"),
        ("UPDATE experiments SET lifecycle_stage = 'deleted'", "mlflow experiments restore"),
    ],
)
def test_a_database_that_cannot_be_used_says_how_to_mend_it(workspace: Workspace, damage: str, advice: str) -> None:
    sql(workspace, damage)
    with pytest.raises(MindError, match=advice):
        registry.find_run(workspace, RACE, "one")


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"hello" * 1000)
    with pytest.raises(MindError, match=r"mlflow\.db cannot be used"):
        registry.find_run(Workspace(tmp_path), Tracking(), "f")


# ------------------------------------------------------------------------ doors


@pytest.mark.parametrize("uri", ["mlruns", "file:./mlruns", "postgresql://host/db", "sqlite://", "http://user:secret@host", "https://"])
def test_an_address_that_cannot_be_a_store_is_refused(uri: str) -> None:
    with pytest.raises(ValidationError):
        Tracking(uri=uri)


def test_the_hint_opens_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hint = store.ui_hint(Workspace(tmp_path), Tracking())
    assert hint.endswith("mlflow server --workers 1 --backend-store-uri sqlite:///mlflow/mlflow.db")
    elsewhere = store.ui_hint(Workspace(tmp_path / "a b"), Tracking())
    assert elsewhere.endswith("'sqlite:///a b/mlflow/mlflow.db'")
    assert store.ui_hint(Workspace(Path("/far")), Tracking()).endswith(" sqlite:////far/mlflow/mlflow.db")
    assert store.ui_hint(Workspace(tmp_path), Tracking(uri="http://server:5000")) == "http://server:5000"
