"""The flow's task around a stage: what is tried again and how, what is shown, and that no stage outlives who started it.

The stage is a script in a real DVC repository; it does what its line in params.yaml says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.logging import disable_run_logger
from prefect.states import Failed

from flows import main, reevaluate, shown
from mind import memory, processes, versioning
from mind.errors import EXIT_MEMORY, EXIT_PASSING, OutOfMemoryError, PassingError, StageError
from mind.methods.table import build
from mind.params import validate
from mind.reevaluation import Accuracy, Pending, Result
from mind.statistics import wilson
from mind.training.loop import train
from mind.workspace import Workspace
from tests import tiny

STAGE = """import os, pathlib, signal, sys, time
trace = pathlib.Path(os.environ["MIND_STAGE_RAN"]); trace.touch()
do = [line for line in open("params.yaml") if line.startswith("do:")][0].split(":")[1].strip()
with open("calls", "a") as calls: calls.write(os.environ.get("MIND_MEMORY", "plenty") + "\\n")
if do == "hungry" and "MIND_MEMORY" not in os.environ: trace.write_text("out of memory: 3 GiB"); sys.exit(71)
if do == "killed" and "MIND_MEMORY" not in os.environ: os.kill(os.getpid(), signal.SIGKILL)
if do == "starving": sys.exit(71)
if do == "wrong": trace.write_text("row 7 has no answer"); sys.exit(2)
if do == "busy": sys.exit(75)
if do == "long":
    def stop(*_): pathlib.Path("saved").touch(); sys.exit(130)
    signal.signal(signal.SIGTERM, stop)
    pathlib.Path("began").touch()
    time.sleep(60)
pathlib.Path("dataset").mkdir(); pathlib.Path("dataset/content").write_text(do if do != "killed" else "hungry")
"""
PIPELINE = "stages: {snapshot: {cmd: python stage.py, deps: [stage.py], params: [do], outs: [dataset]}}\n"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    return Workspace(tmp_path)


def bring(workspace: Workspace, do: str) -> Any:
    workspace.params.write_text(f"do: {do}\n")
    with disable_run_logger():
        return main.bring_up_to_date.fn(workspace.root, "snapshot")


def calls(workspace: Workspace) -> list[str]:
    return (workspace.root / "calls").read_text().split()


@pytest.mark.parametrize("do", ["hungry", "killed"])
def test_out_of_memory_is_met_once_with_half_the_batch(workspace: Workspace, do: str) -> None:
    assert bring(workspace, do).message == "ran"
    assert calls(workspace) == ["plenty", "scarce"]
    assert (workspace.dataset / "content").read_text() == "hungry"
    assert bring(workspace, do).name == "Cached"  # half the batch is no other result


def test_out_of_memory_with_half_the_batch_is_a_failure(workspace: Workspace) -> None:
    with pytest.raises(StageError) as caught:
        bring(workspace, "starving")
    assert calls(workspace) == ["plenty", "scarce"] and caught.value.exit_code == EXIT_MEMORY


def test_bad_input_is_not_tried_again_and_its_reason_travels(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StageError) as caught:
        bring(workspace, "wrong")
    assert calls(workspace) == ["plenty"]
    assert caught.value.reason == "row 7 has no answer" and caught.value.exit_code == 2


def test_only_what_may_pass_by_itself_is_retried(workspace: Workspace) -> None:
    def again(error: Exception) -> bool:
        return main.may_pass_by_itself(main.bring_up_to_date, None, Failed(data=error))  # type: ignore[arg-type]

    assert again(PassingError("overloaded")) and again(StageError("x", exit_code=EXIT_PASSING))
    assert not any(
        again(e) for e in (StageError("x", exit_code=2), StageError("x", exit_code=EXIT_MEMORY), ValueError("x"), TimeoutError())
    )
    assert main.bring_up_to_date.retries == 3 and main.bring_up_to_date.retry_delay_seconds == [10, 60, 300]


def test_a_stage_ends_with_the_flow_that_started_it_and_saves_its_state(workspace: Workspace) -> None:
    workspace.params.write_text("do: long\n")
    code = f"import signal; from pathlib import Path; from mind import versioning; from mind.workspace import Workspace\ndef stop(*_): raise SystemExit(9)\nsignal.signal(signal.SIGTERM, stop)\nversioning.bring_up_to_date(Workspace(Path({str(workspace.root)!r})), 'snapshot')"
    flow = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: (workspace.root / "began").exists())
    stages = psutil.Process(flow.pid).children(recursive=True)
    flow.send_signal(signal.SIGTERM)
    assert flow.wait(timeout=20) == 9
    assert stages and not any(map(processes.runs, stages))
    assert (workspace.root / "saved").exists() and not workspace.dataset.exists()
    assert bring(workspace, "short").message == "ran"  # the killed run's lock is in nobody's way


def test_a_time_limit_ends_the_stage(workspace: Workspace) -> None:
    workspace.params.write_text("do: long\n")

    def over(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, 4)
    try:
        with pytest.raises(TimeoutError):
            versioning.bring_up_to_date(workspace, "snapshot")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (workspace.root / "saved").exists()


def test_two_runs_in_one_workspace_do_not_mix(workspace: Workspace) -> None:
    workspace.params.write_text("do: long\n")
    code = f"from pathlib import Path; from mind import versioning; from mind.workspace import Workspace\nversioning.bring_up_to_date(Workspace(Path({str(workspace.root)!r})), 'snapshot')"
    first = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        until(lambda: (workspace.root / "began").exists())
        with pytest.raises(PassingError, match=rf"another run works in .*PID {first.pid}"):
            bring(workspace, "long")
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


def until(holds: Any, seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.05)


# ----------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("questions", "accumulation", "smaller"), [(8, 1, (4, 2)), (3, 2, (1, 6)), (6, 2, (3, 4)), (1, 4, (1, 4))], ids=str
)
def test_half_the_batch_makes_the_same_steps(
    questions: int, accumulation: int, smaller: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = validate({"training": {"questions_per_step": questions, "accumulation": accumulation}})
    resolved = config.variant("mind")
    assert memory.frugal(resolved) == resolved and memory.portion(1000) == 1000
    monkeypatch.setenv("MIND_MEMORY", "scarce")
    options = memory.frugal(resolved).training
    assert (options.questions_per_step, options.accumulation) == smaller
    assert options.questions_per_step * options.accumulation == questions * accumulation
    assert options.gradient_checkpointing == (questions == 1)
    assert memory.portion(1000) == 500 and memory.portion(1) == 1


def test_used_up_memory_is_known_by_its_many_names() -> None:
    class OutOfMemoryError_(RuntimeError):
        pass

    OutOfMemoryError_.__name__ = "OutOfMemoryError"
    torchs = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    )
    exhausted = [
        MemoryError(),
        OutOfMemoryError_("CUDA"),
        torchs,
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUDA error: out of memory"),
    ]
    assert all(map(memory.is_exhausted, exhausted))
    assert not any(map(memory.is_exhausted, [RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(2, "No such file")]))
    assert isinstance(memory.explained(MemoryError()), OutOfMemoryError) and "batch_tokens" in str(memory.explained(MemoryError()))


@pytest.mark.parametrize("questions", [1, 4])
def test_half_the_batch_trains_the_same_student(questions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another order of additions: up to rounding."""
    metanet = {"width": 16, "heads": 2, "warmup_epochs": 2}
    settings = validate(
        {
            "training": {"questions_per_step": questions, "log_steps": 1},
            "variants": {"mind": {"method": "mind", "metanet": metanet}},
            "run": {"variants": ["mind"], "reference": "mind"},
        }
    ).variant("mind")

    def losses() -> list[float]:
        trained = train(tiny.load(), settings, tiny.examples(4), build)
        return [row["train/loss"] for row in trained.history]

    plenty = losses()
    monkeypatch.setenv("MIND_MEMORY", "scarce")
    assert losses() == pytest.approx(plenty, rel=1e-4)
    assert len(plenty) == 4 // questions


