"""Students that exist x benchmarks that exist -> what has no result yet is measured, and what changed is shown. On a schedule: nightly.

prefect deployment run reevaluate/nightly   on a server and a worker (`mind up`, prefect.yaml)
mind reevaluate                             the same work without Prefect
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import shown
from flows.main import PATIENT
from mind import memory, reevaluation, registry, versioning
from mind.config import Config
from mind.params import load_config
from mind.reevaluation import Pending, Result
from mind.workspace import Workspace


@task(**PATIENT, task_run_name="{pair}")
def measure(workspace: Path, config: Config, pair: Pending) -> Result:
    """One student on one benchmark; its result is on the student's MLflow run before this returns."""
    try:
        result = reevaluation.evaluate(config, Workspace(workspace), pair)
    except Exception as error:
        if not memory.is_exhausted(error):
            raise
        get_run_logger().warning("%s: out of memory; once more, with half the batch", pair)
        with versioning.environment(memory.SCARCE):
            result = reevaluation.evaluate(config, Workspace(workspace), pair)
    get_run_logger().info("%s", result)
    return result


@flow(name="reevaluate")
def reevaluate(workspace: Path = Path()) -> State[Any]:
    """Measure every student on every benchmark that it has no result for: a new file in benchmarks/, changed questions, a new student.

    Ends in the state `Regression` when a student does worse than before by more than chance, `Failed` when a pair could not be measured.

    Args:
        workspace: the folder with params.yaml.
    """
    here = Workspace.find(workspace)
    config = load_config(here.params)
    versioning.ensure_data(here)
    pairs = reevaluation.pending(config, here)
    if not pairs:
        begun = registry.versions(here, config.tracking)
        return Completed(message="every student has a result on every benchmark" if begun else "no student is registered yet")
    states = [measure(here.root, config, pair, return_state=True) for pair in pairs]
    results = [state.result() for state in states if state.is_completed()]
    if results and shown.watched():
        create_table_artifact(key="reevaluation", table=rows(results), description=f"{len(results)} new results")
    return concluded(len(pairs), results)


def concluded(pairs: int, results: Sequence[Result]) -> State[Any]:
    """The state of a flow that had so many pairs to measure."""
    worse = [f"{result.pending.variant} on {result.pending.benchmark}" for result in results if result.regression]
    told = f"{len(results)} of {pairs} measured" + (f"; worse than before: {', '.join(worse)}" if worse else "")
    if len(results) < pairs:
        return Failed(message=told)
    return Completed(name="Regression" if worse else "Completed", message=told)


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What changed, a row for each result."""
    return [
        {
            "student": result.pending.student,
            "variant": result.pending.variant,
            "benchmark": result.pending.benchmark,
            "questions": result.pending.questions,
            "accuracy %": round(100 * result.new.value, 1),
            "95 % interval": f"{100 * result.new.low:.1f} to {100 * result.new.high:.1f}",
            "before %": round(100 * result.old.value, 1) if result.old else "",
            "": "REGRESSION" if result.regression else "new" if result.old is None else "",
        }
        for result in results
    ]


if __name__ == "__main__":
    reevaluate()
