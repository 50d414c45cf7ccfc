"""What tracking costs: opening a run (cold, warm) and storing points, ours beside MLflow's own calls. `python bench/tracking.py [STEPS]`.

30 values a step, as a MIND run has, on SQLite in a temporary folder. Seconds are wall time; CPU seconds stand beside them, because
the machine may have other work. One line of JSON a row, then nothing is left behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mind import tracking
from mind.config import Tracking
from mind.workspace import Workspace

KEYS = [f"train/value{i}" for i in range(30)]

OPEN = """
import sys, time
from pathlib import Path
from mind import store, tracking
from mind.config import Tracking
from mind.workspace import Workspace
wall, cpu = time.perf_counter(), time.process_time()
store.library()
imported = time.perf_counter() - wall
with tracking.open_run(Workspace(Path(sys.argv[1])), Tracking(), name="open", fingerprint=sys.argv[2]):
    print(imported, time.perf_counter() - wall, time.process_time() - cpu)
"""


def row(what: str, **numbers: float) -> None:
    print(json.dumps({"what": what, **{name: round(value, 3) for name, value in numbers.items()}}), flush=True)


def opening(folder: Path) -> None:
    """A process that opens its first run, on a fresh database and on one that is there; then further runs of one process."""
    for what in ("fresh database", "existing database", "existing database, again"):
        done = subprocess.run([sys.executable, "-c", OPEN, str(folder), what], check=True, capture_output=True, text=True)
        imported, opened, cpu = map(float, done.stdout.split())
        row(f"open_run in a new process, {what}", seconds=opened, of_it_importing_mlflow=imported, cpu=cpu)
    for number in range(2):  # the first still imports MLflow into this process
        started = time.perf_counter()
        with tracking.open_run(Workspace(folder), Tracking(), name="open", fingerprint=f"here{number}"):
            opened = time.perf_counter() - started
    row("open_run in a process that had one", seconds=opened)


def storing(folder: Path, what: str, steps: int, store: Callable[[Any, Any, int], None]) -> None:
    """Store `steps` steps of 30 values with `store(run, mlflow, step)`; the block's end waits until all is written."""
    mlflow = store.library()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow/mlflow.db")
    started, cpu, in_loop = time.perf_counter(), time.process_time(), 0.0
    with tracking.open_run(Workspace(folder), Tracking(), name=what, fingerprint=what) as run:
        for step in range(steps):
            called = time.perf_counter()
            store(run, mlflow, step)
            in_loop += time.perf_counter() - called
    seconds = time.perf_counter() - started
    points = steps * len(KEYS)
    row(
        what,
        points_per_second=points / seconds,
        ms_a_step=1000 * seconds / steps,
        cpu=time.process_time() - cpu,
        loop_waits_ms_a_step=1000 * in_loop / steps,
    )


def ours(run: Any, mlflow: Any, step: int) -> None:
    run.log(dict.fromkeys(KEYS, step / 7), step)


def log_metrics(run: Any, mlflow: Any, step: int) -> None:
    mlflow.log_metrics(dict.fromkeys(KEYS, step / 7), step=step, run_id=run.id)


def log_metric(run: Any, mlflow: Any, step: int) -> None:
    for key in KEYS:
        mlflow.log_metric(key, step / 7, step=step, run_id=run.id)


def resuming(folder: Path, steps: int) -> None:
    """Log all of a finished run again: nothing is stored twice, and what that check costs."""
    started = time.perf_counter()
    with tracking.open_run(Workspace(folder), Tracking(), name="ours", fingerprint="run.log", resume_finished=True) as run:
        for step in range(steps):
            ours(run, None, step)
    seconds = time.perf_counter() - started
    stored = len(run._client.get_metric_history(run.id, KEYS[0]))
    row("run.log of points that are stored already", points_per_second=steps * len(KEYS) / seconds, stored_a_key=stored)


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opening(folder)
        storing(folder, "run.log", steps, ours)
        resuming(folder, steps)
        storing(folder, "mlflow.log_metrics", steps // 10, log_metrics)
        storing(folder, "mlflow.log_metric", steps // 100, log_metric)


if __name__ == "__main__":
    main()
