"""What orchestration costs beyond the work itself, and what kill -9 costs. `python bench/flow.py [--only run,served,kills,scale]`.

A tiny random student and a few questions make the work short, so that what is left is orchestration: Prefect, DVC, MLflow, processes.

    run     the stages as plain processes; `mind run` from nothing; `mind run` again; `mind compare` alone (the work of an all-cached run)
    served  the same flow as a deployment on the servers of `mind up`: cold and cached, `prefect deployment run` to its end
    kills   each stage killed with -9 at ten random points of its progress and tried again: are the outputs those of an unkilled run?
    scale   snapshot, DVC's bookkeeping and tracking for 1k, 10k and 100k questions of eight views

One line of JSON a measurement; wall seconds, and CPU seconds of all processes beside them, because the machine may have other work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from mind import outputs, versioning  # noqa: E402
from mind.records import PERSPECTIVES  # noqa: E402
from mind.teacher.cache import ReplyCache  # noqa: E402
from mind.workspace import Workspace  # noqa: E402
from tests import workspaces  # noqa: E402

STAGES = (("synthesize",), ("snapshot",), ("distill", "--variant", "mind"), ("evaluate", "--variant", "mind"))
TARGETS = ("synthesize", "snapshot", "distill@mind", "evaluate@mind")


def row(what: str, **numbers: object) -> None:
    shown = {name: round(value, 2) if isinstance(value, float) else value for name, value in numbers.items()}
    print(json.dumps({"what": what, **shown}), flush=True)


@contextmanager
def measured(what: str) -> Iterator[dict[str, float]]:
    """Wall seconds, and CPU seconds of this process and the children that have ended."""
    found: dict[str, float] = {}
    wall, cpu = time.perf_counter(), _cpu()
    yield found
    found |= {"seconds": time.perf_counter() - wall, "cpu": _cpu() - cpu}
    row(what, **found)


def _cpu() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def make(folder: Path) -> Workspace:
    """A workspace with a tiny student, nothing run yet."""
    folder.mkdir(parents=True)
    return workspaces.make(folder, {"run": {"variants": ["mind"], "reference": "mind"}, "latent": {"questions": 0}})


def call(workspace: Workspace, *command: str, **more: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=workspace.root, env={**os.environ, "PATH": path, **more}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


# ------------------------------------------------------------------------- run


def run(folder: Path) -> None:
    plain, workspace = make(folder / "plain"), make(folder / "run")
    with measured("the stages as plain processes") as bare:
        for stage in STAGES:
            call(plain, "mind.stages", *stage)
    with measured("mind run, from nothing") as cold:
        call(workspace, "mind.cli", "run")
    with measured("mind run, all cached") as again:
        call(workspace, "mind.cli", "run")
    with measured("mind compare") as compared:
        call(workspace, "mind.cli", "compare", "--picture", "reports/comparison.png")
    row("overhead, cold (target 10)", seconds=cold["seconds"] - bare["seconds"] - compared["seconds"])
    row("overhead, all cached (target 5)", seconds=again["seconds"] - compared["seconds"])


# ---------------------------------------------------------------------- served


def served(folder: Path) -> None:
    plain, workspace = make(folder / "plain"), make(folder / "served")
    with measured("the stages as plain processes") as bare:
        for stage in STAGES:
            call(plain, "mind.stages", *stage)
    started = time.perf_counter()
    with up(workspace) as api:
        row("mind up, until all answer", seconds=time.perf_counter() - started)
        for what, spent in (("cold (target 10)", bare["seconds"]), ("all cached (target 5)", 0.0)):
            with measured(f"prefect deployment run mind/full, {what}"):
                call(workspace, "prefect", "deployment", "run", "mind/full", "--watch", "--watch-interval", "1", PREFECT_API_URL=api)
            row(f"the flow run itself, {what}", seconds=flow_seconds(api) - spent)


@contextmanager
def up(workspace: Workspace) -> Iterator[str]:
    """`mind up` on free ports; gives the address of Prefect's API."""
    command = [sys.executable, "-m", "mind.cli", "up", "--prefect-port", "0", "--mlflow-port", "0"]
    process = subprocess.Popen(command, cwd=workspace.root, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "Ctrl-C stops" in line:
            break
    api = next(line.split("PREFECT_API_URL=")[1].strip() for line in lines if "PREFECT_API_URL=" in line)
    try:
        yield api
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def flow_seconds(api: str) -> float:
    """From start to end of the latest flow run: without the worker's polling and the process's imports."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        latest = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
    return latest.total_run_time.total_seconds()


# ----------------------------------------------------------------------- kills


def kills(folder: Path, points: int, stages: Sequence[str]) -> None:
    """Every stage, killed at random points: its output must be that of the unkilled run, training's history with it."""
    narrow, wide = make(folder / "narrow"), make(folder / "wide")
    asked = {"limit": 24, "max_new_tokens": 32, "batch_tokens": 1024}  # in many batches: one can be killed between two
    workspaces.settings(narrow.root, {"training": {"epochs": 16, "checkpoint_steps": 3}, "evaluation": asked})
    workspaces.settings(wide.root, {"synthesis": {"limit": None}})  # 1,944 calls: long enough to be killed in the middle
    jobs = []
    for whole, line, own in ((wide, TARGETS[:2], TARGETS[:2]), (narrow, TARGETS, TARGETS[2:])):
        wanted = [target for target in own if target in stages]
        for target in line if wanted else ():
            started = time.perf_counter()
            versioning.bring_up_to_date(whole, target)
            if target in wanted:
                jobs.append((whole, target, points, time.perf_counter() - started))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:  # not timed: side by side
        for done in [pool.submit(killed, *job) for job in jobs]:
            done.result()


def killed(whole: Workspace, target: str, points: int, length: float) -> None:
    """One stage of copies of a finished workspace. `length`: the seconds that it took there."""
    shares, wanted, asked = random.Random(target), workspaces.digest(whole, target), requests(whole)
    stage, alike, early, resumed, twice = target.replace("@", "-"), 0, 0, 0.0, []
    for point in range(points):
        workspace = Workspace(whole.root.with_name(f"{stage}-{point}"))
        shutil.copytree(whole.root, workspace.root, symlinks=True)
        workspaces.forget(workspace, target)
        share = shares.random()
        died = workspaces.kill(workspace, target, share, after=share * length if target == "snapshot" else 600)
        started = time.perf_counter()
        versioning.bring_up_to_date(workspace, target, force=True)
        resumed += time.perf_counter() - started
        same, early = workspaces.digest(workspace, target) == wanted, early + (not died)
        alike += same
        if target == "synthesize":
            twice.append(requests(workspace) - asked)
        row("killed", stage=target, point=point, at=died or "ended before", same=same)
        shutil.rmtree(workspace.root)
    bought = {"bought_twice": twice} if twice else {}
    row("all of it", stage=target, points=points, ended_before=early, same=alike, mean_seconds_to_the_end=resumed / points, **bought)


def requests(workspace: Workspace) -> int:
    """Calls that the teacher of a workspace was paid for, and whose replies are kept."""
    with ReplyCache(workspace.replies) as cache:
        return cache.spent().requests


# ----------------------------------------------------------------------- scale


def scale(folder: Path) -> None:
    """What grows with the number of questions, eight views each."""
    for count in (1_000, 10_000, 100_000):
        workspace = make(folder / str(count))
        synthetic(workspace, count)
        with measured(f"snapshot, {count} questions"):
            call(workspace, "mind.stages", "snapshot")
        with measured(f"the dataset's version, {count} questions"):
            versioning.version_of(workspace.dataset)
        with measured(f"dvc: snapshot ran, {count} questions"):
            versioning.bring_up_to_date(workspace, "snapshot", force=True)
        with measured(f"dvc: nothing to do, {count} questions"):
            assert versioning.bring_up_to_date(workspace, "snapshot").state == "up to date"
        shutil.rmtree(workspace.dataset)
        with measured(f"dvc: dataset restored, {count} questions"):
            assert versioning.bring_up_to_date(workspace, "snapshot").state == "restored"
        log_training(workspace, count)
        size = sum(path.stat().st_size for path in workspace.dataset.iterdir())
        row(f"dataset, {count} questions", megabytes=size / 1e6)
        shutil.rmtree(workspace.root)


def log_training(workspace: Workspace, count: int) -> None:
    """The points of one epoch: 30 values every five steps of eight questions."""
    from mind import store, tracking
    from mind.params import load_config

    store.make_store(workspace, load_config(workspace.params).tracking)
    rows = count // 40
    with (
        measured(f"tracking: {rows * 30} points, {count} questions"),
        tracking.open_run(workspace, load_config(workspace.params).tracking, name="mind", fingerprint=str(count)) as tracked,
    ):
        for step in range(rows):
            tracked.log({f"train/value{i}": step / 7 for i in range(30)}, step)


def synthetic(workspace: Workspace, count: int) -> None:
    """rationales/ of `count` questions: rows of the usual length, all accepted."""
    from mind.records import Question, Rationale, write_jsonl

    text = "First we write down what is known, and then we go on step by step until the number that was asked for stands alone. " * 2
    with outputs.stage_output(workspace.rationales) as partial:
        write_jsonl(
            partial / "questions.jsonl", (Question(id=f"q{i}", question=f"What is {i} plus 1?", answer=str(i + 1)) for i in range(count))
        )
        rows = (
            Rationale(question_id=f"q{i}", perspective=p, text=f"{text}{i}", answer=str(i + 1), accepted=True, request=f"{i:064x}")
            for i in range(count)
            for p in PERSPECTIVES
        )
        write_jsonl(partial / "rationales.jsonl", rows)
        write_jsonl(partial / "mistakes.jsonl", ())
        outputs.write_manifest(partial, stage="synthesize", inputs={}, config={}, counts={})


def main() -> None:
    sections: dict[str, Callable[..., None]] = {"run": run, "served": served, "kills": kills, "scale": scale}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(sections), help="sections, separated by commas")
    parser.add_argument("--points", type=int, default=10, help="kills of each stage")
    parser.add_argument("--stages", default=",".join(TARGETS), help="which are killed")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "true"}
    for name in args.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            sections[name](Path(folder) / name, *([args.points, args.stages.split(",")] if name == "kills" else []))


if __name__ == "__main__":
    main()