# ------------------------------------------------------------------------ shown


def test_names_of_artifacts_are_what_prefect_takes(workspace: Workspace) -> None:
    derived = Workspace(workspace.root / ".mind" / "workspaces" / "0123abcd")
    assert shown.key("distill@no-Fusion_2") == "distill-no-fusion-2"
    assert shown.key("comparison", workspace) == "comparison" and shown.key("comparison", derived) == "comparison-0123abcd"


def test_the_stages_stand_in_the_order_in_which_they_feed_each_other() -> None:
    assert versioning.stage_targets(("a", "b")) == ["synthesize", "snapshot", "distill@a", "evaluate@a", "distill@b", "evaluate@b"]


# ------------------------------------------------------------------- reevaluate


def result(variant: str, correct: int, before: int | None) -> Result:
    def accuracy(right: int) -> Accuracy:
        return Accuracy(right / 100, *wilson(right, 100), right, 100)

    pair = Pending(variant, "mind-tiny@1", "dozens", "d" * 64, 100, "f", None)
    return Result(pair, accuracy(correct), None if before is None else accuracy(before))


def test_a_regression_is_marked_in_the_table_and_in_the_state() -> None:
    results = [result("mind", 40, 80), result("base", 78, 80), result("sbs", 10, None)]
    assert [row[""] for row in reevaluate.rows(results)] == ["REGRESSION", "", "new"]
    state = reevaluate.concluded(3, results)
    assert (state.name, state.message) == ("Regression", "3 of 3 measured; worse than before: mind on dozens")
    assert reevaluate.concluded(2, results[1:]).name == "Completed"


def test_a_pair_that_could_not_be_measured_fails_the_flow_and_keeps_the_others() -> None:
    state = reevaluate.concluded(3, [result("base", 78, 80)])
    assert state.is_failed() and state.message == "1 of 3 measured"
