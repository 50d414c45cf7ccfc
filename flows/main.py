"""The line as a Prefect flow: synthesize -> snapshot -> (distill -> evaluate) for each variant.

Prefect decides when and where, retries what may pass by itself, and shows what happened. It does not think and does not cache:
a task brings its stage up to date through DVC and returns the state `Cached` when nothing had to run, so the flow and
`dvc repro` can never disagree.

    mind run                                    in this process, no server needed
    prefect deployment run mind/full            on a server and a worker (`mind up`, prefect.yaml)
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task

from flows import shown
from flows.parallel import resources, runner
from mind import doctor, memory, versioning
from mind.config import Parallel
from mind.errors import EXIT_MEMORY, EXIT_PASSING, PassingError, StageError
from mind.params import load_config, nest
from mind.workspace import Workspace

OUT_OF_MEMORY = (EXIT_MEMORY, 128 + signal.SIGKILL)
"""What a stage ends with when it notices that memory is used up, and when the system does."""


def may_pass_by_itself(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Only what can be different next time is tried again: never bad input, a bad key or a fault in the code."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, PassingError) or (isinstance(error, StageError) and error.exit_code == EXIT_PASSING)


PATIENT: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [10, 60, 300],
    "retry_jitter_factor": 0.3,
    "retry_condition_fn": may_pass_by_itself,
    "cache_policy": NO_CACHE,
}
"""A task that is tried again; what is done already it knows from the workspace, not from Prefect."""


@task(**PATIENT, task_run_name="{target}")
def bring_up_to_date(workspace: Path, target: str, force: bool = False) -> State[None]:
    """One stage of the workspace, by content: runs, is restored from DVC's cache, or has nothing to do.

    A stage that ran out of memory is run once more with half the batch; it goes on from its checkpoint.
    """
    log, here = get_run_logger(), Workspace(workspace)
    with shown.progress(target) as environment:
        if runtime.flow_run.id:  # a stage is a process; its MLflow run names the flow run it belongs to
            environment = {**environment, "MIND_FLOW_RUN": str(runtime.flow_run.root_flow_run_id)}
        try:
            outcome = versioning.bring_up_to_date(here, target, force=force, variables=environment)
        except StageError as error:
            log.error("%s: %s", target, error.reason)
            if error.exit_code not in OUT_OF_MEMORY:
                raise
            log.warning("%s: once more, with half the batch", target)
            outcome = versioning.bring_up_to_date(here, target, force=force, variables={**environment, **memory.SCARCE})
    return Completed(name="Cached" if outcome.cached else "Completed", message=outcome.state)


def _run_name() -> str:
    """'mind base,mind training.epochs=1': what ran, in a list of runs."""
    given = runtime.flow_run.parameters
    variants = ",".join(given.get("variants") or [])
    changed = (f"{key}={value}" for key, value in (given.get("set") or {}).items())
    return " ".join(["mind", *filter(None, [variants, *changed]), *(["forced"] if given.get("force") else [])])


@flow(name="mind", flow_run_name=_run_name)
def mind(
    workspace: Path = Path(),
    variants: list[str] | None = None,
    set: dict[str, Any] | None = None,
    force: bool = False,
    stage_hours: float | None = None,
) -> dict[str, str]:
    """Bring the whole line up to date.

    Args:
        workspace: the folder with params.yaml.
        variants: which ones, in place of run.variants.
        set: settings in place of those in params.yaml, by dotted path: these runs get a workspace of their own.
        force: run every stage even where nothing has changed.
        stage_hours: the longest that one stage may take; it is stopped then, and goes on from its saved state in the next run.

    Returns:
        Stage -> "ran", "restored" or "up to date".
    """
    overrides = nest({**(set or {}), **({"run.variants": variants} if variants else {})})
    here = versioning.derive(Workspace.find(workspace), overrides)
    config = load_config(here.params)
    doctor.preflight(config, here)
    versioning.ensure_data(here)
    targets, parallel = versioning.stage_targets(config.run.variants), config.run.parallel
    if parallel.engine == "none":
        states = one_after_another(here.root, targets, force, stage_hours)
    else:
        states = one_after_another(here.root, targets[:2], force, stage_hours)
        states |= side_by_side.with_options(task_runner=runner(parallel))(here.root, targets[2:], parallel, force, stage_hours)
    shown.results(here, config)
    return states


def one_after_another(workspace: Path, targets: list[str], force: bool, hours: float | None) -> dict[str, str]:
    """Stage -> what became of it; the first failure ends it."""
    # a task that returns a state hands that state to its caller
    return {target: str(_limited(hours)(workspace, target, force).message) for target in targets}


@flow(name="variants", flow_run_name="variants side by side")
def side_by_side(workspace: Path, targets: list[str], parallel: Parallel, force: bool, hours: float | None) -> dict[str, str]:
    """The same at the same time; the stages of a variant keep their order, and a variant that fails does not stop the others."""
    futures: dict[str, Any] = {}
    before: dict[str, Any] = {}
    with resources(parallel):
        # all trainings first: on Ray a task that waits for another holds its card meanwhile
        for target in sorted(targets, key=lambda target: target.startswith("evaluate@")):
            variant = target.partition("@")[2]
            after = [before[variant]] if variant in before else []
            futures[target] = before[variant] = _limited(hours).submit(workspace, target, force, wait_for=after)
    for future in futures.values():
        future.wait()
    for future in futures.values():
        future.result()  # raises what failed first
    return {target: str(futures[target].state.message) for target in targets}


def _limited(hours: float | None) -> Any:
    """The task, with a time limit where one was asked for."""
    return bring_up_to_date.with_options(timeout_seconds=3600 * hours) if hours else bring_up_to_date


if __name__ == "__main__":
    mind()
